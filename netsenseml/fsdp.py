"""Models that ``fully_shard`` (FSDP2) has sharded within groups of ranks and replicated between
them.

Within a group nothing changes: gradients are reduced and scattered, so that every rank has the mean
of its shard. The all-reduce of that shard between the replicas is what a method takes over, by a
hook of FSDP. Error feedback is by shard.

FSDP calls this hook after its own all-reduce, unless it knows of no replicas. So while a session is
there, the parameter groups of FSDP are told of the shards' dimension of their mesh alone; the
parameters remain distributed on both, as do checkpoints.
"""

import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from netsenseml.failure import PeerFailed
from netsenseml.hook import Session
from netsenseml.records import monotonic_s


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has made the model, or a part of it."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # before torch 2.6
        return False
    return any(isinstance(module, FSDPModule) for module in model.modules())


class ShardedSession(Session):
    """A session for ``fully_shard`` on a mesh of two dimensions, replicas and shards; made by
    ``attach``.

    Backward waits in every exchange, as it does in FSDP's own on a CPU. The replicas of every shard
    decide for themselves. ``rank`` is that of the default group; an error that names a rank counts
    the replicas of this rank's shard.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        *,
        record: str | os.PathLike[str] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        """Raises ValueError, one line, where there are no replicas, or torch or the method cannot
        do it; RuntimeError where there is a session already."""
        self._units = _units(model)
        group, *others = {unit.replicas for unit in self._units}
        if others:
            raise ValueError(
                "all parts of the model must be on the same mesh, as all replicas decide together"
            )
        shards = _Shards(model, self._units)
        self._open(model, shards, group, method, record, scaler, options)
        self.rank = dist.get_rank()
        self._task = -1
        self._waited_s = 0.0
        if not getattr(self.method, "takes_shards", True):
            self.close()
            raise ValueError(
                f"'{method}' needs the buckets of DistributedDataParallel; with fully_shard choose"
                " another method"
                + ", or interval=1 and delay=0"
                * ("interval" in options or "delay" in options)
            )

    def register(self, _: Any) -> None:
        for unit in self._units:
            unit.hook(self)

    def close(self, accuracy: float | None = None, loss: float | None = None) -> None:
        """As with DDP; afterwards the exchange is FSDP's own again."""
        try:
            super().close(accuracy, loss)
        finally:
            for unit in self._units:
                unit.unhook()

    def reduce(self, unit: "_Unit", gradient: torch.Tensor) -> None:
        """Replace the gradients of a unit's shards, shape (n,), by their mean over the replicas.
        FSDP calls this."""
        bucket: Any = _Bucket(gradient, unit.trained(gradient.numel()))
        task = torch._C._current_graph_task_id()
        first = task != self._task
        if first:
            self._task, self._waited_s = task, 0.0
            torch.autograd.Variable._execution_engine.queue_callback(self._reduced)
        elif self._clock.immediate:
            self._statistics.exposed_s += self._waited_s
            self._exchanged_s += self._waited_s
        done = self._exchange(bucket, first=first, last=False)
        launched_s = monotonic_s()
        try:
            mean = done.wait()
        except RuntimeError:
            raise PeerFailed(self._failure) from None
        if mean is not gradient:
            gradient.copy_(mean)
        self._waited_s = monotonic_s() - launched_s
        self.blocked_s += self._waited_s

    def _reduced(self) -> None:
        """At the end of a backward, after FSDP's own callback, in which some of the exchanges may
        be."""
        if self._clock.immediate:
            self._statistics.nothing_overlapped()
        self._catch_up()
        self._end_backward()

    def state_dict(self) -> dict[str, Any]:
        """For ``torch.distributed.checkpoint``, which takes tensors of one name on several ranks
        for copies: so what belongs to a rank is one value, under a name of its own. The session
        itself may be among what is saved and loaded."""
        kept = io.BytesIO()
        torch.save(super().state_dict(), kept)
        return {f"rank {self.rank}": kept.getvalue()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        name = f"rank {self.rank}"
        if name not in state:
            raise ValueError(
                f"the checkpoint has no state of {name}, but of {', '.join(state)}; go on"
                " without it"
            )
        super().load_state_dict(torch.load(io.BytesIO(state[name])))


class _Unit:
    """What one call of ``fully_shard`` has put together: its gradients come at once."""

    def __init__(self, name: str, module: Any, group: Any, within: Any) -> None:
        """group: FSDP's FSDPParamGroup; within: its mesh without replicas."""
        self.name, self._module, self._group, self._within = name, module, group, within
        self._between = group.mesh_info
        self._partial: torch.Tensor | None = None
        reduced_in = group.mp_policy.reduce_dtype or group.mp_policy.param_dtype
        self.shards = [
            (parameter, _stand_in(parameter, reduced_in)) for parameter in group.fsdp_params
        ]
        """FSDP's FSDPParam, and what stands for its shard."""

    @property
    def replicas(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self._between.replicate_process_group
        return group

    def trained(self, elements: int) -> list[nn.Parameter]:
        """Stand-ins for what has gradients, of so many elements."""
        trained = [
            shard for parameter, shard in self.shards if parameter.sharded_param.requires_grad
        ]
        if sum(shard.numel() for shard in trained) != elements:
            raise ValueError(
                f"some parameters of {self.name or 'the model'} have no gradient; so that all"
                " replicas exchange the same, call set_reduce_scatter_unused_params(True) of the"
                " model"
            )
        return trained

    def hook(self, session: ShardedSession) -> None:
        def reduce(gradient: torch.Tensor) -> None:
            # set_requires_all_reduce(False): the next ones go with it
            if not self._group.all_reduce_grads:
                self._partial = (
                    gradient.clone() if self._partial is None else self._partial.add_(gradient)
                )
                gradient.zero_()
                return
            if self._partial is not None:
                gradient.add_(self._partial)
                self._partial = None
            session.reduce(self, gradient)
            # it has divided for the replicas, too
            if self._group.gradient_divide_factor is not None:
                gradient.mul_(self.replicas.size())

        self._module.set_all_reduce_hook(reduce)
        self._know(self._between, self._within)

    def unhook(self) -> None:
        if self._group.mesh_info is self._within:
            self._module.set_all_reduce_hook(None)
            self._know(self._within, self._between)

    def _know(self, before: Any, after: Any) -> None:
        self._group.mesh_info = after
        if self._group.post_forward_mesh_info is before:  # FSDP compares the two
            self._group.post_forward_mesh_info = after


class _Shards(nn.Module):
    """A model to methods: its parameters are the shards of this rank."""

    def __init__(self, model: nn.Module, units: list[_Unit]) -> None:
        super().__init__()
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._named = {
            names[parameter.sharded_param]: shard
            for unit in units
            for parameter, shard in unit.shards
        }
        self._model = [model]  # not as a part

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named.items()

    def named_modules(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        yield from self._model[0].named_modules(*arguments, **options)


class _Bucket:
    """What methods use of DDP's ``GradBucket``."""

    def __init__(self, buffer: torch.Tensor, parameters: list[nn.Parameter]) -> None:
        self._buffer, self._parameters = buffer, parameters

    def buffer(self) -> torch.Tensor:
        return self._buffer

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def gradients(self) -> list[torch.Tensor]:
        return list(self._buffer.split([parameter.numel() for parameter in self._parameters]))


def _units(model: nn.Module) -> list[_Unit]:
    lacks = f"torch {torch.__version__} has not what this needs of fully_shard; 2.13 has"
    try:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo
    except ImportError:
        raise ValueError(lacks) from None
    found: dict[Any, _Unit] = {}
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        module.reshard()  # after a forward without a backward the parameters are whole
        groups = getattr(module._get_fsdp_state(), "_fsdp_param_groups", None)
        if groups is None or not hasattr(module, "set_all_reduce_hook"):
            raise ValueError(lacks)
        if len(groups) > 1:
            raise ValueError(
                f"the parameters of {name or 'the model'} are on several meshes; give all of them"
                " the same"
            )
        for group in groups:
            if group in found:  # of several modules
                continue
            if group._all_reduce_hook is not None:
                raise RuntimeError(
                    f"{name or 'the model'} has an all-reduce hook already; close its session first"
                )
            if not isinstance(group.mesh_info, HSDPMeshInfo):
                raise ValueError(
                    f"{name or 'the model'} has no replicas to exchange gradients between; call"
                    ' fully_shard with a mesh of two dimensions: init_device_mesh("cpu",'
                    ' (replicas, shards), mesh_dim_names=("replicate", "shard"))'
                )
            within = FSDPMeshInfo.__new__(FSDPMeshInfo)
            vars(within).update(vars(group.mesh_info))
            found[group] = _Unit(name, module, group, within)
    if not found:
        raise ValueError("the model has no parameters that fully_shard has sharded")
    return list(found.values())


def _stand_in(parameter: Any, reduced_in: torch.dtype | None) -> nn.Parameter:
    """Of an FSDPParam: as many elements as its shard has with padding, in the type of its reduced
    gradient, without memory."""
    elements, own = parameter.padded_sharded_param_size.numel(), parameter.sharded_param
    one = torch.empty((), dtype=reduced_in or own.dtype, device=own.device)
    return nn.Parameter(one.expand(elements), requires_grad=own.requires_grad)
