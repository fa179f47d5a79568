"""Latency and bandwidth of the network, from collectives that would have happened anyway."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from operator import mul
from statistics import median
from typing import Any

_BEST_OF = 3  # steps: the one of them that was held up least is taken in place of one that was held up
_STEPS = 16  # so many of the newest are looked at, while the network stays the same,
_FADING = 0.9  # and each weighs less than the next one by this factor
_NOISE_S, _NOISE = 1e-3, 0.05  # how much a step's time is off: what the scheduler costs, and a share of the time
_ODD = 4.0  # times the usual error: a step so far off is an accident, or the first one after a change
_QUANTILE = 0.4  # of the steps' times per byte; not their median, as accidents lengthen a step and hardly ever shorten it
_AS_EXPECTED, _REFIT = 1.0, 4  # a step that is off by no more than the noise is no news: the line is drawn anew at every fourth
_MOST_LATENCY = 0.9  # share of a step's time, at most, so that there is always some left for its bytes
_ALPHA, _CREDIT, _BYTE = range(3)  # places in the filter's state
_UNKNOWN_ALPHA_S, _ALPHA_S, _CREDIT_S = 2e-3, 5e-4, 4e-3  # usual alpha, how far from half a known RTT, usual credit
_DRIFT, _BYTE_DRIFT = 0.02, 0.02  # shares by which they, and the time per byte, change in a step
_LEAST_NOISE = 0.1  # times the noise above: quieter than this no network is taken for
_RESOLUTION_S = 1e-9  # of the clock
_RETURN = 1 / 64  # share of the way back to half of the smallest RTT that alpha goes before every step


@dataclass(frozen=True, slots=True)
class Transfer:
    """One collective, or several that overlapped, as all ranks agreed on it.

    payload_bytes: what a rank sent, by the collective's cost formula. hops: one-way delays that it passes one after another.
    seconds: from its launch, or from the completion of the one before it if that was later, to its completion; the shortest
        among the ranks, as those that came early were waiting for the last. Collectives that overlap may complete in another
        order on every rank: of those it is the ranks' sums of which to take the shortest. The sum of the shortest, measured
        with two and three buckets on Gloo, came out at 0.9 of that in the median and below 0.1 in a tenth of the steps.
    """

    payload_bytes: int
    hops: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Step:
    """The sums over a step's transfers, and the rate that the kernel told, 0 if none."""

    payload_bytes: int
    hops: int
    seconds: float
    kernel_bps: float


@dataclass(frozen=True, slots=True)
class _Line:
    """Seconds of a step = hops * alpha_s + bytes * byte_s - credit_s."""

    alpha_s: float
    byte_s: float
    credit_s: float

    def seconds(self, step: _Step) -> float:
        return max(step.hops * self.alpha_s + step.payload_bytes * self.byte_s - self.credit_s, 1e-6)


class NetworkEstimate:
    """What a step's exchange takes, in latency and bandwidth, as seen by the collectives themselves.

        seconds = hops * alpha + 8 * bytes / beta        (Hockney 1994)

    ``alpha_s``: latency of a hop in s, with what the machines add to that of the wire. ``beta_bps``: payload bandwidth of the
    bottleneck in bits/s; None before the first step.

    The *true share* that beta estimates: a link that carries R bits/s of Ethernet frames carries R * 1448/1514 of TCP payload,
    less some 2 % for the acknowledgements of the opposite flow, less what competing flows take while the exchange goes on.

    Collectives that are under way at the same time share the link and end in any order, so only the sum over a step's
    transfers means something, and the estimate learns from the sums. It needs no kernel: both other arguments of ``update``
    only help where times alone leave it open how much of them is latency.

    1. A step's time obeys the line above, less a credit: a token bucket that filled up during the compute before lets the
       first milliseconds pass for free. Noise lengthens a time and hardly ever shortens it, so in place of a step that was held
       up, the one of the last three is taken that was held up least.
    2. Alpha and credit change seldom. A Kalman filter learns them from all steps but those around a change, as far as sizes
       and hops differ; with payloads of one size, where they cannot be told from beta, they stay. Alpha starts at half of the
       smallest RTT and tends back to it.
    3. Beta changes often: it is a robust quantile over the last steps of the time per byte that is left after 2.
    4. Two steps in a row that are off in the same direction, by far more than usual, are no accident but a change of the
       network: what came before is forgotten. Alpha and credit stay, so a change is one of beta until payloads of several
       sizes say otherwise. A step too small to tell is passed over.

    Equal updates give equal results, bit by bit, on any machine: replicas depend on it. Hence there are no operations but those
    that IEEE 754 defines exactly.
    """

    def __init__(self) -> None:
        self._line = _Line(alpha_s=0.0, byte_s=0.0, credit_s=0.0)
        self._min_rtt_s: float | None = None
        self._count = 0
        self._left_out = 0  # steps that the filter left out since the last change, up to _BEST_OF
        self._state = [0.0, 0.0, 0.0]
        self._spread = [[_squared(_UNKNOWN_ALPHA_S), 0.0, 0.0], [0.0, _squared(_CREDIT_S), 0.0], [0.0, 0.0, 0.0]]
        self._newest: deque[_Step] = deque(maxlen=_BEST_OF)
        self._steps: deque[_Step] = deque(maxlen=_STEPS)
        self._errors: deque[float] = deque(maxlen=_STEPS)
        self._last_error = 0.0

    @property
    def alpha_s(self) -> float:
        """Latency of a hop in s."""
        return self._line.alpha_s

    @property
    def beta_bps(self) -> float | None:
        """Payload bandwidth of the bottleneck in bits/s; None before the first step."""
        return 8 / self._line.byte_s if self._line.byte_s else None

    def predict_s(self, payload_bytes: float, hops: float) -> float:
        """Time in s that collectives will take after each other: hops * alpha + 8 * bytes / beta.

        payload_bytes: what a rank sends. hops: one-way delays. Before the first step only what is known of latency counts.
        """
        return hops * self._line.alpha_s + payload_bytes * self._line.byte_s

    def update(self, transfers: Sequence[Transfer], kernel_bps: float | None = None, min_rtt_s: float | None = None) -> None:
        """Learn from the transfers of one step. Call it on all ranks with equal arguments.

        kernel_bps: what the ranks' connections carried while they were busy (``TcpSample.bandwidth_bps``), the smallest among
            the ranks, bits/s > 0. Where that is more than the times account for, the rest was latency.
        min_rtt_s: smallest round-trip time to the next rank, the ranks' mean, s >= 0. Both are None if unknown.
        A step without bytes or without time teaches nothing.
        """
        step = _Step(
            payload_bytes=sum(transfer.payload_bytes for transfer in transfers),
            hops=sum(transfer.hops for transfer in transfers),
            seconds=math.fsum(transfer.seconds for transfer in transfers),
            kernel_bps=kernel_bps or 0.0,
        )
        if min_rtt_s is not None:
            if self._min_rtt_s is None:
                self._line = _Line(min_rtt_s / 2, self._line.byte_s, self._line.credit_s)
                # What was known of alpha without it, and so of the others, is forgotten.
                self._state[_ALPHA] = min_rtt_s / 2
                _forget(self._spread, _ALPHA, _squared(_ALPHA_S))
                self._left_out = 0
            self._min_rtt_s = min_rtt_s
        if step.payload_bytes <= 0 or step.seconds < _RESOLUTION_S:
            return
        self._newest.append(step)
        usual = median(map(abs, self._errors)) if self._errors else 1.0
        odd = _ODD * max(1.0, usual)
        if len(self._newest) > 1:
            before = self._newest[-2]
            # Where two are odd, a change may have begun.
            if abs(self._error(before)) <= odd or abs(self._error(step)) <= odd:
                self._learn(before, usual)
        if self._steps and self._error(step) > _AS_EXPECTED:
            step = min(self._newest, key=self._error)
        if self._steps and self._is_change(step, odd):
            self._steps = deque([self._steps[-1]], maxlen=_STEPS)
            self._left_out = 0
        self._steps.append(step)
        self._count += 1
        if self._count % _REFIT == 0 or self._count < _STEPS or abs(self._error(step)) > _AS_EXPECTED:
            self._line = self._through(min(self._state[_ALPHA], self._most_alpha_s()), self._state[_CREDIT])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep: numbers and lists of numbers."""
        return {
            "line": list(astuple(self._line)),
            "min_rtt_s": self._min_rtt_s,
            "count": self._count,
            "left_out": self._left_out,
            "state": list(self._state),
            "spread": [list(row) for row in self._spread],
            "newest": [list(astuple(step)) for step in self._newest],
            "steps": [list(astuple(step)) for step in self._steps],
            "errors": list(self._errors),
            "last_error": self._last_error,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint."""
        self._line = _Line(*state["line"])
        self._min_rtt_s = state["min_rtt_s"]
        self._count = state["count"]
        self._left_out = state["left_out"]
        self._state = list(state["state"])
        self._spread = [list(row) for row in state["spread"]]
        self._newest = deque((_Step(*step) for step in state["newest"]), maxlen=_BEST_OF)
        self._steps = deque((_Step(*step) for step in state["steps"]), maxlen=_STEPS)
        self._errors = deque(state["errors"], maxlen=_STEPS)
        self._last_error = state["last_error"]

    def _is_change(self, step: _Step, odd: float) -> bool:
        """4. odd: from so many times the noise on, an error is odd."""
        expected_s, error = self._line.seconds(step), self._error(step)
        self._errors.append(error)
        if abs(error) <= odd and expected_s < odd * _noise_s(expected_s):
            return False
        before, self._last_error = self._last_error, error
        again = step == self._steps[-1]  # one step that was fast by chance is not two
        return min(error, before) > odd or (max(error, before) < -odd and not again)

    def _error(self, step: _Step) -> float:
        """By how many times the noise a step took longer than it should have."""
        expected_s = self._line.seconds(step)
        return (step.seconds - expected_s) / _noise_s(min(step.seconds, expected_s))

    def _learn(self, step: _Step, usual: float) -> None:
        """2. The state is alpha, credit, and the time per byte only so that the others can be told from it.

        usual: by how many times the noise steps are mostly off.
        """
        state, spread = self._state, self._spread
        if self._min_rtt_s is not None:
            state[_ALPHA] += _RETURN * (self._min_rtt_s / 2 - state[_ALPHA])
        for i, usual_s in ((_ALPHA, _UNKNOWN_ALPHA_S if self._min_rtt_s is None else _ALPHA_S), (_CREDIT, _CREDIT_S)):
            spread[i][i] = min(spread[i][i] + _squared(_DRIFT * usual_s), _squared(usual_s))
        if self._left_out < _BEST_OF:
            # The first steps after a change may have seen both networks.
            self._left_out += 1
            state[_BYTE] = self._line.byte_s
            _forget(spread, _BYTE, _squared(2 * state[_BYTE]))
            return
        spread[_BYTE][_BYTE] += _squared(_BYTE_DRIFT * state[_BYTE])
        noise_s = min(1.0, max(_LEAST_NOISE, usual)) * _noise_s(step.seconds)
        _measure(state, spread, (step.hops, -1.0, step.payload_bytes), step.seconds, noise_s)
        # The kernel's word is as good as a step without latency, but it counts only where it is faster.
        busy_s = 8 * step.payload_bytes / step.kernel_bps if step.kernel_bps else math.inf
        if busy_s < state[_BYTE] * step.payload_bytes - state[_CREDIT]:
            _measure(state, spread, (0.0, -1.0, step.payload_bytes), busy_s, noise_s)
        most_alpha_s = self._most_alpha_s()
        _bound(state, spread, _ALPHA, most_alpha_s)
        _bound(state, spread, _CREDIT, math.inf)
        state[_ALPHA] = min(max(state[_ALPHA], 0.0), most_alpha_s)

    def _most_alpha_s(self) -> float:
        return _MOST_LATENCY * min(step.seconds / max(step.hops, 1) for step in self._steps)

    def _through(self, alpha_s: float, credit_s: float) -> _Line:
        """3. A step weighs as much as its time can be relied on."""
        rated = []
        fading = 1.0
        for step in reversed(self._steps):
            left_s = step.seconds - alpha_s * step.hops + credit_s
            rated.append((left_s / step.payload_bytes, fading * left_s / _noise_s(left_s)))
            fading *= _FADING
        rated.sort()
        missing = _QUANTILE * math.fsum(weight for _, weight in rated)
        for byte_s, weight in rated:  # noqa: B007 - the one at which it ends is the quantile
            missing -= weight
            if missing <= 0:
                break
        return _Line(alpha_s, byte_s, credit_s)


def _measure(state: list[float], spread: list[list[float]], row: Sequence[float], seconds: float, noise_s: float) -> None:
    """A step of a Kalman filter: row * state took so many seconds. spread: the covariance of the state.

    A step that was shorter by far counts by its distance, not the square of it; one that was longer, which is more likely an
    accident, the less the longer it was.
    """
    error_s = seconds - math.fsum(map(mul, row, state))
    moved = [math.fsum(map(mul, row, of_one)) for of_one in spread]
    off_s = error_s if error_s > 0 else noise_s
    variance = math.fsum(map(mul, row, moved)) + max(_squared(noise_s), off_s * abs(error_s))
    for i in range(len(state)):
        state[i] += moved[i] * error_s / variance
        for j in range(len(state)):
            spread[i][j] -= moved[i] * moved[j] / variance


def _bound(state: list[float], spread: list[list[float]], i: int, most: float) -> None:
    """Bring one number of the state between 0 and its bound, and the others to where they most likely are then."""
    bound = min(max(state[i], 0.0), most)
    excess = state[i] - bound
    if excess and spread[i][i] > 0:
        for j in range(len(state)):
            state[j] -= spread[j][i] / spread[i][i] * excess
    state[i] = bound


def _forget(spread: list[list[float]], i: int, variance: float) -> None:
    """Of one number of the state nothing more is known than its variance."""
    for j in range(len(spread)):
        spread[i][j] = spread[j][i] = 0.0
    spread[i][i] = variance


def _squared(number: float) -> float:
    return number * number  # Python's power is the C library's, which may differ in the last bit


def _noise_s(seconds: float) -> float:
    return _NOISE_S + _NOISE * seconds
