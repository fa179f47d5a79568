"""DeCo-SGD (Lu, Jiang, Li, Dong, Wei, Cai, Wang: DeCo-SGD: Joint Optimization of Delay Staleness
and Gradient Compression Ratio for Distributed SGD, arXiv 2507.17346), without its staleness, to be
compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

from netsenseml.control.budget import ByteBudget, Recent
from netsenseml.control.policy import Observation
from netsenseml.exchange.communicators import Plan
from netsenseml.exchange.mesh import Topology


class Deco(ByteBudget):
    """The largest ratio d with which an exchange takes no longer than a step computes:

        b + d S / a <= T,    so d = min(1, (T - b) a / S)

    a: bandwidth. b: latency. S: size of a gradient. T: what a step computes.

    The paper chooses d together with the staleness s, by which the mean of a step is applied s
    steps later: of all pairs with which the network holds no computation up (d S / a <= T and b + d
    S / a <= s T) the one with the least noise; staleness amplifies, exponentially, what compression
    does to it. **Here there is no staleness: only d is chosen.** Means are applied in their own
    step, so the exchange is beside its own backward, and what does not fit there is waited for. The
    condition above is the paper's at s = 1, where an exchange has the time of one computation. Over
    paths with b > T, where the paper would take s > 1, the smallest payload is what is left; that
    is not DeCo-SGD at its best. We know the paper by its abstract and from what others say of it;
    the formulas are as we understand it.

    Where it leaves something open, or supposes another system, we chose: a is that of the newest 8
    steps, latency aside (``Recent``), T their median, b the newest latency of an empty exchange. d
    is a share of the bytes of all-reduce, and chosen anew in every step.
    """

    def __init__(
        self, plans: Sequence[Plan], topology: Topology, elements: int, *, start: float
    ) -> None:
        super().__init__(plans, topology, elements, start=start)
        self._recent = Recent()

    def budget_bytes(self, observation: Observation) -> float:
        recent, latency_s = self._recent, self.latency_s(observation)
        recent.add(
            self.sent_bytes(observation),
            observation.communication_s,
            latency_s,
            observation.compute_s,
        )
        self.bandwidth_bps = 8 * recent.bytes_per_s
        return recent.bytes_per_s * (recent.compute_s - latency_s)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "recent": self._recent.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._recent.load(state["recent"])
