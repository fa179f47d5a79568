"""Latency and bandwidth of the network, from collectives that happen anyway."""

from collections import deque
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from netsenseml.exchange.communicators import Plan
from netsenseml.exchange.mesh import CONCURRENT, Shape

Array = NDArray[np.float64]

# What half and twice of each does to progress and bandwidth: python tests/netsenseml/simulation.py --constants
WINDOW = 16  # values that are smoothed
DRIFT = 0.02  # by which what is learnt may have changed from step to step; no time is better known either
SURPRISE = 3.0  # standard deviations: such a time is an accident; or a change, if
IN_A_ROW = 3  # so many come together: if a tenth of the steps are accidents, that is every thousandth step
# Standard deviations of logarithms before anything is seen: of the bandwidth, of what is a communicator's own beside it (how
# much more or less a hop and a byte take), and of its fixed part.
UNKNOWN, OWN, FIXED = 1.0, 0.25, 2.0


class Smooth:
    """Mean of the middle half of the newest values: accidents fall out of it, and what alternates is averaged."""

    def __init__(self, value: float | None = None) -> None:
        self.value = value
        self._values: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> None:
        self._values.append(value)
        ordered = sorted(self._values)
        cut = len(ordered) // 4
        self.value = fmean(ordered[cut : len(ordered) - max(cut, len(ordered) > 1)])  # of two or three, not the largest


class NetworkModel:
    """What a step's exchange takes, by every plan.

    A bucket's bytes follow those of the one before through the link, and its latency passes beside that of others:

        seconds = latency terms x alpha + bytes of the host x beta + elements x gamma      (Hockney 1994, and a fixed part)

    The latency of a direct exchange is measured: that of statistics behind every step is one that is nearly empty. The seconds
    of a byte are the network's; how much more or less a hop and a byte take with a communicator, and its fixed part, are its
    own. So incast, a host's shared interface and slow start need no formula. All of these come from the time that every step
    takes, by an iterated extended Kalman filter of their logarithms (Bell and Cathey 1993): what one step cannot tell apart is
    shared out by how uncertain each is, a small payload hardly moves the bandwidth, and it is known how far off a forecast may
    be.
    """

    def __init__(self, plans: Sequence[Plan], shape: Shape, byte_s: float, element_s: float) -> None:
        """byte_s: what is thought of the network before any step; element_s: of gamma."""
        self.latency = Smooth()
        """Of a direct exchange, s: between the farthest two ranks."""
        self.ring_share = 1.0
        """A ring passes all delays alike: mean of the ranks' round-trip times over the largest."""
        self._plans, self._shape = list(plans), shape
        communicators = list(dict.fromkeys(plan.communicator for plan in plans))
        self._rings = np.array([plan.communicator.endswith("ring") for plan in plans])
        # Logarithms: of a byte's seconds; then of every communicator's hop and byte over the network's, and of its gamma.
        self._logs = np.array([np.log(byte_s)] + [0, 0, np.log(element_s)] * len(communicators))
        self._prior = np.array([UNKNOWN] + [OWN, OWN, FIXED] * len(communicators)) ** 2
        self._covariance, self._noise, self._surprises = np.diag(self._prior), OWN, 0
        # Which of them make up alpha, beta and gamma of a plan. Causes of time, everywhere: (other, hops, bytes, elements).
        self._sums = np.zeros((len(plans), 4, len(self._logs)))
        for row, plan in zip(self._sums, plans, strict=True):
            own = 1 + 3 * communicators.index(plan.communicator)
            row[1, own] = row[2, 0] = row[2, own + 1] = row[3, own + 2] = 1
        self._elements: tuple[int, ...] = ()
        self._counts = np.zeros((len(plans), 0, 4))

    def buckets(self, elements: Sequence[int]) -> None:
        """What the next steps consist of."""
        if tuple(elements) != self._elements:
            self._elements, self._counts = tuple(elements), np.zeros((len(self._plans), len(elements), 4))
            for row, plan in zip(self._counts, self._plans, strict=True):
                costs = [plan.cost(number, self._shape) for number in elements]
                row[:, 1:] = [(c.latency_terms, c.host_bytes, n) for c, n in zip(costs, elements, strict=True)]

    def bandwidth_bps(self, plan: int) -> float:
        """Payload that a host's link carries with a plan, bits/s.

        A link that carries R bits/s of Ethernet frames carries R x 1448/1514 of TCP payload, less some 2 % for the
        acknowledgements of the opposite flow, less what competing flows take.
        """
        return float(8 / np.exp(self._sums[plan, 2] @ self._logs))

    def forecast(
        self, ready_s: Sequence[float], coding_s: Array, rows: slice = slice(None), logs: Array | None = None
    ) -> tuple[Array, Array]:
        """Of a step with every plan, seconds from the last gradient to the end of the exchange, and in which a collective is
        under way. Shape (plans, 5): by cause (waiting and coding, hops, bytes, elements), and last their sum.

        ready_s: of every bucket, before the last gradient, s <= 0. coding_s: of every plan and bucket.
        """
        unit_s = np.exp(self._sums[rows] @ (self._logs if logs is None else logs))
        unit_s[:, 1] *= (self.latency.value or 0.0) * np.where(self._rings[rows], self.ring_share, 1.0)
        takes = np.pad(self._counts[rows] * unit_s[:, None], ((0, 0), (0, 0), (0, 1)))  # and last their sum, as that decides
        takes[:, :, 4] = takes.sum(2)
        hops = takes * (0, 1, 0, 0, 0)
        hops[:, :, 4] = hops[:, :, 1]
        own = np.zeros_like(takes)
        own[:, :, 0] = own[:, :, 4] = coding_s / 2
        busy, done = np.zeros_like(takes[:, 0]), list[Array]()
        coded = link = end = busy - (1e9, 0, 0, 0, 1e9)
        for i, ready in enumerate(ready_s):
            coded = _later(coded, np.array([[ready, 0, 0, 0, ready]])) + own[:, i]
            start = _later(coded, done[i - CONCURRENT]) if i >= CONCURRENT else coded
            link = _later(link, start) + (takes[:, i] - hops[:, i])
            done.append(link + hops[:, i])
            since = _later(start, end)
            busy += _later(done[i], since) - since
            end = _later(end, done[i])
        exposed = _later(end + own[:, -1] if len(ready_s) else end, np.zeros_like(end))
        return exposed, busy

    def learn(self, plan: int, ready_s: Sequence[float], coding_s: Sequence[float], seconds: float) -> None:
        """Learn from the time in which a step's collectives were under way."""
        self._covariance += DRIFT**2 * np.eye(len(self._prior))
        spread = np.sqrt(np.minimum(self._prior / self._covariance.diagonal(), 1))
        self._covariance *= np.outer(spread, spread)  # nothing gets less known than it was at first
        step = plan, ready_s, np.array([coding_s]), max(seconds, 1e-9)
        busy, slope = self._busy(*step[:3], self._logs)
        off = np.log(step[3] / busy[4])
        side = int(np.sign(off)) if abs(off) > SURPRISE * np.sqrt(slope @ self._covariance @ slope + self._noise**2) else 0
        self._surprises = self._surprises + side if side * self._surprises > 0 else side
        if side and abs(self._surprises) < IN_A_ROW:
            return
        if side:
            self._surprises, self._covariance[0, 0] = 0, self._covariance[0, 0] + UNKNOWN**2
        self._noise += (min(1.25 * abs(off), SURPRISE * self._noise) - self._noise) / WINDOW  # E|x| = 0.8 sigma
        self._noise = max(self._noise, DRIFT)
        found = self._explain(*step, self._logs)
        if side:  # perhaps it was the fixed part all the time, too small so far for the iteration to find it
            fixed, own = self._logs.copy(), int(self._sums[plan, 3].argmax())
            fixed[own] += np.log1p(max(step[3] - busy[4], 0.0) / max(busy[3], 1e-12))
            found = min(found, self._explain(*step, fixed), key=lambda explained: explained[0])
        _, self._logs, known = found
        self._covariance -= known

    def _explain(
        self, plan: int, ready_s: Sequence[float], coding_s: Array, seconds: float, logs: Array
    ) -> tuple[float, Array, Array]:
        """The filter's update, looked for from ``logs`` on: (how unlikely it is, the logarithms, what less is unknown)."""
        for _ in range(6):  # the forecast is not linear: again from where the last attempt has come to
            busy, slope = self._busy(plan, ready_s, coding_s, logs)
            spread = self._covariance @ slope
            variance = slope @ spread + self._noise**2
            off = np.log(seconds / busy[4]) - slope @ (self._logs - logs)
            change = self._logs + spread / variance * off - logs
            logs = logs + np.clip(change, -1, 1)
            if np.abs(change).max() < 0.01:
                break
        return off**2 / variance, logs, np.outer(spread, spread) / variance

    def _busy(self, plan: int, ready_s: Sequence[float], coding_s: Array, logs: Array) -> tuple[Array, Array]:
        """Seconds in which a collective is under way, as forecast, and the derivatives of their logarithm."""
        busy = self.forecast(ready_s, coding_s, slice(plan, plan + 1), logs)[1][0]
        busy[4] = max(busy[4], 1e-9)
        return busy, busy[:4] @ self._sums[plan] / busy[4]

    def deviations(self, parts: Array, seconds: Array, plan: int) -> Array:
        """Standard deviations of log(seconds of a step with every plan / with this one), shape (plans,).

        parts: of them by cause, as forecast, shape (plans, 5). seconds: of the steps.
        """
        slopes = np.einsum("pk,pkx->px", parts[:, :4], self._sums) / seconds[:, None]
        slopes -= slopes[plan]
        return np.sqrt(np.maximum(((slopes @ self._covariance) * slopes).sum(1), 0.0))


def _later(times: Array, others: Array) -> Array:
    """The later one, row by row; in the last column are the times, before it what they are made of."""
    return np.where(times[:, -1:] >= others[:, -1:], times, others)
