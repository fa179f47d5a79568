"""Our rule: the least lossy scheme that keeps communication off the critical path."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from netsenseml.compress.codec import Codec
from netsenseml.control.observation import Observation
from netsenseml.exchange.schemes import Gather, Plain, Scheme, TwoPhase
from netsenseml.sensing.network import NetworkEstimate

_STEP = 0.8  # ratio of one sparse rung to the one above it
_DENSEST = 0.2
_MARGIN = 0.85  # a rung above must fit into this share of the budget before it is taken
_PATIENCE = 3  # so many steps in a row
_TRIAL = 10  # a rung that is left within so many steps was no good
_LENIENT = 2.0  # where lateness is as large as the budget, the first steps of a trial may take so many times as long
_DEVIATIONS = 2.0  # so far may the mean of a trial be off by chance, in standard deviations
_GROWTH = 2.0  # the first trial sends so many times the bytes, or one rung more, the next one of a series the square of it,
_MOST_GROWTH = 16.0  # and so on up to this
_LONGEST_PAUSE = 320
_FASTER = 1.3  # a network that is faster by this factor is another one
_WORTH = 0.03  # share of a step that a lossier rung must save
_LEARN, _MOST_SURPRISE = 0.25, 2.0  # weight of the newest step in what coding costs; a rank that slept is an accident
_FORGET = 0.02  # share of the way back to the measured costs in a step without coding


def ladder(ranks: int, floor: float, item_bytes: int = 4) -> list[Scheme]:
    """Schemes, least lossy first: the gradients as they are, of ``item_bytes`` an element, bfloat16, 8 and 4 bits, then ever
    fewer elements, down to the share ``floor``.

    What sends no less than the scheme before it is left out: with many ranks a gather of 10 % is larger than 4 bits of all.
    """
    densities = [max(_DENSEST, floor)]
    while densities[-1] > floor:
        below = float(f"{densities[-1] * _STEP:.2g}")
        densities.append(below if below > 1.1 * floor else floor)  # no two rungs that send as much
    rungs: list[Scheme] = [Plain(item_bytes)]
    lossy: list[Scheme] = [TwoPhase(Codec(values)) for values in ("bf16", "int8", "int4")]
    lossy += (Gather(Codec(SPARSE_VALUES, density)) for density in densities)
    for scheme in lossy:
        if _bytes(scheme, ranks) < _bytes(rungs[-1], ranks):
            rungs.append(scheme)
    return rungs


SPARSE_VALUES = "int4"
"""More elements with a sign and a common magnitude would lose less energy in as many bytes. But then what is large is sent
too small and what is small too large in every step, and with a momentum of 0.9 a small GPT diverged, at 8 % and at 2 %."""


def _bytes(scheme: Scheme, ranks: int) -> float:
    return math.fsum(payload for payload, _ in scheme.payloads(1 << 20, ranks))


class BudgetPolicy:
    """Forecast the exposed time of every rung, and take the least lossy one that fits:

        exposed <= share x max(compute, latency) + latency

    where latency is what the rung would take with nothing to send: it has to be paid anyway. Exposed time is forecast
    by sending the buckets through two stations, each one bucket at a time, from the moments at which they were ready:
    coding (seconds an element, measured before and corrected by every coded step) and the network,
    hops x alpha + 8 bytes / beta (``sensing.network``).

    Nothing is lost for nothing: a lossier rung must shorten the step by more than ``_WORTH`` of it, coding counted in full. It
    runs beside backward, but where processors are scarce backward waits for it.

    Fast down: a rung that does not fit, by its forecast and by the last steps themselves, is left at once. Slow up: a rung
    above has to fit with a margin several times in a row.

    A forecast from small payloads takes whatever delays them for a lack of bandwidth, and would keep them small for ever. So
    now and then a rung of ``_GROWTH`` times the bytes is tried, whatever its forecast says, and with every success a larger
    one, up to ``_MOST_GROWTH`` times. It stays if its steps fit, or if they wait hardly longer than those before: then it was
    not the bytes that took the time. A rung that was taken and soon left again, for the one before it, is not tried for
    a while, and twice as long each time, until the network has become faster.
    """

    def __init__(
        self,
        rungs: Sequence[Scheme],
        ranks: int,
        network: NetworkEstimate,
        coding_s: Mapping[str, float],
        *,
        share: float,
        start: float,
    ) -> None:
        """rungs: least lossy first. coding_s: seconds per element of encoding and decoding, by name of the scheme.

        start: the first steps are exchanged by the least lossy rung that sends no more than this share of the elements.
        """
        self._rungs = rungs
        self._ranks = ranks
        self._network = network
        self._coding_s = coding_s
        self._coding_factor = 1.0
        self._elements: tuple[int, ...] = ()
        self._payloads: dict[str, list[list[tuple[float, int]]]] = {}
        self._share = share
        self._rung = next((i for i, rung in enumerate(rungs) if _density(rung) <= start), len(rungs) - 1)
        self._step = 0
        self._candidates: list[int] = []
        self._exposed_s: list[float] = []
        self._fitted = False
        self._tolerated_s, self._spread_s, self._lenient = 0.0, 0.0, False
        self._climbed_at, self._climbed_from = -_TRIAL, self._rung
        self._growth = _GROWTH
        self._ceiling, self._ceiling_until, self._pause = 0, 0, _TRIAL
        self._ceiling_bps = 0.0

    @property
    def scheme(self) -> Scheme:
        """The decision in force."""
        return self._rungs[self._rung]

    @property
    def at_ease(self) -> bool:
        """Nothing is lost, for some time already, and the last steps fitted."""
        return self._rung == 0 and len(self._exposed_s) == _TRIAL and self._fitted

    def decide(self, seen: Observation) -> None:
        self._step += 1
        bandwidth_bps = self._network.beta_bps
        if bandwidth_bps is None:
            return
        if expected_s := self._coding_s.get(self.scheme.name, 0.0) * sum(seen.elements):
            surprise = seen.encode_s / (expected_s * self._coding_factor)
            self._coding_factor *= 1 + _LEARN * (min(max(surprise, 1 / _MOST_SURPRISE), _MOST_SURPRISE) - 1)
        else:  # what is not seen any more is forgotten
            self._coding_factor += _FORGET * (1 - self._coding_factor)
        if self._step >= self._ceiling_until or bandwidth_bps > _FASTER * self._ceiling_bps:
            self._ceiling = 0
        before = self._rung
        self._exposed_s = [*self._exposed_s[1 - _TRIAL :], seen.exposed_s]
        self._fitted = max(self._exposed_s[-2:]) <= self._allowed_s(before, seen)
        fitted = self._fitted or self._fits(before, seen)
        tolerated = not fitted and self._is_tolerated(seen)
        if fitted or tolerated:
            self._climb(seen)
        else:
            self._fall(seen, bandwidth_bps)
        if self._rung == before:
            return
        if self._rung > before:
            self._tolerated_s = self._spread_s = 0.0
        elif not tolerated:  # or it would grow from rung to rung
            self._remember_waiting(seen)
        self._lenient = not fitted
        self._candidates, self._exposed_s = [], []

    def _remember_waiting(self, seen: Observation) -> None:
        """What may be waited for with a rung above, as so much was waited for with this one."""
        mean_s = math.fsum(self._exposed_s) / len(self._exposed_s)
        self._tolerated_s = mean_s + _WORTH * (seen.compute_s + mean_s)
        # A product, as Python's power is the C library's, which may differ between machines in the last bit.
        squares = ((waited_s - mean_s) * (waited_s - mean_s) for waited_s in self._exposed_s)
        self._spread_s = math.sqrt(math.fsum(squares) / len(self._exposed_s))

    def _is_tolerated(self, seen: Observation) -> bool:
        """Whether the last steps waited hardly longer than with the rung below; noise is no difference."""
        newest_s = self._exposed_s[-_PATIENCE:]
        mean_s = math.fsum(newest_s) / len(newest_s)
        begins = len(newest_s) < _PATIENCE and self._lenient
        noise_s = _DEVIATIONS * self._spread_s / math.sqrt(len(newest_s))
        return mean_s <= (_LENIENT if begins else 1.0) * (self._tolerated_s + noise_s)

    def _climb(self, seen: Observation) -> None:
        if self._step == self._climbed_at + _TRIAL:
            self._pause = _TRIAL
        if self._rung == 0:
            return
        candidate = min(self._rung, self._least_lossy(range(self._ceiling, self._rung + 1), seen, _MARGIN))
        self._candidates = [*self._candidates[1 - _PATIENCE :], candidate]
        if len(self._candidates) < _PATIENCE:
            return
        rung = max(self._candidates)
        if rung == self._rung:
            rung = self._larger(seen)
        if rung < self._rung:
            self._climbed_from, self._climbed_at = self._rung, self._step
            self._rung = rung

    def _larger(self, seen: Observation) -> int:
        """The rung to try, or the present one if no other may be tried."""
        rungs = range(self._ceiling, self._rung)
        if not rungs:
            return self._rung
        most_bytes = self._growth * self._bytes(self._rung, seen)
        self._growth = min(self._growth * self._growth, _MOST_GROWTH)
        return next((rung for rung in rungs if self._bytes(rung, seen) <= most_bytes), rungs[-1])

    def _bytes(self, rung: int, seen: Observation) -> float:
        return math.fsum(payload for stages in self._payloads_of(self._rungs[rung], seen) for payload, _ in stages)

    def _payloads_of(self, scheme: Scheme, seen: Observation) -> list[list[tuple[float, int]]]:
        """Of every bucket, (bytes, hops) of every stage; the buckets of a model hardly ever change."""
        if seen.elements != self._elements:
            self._elements, self._payloads = seen.elements, {}
        if scheme.name not in self._payloads:
            self._payloads[scheme.name] = [scheme.payloads(elements, self._ranks) for elements in seen.elements]
        return self._payloads[scheme.name]

    def _fall(self, seen: Observation, bandwidth_bps: float) -> None:
        rung = self._least_lossy(range(self._ceiling, len(self._rungs)), seen, 1.0)
        if self._step - self._climbed_at <= _TRIAL and rung > self._rung:
            self._ceiling, self._ceiling_bps = self._rung + 1, bandwidth_bps
            self._ceiling_until = self._step + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._climbed_at = -_TRIAL
            rung = min(rung, self._climbed_from)
        if rung > self._rung:
            self._growth = _GROWTH
        if rung == self._rung and len(self._exposed_s) >= _PATIENCE:
            rung = self._larger(seen)
        if rung < self._rung:
            self._climbed_from, self._climbed_at = self._rung, self._step
        self._rung = rung

    def _least_lossy(self, rungs: range, seen: Observation, margin: float) -> int:
        """The first rung that fits, or if none does, the one that is over soonest; or one above it that takes hardly longer."""
        fitting = (rung for rung in rungs if self._fits(rung, seen, margin))
        soonest = min(rungs, key=lambda rung: self.exposed_s(self._rungs[rung], seen), default=self._rung)
        target = next(fitting, soonest)
        enough_s = (1 + _WORTH * margin) * self._step_s(target, seen)
        return next((rung for rung in rungs if rung < target and self._step_s(rung, seen) <= enough_s), target)

    def _step_s(self, rung: int, seen: Observation) -> float:
        """Forecast of a step in which compute has to wait for coding."""
        scheme = self._rungs[rung]
        return (
            seen.compute_s + self.exposed_s(scheme, seen, coding=False) + self._seconds_an_element(scheme) * sum(seen.elements)
        )

    def _seconds_an_element(self, scheme: Scheme) -> float:
        return self._coding_factor * self._coding_s.get(scheme.name, 0.0)

    def _fits(self, rung: int, seen: Observation, margin: float = 1.0) -> bool:
        return self.exposed_s(self._rungs[rung], seen) <= self._allowed_s(rung, seen, margin)

    def _allowed_s(self, rung: int, seen: Observation, margin: float = 1.0) -> float:
        """Exposed time that a rung may take."""
        hops = sum(hops for stages in self._payloads_of(self._rungs[rung], seen) for _, hops in stages)
        latency_s = self._network.alpha_s * hops
        return latency_s + margin * self._share * max(seen.compute_s, latency_s)

    def exposed_s(self, scheme: Scheme, seen: Observation, *, coding: bool = True) -> float:
        """Forecast of the exposed time if a step like the last were exchanged by a scheme, with or without its coding."""
        coding_s = self._seconds_an_element(scheme) if coding else 0.0
        coded_s = landed_s = -max(seen.lead_s, default=0.0)
        for elements, lead_s, stages in zip(seen.elements, seen.lead_s, self._payloads_of(scheme, seen), strict=True):
            coded_s = max(coded_s, -lead_s) + coding_s * elements
            landed_s = max(landed_s, coded_s)
            for payload_bytes, hops in stages:
                landed_s += self._network.predict_s(payload_bytes, hops)
        return max(0.0, landed_s)

    def state_dict(self) -> dict[str, Any]:
        return {"schemes": [rung.name for rung in self._rungs], **{name: getattr(self, name) for name in _STATE}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = (
    *("_rung", "_step", "_coding_factor", "_candidates", "_exposed_s", "_fitted", "_tolerated_s", "_spread_s", "_lenient"),
    *("_climbed_at", "_climbed_from", "_growth", "_ceiling", "_ceiling_until", "_ceiling_bps", "_pause"),
)


def _density(scheme: Scheme) -> float:
    return scheme.codec.density if isinstance(scheme, Gather) else 1.0
