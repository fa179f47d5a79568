"""Latency and bandwidth of the network, from collectives that happen anyway."""

from collections import deque
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from netsenseml.exchange.communicators import Plan
from netsenseml.exchange.mesh import CONCURRENT, Topology

Array = NDArray[np.float64]

# What half and twice of each does to progress and bandwidth: python tests/netsenseml/simulation.py
# --constants
WINDOW = 16  # reports that are smoothed
# share by which what is known returns, with every report, to what was thought at first
FORGETTING = 1 / 500
RESOLUTION = 0.02  # relative: no time is known better, and no plan is better by less
SURPRISE = 3.0  # standard deviations: such a time is an accident; or a change, if
# so many come together: if a tenth of the steps are accidents, that is every thousandth step
IN_A_ROW = 3
# standard deviation of the logarithm of a bandwidth, and of a communicator's fixed part, before
# they are seen
UNKNOWN = 2.0
# Likewise of how much more or less a hop and a byte take with a communicator; and share of the
# first step that is fixed.
OWN = 0.15


class Smooth:
    """Mean of the middle half of the newest values: accidents fall out of it, and what alternates
    is averaged."""

    def __init__(self, value: float) -> None:
        """value: before the first one is added."""
        self.halves = value, value
        """Means of the lower and the upper half of that half."""
        self._values: deque[float] = deque(maxlen=WINDOW)

    @property
    def value(self) -> float:
        return fmean(self.halves)

    def add(self, value: float) -> None:
        self._values.append(value)
        ordered = sorted(self._values)
        cut = len(ordered) // 4
        # of two or three, not the largest
        middle = ordered[cut : len(ordered) - max(cut, len(ordered) > 1)]
        self.halves = fmean(middle[: (len(middle) + 1) // 2]), fmean(middle[len(middle) // 2 :])


class NetworkModel:
    """What a step's exchange takes, by every plan.

    A bucket's bytes follow those of the one before through the link, and its latency passes beside
    that of others:

        seconds = latency terms x alpha + bytes of the host x beta + elements x gamma

    (Hockney 1994, and a fixed part).

    The latency of a direct exchange is measured: that of the control channel's report behind every
    step, which is nearly empty. The seconds of a byte are the network's; how much more or less a
    hop and a byte take with a communicator, and its fixed part, are its own. So incast, a host's
    shared interface and slow start need no formula. All of these come from the time that every step
    takes, by an iterated extended Kalman filter of their logarithms (Bell and Cathey 1993): what
    one step cannot tell apart is shared out by how uncertain each is, a small payload hardly moves
    the bandwidth, and it is known how far off a forecast may be.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        topology: Topology,
        latency_s: float,
        byte_s: float,
        element_s: float,
    ) -> None:
        """latency_s, byte_s: what is thought of the network before any step; element_s: of
        gamma."""
        self.latency = Smooth(latency_s)
        """Of a direct exchange, s: between the farthest two ranks."""
        self.ring_share = 1.0
        """A ring passes all delays alike: mean of the ranks' round-trip times over the largest."""
        self._plans, self._topology = list(plans), topology
        communicators = list(dict.fromkeys(plan.communicator for plan in plans))
        self._rings = np.array([plan.communicator.endswith("ring") for plan in plans])
        # Logarithms: of a byte's seconds; then of every communicator's hop and byte over the
        # network's, and of its gamma.
        self._logs = np.array([np.log(byte_s)] + [0, 0, np.log(element_s)] * len(communicators))
        self._prior = np.array([UNKNOWN] + [OWN, OWN, UNKNOWN] * len(communicators)) ** 2
        self._thought, self._covariance = self._logs, np.diag(self._prior)
        self._noise, self._surprises, self._seen = OWN, 0, False
        # Which of them make up alpha, beta and gamma of a plan. Causes of time, everywhere: (other,
        # hops, bytes, elements).
        self._sums = np.zeros((len(plans), 4, len(self._logs)))
        for row, plan in zip(self._sums, plans, strict=True):
            own = 1 + 3 * communicators.index(plan.communicator)
            row[1, own] = row[2, 0] = row[2, own + 1] = row[3, own + 2] = 1
        self._warm = set[str]()
        self._elements: tuple[int, ...] = ()
        self._counts = np.zeros((len(plans), 0, 4))
        self._counts_of: dict[tuple[int, ...], Array] = {}

    def buckets(self, elements: Sequence[int]) -> None:
        """What is forecast and learnt of next consists of so many elements."""
        self._elements = tuple(elements)
        if self._elements not in self._counts_of:
            counts = self._counts_of[self._elements] = np.zeros(
                (len(self._plans), len(elements), 4)
            )
            for row, plan in zip(counts, self._plans, strict=True):
                costs = [plan.cost(number, self._topology) for number in elements]
                row[:, 1:] = [
                    (c.latency_terms, c.host_bytes, n) for c, n in zip(costs, elements, strict=True)
                ]
        self._counts = self._counts_of[self._elements]

    def bandwidth_bps(self, plan: int) -> float:
        """Payload that a host's link carries with a plan, bits/s.

        A link that carries R bits/s of Ethernet frames carries R x 1448/1514 of TCP payload, less
        some 2 % for the acknowledgements of the opposite flow, less what competing flows take.
        """
        return float(8 / np.exp(self._sums[plan, 2] @ self._logs))

    def forecast(
        self,
        ready_s: Sequence[float],
        coding_s: Array,
        rows: slice = slice(None),
        logs: Array | None = None,
    ) -> tuple[Array, Array]:
        """Of a step with every plan, seconds from the last gradient to the end of the exchange, and
        in which a collective is under way. Shape (plans, 5): by cause (waiting and coding, hops,
        bytes, elements), and last their sum.

        ready_s: of every bucket, before the last gradient, s <= 0. coding_s: of every plan and
        bucket.
        """
        exposed, busy, _ = self._course(
            ready_s, coding_s, rows, self._logs if logs is None else logs
        )
        return exposed, busy

    def least(self, ready_s: Sequence[float], coding_s: Array) -> Array:
        """Seconds from a step to the next, with every plan, where an exchange may last until that
        of the same bucket in the next step: as its longest bucket takes, or the bytes of all. Shape
        and parameters as of ``forecast``."""
        return self._course(ready_s, coding_s, slice(None), self._logs)[2]

    def _course(
        self, ready_s: Sequence[float], coding_s: Array, rows: slice, logs: Array
    ) -> tuple[Array, Array, Array]:
        unit_s = np.exp(self._sums[rows] @ logs)
        unit_s[:, 1] *= self.latency.value * np.where(self._rings[rows], self.ring_share, 1.0)
        # and last their sum, as that decides
        takes = np.pad(self._counts[rows] * unit_s[:, None], ((0, 0), (0, 0), (0, 1)))
        takes[:, :, 4] = takes.sum(2)
        hops, coding = (
            takes[:, :, 1:2] * (0, 1, 0, 0, 1),
            coding_s[:, :, None]
            / 2
            * (
                1,
                0,
                0,
                0,
                1,
            ),
        )
        busy, least, done = np.zeros_like(takes[:, 0]), (takes - hops).sum(1), list[Array]()
        coded = link = end = busy - (1e9, 0, 0, 0, 1e9)
        for i, ready in enumerate(ready_s):
            of_ready = np.array([[ready, 0, 0, 0, ready]])
            coded = _later(coded, of_ready) + coding[:, i]
            start = _later(coded, done[i - CONCURRENT]) if i >= CONCURRENT else coded
            link = _later(link, start) + (takes[:, i] - hops[:, i])
            done.append(link + hops[:, i])
            least = _later(least, done[i] + coding[:, i] - of_ready)
            since = _later(start, end)
            busy += _later(done[i], since) - since
            end = _later(end, done[i])
        exposed = _later(end + coding[:, -1] if len(ready_s) else end, np.zeros_like(end))
        return exposed, busy, least

    def learn(
        self, plan: int, ready_s: Sequence[float], coding_s: Sequence[float], seconds: float
    ) -> None:
        """Learn from the time in which a step's collectives were under way."""
        communicator = self._plans[plan].communicator
        if communicator not in self._warm:  # its connections began slowly, as TCP does
            self._warm.add(communicator)
            return
        seconds, coding = max(seconds, 1e-9), np.array([coding_s])
        # were the fixed part too small now, it would never be found: a correction moves it by its
        # share
        if not self._seen:
            self._seen, least = True, np.log(OWN * seconds / sum(self._elements))
            self._thought[3::3] = np.maximum(self._thought[3::3], least)
            self._logs = self._thought
        # The network's bandwidth alone does not return: what it was says more than what was thought
        # at first.
        self._covariance += FORGETTING * (np.diag(self._prior) - self._covariance)
        self._logs = self._logs + FORGETTING / 2 * (self._thought - self._logs) * (
            np.arange(len(self._logs)) > 0
        )
        logs = self._logs
        # the forecast is not linear: again from where the last attempt has come to
        for attempt in range(6):
            busy = self.forecast(ready_s, coding, slice(plan, plan + 1), logs)[1][0]
            expected_s = max(busy[4], 1e-9)
            slope, off = busy[:4] @ self._sums[plan] / expected_s, np.log(seconds / expected_s)
            if attempt == 0 and not self._credible(
                off, np.sqrt(slope @ self._covariance @ slope + self._noise**2)
            ):
                return
            spread = self._covariance @ slope
            innovation, variance = (
                off - slope @ (self._logs - logs),
                slope @ spread + self._noise**2,
            )
            change = self._logs + spread / variance * innovation - logs
            logs = logs + np.clip(change, -1, 1)
            if np.abs(change).max() < RESOLUTION / 2:
                break
        self._logs = logs
        self._covariance -= np.outer(spread, spread) / variance

    def _credible(self, off: float, deviation: float) -> bool:
        """Whether to learn from a time whose logarithm is off by so much. After so many surprises
        that it cannot be accidents the bandwidth is unknown again."""
        side = int(np.sign(off)) if abs(off) > SURPRISE * deviation else 0
        self._surprises = self._surprises + side if side * self._surprises > 0 else side
        if side and abs(self._surprises) < IN_A_ROW:
            return False
        if side:
            self._surprises, self._covariance[0, 0] = 0, self._covariance[0, 0] + UNKNOWN**2
        # E|x| = 0.8 sigma
        self._noise += (min(1.25 * abs(off), SURPRISE * self._noise) - self._noise) / WINDOW
        self._noise = max(self._noise, RESOLUTION)
        return True

    def deviations(self, parts: Array, seconds: Array, plan: int) -> Array:
        """Standard deviations of log(seconds of a step with every plan / with this one), shape
        (plans,).

        parts: of them by cause, as forecast, shape (plans, 5); or of all plans several times.
        seconds: of the steps.
        """
        sums = np.tile(self._sums, (len(parts) // len(self._sums), 1, 1))
        slopes = np.einsum("pk,pkx->px", parts[:, :4], sums) / seconds[:, None]
        slopes -= slopes[plan]
        return np.sqrt(np.maximum(((slopes @ self._covariance) * slopes).sum(1), 0.0))


def _later(times: Array, others: Array) -> Array:
    """The later one, row by row; in the last column are the times, before it what they are made
    of."""
    return np.where(times[:, -1:] >= others[:, -1:], times, others)
