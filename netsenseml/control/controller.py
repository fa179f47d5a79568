"""Our rule: the plan with the largest progress per second."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from netsenseml.control.plans import step_progress
from netsenseml.control.policy import Observation, split_timing, with_timing
from netsenseml.exchange.communicators import Plan, RingAllReduce
from netsenseml.exchange.mesh import Topology
from netsenseml.sensing.network import FORGETTING, RESOLUTION, Array, NetworkModel, Smooth

OPTIMISM = 0.7  # standard deviations: what would be better with so much luck is tried
_RISK = 0.7
"""With a delay nothing is tried for luck that is thought to make half the progress: several of its
steps have begun before the first one tells, and where exchanges are hidden nothing else tells how
long a larger one takes."""
_EAGER = 0.1
"""Share of what it costs to come back that must have been lost by staying before the ranks part.
All of it would be a minute where links are so thin that a model takes half of one; nothing of it,
and they would part for a moment's gain."""


class Controller:
    """Choose the plan with the largest progress per second:

        progress per second = progress of a step / seconds
        progress of a step  = what is left of it by what it loses    ``control.plans.step_progress``
        seconds             = compute + exposed communication        forecast by ``NetworkModel``

    1. Every step corrects what is known of network, compute and coding.
    2. The best plan is taken if it is better than the present one by ``RESOLUTION``, below which
    nothing can be told.
    3. If none is, one is tried that would be with some luck: small payloads cannot tell how fast
       the network is, and the longer ago the last large one was, the less is known. Its own steps
       then tell whether it stays.

    With ``intervals`` a plan may also be to exchange parameters every so many steps; then

        seconds = compute + (coding + communication) / interval

    From a plan with an interval to one without all of the model and of the optimizer's moments has
    to be exchanged in float32 (``methods.local_steps``). So that step is taken when as much time
    has been lost by not taking it, as skis are bought when so much has been spent on hiring them:
    then it was never more than twice the time that it had to be (Karlin, Manasse, Rudolph and
    Sleator, Competitive snoopy caching, Algorithmica 3, 1988). The other way costs nothing at once,
    and is taken when a share ``_EAGER`` of that is lost; in the beginning, at once.

    With ``delays`` a plan may also be to apply a mean one exchange later. As its exchange then has
    as long as the next one is away,

        seconds = the longer one of compute and (coding + communication) / interval

    Into a delay and out of it costs a step each time, as one comes first that has no mean, and the
    last mean is spread over others: that step is taken when so much has been lost by not taking it.
    Plans of one kind have an interval or none, and a delay or none; only between these one is tried
    for luck.
    """

    sample_every = 8  # what plans would lose changes slowly

    def __init__(
        self,
        plans: Sequence[Plan],
        topology: Topology,
        coding_s: Mapping[str, float],
        lost: Mapping[str, float],
        *,
        latency_s: float,
        byte_s: float,
        scarce: bool,
        timings: Sequence[tuple[int, int]] = ((0, 0),),
    ) -> None:
        """What is known before the training: latency_s, byte_s of the network. coding_s: seconds an
        element of encoding and decoding, by plan. lost: share of a gradient's energy that is not
        sent, by plan. timings: intervals and delays that plans may have (``policy.timings``).

        scarce: ranks share cores, so that coding takes its time from compute instead of running
        beside it.
        """
        self._plans, self._timings = list(plans), list(timings)
        self.names = [with_timing(plan.name, *when) for when in self._timings for plan in plans]
        """Of all that there is to choose from: plans, with every interval and delay."""
        self._kinds = np.repeat([_kind(*when) for when in self._timings], len(plans))
        self._missed_s = 0.0
        """By not taking the best plan of another kind, as long as there is a better one."""
        self._scarce, self._lost, self._looked = scarce, dict(lost), False
        self._coding_s = np.array([coding_s.get(plan.name, 0.0) for plan in plans])
        # What a communicator does in memory may take about as long as coding does.
        element_s = float(np.mean([*coding_s.values(), 1e-10]))
        self.network = NetworkModel(plans, topology, latency_s, byte_s, element_s)
        self._compute, self._coding = Smooth(0.0), {dense: Smooth(1.0) for dense in (True, False)}
        self._cold = {True: 2, False: 2}
        """Steps of which the coding is not counted yet, of dense plans and of sparse ones."""
        self.adaptive = True
        """Whether the optimizer is, which bears less; so it is taken to be until it is seen."""
        self._elements: tuple[int, ...] = ()
        self._ready: tuple[float, ...] = ()
        self.plan, self._settled = self.names[0], False

    @property
    def bandwidth_bps(self) -> float | None:
        return self.network.bandwidth_bps(self.names.index(self.plan) % len(self._plans))

    @property
    def may_skip_reports(self) -> bool:
        return self._settled and self.plan == RingAllReduce.name

    def begin(self, elements: Sequence[int], compute_s: float) -> None:
        """Choose a plan for a first step of which nothing is known but the network and the sizes of
        its buckets."""
        self._elements, self._ready, self._compute = (
            tuple(elements),
            (0.0,) * len(elements),
            Smooth(compute_s),
        )
        # A few steps with fewer elements do no optimizer harm, while a plan that is too dense costs
        # as many long steps.
        self.adaptive = False
        gains = self._gains()[0]
        other = self._kinds > self._kinds.min()
        # a few steps of the plainest kind tell what compute takes, and what optimizer it is: then
        # it is free
        if other.any():
            gains[other], self._missed_s = -np.inf, np.inf
        self.plan = self.names[int(gains.argmax())]
        self.adaptive = True

    def decide(self, observation: Observation) -> None:
        self._learn(observation)
        if observation.plan != self.plan:  # a step from before the newest decision
            return
        gains, deviations = self._gains()
        other = self._kinds != _kind(*split_timing(self.plan)[1:])
        if other.any():
            best = int(np.where(other, gains, -np.inf).argmax())
            if self._worth_a_switch(best, float(gains[best] - gains[~other].max()), observation):
                self.plan, self._settled = self.names[best], False
                return
        gains[other] = -np.inf
        if gains.max() <= RESOLUTION:
            if split_timing(self.plan)[2]:
                gains[gains < -_RISK] = -np.inf
            gains += OPTIMISM * deviations
        self._settled = bool(gains.max() <= RESOLUTION)
        if not self._settled:
            self.plan = self.names[int(gains.argmax())]

    def _worth_a_switch(self, there: int, better: float, observation: Observation) -> bool:
        """To a plan of another kind, number ``there``. better: logarithm of the progress per second
        there over here."""
        (_, interval, delay), (_, other_interval, other_delay) = (
            split_timing(observation.plan),
            split_timing(self.names[there]),
        )
        farther = _kind(other_interval, other_delay) > _kind(interval, delay)
        if better <= (RESOLUTION if farther else 0.0):  # in doubt every step, and at once
            self._missed_s = 0.0
            return False
        self._missed_s += (1 - np.exp(-better)) * (
            max(interval, 1) * observation.compute_s + observation.exposed_s
        )
        price_s = 0.0 if delay == other_delay else observation.compute_s + observation.exposed_s
        if (interval > 0) != (other_interval > 0):
            price_s += self._back_s() * (1.0 if interval else _EAGER)
        if self._missed_s < price_s:
            return False
        self._missed_s = 0.0
        return True

    def _back_s(self) -> float:
        """What it takes from a plan with an interval to one without: parameters and moments as they
        are."""
        moments = 2 if self.adaptive else 1
        self.network.buckets([sum(self._elements)] * (1 + moments))
        row = next(
            number for number, plan in enumerate(self._plans) if isinstance(plan, RingAllReduce)
        )
        exposed = self.network.forecast(
            [0.0] * (1 + moments), np.zeros((len(self._plans), 1 + moments))
        )[0]
        return float(exposed[row, 4])

    def _learn(self, observation: Observation) -> None:
        name, interval, delay = split_timing(observation.plan)
        total, plan = (
            sum(observation.elements),
            self.names.index(with_timing(name, *self._timings[0])),
        )
        for name, share in observation.lost.items():
            # The first look replaces what was only thought; later ones differ by chance.
            self._lost[name] = (self._lost[name] + share) / 2 if self._looked else share
        self._looked = self._looked or bool(observation.lost)
        self._elements = observation.elements
        self._ready = tuple(
            ready_s / max(observation.compute_s, 1e-9) for ready_s in observation.ready_s
        )
        coded = self._scarce and (not interval or delay > 0)  # else nothing is coded meanwhile
        beside_s = observation.encode_s / max(interval, 1) * coded
        self._compute.add(max(observation.compute_s - beside_s, 0.3 * observation.compute_s))
        # what is not seen returns to what was measured at first
        for dense, factor in self._coding.items():
            coded_s = self._coding_s[plan] * total * (self._plans[plan].dense == dense)
            # it touches its memory for the first time, twice, as DDP makes its buckets anew
            if coded_s and self._cold[dense]:
                self._cold[dense] -= 1
            else:
                factor.add(
                    observation.encode_s / coded_s
                    if coded_s
                    else factor.value ** (1 - 10 * FORGETTING)
                )
        self.network.ring_share = observation.ring_share
        if observation.latency_s is not None and not (
            delay and observation.latency_s > self.network.latency.value
        ):
            # with a delay, it is that of a queue in which the next exchange is
            self.network.latency.add(observation.latency_s)
        parts, ready_s = (
            (observation.elements, observation.ready_s) if not interval else ((total,), (0.0,))
        )
        self.network.buckets(parts)
        coding_s = [observation.encode_s * elements / total for elements in parts]
        self.network.learn(plan, ready_s, coding_s, observation.communication_s)

    def _forecast(self) -> tuple[Array, Array]:
        """Of a step with every name: what the network adds to it, by cause, shape (names, 5), and
        what it takes in all, s."""
        coding_s = self._coding_s * [self._coding[plan.dense].value for plan in self._plans]
        total = sum(self._elements)
        at_once = np.zeros((len(self._plans), 5))  # what an exchange takes that no backward hides
        if any(interval for interval, _ in self._timings):
            self.network.buckets([total])
            at_once = self.network.forecast([0.0], coding_s[:, None] * total)[0]
        self.network.buckets(self._elements)
        found = []
        for interval, delay in self._timings:
            coded = self._scarce and (not interval or delay > 0)
            busy_s = coding_s * total / max(interval, 1) * coded + 1e-9
            halves = []
            # For long and short steps by themselves, as what is hidden behind both is less than
            # what fits behind their mean.
            for compute_s in self._compute.halves:
                exchange = (
                    at_once / interval
                    if interval
                    else self._of_gradients(coding_s, compute_s, delay)
                )
                halves.append(_step(compute_s + busy_s, exchange, delay))
            found.append([np.mean(of_both, 0) for of_both in zip(*halves, strict=True)])
        parts, seconds = zip(*found, strict=True)
        return np.concatenate(parts), np.concatenate(seconds)

    def _of_gradients(self, coding_s: Array, compute_s: float, delay: int) -> Array:
        """Of an exchange in a step with every plan: what is exposed, or with a delay what it
        takes."""
        ready_s = [ready * compute_s for ready in self._ready]
        beside_s = coding_s[:, None] * self._elements * (not self._scarce)
        return (
            self.network.least(ready_s, beside_s)
            if delay
            else self.network.forecast(ready_s, beside_s)[0]
        )

    def _gains(self) -> tuple[Array, Array]:
        """log(progress per second of every plan / of the present one), and its standard
        deviations."""
        (parts, seconds), here = self._forecast(), self.names.index(self.plan)
        progress = [
            step_progress(
                plan,
                self._lost.get(plan.name, 0.0),
                adaptive=self.adaptive,
                interval=interval,
                delay=delay,
            )
            for interval, delay in self._timings
            for plan in self._plans
        ]
        gains = np.log(progress / seconds)
        return gains - gains[here], self.network.deviations(parts, seconds, here)

    def seconds(self, name: str) -> float:
        """Forecast of a step with a plan."""
        return float(self._forecast()[1][self.names.index(name)])

    def state_dict(self) -> dict[str, Any]:
        """No more than the plan: the network may be another one when the training goes on."""
        return {"plan": self.plan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.plan, self._settled, self._missed_s = state["plan"], False, 0.0


def _step(busy_s: Array, exchange: Array, delay: int) -> tuple[Array, Array]:
    """(what the network adds to a step, what that takes) with an exchange behind what keeps the
    rank busy, or beside it."""
    if not delay:
        return exchange, busy_s + exchange[:, 4]
    longer = exchange[:, 4] > busy_s
    return exchange * longer[:, None], np.where(longer, exchange[:, 4], busy_s)


def _kind(interval: int, delay: int) -> int:
    """Of plans between which nothing is lost by going from one to another; the larger, the farther
    from plain exchanges."""
    return 2 * (interval > 0) + (delay > 0)
