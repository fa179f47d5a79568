"""Our rule: the plan with the largest progress per second."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from netsenseml.control.plans import worth
from netsenseml.control.policy import Observation
from netsenseml.exchange.communicators import Plan, RingAllReduce
from netsenseml.exchange.mesh import Shape
from netsenseml.sensing.network import FORGETTING, RESOLUTION, Array, NetworkModel, Smooth

OPTIMISM = 0.7  # standard deviations: what would be better with so much luck is tried


class Controller:
    """Choose the plan with the largest progress per second:

        progress per second = worth / seconds
        worth   = what a step is worth after what it loses    ``control.plans.worth``
        seconds = compute + exposed communication             forecast by ``NetworkModel``

    1. Every step corrects what is known of network, compute and coding.
    2. The best plan is taken if it is better than the present one by ``RESOLUTION``, below which nothing can be told.
    3. If none is, one is tried that would be with some luck: small payloads cannot tell how fast the network is, and the longer
       ago the last large one was, the less is known. Its own steps then tell whether it stays.
    """

    look_every = 8  # what plans would lose changes slowly

    def __init__(
        self,
        plans: Sequence[Plan],
        shape: Shape,
        coding_s: Mapping[str, float],
        lost: Mapping[str, float],
        *,
        latency_s: float,
        byte_s: float,
        scarce: bool,
    ) -> None:
        """What is known before the training: latency_s, byte_s of the network. coding_s: seconds an element of encoding and
        decoding, by plan. lost: share of a gradient's energy that is not sent, by plan.

        scarce: ranks share cores, so that coding takes its time from compute instead of running beside it.
        """
        self._plans, self._names = list(plans), [plan.name for plan in plans]
        self._scarce, self._lost, self._looked = scarce, dict(lost), False
        self._coding_s = np.array([coding_s.get(name, 0.0) for name in self._names])
        # What a communicator does in memory may take about as long as coding does.
        element_s = float(np.mean([*coding_s.values(), 1e-10]))
        self.network = NetworkModel(plans, shape, latency_s, byte_s, element_s)
        self._compute, self._coding = Smooth(0.0), {dense: Smooth(1.0) for dense in (True, False)}
        self.adaptive = True
        """Whether the optimizer is, which bears less; so it is taken to be until it is seen."""
        self._elements: tuple[int, ...] = ()
        self._ready: tuple[float, ...] = ()
        self.plan, self._settled = self._names[0], False

    @property
    def bandwidth_bps(self) -> float | None:
        return self.network.bandwidth_bps(self._names.index(self.plan))

    @property
    def may_skip_reports(self) -> bool:
        return self._settled and self.plan == RingAllReduce.name

    def begin(self, elements: Sequence[int], compute_s: float) -> None:
        """Choose a plan for a first step of which nothing is known but the network and the sizes of its buckets."""
        self._elements, self._ready, self._compute = tuple(elements), (0.0,) * len(elements), Smooth(compute_s)
        self.network.buckets(elements)
        # A few steps with fewer elements do no optimizer harm, while a plan that is too dense costs as many long steps.
        self.adaptive = False
        self.plan = self._names[int(self._gains()[0].argmax())]
        self.adaptive = True

    def decide(self, seen: Observation) -> None:
        self._learn(seen)
        if seen.plan != self.plan:  # a step from before the newest decision
            return
        gains, deviations = self._gains()
        if gains.max() <= RESOLUTION:
            gains += OPTIMISM * deviations
        self._settled = bool(gains.max() <= RESOLUTION)
        if not self._settled:
            self.plan = self._names[int(gains.argmax())]

    def _learn(self, seen: Observation) -> None:
        total, plan = sum(seen.elements), self._names.index(seen.plan)
        for name, share in seen.lost.items():  # the first look replaces what was only thought; later ones differ by chance
            self._lost[name] = (self._lost[name] + share) / 2 if self._looked else share
        self._looked = self._looked or bool(seen.lost)
        self._elements = seen.elements
        self._ready = tuple(ready_s / max(seen.compute_s, 1e-9) for ready_s in seen.ready_s)
        self._compute.add(max(seen.compute_s - seen.encode_s * self._scarce, 0.3 * seen.compute_s))
        for dense, factor in self._coding.items():  # what is not seen returns to what was measured at first
            coded_s = self._coding_s[plan] * total * (self._plans[plan].dense == dense)
            factor.add(seen.encode_s / coded_s if coded_s else factor.value ** (1 - 10 * FORGETTING))
        self.network.ring_share = seen.ring_share
        if seen.latency_s is not None:
            self.network.latency.add(seen.latency_s)
        self.network.buckets(seen.elements)
        coding_s = [seen.encode_s * elements / total for elements in seen.elements]
        self.network.learn(plan, seen.ready_s, coding_s, seen.communication_s)

    def _forecast(self) -> tuple[Array, Array]:
        """Of a step with every plan: what the network adds to it, by cause, shape (plans, 5), and what it takes in all, s."""
        coding_s = self._coding_s * [self._coding[plan.dense].value for plan in self._plans]
        beside_s = coding_s[:, None] * self._elements * (not self._scarce)
        # For long and short steps by themselves, as what is hidden behind both is less than what fits behind their mean.
        parts: Array = np.mean(
            [self.network.forecast([r * compute_s for r in self._ready], beside_s)[0] for compute_s in self._compute.halves], 0
        )
        return parts, self._compute.value + coding_s * sum(self._elements) * self._scarce + parts[:, 4] + 1e-9

    def _gains(self) -> tuple[Array, Array]:
        """log(progress per second of every plan / of the present one), and its standard deviations."""
        (parts, seconds), here = self._forecast(), self._names.index(self.plan)
        worths = [worth(plan, self._lost.get(plan.name, 0.0), adaptive=self.adaptive) for plan in self._plans]
        gains = np.log(worths / seconds)
        return gains - gains[here], self.network.deviations(parts, seconds, here)

    def seconds(self, name: str) -> float:
        """Forecast of a step with a plan."""
        return float(self._forecast()[1][self._names.index(name)])

    def state_dict(self) -> dict[str, Any]:
        """No more than the plan: the network may be another one when the training goes on."""
        return {"plan": self.plan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.plan, self._settled = state["plan"], False
