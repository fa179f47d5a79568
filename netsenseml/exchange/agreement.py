"""What all ranks know of each other's measurements, so that all can take the same decision."""

from array import array

import torch
import torch.distributed as dist
from torch.distributed import AllToAllOptions
from torch.futures import Future

from netsenseml.exchange.collectives import dissolve, own_group

_OPTIONS = AllToAllOptions()


class Agreement:
    """Every rank's measurements, shared behind the training.

    ``share`` launches and never waits, so it may be called from a collective's callback; ``result`` waits. Both are
    called in turn, on every rank. It uses a process group of its own, because collectives of one group must be
    launched in the same order everywhere and a callback's moment is different on every rank; and Gloo, so that the few
    bytes stay on the CPU whatever the gradients use.

    Cost: an all-to-all, that is one message to every other rank and one one-way delay, where an all-reduce would pass
    2 (n - 1) delays.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Form the group; called on all ranks of ``group``."""
        self._ranks = group.size()
        self._group = own_group(group, backend="gloo")
        self._shared = torch.empty(0)
        self._done: Future[object] | None = None

    def share(self, values: list[float]) -> None:
        """Send this rank's values; as many on every rank."""
        mine = torch.frombuffer(array("d", values * self._ranks), dtype=torch.float64)
        self._shared = torch.empty(self._ranks, len(values), dtype=torch.float64)
        # What all_to_all_single does, without its checks: they would take longer than all else here.
        self._done = self._group.alltoall_base(self._shared, mine, [], [], _OPTIONS).get_future()

    def result(self) -> list[list[float]] | None:
        """What the ranks shared last, row r from rank r; None if there is nothing new."""
        if self._done is None:
            return None
        self._done.wait()
        self._done = None
        shared: list[list[float]] = self._shared.tolist()
        return shared

    def close(self) -> None:
        """Wait for what is under way and dissolve the group; called on all ranks."""
        self.result()
        dissolve(self._group)

    def largest(self, values: list[float]) -> list[float]:
        """The largest of every value among the ranks; waits."""
        self.share(values)
        shared = self.result()
        assert shared is not None
        return [max(column) for column in zip(*shared, strict=True)]
