"""Gradients as bytes: which elements are sent, and how their values and positions are written."""

import hashlib
import importlib.util
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

import numpy as np
import torch

from netsenseml.compress import layout, tensors
from netsenseml.compress.layout import HEADER_BYTES, VALUES, Layout, MalformedBuffer, parse
from netsenseml.compress.sparsify import kept_elements

__all__ = ["VALUES", "Codec", "MalformedBuffer", "Sent", "add_decoded", "positions"]


@dataclass(slots=True)
class Sent:
    """What an encoder tells of a bucket beside its bytes."""

    positions: torch.Tensor | None = None
    """Of the elements sent last, ascending, shape (k,), int32; None if all were."""
    residual_scale: float = 1.0
    """Norm of the residual over that of what was not sent of the tensor; 0 where other ranks keep
    all of it."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How a flat float32 gradient is written: the share of its elements that is sent, and the
    format of their values.

    density: the elements of largest magnitude are sent, exactly k = ``elements(n)`` of n; NaN is
    larger than infinity, and the lower index comes first among equals. The others have at most 1 -
    k / n of the energy (the sum of squares). At 1 all are sent, without positions.

    values, with the largest error of a value x; m is the largest magnitude in its block, the values
    that share a scale:

    ====  ==========================================================================================
    fp32  none
    bf16  2**-8 |x|: rounded to nearest, to even in between
    int8  half a step, rounded to nearest, to even in between. A step is m / 127, rounded up to a
          bfloat16 (by at most a 128th) lest the largest value need one level more; 128 values a
          block
    int4  likewise, with steps of m / 7; 32 values a block
    sign  m: all become +s or -s with s = the mean magnitude of the block, to the nearest bfloat16,
          which leaves the least energy, namely sum(x**2) - count * s**2; 128 values a block
    ====  ==========================================================================================

    To that comes what is below the smallest normal numbers: 2**-133 for bf16 and sign, 2**-127 for
    int8 and int4. A block with a value that is not finite decodes to NaN as a whole. See ``layout``
    for the bytes.

    stochastic: int8 and int4 round up or down by chance, so that the mean over seeds is x (within
    2**-16 steps), with an error of up to a step, and twice the energy lost. For sums without error
    feedback; neither name nor bytes tell of it.
    """

    values: str
    density: float = 1.0
    stochastic: bool = False

    def __post_init__(self) -> None:
        if self.values not in VALUES:
            raise ValueError(f"unknown format '{self.values}'; there are {', '.join(VALUES)}")
        if not 0 < self.density <= 1:
            raise ValueError(f"a density must be above 0 and at most 1, not {self.density}")

    @property
    def name(self) -> str:
        """Such as ``int8``, or ``sparse-bf16@1%``."""
        if self.density == 1:
            return self.values
        return f"sparse-{self.values}@{(100 * Decimal(repr(self.density))).normalize():f}%"

    @classmethod
    def parse(cls, name: str) -> "Codec":
        """Inverse of ``name``; raises ValueError, one line."""
        kind, _, percent = name.removeprefix("sparse-").partition("@")
        try:
            if name.startswith("sparse-") != bool(percent):
                raise ValueError
            return cls(kind, float(Decimal(percent.removesuffix("%")) / 100) if percent else 1.0)
        except (ValueError, InvalidOperation):
            choices = ", ".join(VALUES)
            raise ValueError(
                f"unknown codec '{name}'; there are {choices} and, such as sparse-bf16@1%, sparse"
                " ones"
            ) from None

    def elements(self, n: int) -> int:
        """Elements sent out of n."""
        return kept_elements(n, self.density)

    def nbytes(self, n: int) -> int:
        """Size of the buffer for n elements, whatever they are."""
        return self._layout(n).nbytes

    def _layout(self, n: int) -> Layout:
        return layout.layout(VALUES[self.values], n, self.elements(n))

    def encode(
        self,
        compensated: torch.Tensor,
        seed: int,
        *,
        sent: Sent | None = None,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The buffer, uint8 of shape (nbytes(n),), for gradient plus residual; what was not sent
        stays in ``compensated``.

        compensated: contiguous float32 of shape (n,), n < 2**31. Buffer and new residual make up
        the old values, up to float32 rounding, and exactly where nothing was sent. Where the buffer
        holds something that is not finite the residual is 0: like after an all-reduce, all ranks
        see it, once.

        chosen: positions of the elements to send in place of the largest, ascending, shape
        (elements(n),), integer. seed: of stochastic rounding, else without effect. The same input
        and seed give the same bytes on every machine and device.
        """
        x, cpu = compensated, compensated.device.type == "cpu"
        if x.dtype != torch.float32 or x.dim() != 1 or not x.is_contiguous():
            raise ValueError(
                f"only contiguous float32 of shape (n,) can be encoded, not {x.dtype}"
                f" {tuple(x.shape)}"
            )
        plan = self._layout(x.numel())
        if chosen is not None and chosen.numel() != plan.k:
            raise ValueError(f"of {plan.n} elements {plan.k} are to be sent, not {chosen.numel()}")
        # NumPy asks for huge pages. With small ones, the first touch of the buffer takes longer
        # than the rest of the work.
        buffer = (
            torch.from_numpy(np.empty(plan.nbytes, np.uint8))
            if cpu
            else x.new_empty(plan.nbytes, dtype=torch.uint8)
        )
        key = None
        if self.stochastic:
            key = int.from_bytes(
                hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little"
            )
        positions = _backend(x.device.type).encode(x.detach(), plan, key, buffer, chosen)
        if sent is not None:
            sent.positions = positions
        return buffer


def positions(buffer: torch.Tensor) -> torch.Tensor:
    """Of the elements in a buffer that ``encode`` has made: ascending, shape (k,), int64. Raises
    MalformedBuffer."""
    plan = parse(buffer[:HEADER_BYTES].cpu().numpy().tobytes(), buffer.numel())
    return tensors.positions(buffer, plan)


def add_decoded(buffer: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Add ``scale`` times a decoded buffer to ``out``, shape (n,), contiguous float32; returns
    ``out``.

    Two roundings an element, the product's and the sum's, and so the same bits everywhere. Raises
    MalformedBuffer, one line, and leaves ``out`` as it is, if the buffer is not one that a codec
    writes for n elements. It may be on another device.
    """
    if out.dtype != torch.float32 or out.dim() != 1 or not out.is_contiguous():
        raise ValueError(
            f"only to contiguous float32 of shape (n,) can be added, not to {out.dtype}"
            f" {tuple(out.shape)}"
        )
    if buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise MalformedBuffer(
            f"a buffer is uint8 of shape (bytes,), not {buffer.dtype} {tuple(buffer.shape)}"
        )
    plan = parse(buffer[:HEADER_BYTES].cpu().numpy().tobytes(), buffer.numel())
    if plan.n != out.numel():
        raise MalformedBuffer(f"a buffer for {plan.n} elements, not {out.numel()}")
    buffer = buffer.to(out.device, non_blocking=True)
    if not buffer.is_contiguous() or buffer.data_ptr() % 8:
        buffer = buffer.clone(memory_format=torch.contiguous_format)
    _backend(out.device.type).add_decoded(buffer, plan, out.detach(), scale)
    return out


def load_kernels(device: torch.device) -> None:
    """Load the kernels for tensors of a device, where the first coding would; they are compiled
    once on a machine, which takes some seconds. Triton's are compiled when a format is used first,
    likewise once."""
    _backend(device.type)


@cache
def _backend(device: str) -> Any:
    """Triton's kernels for CUDA devices, numba's for the CPU, operations of torch for what is
    left."""
    name = "arrays" if device == "cpu" else "tensors"
    if (
        device == "cuda"
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability() >= (7, 0)
    ):
        name = "device_kernels"
    return importlib.import_module(f"netsenseml.compress.{name}")
