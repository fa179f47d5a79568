"""Asynchronous collectives with their cost.

Every function is called by all ranks of the group in the same order and returns at once with a
future of one tensor. The byte formulas are what one rank sends, without TCP/IP headers; n is the
number of ranks.

They are launched on the group itself, as those of ``exchange.mesh`` are not known to
torch.distributed.

What is on an accelerator crosses in pinned memory of the host if the group is one of those, and
there the result arrives, too: whoever takes it brings it back.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.futures import Future

from netsenseml.streams import start_to_host


def all_reduce_mean(tensor: torch.Tensor, group: dist.ProcessGroup) -> Future[torch.Tensor]:
    """Mean over the ranks, in place where that is possible, round a ring. Divides before summing,
    so that a low-precision sum cannot overflow."""
    mean = _on_host(tensor.div_(group.size()), group)
    return _result(group.allreduce([mean]), mean)


def all_reduce_bytes(payload_bytes: int, ranks: int) -> float:
    """Bytes a rank sends in a ring all-reduce of ``payload_bytes`` = B: 2 (n - 1) / n * B.

    Each rank passes on n - 1 chunks of B / n while reducing, and as many while gathering the sums.
    """
    return 2 * (ranks - 1) / ranks * payload_bytes


def all_gather(slot: torch.Tensor, group: dist.ProcessGroup, *, ring: bool) -> Future[torch.Tensor]:
    """Gather one slot of equal size from every rank: slot of shape (s,) -> (n, s), row r from rank
    r.

    Directly every rank sends to all others at once; on the ring every link carries one flow at a
    time, and every hop costs a delay and a thread that has to wake up.
    """
    ranks, slot = group.size(), _on_host(slot, group)
    slots = _received(slot, ranks * slot.numel())
    work = (
        group._allgather_base(slots, slot)
        if ring
        else group.alltoall_base(slots, slot.repeat(ranks), [], [])
    )
    return _result(work, slots.view(ranks, -1))


def all_gather_bytes(slot_bytes: int, ranks: int) -> float:
    """Bytes a rank sends in an all-gather of slots of ``slot_bytes`` = S: (n - 1) * S."""
    return (ranks - 1) * slot_bytes


def all_to_all_chunks(
    chunks: Sequence[torch.Tensor], sizes: Sequence[int], group: dist.ProcessGroup
) -> Future[torch.Tensor]:
    """Send chunk i, shape (s_i,), to rank i; returns what arrived, shape (sum of sizes,): of rank
    i, sizes[i] elements."""
    sending = _on_host(torch.cat(list(chunks)), group)
    received = _received(sending, sum(sizes))
    sent = [chunk.numel() for chunk in chunks]
    return _result(group.alltoall_base(received, sending, list(sizes), sent), received)


def _on_host(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tensor where the collectives of a group can take it; waits for the stream that makes it
    if it must be copied."""
    if tensor.device.type == "cpu" or not isinstance(group, dist.ProcessGroupGloo):
        return tensor
    host = start_to_host(tensor)
    torch.get_device_module(tensor.device).current_stream(tensor.device).synchronize()
    return host


def _received(sent: torch.Tensor, elements: int) -> torch.Tensor:
    return torch.empty(elements, dtype=sent.dtype, device=sent.device, pin_memory=sent.is_pinned())


def _result(work: dist.Work, tensor: torch.Tensor) -> Future[torch.Tensor]:
    """A future of the tensor that a collective writes to; its own value differs between backends
    and releases."""
    # reading the value lets an error through
    return work.get_future().then(lambda done: (done.value(), tensor)[1])
