"""What published controllers share: each gives a step a number of bytes."""

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from netsenseml.control.policy import Observation
from netsenseml.exchange.communicators import (
    BySize,
    DirectAllReduce,
    Hierarchical,
    Plan,
    RingAllReduce,
    SparseAllGather,
    parse,
)
from netsenseml.exchange.mesh import Topology

_WINDOW = 8


class ByteBudget:
    """Of the plans whose bytes fit the budget of a step, take the one that loses least of a
    gradient; if none fits, the smallest.

    What a policy has of its own is ``budget_bytes``. Bytes are those across a host's interface, one
    way. Published controllers mostly set the ratio of top-k with a float32 and an index an element.
    In their best form here they have the plans that our own rule chooses from: first all elements
    in fewer bits, then ever fewer elements in 4 bits, with error feedback. A ratio of theirs is the
    budget over the bytes of all-reduce.

    Directly or round a ring is chosen by size, as all methods do that cannot choose (``BySize``).
    """

    may_skip_reports = False
    bandwidth_bps: float | None = None
    sample_every = 0

    def __init__(
        self, plans: Sequence[Plan], topology: Topology, elements: int, *, start: float
    ) -> None:
        """plans: ordered by what they lose, as ``control.plans.plans`` does. elements: of all
        buckets. start: share of all-reduce's bytes in the first steps, of which nothing is
        known."""
        self._topology, self._plans = (
            topology,
            [plan for plan in plans if not plan.name.endswith("-ring")],
        )
        self._elements: tuple[int, ...] = ()
        self._levels: list[tuple[str, float]] = []
        self._buckets((elements,))
        self.plan = self._within(start * self.dense_bytes)

    @property
    def dense_bytes(self) -> float:
        """Of all-reduce."""
        return self._levels[0][1]

    @property
    def smallest_bytes(self) -> float:
        return min(size for _, size in self._levels)

    def budget_bytes(self, observation: Observation) -> float:
        """Learn from a step; how many bytes a later one may send."""
        raise NotImplementedError

    def sent_bytes(self, observation: Observation) -> float:
        """What a step has sent."""
        return self._bytes(self._plan(observation.plan))

    def latency_s(self, observation: Observation) -> float:
        """What its exchange would have taken with nothing in it."""
        cost = self._plan(observation.plan).cost(max(observation.elements), self._topology)
        return (observation.latency_s or 0.0) * cost.latency_terms

    def decide(self, observation: Observation) -> None:
        self._buckets(observation.elements)
        self.plan = self._within(self.budget_bytes(observation))

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.plan = state["plan"]

    def _buckets(self, elements: tuple[int, ...]) -> None:
        """What the next steps consist of; finds the levels of compression: names of plans and their
        bytes."""
        if elements != self._elements:
            self._elements = elements
            self._levels = [(plan.name, self._bytes(plan)) for plan in map(self._form, self._plans)]

    def _form(self, plan: Plan) -> Plan:
        inner = plan.inner if isinstance(plan, Hierarchical) else plan
        if not isinstance(inner, DirectAllReduce | SparseAllGather):
            return plan
        ranks = self._topology.ranks if inner is plan else self._topology.of_hosts.ranks
        form = BySize(inner).chosen(max(self._elements), ranks)
        return form if inner is plan else Hierarchical(form)

    def _bytes(self, plan: Plan) -> float:
        return sum(plan.cost(elements, self._topology).host_bytes for elements in self._elements)

    def _plan(self, name: str) -> Plan:
        # that has an element's bytes, too
        return self._plans[0] if name == RingAllReduce.name else parse(name)

    def _within(self, budget_bytes: float) -> str:
        fits = max(budget_bytes, self.smallest_bytes)
        return next(name for name, size in self._levels if size <= fits)


class Recent:
    """Bandwidth and compute time, of the newest steps.

    The bandwidth is all bytes of these over all the time in which they crossed the network, latency
    aside. So a step counts by the time that it took: a link that is slower now is known at once,
    one that is faster after as many steps as are kept.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=_WINDOW)

    def add(self, sent_bytes: float, seconds: float, latency_s: float, compute_s: float) -> None:
        """seconds: in which a collective was under way. Of nearly all of them being latency a tenth
        is left."""
        self._steps.append((sent_bytes, max(seconds - latency_s, seconds / 10, 1e-9), compute_s))

    @property
    def bytes_per_s(self) -> float:
        return sum(step[0] for step in self._steps) / sum(step[1] for step in self._steps)

    @property
    def compute_s(self) -> float:
        return median(step[2] for step in self._steps)

    def state(self) -> list[tuple[float, float, float]]:
        """For a checkpoint."""
        return list(self._steps)

    def load(self, state: Sequence[tuple[float, float, float]]) -> None:
        self._steps.clear()
        self._steps.extend(state)
