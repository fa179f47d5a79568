"""Our rule: the plan with the largest progress per second."""

from collections.abc import Mapping, Sequence
from typing import Any

from netsenseml.control.plans import worth
from netsenseml.control.policy import Observation
from netsenseml.exchange.communicators import Cost, Plan, RingAllReduce
from netsenseml.exchange.mesh import Shape
from netsenseml.sensing.network import Bucket, NetworkModel, Smooth

# Chosen by hand, and tried together in tests/netsenseml/simulation.py; not each by a measurement of its own.
HYSTERESIS = 0.03  # another plan must be better by more
OPTIMISM = 2.0  # times the bandwidth: the plan that would be best with so much is tried now and then
FIRST_PAUSE, LONGEST_PAUSE = 6, 320  # steps between two trials: doubled after one in vain
_TRIAL = 3  # steps of a trial before it is judged


class Controller:
    """Choose the plan with the largest progress per second:

        progress per second = worth / seconds
        worth   = what a step is worth after what it loses    ``control.plans.worth``
        seconds = compute + exposed communication             forecast by ``NetworkModel``

    1. Every step corrects what is known of network, compute and coding; all by the same smoothing.
    2. The best plan is taken if it is better than the present one by ``HYSTERESIS``; one that loses less, by a sixth of that.
    3. Small payloads cannot tell how fast the network is. So now and then the plan is tried that would be best if it were
       ``OPTIMISM`` times as fast, and kept if its own steps say so.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        shape: Shape,
        network: NetworkModel,
        coding_s: Mapping[str, float],
        lost: Mapping[str, float],
        *,
        scarce: bool,
    ) -> None:
        """coding_s: seconds an element of encoding and decoding, by plan. lost: before any gradient was seen.

        scarce: ranks share cores, so that coding takes its time from compute instead of running beside it.
        """
        self._plans = {plan.name: plan for plan in plans}
        self._shape, self._network = shape, network
        self._coding_s, self._scarce = coding_s, scarce
        self.adaptive = True
        """Whether the optimizer is, which bears less; so it is taken to be until it is seen."""
        self._lost = dict(lost)
        self._compute, self._coding = Smooth(), Smooth(1.0)
        self._costs: dict[tuple[str, int], Cost] = {}
        self._elements: tuple[int, ...] = ()
        self._ready: tuple[float, ...] = ()
        self.plan = plans[0].name
        self._home: str | None = None
        self._reports = self._quiet = self._trials = 0
        self._pause = FIRST_PAUSE

    @property
    def bandwidth_bps(self) -> float | None:
        return self._network.bandwidth_bps()

    @property
    def may_skip_reports(self) -> bool:
        return isinstance(self._plans[self.plan], RingAllReduce) and self._home is None and self._quiet >= FIRST_PAUSE

    def begin(self, elements: Sequence[int], compute_s: float) -> None:
        """Choose a plan for a first step of which nothing is known but the network and the sizes of its buckets."""
        self._elements, self._ready = tuple(elements), (0.0,) * len(elements)
        self._compute.value = compute_s
        # A few steps with fewer elements do no optimizer harm, while a plan that is too dense costs as many long steps.
        self.adaptive = False
        self.plan = self._best()
        self.adaptive = True

    def decide(self, seen: Observation) -> None:
        plan = self._plans[seen.plan]
        self._learn(plan, seen)
        if seen.plan != self.plan:  # a step from before the newest decision
            return
        self._reports += 1
        if self._home is not None:
            if self._reports >= _TRIAL:
                self._judge(self._home)
            return
        values = {name: self._value(name) for name in self._plans}
        here = self._lost.get(self.plan, 0.0)
        for names, margin in ((values, HYSTERESIS), (self._losing_less(here), HYSTERESIS / 6)):
            best = max(names, key=values.__getitem__, default=self.plan)
            if values[best] > (1 + margin) * values[self.plan]:
                self._take(best)
                return
        self._quiet += 1
        if self._quiet >= self._pause:
            self._quiet, self._trials = 0, self._trials + 1
            tried = self._hopeful(others=self._trials % 2 == 0)
            if tried != self.plan:
                self._home = self.plan
                self._take(tried)

    def _learn(self, plan: Plan, seen: Observation) -> None:
        self._lost.update(seen.lost)
        self._network.ring_share = seen.ring_share
        if seen.latency_s is not None:
            self._network.latency.add(seen.latency_s)
        coding_s = seen.encode_s if self._scarce else 0.0
        self._compute.add(max(seen.compute_s - coding_s, 0.3 * seen.compute_s))
        total = sum(seen.elements)
        if expected_s := self._coding_s.get(plan.name, 0.0) * total:
            self._coding.add(seen.encode_s / expected_s)
        self._elements = seen.elements
        self._ready = tuple(ready_s / max(seen.compute_s, 1e-9) for ready_s in seen.ready_s)
        buckets = [
            Bucket(elements, ready_s, seen.encode_s * elements / total, self._cost(plan, elements))
            for ready_s, elements in zip(seen.ready_s, seen.elements, strict=True)
        ]
        if self._network.learn(plan, buckets, seen.communication_s):
            self._pause = FIRST_PAUSE

    def _judge(self, home: str) -> None:
        """End a trial."""
        self._home, best = None, self._best()
        stays = self._value(best) > (1 + HYSTERESIS) * self._value(home)
        self._pause = FIRST_PAUSE if stays else min(2 * self._pause, LONGEST_PAUSE)
        self._take(best if stays else home)

    def _take(self, plan: str) -> None:
        if plan != self.plan:
            self.plan, self._reports, self._quiet = plan, 0, 0

    def _losing_less(self, lost: float) -> list[str]:
        return [name for name in self._plans if self._lost.get(name, 0.0) < lost]

    def _best(self) -> str:
        return max(self._plans, key=self._value)

    def _hopeful(self, *, others: bool) -> str:
        """The best plan if the network were ``OPTIMISM`` times as fast, of those whose steps take no more times as long.

        others: for the communicators in use it is not; so those that were never seen get their turn.
        """
        spared, most_s = self._plans[self.plan].communicator if others else "", OPTIMISM * self.seconds(self.plan)
        names = [name for name in self._plans if self.seconds(name) <= most_s]
        return max(names, key=lambda name: self._value(name, 1.0 if self._plans[name].communicator == spared else OPTIMISM))

    def _value(self, name: str, optimism: float = 1.0) -> float:
        """Progress per second."""
        value = worth(self._plans[name], self._lost.get(name, 0.0), adaptive=self.adaptive)
        return value / max(self.seconds(name, optimism), 1e-9)

    def seconds(self, name: str, optimism: float = 1.0) -> float:
        """Forecast of a step with a plan."""
        plan = self._plans[name]
        compute_s, byte_s = self._compute.value or 0.0, self._network.byte_s(plan.communicator) or 0.0
        coding_s = (self._coding.value or 1.0) * self._coding_s.get(name, 0.0)
        buckets = [
            Bucket(elements, ready * compute_s, 0.0 if self._scarce else coding_s * elements, self._cost(plan, elements))
            for ready, elements in zip(self._ready, self._elements, strict=True)
        ]
        beside_s = coding_s * sum(self._elements) if self._scarce else 0.0
        return compute_s + beside_s + self._network.forecast(plan, buckets, byte_s / optimism)[1]

    def _cost(self, plan: Plan, elements: int) -> Cost:
        """Kept, as the buckets of a model hardly ever change, and every plan is asked for in every step."""
        key = plan.name, elements
        if key not in self._costs:
            self._costs[key] = plan.cost(elements, self._shape)
        return self._costs[key]

    def state_dict(self) -> dict[str, Any]:
        """No more than the plan: the network may be another one when the training goes on."""
        return {"plan": self.plan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._take(state["plan"])
