"""What one step's exchange costs, measured the same way for every method."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.futures import Future

from netsenseml.agent.protocol import monotonic_s
from netsenseml.exchange.collectives import all_reduce_bytes
from netsenseml.sensing.tcp import TcpSample


class BackwardCosts(NamedTuple):
    """What one backward has cost; the columns of ``Ledger``."""

    comm_s: float
    window_s: float
    encode_s: float
    flight_s: float
    payload_bytes: int
    hops: int
    ready_s: list[float]
    bucket_elements: list[int]


class Ledger:
    """Account of one step: bytes, elements and times of all its buckets.

    A method calls ``coding`` around its encoding and sends every collective by ``launch``; the session does the rest.
    Callbacks of collectives run on threads of the process group, hence the lock.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.began_s = monotonic_s()
        """When the step began, CLOCK_MONOTONIC seconds."""
        self.scheme = ""
        self.payload_bytes = 0
        self.elements = 0
        self.elements_sent = 0
        self.encode_s = 0.0
        self.comm_s = 0.0
        """Exposed communication: from the last gradient being ready to the last bucket being exchanged, and before that
        the time that backward waited in the hook."""
        self.window_s = 0.0
        """Compute that preceded the exchange: from the last exchange (or the beginning) to the last gradient."""
        self.ready_s: list[float] = []
        """When the gradients of each bucket were ready."""
        self.bucket_elements: list[int] = []
        self._energy = self._lost = 0.0
        self._coded = False
        self.tcp: TcpSample | None = None
        """What the kernel saw of the connections since it was asked before."""
        self.hops = 0
        """One-way delays that all collectives pass, one after another."""
        self.flight_s = 0.0
        """Time in which at least one collective was under way."""
        self._lock = threading.Lock()
        self._in_flight = 0
        self._in_flight_since = 0.0
        self._before = self._costs()

    def begin_backward(self) -> None:
        """From here on ``of_backward`` counts; a step may have several backwards that synchronise."""
        self._before = self._costs()

    def of_backward(self) -> BackwardCosts:
        """What the newest backward has cost."""
        before, buckets = self._before, len(self._before.ready_s)
        return BackwardCosts(
            self.comm_s - before.comm_s,
            self.window_s - before.window_s,
            self.encode_s - before.encode_s,
            self.flight_s - before.flight_s,
            self.payload_bytes - before.payload_bytes,
            self.hops - before.hops,
            self.ready_s[buckets:],
            self.bucket_elements[buckets:],
        )

    def _costs(self) -> BackwardCosts:
        return BackwardCosts(
            *(self.comm_s, self.window_s, self.encode_s, self.flight_s, self.payload_bytes, self.hops),
            self.ready_s.copy(),
            self.bucket_elements.copy(),
        )

    @contextmanager
    def coding(self) -> Iterator[None]:
        """Count the time spent inside as encoding or decoding."""
        began = monotonic_s()
        try:
            yield
        finally:
            with self._lock:
                self.encode_s += monotonic_s() - began

    def launch(
        self,
        collective: Callable[[], Future[torch.Tensor]],
        *,
        payload_bytes: float,
        hops: int,
        elements: int = 0,
    ) -> Future[torch.Tensor]:
        """Launch a collective and account for it; the returned future holds its result.

        payload_bytes: what this rank sends for it by the collective's cost formula. hops: one-way delays that it passes.
        elements: gradient elements of this rank in the payload.
        """
        with self._lock:
            self.payload_bytes += round(payload_bytes)
            self.hops += hops
            self.elements_sent += elements
            if not self._in_flight:
                self._in_flight_since = monotonic_s()
            self._in_flight += 1

        # Another future, as nothing else makes sure that this comes before what others do with the result.
        return collective().then(self._landed)

    def _landed(self, done: Future[torch.Tensor]) -> torch.Tensor:
        with self._lock:
            self._in_flight -= 1
            if not self._in_flight:
                self.flight_s += monotonic_s() - self._in_flight_since
        return done.value()

    def lose(self, share: float, energy: float) -> None:
        """Note for a bucket what share of its energy, the sum of squares of what was to be sent, was not sent."""
        with self._lock:
            self._coded = True
            self._energy += energy
            self._lost += share * energy

    @property
    def lost_energy(self) -> float | None:
        """Share of the energy of all buckets that was not sent; None if the method does not tell."""
        return (self._lost / self._energy if self._energy else 0.0) if self._coded else None

    @property
    def dense_bytes(self) -> int:
        """Bytes that a ring all-reduce of the same gradients in float32 would send from this rank."""
        return round(all_reduce_bytes(4 * self.elements, self.ranks))

    @property
    def ratio(self) -> float:
        """Share of the gradient elements that were sent."""
        return self.elements_sent / self.elements if self.elements else 1.0
