"""Latency and bandwidth of the network, from collectives that would have happened anyway."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import median
from typing import Any

_STEPS = 16  # of the past that the fit looks at, while the network stays the same
_NOISE_S, _NOISE = 1e-3, 0.05  # by how much a step's time is off: the scheduler's part, and a share of the time
_ODD = 4.0  # times the usual error: no noise
_GROW = .5
_MEMORY = 0.9
_QUANTILE = 0.4  # below the median, as noise lengthens a transfer and hardly ever shortens it
_MOST_LATENCY = 0.9  # of a step's time; what is left bounds the bandwidth
_ANCHOR = 12  # weight of what was known of latency and credit, against one step
_KERNEL = 0.25  # weight of the kernel's word, against one step
_PASSES = 3


@dataclass(frozen=True, slots=True)
class Transfer:
    """One collective, as all ranks agreed on it.

    payload_bytes: what a rank sent, by the collective's cost formula. hops: one-way delays that it passes one after another.
    seconds: from its launch, or from the completion of those launched before it if that was later, to its completion; the
        shortest among the ranks, as those that came early were waiting for the last.
    """

    payload_bytes: int
    hops: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Step:
    """The sums over the transfers of a step; what the kernel said of the rate, 0 if nothing."""

    hops: int
    payload_bytes: int
    seconds: float
    kernel_bps: float


class NetworkEstimate:
    """What a step's exchange will take: hops * alpha + 8 * bytes / beta."""

    def __init__(self) -> None:
        self.alpha_s = 0.0
        self.beta_bps: float | None = None
        self._credit_s = 0.0
        self._min_rtt_s: float | None = None
        self._seen = 0
        self._odd = 0.0
        self._steps: deque[_Step] = deque(maxlen=_STEPS)
        self._errors: deque[float] = deque(maxlen=_STEPS)

    def predict_s(self, payload_bytes: float, hops: int) -> float:
        """Time in s that a transfer will take."""
        if self.beta_bps is None:
            return 0.0
        return hops * self.alpha_s + 8 * payload_bytes / self.beta_bps

    def update(self, transfers: Sequence[Transfer], kernel_bps: float | None = None, min_rtt_s: float | None = None) -> None:
        """Learn from one step."""
        step = _Step(
            hops=sum(transfer.hops for transfer in transfers),
            payload_bytes=sum(transfer.payload_bytes for transfer in transfers),
            seconds=sum(transfer.seconds for transfer in transfers),
            kernel_bps=kernel_bps or 0.0,
        )
        if min_rtt_s is not None:
            if self._min_rtt_s is None:
                self.alpha_s = min_rtt_s / 2
            self._min_rtt_s = min_rtt_s
        if step.payload_bytes <= 0 or step.seconds <= 0:
            return
        if self.beta_bps is not None and self._is_change(step):
            self._seen = 1
            while len(self._steps) > 1:
                self._steps.popleft()
        self._steps.append(step)
        self._fit()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep; plain numbers and lists."""
        return {
            "alpha_s": self.alpha_s,
            "beta_bps": self.beta_bps,
            "credit_s": self._credit_s,
            "min_rtt_s": self._min_rtt_s,
            "steps": [list(astuple(step)) for step in self._steps],
            "errors": list(self._errors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint."""
        self.alpha_s, self.beta_bps = state["alpha_s"], state["beta_bps"]
        self._credit_s, self._min_rtt_s = state["credit_s"], state["min_rtt_s"]
        self._steps = deque((_Step(*step) for step in state["steps"]), maxlen=_STEPS)
        self._errors = deque(state["errors"], maxlen=_STEPS)

    def _is_change(self, step: _Step) -> bool:
        expected_s = max(self.predict_s(step.payload_bytes, step.hops) - self._credit_s, 1e-6)
        error = (step.seconds - expected_s) / _noise_s(min(step.seconds, expected_s))
        limit = _ODD * max(1.0, median(map(abs, self._errors))) if self._errors else _ODD
        self._errors.append(error)
        if abs(error) <= limit and expected_s < limit * _noise_s(expected_s):
            return False  # too small to tell
        before, self._odd = self._odd, error
        return min(error, before) > limit or max(error, before) < -limit

    def _fit(self) -> None:
        steps = self._steps
        most_s = min(_MOST_LATENCY * step.seconds / max(step.hops, 1) for step in steps)
        known_s, known_credit_s = self.alpha_s, self._credit_s
        if self._min_rtt_s is not None:
            known_s += (self._min_rtt_s / 2 - known_s) / 8
        known_s = min(known_s, most_s)
        alpha_s, credit_s = known_s, known_credit_s
        self._seen += 1
        anchor = min(_ANCHOR, self._seen * _GROW) / _noise_s(median(step.seconds for step in steps)) ** 2
        hops_anchor = anchor * max(1, median(step.hops for step in steps)) ** 2
        for _ in range(_PASSES):
            slope = self._slope(alpha_s, credit_s)
            bb = bh = b1 = bt = hh = h1 = n = ht = t1 = 0.0
            for age, step in enumerate(reversed(steps)):
                line_s = slope * step.payload_bytes
                noise_s = _noise_s(line_s)
                off_s = abs(step.seconds - alpha_s * step.hops + credit_s - line_s)
                weight = _MEMORY**age / (noise_s * max(noise_s, off_s))
                b, h, t = step.payload_bytes, step.hops, step.seconds
                bb, bh, b1, bt = bb + weight * b * b, bh + weight * b * h, b1 + weight * b, bt + weight * b * t
                hh, h1, n, ht, t1 = hh + weight * h * h, h1 + weight * h, n + weight, ht + weight * h * t, t1 + weight * t
                if step.kernel_bps * slope > 8:
                    bb, bt = bb + _KERNEL * weight * b * b, bt + _KERNEL * weight * b * b * 8 / step.kernel_bps
            aa, ac, cc = hh - bh * bh / bb + hops_anchor, b1 * bh / bb - h1, n - b1 * b1 / bb + anchor
            ya = ht - bh * bt / bb + hops_anchor * known_s
            yc = b1 * bt / bb - t1 + anchor * known_credit_s
            credit_s = (yc * aa - ya * ac) / (aa * cc - ac * ac)
            for _ in range(3):
                alpha_s = max(0.0, min(most_s, (ya - ac * credit_s) / aa))
                credit_s = max(0.0, (yc - ac * alpha_s) / cc)
        self.alpha_s, self._credit_s = alpha_s, credit_s
        self.beta_bps = 8 / self._slope(alpha_s, credit_s)

    def _slope(self, alpha_s: float, credit_s: float) -> float:
        """Seconds per byte: quantile over the steps, weighted by their bytes."""
        rated = []
        for age, step in enumerate(reversed(self._steps)):
            line_s = step.seconds - alpha_s * step.hops + credit_s
            rated.append((line_s / step.payload_bytes, _MEMORY**age * line_s / _noise_s(line_s)))
        rated.sort()
        left = _QUANTILE * math.fsum(weight for _, weight in rated)
        for slope, weight in rated:
            left -= weight
            if left <= 0:
                return slope
        return rated[-1][0]


def _noise_s(seconds: float) -> float:
    return _NOISE_S + _NOISE * seconds
