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

from netsenseml.agent.protocol import monotonic_s
from netsenseml.compress.feedback import energy_lost, sample
from netsenseml.exchange.collectives import all_reduce_bytes, all_reduce_hops, dissolve, own_group
from netsenseml.exchange.conveyor import Conveyor, Exchange
from netsenseml.ledger import Ledger
from netsenseml.methods.base import Method, require_cpu

_PLAIN_STEPS = 2
"""Steps of plain all-reduce at the beginning; with warm start and error feedback the hook insists on as many."""


class PowerSgd(Method):
    """Low-rank approximation with error feedback and warm start (Vogels et al., NeurIPS 2019), by ``powerSGD_hook``.

    The hook launches collectives, and waits for some, from callbacks of others. With Gloo, two buckets at a time could then
    be launched in different orders on different ranks; so each bucket waits for the one before, beside backward.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, rank: int) -> None:
        super().__init__(module, group)
        require_cpu(module)
        self._approximation_rank = rank
        self._state = PowerSGDState(own_group(group), matrix_approximation_rank=rank, start_powerSGD_iter=_PLAIN_STEPS)
        self._conveyor = Conveyor()

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        ledger.scheme = f"powersgd-{self._approximation_rank}"
        return self._conveyor.submit(self._exchange(bucket, ledger))

    def _exchange(self, bucket: GradBucket, ledger: Ledger) -> Exchange:
        before = self._sampled(bucket)
        values = bucket.buffer().numel() if self._state.iter < _PLAIN_STEPS else self._values(bucket)
        ledger.launch(
            lambda: powerSGD_hook(self._state, bucket),
            payload_bytes=all_reduce_bytes(bucket.buffer().element_size() * values, self.group.size()),
            hops=3 * all_reduce_hops(self.group.size()),
            elements=values,
        ).wait()
        yield from ()  # all its collectives are the hook's
        left = self._state.error_dict.get(bucket.index())
        if left is not None and not left.sum().isfinite():  # an overflow; it must not come back for ever
            for kept in (getattr(self._state, name) for name in _KEPT):
                kept.pop(bucket.index(), None)
        elif left is not None:
            ledger.lose(energy_lost(before, left), left.numel() * before.square().mean().item())
        return bucket.buffer()

    def _sampled(self, bucket: GradBucket) -> torch.Tensor:
        left = self._state.error_dict.get(bucket.index())
        return sample(bucket.buffer()) + (sample(left) if left is not None else 0)

    def _values(self, bucket: GradBucket) -> int:
        """Numbers that are sent for a bucket: r (rows + columns) for each matrix where that is less, else all of it."""
        total = 0
        for gradient in bucket.gradients():
            rows = gradient.shape[0] if gradient.dim() > 1 else 1
            columns = gradient.numel() // max(rows, 1)
            low_rank = min(rows, columns, self._approximation_rank) * (rows + columns)
            fits = gradient.dim() > 1 and low_rank * self._state.min_compression_rate < gradient.numel()
            total += low_rank if fits else gradient.numel()
        return total

    def close(self) -> None:
        self._conveyor.close()
        group, self._state.process_group = self._state.process_group, None
        if group is None or not dissolve(group):
            return
        # The hook's last callback may still hold the group, on one of the group's own threads. If that were the last to let go
        # of it, the thread would have to wait for its own end, which aborts the process.
        held_once = object()
        given_up_s = monotonic_s() + _PATIENCE_S
        while sys.getrefcount(group) > sys.getrefcount(held_once) and monotonic_s() < given_up_s:
            time.sleep(1e-3)

    def state_dict(self) -> dict[str, Any]:
        state = self._state
        return {"iter": state.iter, **{name: {i: t.clone() for i, t in getattr(state, name).items()} for name in _KEPT}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state.iter = state["iter"]
        for name in _KEPT:
            setattr(self._state, name, {i: t.clone() for i, t in state[name].items()})


_PATIENCE_S = 1.0
"""Far longer than a callback takes."""
_KEPT = ("error_dict", "p_memory_dict", "q_memory_dict")
