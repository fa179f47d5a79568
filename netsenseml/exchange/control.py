"""What all ranks measured goes to rank 0, and what it decides comes back, behind the training."""

from array import array
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import AllToAllOptions, ScatterOptions
from torch.futures import Future

from netsenseml.exchange.mesh import Mesh
from netsenseml.exchange.scheduler import Exchange
from netsenseml.records import monotonic_s

_DIRECT, _FROM_RANK_0 = AllToAllOptions(), ScatterOptions()
_FROM_RANK_0.rootRank = 0


class ControlChannel:
    """Rounds of measurements and decisions, each launched at once and taken later.

    A round is an all-to-all of every rank's measurements, and rank 0's answer to all. Both are
    direct, so that a round takes two latency terms; and as the first is nearly empty and all wait
    for all in it, it measures what a direct exchange takes at least.
    """

    def __init__(
        self, mesh: Mesh, decide: Callable[[list[list[float]]], bytes], answer_bytes: int
    ) -> None:
        """decide: called on rank 0, on a thread of its own, with a row of every rank; returns the
        answer."""
        self._rank, self._ranks, self._decide = mesh.rank, mesh.ranks, decide
        self._answer_bytes = answer_bytes
        self._groups: tuple[dist.ProcessGroup, ...] = mesh.stage(2), mesh.stage(3)
        self._scheduler = mesh.new_scheduler()
        self.latency_s = 0.0
        """Of the newest round that is over: of its first part, on this rank."""

    def report(self, measured: list[float]) -> Future[torch.Tensor]:
        """Begin a round; as many values on every rank. The future has rank 0's answer, shape
        (bytes,), uint8."""
        return self._scheduler.submit(self._round(measured))

    def send(self, tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Send every rank its part of a tensor, shape (n,), n a multiple of the ranks; returns what
        arrived and how long it took, s."""
        began_s, arrived = monotonic_s(), torch.empty_like(tensor)
        self._groups[0].alltoall_base(arrived, tensor, [], [], _DIRECT).wait()
        return arrived, monotonic_s() - began_s

    def largest(self, values: list[float]) -> list[float]:
        """The largest of every value among the ranks; waits."""
        arrived, _ = self.send(torch.tensor(values * self._ranks, dtype=torch.float64))
        return arrived.view(self._ranks, -1).amax(0).tolist()

    def _round(self, measured: list[float]) -> Exchange:
        mine = torch.frombuffer(array("d", measured * self._ranks), dtype=torch.float64)
        rows = torch.empty(self._ranks, len(measured), dtype=torch.float64)
        began_s = monotonic_s()
        # What all_to_all_single and scatter do, without their checks: they would take longer than
        # all else here.
        yield self._groups[0].alltoall_base(rows, mine, [], [], _DIRECT).get_future()
        self.latency_s = monotonic_s() - began_s
        answer = torch.empty(self._answer_bytes, dtype=torch.uint8)
        sent = []
        if self._rank == 0:
            decision = torch.frombuffer(bytearray(self._decide(rows.tolist())), dtype=torch.uint8)
            sent = [[decision] * self._ranks]
        yield self._groups[1].scatter([answer], sent, _FROM_RANK_0).get_future()
        return answer

    def close(self) -> None:
        """End the thread, after all that is under way; call it on all ranks."""
        self._scheduler.close()
        del self._groups  # they end with their last reference
        self._groups = ()
