"""Emulated compute: the parameters, layers and buckets of a model, and waits in place of its
arithmetic.

The gradients are made up: they have the shapes of the real ones and heavy tails, but carry no
signal. So this measures throughput, never accuracy.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from netsenseml.records import monotonic_s

FORWARD_SHARE = 1 / 3
"""Of a step's compute; backward computes two products where forward computes one."""
_TABLE = 1 << 21
_SPARE = 1 << 12
_COMPARED = 1 << 14
_BLOCK = 1024
_SHORTEST_S = 5e-5  # a sleep of less takes longer than asked for


@dataclass(frozen=True, slots=True)
class Timing:
    """compute_s: forward and backward of a step. jitter: standard deviation from step to step, as a
    share; drawn from seed."""

    compute_s: float
    jitter: float
    seed: int


class Emulated(nn.Module):
    """A model that only takes its time: ``begin()``, then call it, then ``backward`` of what it
    returns.

    Each layer waits for its share of the time, by its multiplications, and in backward hands over
    its gradients: DDP fills the same buckets in the same order, and exchange and backward overlap
    as they would. What the layers have waited for is counted from the beginning of the step, so a
    machine that comes late with one layer catches up in the next; but time that the hook itself
    takes away from backward is not caught up.
    """

    def __init__(self, model: nn.Module, sample: torch.Tensor, timing: Timing) -> None:
        """model, sample: on the meta device; one input of the model, with a batch dimension of
        1."""
        super().__init__()
        works = layer_works(model, sample)
        _materialize(model)
        self.model = model
        total = sum(works.values())
        self._layers = [
            (tuple(layer.parameters(recurse=False)), work / total) for layer, work in works.items()
        ]
        self._timing = timing
        self._gradients = _Gradients(timing.seed)
        self._draw = random.Random(timing.seed)
        self._step_s = timing.compute_s
        self._due_s = 0.0
        self._taken_s = 0.0
        self.taken_s: Callable[[], float] = lambda: 0.0
        """Time in s that the hook has taken away from backward so far."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._gradients.apply(fn)  # to(device) is for them, too
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def begin(self, factor: float = 1.0) -> None:
        """A step begins. factor: by how much longer it takes than others."""
        self._step_s = (
            self._timing.compute_s * factor * max(0.1, self._draw.gauss(1, self._timing.jitter))
        )
        self._due_s = monotonic_s()
        self._taken_s = self.taken_s()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for parameters, share in self._layers:
            x = _Layer.apply(x, self, share, *parameters)  # type: ignore[no-untyped-call]
        return x

    def wait(self, share: float) -> None:
        """Wait for a share of the step's compute."""
        taken_s = self.taken_s()
        self._due_s += share * self._step_s + taken_s - self._taken_s
        self._taken_s = taken_s
        left_s = self._due_s - monotonic_s()
        if left_s > _SHORTEST_S:
            time.sleep(left_s)

    def end(self) -> None:
        """A step ends: the first elements of every parameter add up their mean gradients, so that
        replicas can be compared."""
        with torch.no_grad():
            for parameter in self.parameters():
                assert parameter.grad is not None
                parameter.view(-1)[:_COMPARED].add_(parameter.grad.view(-1)[:_COMPARED])


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, emulated: Emulated, share: float, *parameters: torch.Tensor
    ) -> torch.Tensor:
        emulated.wait(FORWARD_SHARE * share)
        ctx.emulated, ctx.share, ctx.shapes = (
            emulated,
            share,
            [parameter.shape for parameter in parameters],
        )
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.emulated.wait((1 - FORWARD_SHARE) * ctx.share)
        return gradient, None, None, *(ctx.emulated._gradients.draw(shape) for shape in ctx.shapes)


class _Gradients:
    """Views into one table of Student's t with 3 degrees of freedom, whose scale differs from block
    to block."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        values = draw.standard_t(3, _TABLE).reshape(-1, _BLOCK) * np.exp(
            draw.standard_normal((_TABLE // _BLOCK, 1))
        )
        self._table = torch.from_numpy(values.reshape(-1).astype(np.float32))
        self._draw = random.Random(seed)

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put the table elsewhere."""
        self._table = fn(self._table)

    def draw(self, shape: torch.Size) -> torch.Tensor:
        """A tensor of this shape, another one each time; rows of one larger than the table
        overlap."""
        rows = shape[0] if len(shape) > 1 else 1
        columns = shape.numel() // rows
        stride = min(columns, (_TABLE - _SPARE - columns) // rows)
        if stride < 1:
            raise ValueError(
                f"a parameter of shape {tuple(shape)} has too long rows to be emulated"
            )
        offset = self._draw.randrange(_TABLE - (rows - 1) * stride - columns + 1)
        drawn = self._table.as_strided((rows, columns), (stride, 1), offset)
        return drawn.unflatten(1, shape[1:]) if len(shape) > 1 else drawn[0]


def layer_works(model: nn.Module, sample: torch.Tensor) -> dict[nn.Module, float]:
    """Multiplications of every layer that has parameters of its own, for one sample, in the order
    of forward."""
    works: dict[nn.Module, float] = {}

    def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        weight = getattr(layer, "weight", None)
        dense = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
        works[layer] = works.get(layer, 0.0) + output.numel() * (
            weight[0].numel() if dense and weight is not None else 1
        )

    owners = [
        layer
        for layer in model.modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    handles = [layer.register_forward_hook(count) for layer in owners]
    with torch.no_grad():
        model(sample)
    for handle in handles:
        handle.remove()
    if missing := set(owners) - set(works):
        raise ValueError(
            f"{len(missing)} layers of the model are not used by its forward; it cannot be emulated"
        )
    return works


def _materialize(model: nn.Module) -> None:
    """Give the parameters memory that is zero, and is only taken once it is written to."""
    for module in model.modules():
        module._buffers.clear()
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(
                module,
                name,
                nn.Parameter(torch.from_numpy(np.zeros(parameter.shape, dtype=np.float32))),
            )
