"""What one step's exchange costs, measured the same way for every method."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch.futures import Future

from netsenseml.clock import Clock, Mark
from netsenseml.exchange.collectives import all_reduce_bytes
from netsenseml.records import monotonic_s
from netsenseml.sensing.tcp import TcpSample


class BackwardCosts(NamedTuple):
    """What one backward has cost; the columns of ``StepStatistics``."""

    exposed_s: float
    compute_s: float
    encode_s: float
    communication_s: float
    payload_bytes: int
    ready_s: list[float]
    bucket_elements: list[int]


class StepStatistics:
    """Account of one step: bytes, elements and times of all its buckets.

    A method calls ``coding`` around its encoding and sends every collective by ``launch``; the
    session does the rest. Callbacks of collectives run on threads of the process group, hence the
    lock.

    Of an accelerator, times are known by ``settle`` only, once it has done what it was told.
    """

    def __init__(self, ranks: int, clock: Clock | None = None) -> None:
        """clock: of the device that the gradients are on."""
        self.ranks = ranks
        self._clock = clock or Clock(torch.device("cpu"))
        self.began_s = monotonic_s()
        """When the step began, CLOCK_MONOTONIC seconds."""
        self.scheme = ""
        """How the gradients are exchanged, for the records."""
        self.payload_bytes = 0
        self.elements = 0
        self.elements_sent = 0
        self.encode_s = 0.0
        self.exposed_s = 0.0
        """From the last gradient being ready to the last bucket being exchanged, before that the
        time that backward waited in the hook, and after it that of an exchange behind the
        optimizer."""
        self.compute_s = 0.0
        """What preceded the exchange: from the last exchange (or the beginning) to the last
        gradient."""
        self.communication_s = 0.0
        """Time in which at least one collective was under way."""
        self.ready_s: list[float] = []
        """When the gradients of each bucket were ready."""
        self.bucket_elements: list[int] = []
        self.residual_ratio: float | None = None
        """Largest norm of a residual over that of its gradient; None if the method keeps none."""
        self.tcp: TcpSample | None = None
        """What the kernel saw of the connections since it was asked before."""
        self.landed_s = 0.0
        """When the last collective landed of which something is known; what was under way before
        then counts no more."""
        self._energy = self._lost = 0.0
        self._lock = threading.Lock()
        self._ready: list[Mark] = []
        self._coded: list[tuple[Mark, Mark]] = []
        self._waited: list[tuple[Mark, Mark]] = []
        self._under_way: list[tuple[Mark, Mark]] = []
        self._before = self._costs()

    def begin_backward(self) -> None:
        """From here on ``of_backward`` counts; a step may have several backwards that
        synchronise."""
        self.settle()  # what one that broke off has left
        self._before = self._costs()

    def of_backward(self) -> BackwardCosts:
        """What the newest backward has cost."""
        before, now = self._before, self._costs()
        buckets = len(before.ready_s)
        return BackwardCosts(
            now.exposed_s - before.exposed_s,
            now.compute_s - before.compute_s,
            now.encode_s - before.encode_s,
            now.communication_s - before.communication_s,
            now.payload_bytes - before.payload_bytes,
            now.ready_s[buckets:],
            now.bucket_elements[buckets:],
        )

    def _costs(self) -> BackwardCosts:
        times = self.exposed_s, self.compute_s, self.encode_s, self.communication_s
        return BackwardCosts(
            *times, self.payload_bytes, self.ready_s.copy(), self.bucket_elements.copy()
        )

    def arrive(self, elements: int, ready: Mark) -> None:
        """A bucket has come; ready: when its gradients were computed, or will be."""
        with self._lock:
            self.elements += elements
            self.bucket_elements.append(elements)
            self._ready.append(ready)

    def nothing_overlapped(self) -> None:
        """Backward has waited for every bucket, as it would at its end if all had been ready by
        then, and not before."""
        with self._lock:
            self._ready = self._ready[-1:] * len(self._ready)

    def settle(self) -> None:
        """Take into account what ended since the last call; waits until it has."""
        seconds = self._clock.seconds
        with self._lock:
            ready, coded, waited, under_way = (
                self._ready,
                self._coded,
                self._waited,
                self._under_way,
            )
            self._ready, self._coded, self._waited, self._under_way = [], [], [], []
        self.ready_s += map(seconds, ready)
        self.exposed_s += sum(seconds(end) - seconds(begin) for begin, end in waited)
        self.encode_s += sum(seconds(end) - seconds(begin) for begin, end in coded)
        for began_s, landed_s in sorted((seconds(begin), seconds(end)) for begin, end in under_way):
            self.communication_s += max(0.0, landed_s - max(began_s, self.landed_s))
            self.landed_s = max(self.landed_s, landed_s)

    @contextmanager
    def coding(self) -> Iterator[None]:
        """Count the time spent inside as encoding or decoding."""
        began = self._clock.mark()
        try:
            yield
        finally:
            with self._lock:
                self._coded.append((began, self._clock.mark()))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside, behind the optimizer, as exposed."""
        began = self._clock.mark()
        try:
            yield
        finally:
            with self._lock:
                self._waited.append((began, self._clock.mark()))

    def separate(self) -> "StepStatistics":
        """An account of its own for an exchange that may outlast the step; ``include`` takes it in
        where it ends."""
        return StepStatistics(self.ranks, self._clock)

    def include(self, other: "StepStatistics") -> None:
        """Take in what an exchange has cost that is over; ``other`` may only be read then."""
        with self._lock:
            self.payload_bytes += other.payload_bytes
            self.elements_sent += other.elements_sent
            self._coded += other._coded
            self._under_way += other._under_way
        if other.residual_ratio is not None:
            self.lose(other.lost_energy or 0.0, other._energy, other.residual_ratio)

    def launch(
        self,
        collective: Callable[[], Future[torch.Tensor]],
        payload_bytes: float,
        *,
        elements: int = 0,
    ) -> Future[torch.Tensor]:
        """Launch a collective and account for it; the returned future holds its result.

        payload_bytes: what this rank sends for it by the collective's cost formula.
        elements: gradient elements of this rank in the payload.
        """
        with self._lock:
            self.payload_bytes += round(payload_bytes)
            self.elements_sent += elements
        landed = partial(self._landed, self._clock.mark())
        # Another future, as nothing else makes sure that this comes before what others do with the
        # result.
        return collective().then(landed)

    def _landed(self, began: Mark, done: Future[torch.Tensor]) -> torch.Tensor:
        value = done.value()
        with self._lock:
            self._under_way.append(
                (began, monotonic_s() if value.device.type == "cpu" else self._clock.mark())
            )
        return value

    def lose(self, share: float, energy: float, residual_ratio: float = 0.0) -> None:
        """Note what share of a bucket's energy, the sum of squares of what was to be sent, was not
        sent.

        residual_ratio: norm of what is kept of it over that of the gradient.
        """
        with self._lock:
            self.residual_ratio = max(residual_ratio, self.residual_ratio or 0.0)
            self._energy += energy
            self._lost += share * energy

    @property
    def lost_energy(self) -> float | None:
        """Share of the energy of all buckets that was not sent; None if the method does not
        tell."""
        if self.residual_ratio is None:
            return None
        return self._lost / self._energy if self._energy else 0.0

    @property
    def dense_bytes(self) -> int:
        """Bytes that a ring all-reduce of the same gradients in float32 would send from this
        rank."""
        return round(all_reduce_bytes(4 * self.elements, self.ranks))

    @property
    def ratio(self) -> float:
        """Share of the gradient elements that were sent."""
        return self.elements_sent / self.elements if self.elements else 1.0
