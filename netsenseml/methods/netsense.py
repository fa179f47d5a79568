"""Sense, decide, compress: the method NetSenseML."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future

from netsenseml.control.bdp import BdpPolicy
from netsenseml.control.budget import BudgetPolicy, ladder
from netsenseml.control.costs import coding_costs
from netsenseml.control.fixed import FixedPolicy
from netsenseml.control.observation import Observation, Policy
from netsenseml.exchange.agreement import Agreement
from netsenseml.exchange.schemes import Plain
from netsenseml.ledger import Ledger
from netsenseml.methods.base import require_cpu
from netsenseml.methods.coded import Coded
from netsenseml.methods.plain import AllReduce
from netsenseml.sensing.network import NetworkEstimate, Transfer


class NetSense(Coded):
    """Every step is exchanged by the scheme that the network can bear.

    1. When a step's exchange is over, every rank shares what it measured: how long its collectives took, when its buckets
       were ready, how long it computed, what the kernel says of its connections. That runs behind the optimizer and the
       next forward.
    2. Before the first bucket of the next step, every rank feeds the same numbers into the same estimate and policy,
       and so arrives at the same scheme.
    3. Plain all-reduce is one of the schemes. While it goes on, nothing is coded, copied or kept, and while the network bears
       it with ease, of steps shorter than ``_ASK_S`` only every other one is shared.
    """

    senses = True

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        *,
        policy: str,
        share: float,
        floor: float,
        start: float,
        schemes: Sequence[str],
    ) -> None:
        require_cpu(module)  # before groups are formed
        ranks = group.size()
        self._agreement = Agreement(group)
        self._network = NetworkEstimate()
        self._policy: Policy
        if policy == "fixed" or ranks == 1:  # one rank alone has nothing to decide
            self._policy = FixedPolicy(schemes if policy == "fixed" else [Plain.name])
        elif policy == "bdp":
            self._policy = BdpPolicy(start=start, floor=floor)
        else:
            parameter = next(module.parameters())
            rungs = ladder(ranks, floor, parameter.element_size())
            costs = coding_costs(rungs, ranks, parameter.device)
            agreed = dict(zip(costs, self._agreement.largest(list(costs.values())), strict=True))
            self._policy = BudgetPolicy(rungs, ranks, self._network, agreed, share=share, start=start)
        super().__init__(module, group, self._policy.scheme)
        self._all_reduce = AllReduce(module, group)
        self._elements: tuple[int, ...] = ()
        self._sent = 0, 0
        self._was_plain = self._nothing_left = True
        self._step_s, self._since_asked_s, self._rested = _ASK_S, 0.0, 0

    def begin(self) -> None:
        super().begin()
        self._learn()
        # By agreed times, so that all ranks ask and share in the same steps: only then the smallest is the bottleneck's.
        self._since_asked_s = self._step_s + (0.0 if self.asks_kernel else self._since_asked_s)
        self.asks_kernel = self._since_asked_s >= _ASK_S
        rests = self._policy.at_ease and not self.asks_kernel and self._rested < _MOST_RESTS
        self._rested = self._rested + 1 if rests else 0
        self.scheme = self._policy.scheme
        self._nothing_left, self._was_plain = self._was_plain, isinstance(self.scheme, Plain)

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        if self._was_plain and self._nothing_left:
            return self._all_reduce.exchange(bucket, ledger)
        return super().exchange(bucket, ledger)

    def finish(self, ledger: Ledger) -> None:
        spent = ledger.of_backward()
        if self._rested or not spent.payload_bytes:  # a single rank has nobody to exchange with
            return
        tcp = ledger.tcp
        kernel_bps = tcp.bandwidth_bps if tcp is not None else None
        rtt_s = tcp.min_rtt_s if tcp is not None else None
        last_s = max(spent.ready_s)
        self._elements, self._sent = tuple(spent.bucket_elements), (spent.payload_bytes, spent.hops)
        self._agreement.share(
            [
                spent.comm_s,
                -spent.window_s,  # of everything the smallest value counts, of this one and the next the largest
                -spent.encode_s,
                spent.flight_s,
                kernel_bps or _UNKNOWN,
                rtt_s or _UNKNOWN,
                *(last_s - ready_s for ready_s in spent.ready_s),
            ]
        )

    def _learn(self) -> None:
        """Take what the ranks shared of the last step into account; the slowest rank is the one that all waited for."""
        shared = self._agreement.result()
        if shared is None:
            return
        smallest = (min(column) for column in zip(*shared, strict=True))
        exposed_s, minus_compute_s, minus_encode_s, flight_s, kernel_bps, _, *lead_s = smallest
        # A ring passes every delay as often as all others. Summed exactly, as machines may add in different orders.
        rtt_s = math.fsum(row[_RTT] for row in shared) / len(shared)
        payload_bytes, hops = self._sent
        self._network.update([Transfer(payload_bytes, hops, flight_s)], _known(kernel_bps), _known(rtt_s))
        self.bandwidth_bps = self._network.beta_bps
        self._step_s = exposed_s - minus_compute_s
        self._policy.decide(
            Observation(
                elements=self._elements,
                lead_s=tuple(lead_s),
                compute_s=-minus_compute_s,
                exposed_s=exposed_s,
                payload_bytes=payload_bytes,
                flight_s=flight_s,
                encode_s=-minus_encode_s,
            )
        )

    def close(self) -> None:
        try:
            self._agreement.close()
        finally:
            super().close()

    def state_dict(self) -> dict[str, Any]:
        self._learn()
        kept = {"policy": self._policy.state_dict(), "network": self._network.state_dict(), "was_plain": self._was_plain}
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, one line, where the checkpoint is of another policy, ladder or version."""
        if self._network.state_dict().keys() != state["network"].keys():
            raise ValueError("the checkpoint is of another version of netsense; go on without the state of the hook")
        mine, other = self._policy.state_dict(), state["policy"]
        if mine.keys() != other.keys() or mine.get("schemes") != other.get("schemes"):
            raise ValueError(
                "the checkpoint is of netsense with other schemes, which depend on policy, floor, the number of ranks and the "
                "version; use the same, or go on without the state of the hook"
            )
        self._agreement.result()  # of a step that is not part of the checkpoint
        # Some ranks may have learnt from that step, others not.
        self._step_s, self._since_asked_s, self.asks_kernel, self._rested = _ASK_S, 0.0, True, 0
        super().load_state_dict(state)
        self._policy.load_state_dict(state["policy"])
        self._network.load_state_dict(state["network"])
        self._was_plain = state["was_plain"]


_UNKNOWN = float("inf")
"""Larger than anything, where the smallest value counts."""
_ASK_S = 0.2
"""So often is the kernel asked at most; it would not tell of a shorter time anyway (``sensing.tcp``)."""
_MOST_RESTS = 1
"""So many steps in a row are not shared at most: a change of the network, which takes four to be known, is known after five."""
_RTT = 5
"""Place of the round-trip time among the values that are shared."""


def _known(value: float) -> float | None:
    return None if value == _UNKNOWN else value
