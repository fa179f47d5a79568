"""PyTorch's own PowerSGD, made safe for Gloo."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future

from netsenseml.compress.feedback import energy_lost, norm, sample
from netsenseml.exchange.collectives import all_reduce_bytes
from netsenseml.exchange.mesh import Mesh
from netsenseml.exchange.scheduler import Exchange
from netsenseml.methods.base import Method
from netsenseml.records import monotonic_s
from netsenseml.statistics import StepStatistics
from netsenseml.streams import in_default_stream

_PLAIN_STEPS = 2
"""Steps of plain all-reduce at the beginning; with warm start and error feedback the hook insists
on as many."""


class PowerSgd(Method):
    """Low-rank approximation with error feedback and warm start (Vogels et al., NeurIPS 2019), by
    ``powerSGD_hook``.

    The hook launches collectives, and waits for some, from callbacks of others. With Gloo, two
    buckets at a time could then be launched in different orders on different ranks; so each bucket
    waits for the one before, beside backward. On an accelerator its callbacks work in the default
    stream, and it waits for the whole device.
    """

    takes_complex = False
    takes_shards = False

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, rank: int) -> None:
        super().__init__(module, group)
        self._approximation_rank = rank
        self._mesh = Mesh(group)
        self._before: dict[str, Any] | None = None
        self._state = PowerSGDState(
            self._mesh.stage(0),
            matrix_approximation_rank=rank,
            start_powerSGD_iter=_PLAIN_STEPS,
            orthogonalization_epsilon=_EPSILON,
        )

    def exchange(self, bucket: GradBucket, statistics: StepStatistics) -> Future[torch.Tensor]:
        statistics.scheme = f"powersgd-{self._approximation_rank}"
        return self._mesh.scheduler.submit(
            self._exchange(bucket, statistics), bucket.buffer().device
        )

    def _exchange(self, bucket: GradBucket, statistics: StepStatistics) -> Exchange:
        yield from ()  # all collectives are the hook's
        with in_default_stream(bucket.buffer().device):
            self._exchange_by_hook(bucket, statistics)
        return bucket.buffer()

    def _exchange_by_hook(self, bucket: GradBucket, statistics: StepStatistics) -> None:
        before = self._sampled(bucket)
        gradient_norm = norm(bucket.buffer())
        values = (
            bucket.buffer().numel() if self._state.iter < _PLAIN_STEPS else self._values(bucket)
        )
        sent = all_reduce_bytes(bucket.buffer().element_size() * values, self.group.size())
        held = self._hold(bucket)
        filled: Any = _WithoutEmpty(bucket)
        statistics.launch(lambda: powerSGD_hook(self._state, filled), sent, elements=values).wait()
        self._revive(bucket.index())
        residual = self._state.error_dict.get(bucket.index())
        # an overflow; it must not come back for ever
        if residual is not None and not residual.sum().isfinite():
            for kept in (getattr(self._state, name) for name in _KEPT):
                kept.pop(bucket.index(), None)
        elif residual is not None:
            for begin, kept in held:
                residual[begin : begin + len(kept)] += kept
            ratio = norm(residual) / gradient_norm if gradient_norm > 0 else 0.0
            statistics.lose(energy_lost(before, residual), norm(before) ** 2, ratio)

    def _revive(self, index: int) -> None:
        """Of a gradient that is zero, as those of unused parameters, the warm start would be zero,
        and stay so."""
        start = self._state.q_memory_dict.get(index)
        if start is not None and bool((zeros := start == 0).any()):
            draw = torch.Generator().manual_seed(0)
            start[zeros] = _TINY * torch.randn(start.shape, generator=draw).to(start)[zeros]

    def _hold(self, bucket: GradBucket) -> list[tuple[int, torch.Tensor]]:
        """Take what is kept for unused parameters out of the residual: (where, what)."""
        residual = self._state.error_dict.get(bucket.index())
        if residual is None or not self.holds_unused:
            return []
        held, begin = [], 0
        for gradient in bucket.gradients():
            end = begin + gradient.numel()
            if not gradient.any():
                held.append((begin, residual[begin:end].clone()))
                residual[begin:end] = 0
            begin = end
        return held

    def begin(self) -> None:
        if self.keeps_copy and self._before is None:
            self._before = self.state_dict()

    def undo(self) -> None:
        if self._before is not None:
            self.load_state_dict(self._before)

    def end_step(self) -> None:
        self._before = None

    def rescale(self, factor: float, *, gradients: bool) -> None:
        for residual in self._state.error_dict.values():
            residual.mul_(factor)

    def _sampled(self, bucket: GradBucket) -> torch.Tensor:
        left = self._state.error_dict.get(bucket.index())
        return sample(bucket.buffer()) + (sample(left) if left is not None else 0)

    def _values(self, bucket: GradBucket) -> int:
        """Numbers that are sent for a bucket: r (rows + columns) for each matrix where that is
        less, else all of it."""
        total = 0
        for gradient in bucket.gradients():
            rows = gradient.shape[0] if gradient.dim() > 1 else 1
            columns = gradient.numel() // max(rows, 1)
            low_rank = min(rows, columns, self._approximation_rank) * (rows + columns)
            fits = (
                gradient.dim() > 1
                and low_rank * self._state.min_compression_rate < gradient.numel()
            )
            total += low_rank if fits else gradient.numel()
        return total

    def close(self) -> None:
        group, self._state.process_group = self._state.process_group, None
        self._mesh.close()
        # The hook's last callback may still hold the group, on one of the group's own threads. If
        # that were the last to let go of it, the thread would have to wait for its own end, which
        # aborts the process.
        held_once = object()
        given_up_s = monotonic_s() + _PATIENCE_S
        while sys.getrefcount(group) > sys.getrefcount(held_once) and monotonic_s() < given_up_s:
            time.sleep(1e-3)

    def state_dict(self) -> dict[str, Any]:
        state = self._state
        return {
            "steps": state.iter,
            **{name: {i: t.clone() for i, t in getattr(state, name).items()} for name in _KEPT},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state.iter = state["steps"]
        for name in _KEPT:
            setattr(self._state, name, {i: t.clone() for i, t in state[name].items()})


class _WithoutEmpty:
    """A bucket less its gradients of no elements, which the hook cannot shape as matrices."""

    def __init__(self, bucket: GradBucket) -> None:
        self.buffer, self.index, self.is_last = bucket.buffer, bucket.index, bucket.is_last
        self._gradients = [gradient for gradient in bucket.gradients() if gradient.numel()]

    def gradients(self) -> list[torch.Tensor]:
        return self._gradients


_EPSILON = 1e-30
"""Far below the norm of any column: it only keeps one of zeros from becoming NaN."""
_TINY = 1e-12
"""Beside what is not zero it does not count."""
_PATIENCE_S = 1.0
"""Far longer than a callback takes."""
_KEPT = ("error_dict", "p_memory_dict", "q_memory_dict")
