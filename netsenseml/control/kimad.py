"""Kimad (Xin, Ilin, Zhang, Canini, Richtárik: Kimad: Adaptive Gradient Compression with Bandwidth
Awareness, DistributedML 2023, arXiv 2312.08053), to be compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

from netsenseml.control.budget import ByteBudget, Recent
from netsenseml.control.policy import Observation
from netsenseml.exchange.communicators import Plan
from netsenseml.exchange.mesh import Topology

_OF_COMPUTE = 1.5


class Kimad(ByteBudget):
    """Send what the bandwidth carries in the time that a step has for it:

        budget = B x (t - T)
        compressor = the one with the smallest error among those that fit the budget

    B: bandwidth as estimated. t: time budget of a step, which the user gives. T: what a step
    computes.

    Where the paper leaves something open, or supposes another system, we chose: B is that of the
    newest 8 steps, latency aside (``Recent``), and T their median. t = 1.5 T unless it is given, so
    that no more than a third of the time goes to the network. What may go beside backward is not
    added to the budget. Bytes are those of the collective, where the paper has a server. We know
    the paper by its abstract and introduction, and from what others say of it.

    Kimad+ shares the budget out among the layers, by dynamic programming over ratios of top-k, so
    that their errors sum up to the least. Within a bucket we have that without a search: its k
    largest elements are those that leave the smallest error, whatever layer they are of. Among
    buckets there is no such choice: a plan is that of all buckets of a step.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        topology: Topology,
        elements: int,
        *,
        start: float,
        time_budget: float,
    ) -> None:
        """time_budget: t, s; 0 leaves it to T."""
        super().__init__(plans, topology, elements, start=start)
        self._time_budget, self._recent = time_budget, Recent()

    def budget_bytes(self, observation: Observation) -> float:
        recent = self._recent
        recent.add(
            self.sent_bytes(observation),
            observation.communication_s,
            self.latency_s(observation),
            observation.compute_s,
        )
        self.bandwidth_bps = 8 * recent.bytes_per_s
        time_budget = self._time_budget or _OF_COMPUTE * recent.compute_s
        return recent.bytes_per_s * (time_budget - recent.compute_s)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "recent": self._recent.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._recent.load(state["recent"])
