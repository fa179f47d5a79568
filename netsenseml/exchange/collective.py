"""The compressed collective: the mean of a tensor over all ranks, as a plan has it."""

import torch
import torch.distributed as dist
from torch.futures import Future

from netsenseml.compress.codec import Sent
from netsenseml.compress.feedback import ErrorFeedback, Key, energy_lost, norm, sample
from netsenseml.exchange.collectives import all_reduce_bytes
from netsenseml.exchange.collectives import all_reduce_mean as ring_mean
from netsenseml.exchange.communicators import Context, Plan, RingAllReduce
from netsenseml.exchange.mesh import Mesh
from netsenseml.exchange.scheduler import Exchange
from netsenseml.statistics import StepStatistics
from netsenseml.streams import use_here


def all_reduce_mean(
    tensor: torch.Tensor,
    key: Key,
    plan: Plan,
    mesh: Mesh,
    statistics: StepStatistics | None = None,
    *,
    feedback: bool = True,
    memory: ErrorFeedback | None = None,
) -> Future[torch.Tensor]:
    """Replace ``tensor`` by its mean over the ranks of ``mesh``, as ``plan`` has it; returns at
    once.

        work = all_reduce_mean(gradient, "fc1", DirectAllReduce(Codec("int4")), mesh)
        work.wait()

    tensor: shape (n,), contiguous, floating point, on any device; not to be touched before the work
        is done. Call it on all ranks in the same order, with the same plan and as many elements.
        The result is the same bit by bit on all of them.
    key: finds the residual, which is what earlier plans did not send of earlier tensors of this
        key: sent + new residual = tensor + old residual. Without ``feedback`` nothing is kept, and
        what is not sent is lost.
    memory: has the residuals, in place of the mesh's.
    statistics: is told bytes, times (by its ``settle``) and the energy that was not sent.

    When not to use it: where nothing is to be saved, ``torch.distributed.all_reduce`` does the same
    with nothing around it. The future raises what a collective raised; after that the mesh is of no
    use. Of an accelerator, ``wait`` makes its current stream wait for the result.
    """
    mesh.sequence += 1
    statistics = statistics or StepStatistics(mesh.ranks)
    kept = (memory or mesh.memory) if feedback else None
    if isinstance(plan, RingAllReduce):
        return _as_it_is(tensor, key, mesh, statistics, kept)
    exchange = _exchange(tensor, key, plan, mesh, statistics, mesh.sequence, kept)
    return mesh.scheduler.submit(exchange, tensor.device)


def _as_it_is(
    tensor: torch.Tensor,
    key: Key,
    mesh: Mesh,
    statistics: StepStatistics,
    memory: ErrorFeedback | None,
) -> Future[torch.Tensor]:
    """Ring all-reduce in the group of DDP, launched on the caller's thread, where nothing of the
    caller's can be overtaken, or beside it, where Gloo must wait for a device.
    """
    if memory is not None:
        add_residual(tensor, key, memory, statistics)
    if mesh.by_stream(tensor.device):
        return _launch(tensor, mesh.group, statistics)
    return mesh.scheduler.submit(_ring(tensor, mesh, statistics), tensor.device)


def add_residual(
    tensor: torch.Tensor, key: Key, memory: ErrorFeedback, statistics: StepStatistics
) -> None:
    """Add what earlier plans have left behind to ``tensor``, all of which is sent now, or needs no
    sending.

    It is spread over the next steps, and its memory is freed when there is no more.
    """
    if not memory.holds(key):
        return
    with statistics.coding():
        compensated = memory.compensate(key, tensor, dense=True)
        before = sample(compensated.tensor)
        tensor.copy_(compensated.tensor)
        compensated.tensor.zero_()
        ratio = memory.settle(key, compensated)
        if not compensated.held and not memory.momentum:
            memory.forget(key)
        statistics.lose(0.0, norm(before) ** 2, ratio)


def _launch(
    tensor: torch.Tensor, group: dist.ProcessGroup, statistics: StepStatistics
) -> Future[torch.Tensor]:
    sent = all_reduce_bytes(tensor.nbytes, group.size())
    return statistics.launch(lambda: ring_mean(tensor, group), sent, elements=tensor.numel())


def _ring(tensor: torch.Tensor, mesh: Mesh, statistics: StepStatistics) -> Exchange:
    use_here(tensor)
    return tensor.copy_((yield _launch(tensor, mesh.stage(0), statistics)), non_blocking=True)


def _exchange(
    tensor: torch.Tensor,
    key: Key,
    plan: Plan,
    mesh: Mesh,
    statistics: StepStatistics,
    number: int,
    memory: ErrorFeedback | None,
) -> Exchange:
    with statistics.coding():
        use_here(tensor)
        if memory is not None:
            compensated = memory.compensate(key, tensor, dense=plan.dense)
            source = compensated.tensor
        else:
            source = tensor.to(torch.float32, copy=True)
        before = sample(source)
    out = tensor if tensor.dtype == source.dtype else torch.empty_like(source)
    context = Context(
        mesh, statistics, number, out, Sent(), mesh.rank, (mesh.stage(0), mesh.stage(1))
    )
    mean = yield from plan.exchange(source, context)
    with statistics.coding():
        lost, scale = energy_lost(before, source), context.sent.residual_scale
        ratio = 0.0
        if memory is not None:
            ratio = memory.settle(key, compensated, context.sent.positions, scale=scale)
        if scale:
            statistics.lose(lost / scale**2, norm(before) ** 2, ratio / scale)
        return tensor.copy_(mean)  # which does nothing where the mean was formed in it
