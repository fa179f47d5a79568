"""Gradients as bytes: which elements are sent, and how their values and positions are written."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
import torch

from netsenseml.compress import kernels, tensors
from netsenseml.compress.kernels import Array
from netsenseml.compress.layout import (
    BF16,
    BLOCK,
    BLOCK_BYTES,
    FP32,
    HEADER_BYTES,
    INT4,
    INT8,
    SIGN,
    VALUES,
    Layout,
    MalformedBuffer,
    layout,
    parse,
)
from netsenseml.compress.sparsify import sampling, slots

__all__ = ["VALUES", "Codec", "MalformedBuffer", "Sent", "add_decoded"]


@dataclass(slots=True)
class Sent:
    """What an encoder tells of a bucket beside its bytes."""

    positions: torch.Tensor | None = None
    """Of the elements sent last, ascending, shape (k,), int32; None if all were."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How a flat float32 gradient is written: the share of its elements that is sent, and the format of their values.

    density: the elements of largest magnitude are sent, exactly k = ``elements(n)`` of n; NaN is larger than infinity, and
    the lower index comes first among equals. The others have at most 1 - k / n of the energy (the sum of squares). At 1
    all are sent, without positions.

    values, with the largest error of a value x; m is the largest magnitude in its block, 256 values that share a scale:

    ====  ====================================================================================================
    fp32  none
    bf16  2**-8 |x|: rounded to nearest, to even in between
    int8  one step, m / 127: rounded up or down by chance, so that the mean over seeds is x (within 2**-16 steps) and the
          variance at most a quarter of a square step
    int4  one step, m / 7, likewise
    sign  m: all become +s or -s with s = the mean magnitude of the block, which leaves the least energy, namely
          sum(x**2) - count * s**2
    ====  ====================================================================================================

    To that comes what is below the smallest normal numbers: 2**-134 for bf16, 64 * 2**-149 for the last three. A block of
    int8, int4 or sign with a value that is not finite decodes to NaN as a whole. See ``layout`` for the bytes.
    """

    values: str
    density: float = 1.0

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
            raise ValueError(f"unknown codec '{name}'; there are {choices} and, such as sparse-bf16@1%, sparse ones") from None

    def elements(self, n: int) -> int:
        """Elements sent out of n."""
        return slots(n, self.density)

    def nbytes(self, n: int) -> int:
        """Size of the buffer for n elements, whatever they are."""
        return self._layout(n).nbytes

    def _layout(self, n: int) -> Layout:
        return layout(VALUES[self.values], n, self.elements(n))

    def encode(self, wanted: torch.Tensor, seed: int, *, sent: Sent | None = None) -> torch.Tensor:
        """The buffer, uint8 of shape (nbytes(n),); ``wanted``, contiguous float32 of shape (n,), n < 2**31, keeps what is left.

        Buffer and rest make up what was wanted, up to float32 rounding, and exactly where nothing was sent. Where the
        buffer holds something that is not finite nothing is left behind: like after an all-reduce, all ranks see it, once.

        seed: of the stochastic rounding. The same input and seed give the same bytes, on every machine and device.
        """
        if wanted.dtype != torch.float32 or wanted.dim() != 1 or not wanted.is_contiguous():
            raise ValueError(f"only contiguous float32 of shape (n,) can be encoded, not {wanted.dtype} {tuple(wanted.shape)}")
        plan = self._layout(wanted.numel())
        buffer = torch.empty(plan.nbytes, dtype=torch.uint8, device=wanted.device)
        buffer[-8:] = 0  # the padding behind the codes
        buffer[:HEADER_BYTES] = torch.frombuffer(bytearray(plan.header()), dtype=torch.uint8)
        key = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
        backend = _encode if wanted.device.type == "cpu" else tensors.encode
        positions = backend(wanted.detach(), plan, key, buffer)
        if sent is not None:
            sent.positions = positions
        return buffer


def add_decoded(buffer: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Add ``scale`` times a decoded buffer to ``out``, shape (n,), contiguous float32; returns ``out``.

    Two roundings an element, the product's and the sum's, and so the same bits everywhere. Raises MalformedBuffer, one
    line, and leaves ``out`` as it is, if the buffer is not one that a codec writes for n elements.
    """
    if out.dtype != torch.float32 or out.dim() != 1 or not out.is_contiguous():
        raise ValueError(f"only to contiguous float32 of shape (n,) can be added, not to {out.dtype} {tuple(out.shape)}")
    if buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise MalformedBuffer(f"a buffer is uint8 of shape (bytes,), not {buffer.dtype} {tuple(buffer.shape)}")
    plan = parse(buffer[:HEADER_BYTES].cpu().numpy().tobytes(), buffer.numel())
    if plan.n != out.numel():
        raise MalformedBuffer(f"a buffer for {plan.n} elements, not {out.numel()}")
    if not buffer.is_contiguous() or buffer.data_ptr() % 8:
        buffer = buffer.clone(memory_format=torch.contiguous_format)
    backend = _add_decoded if out.device.type == "cpu" else tensors.add_decoded
    backend(buffer, plan, out.detach(), scale)
    return out


def _encode(wanted: torch.Tensor, plan: Layout, key: int, buffer: torch.Tensor) -> torch.Tensor | None:
    x, body = wanted.numpy(), buffer.numpy()
    if plan.dense:
        _put_values(x, plan, key, body)
        return None
    positions, values = _largest(x, plan.k)
    high, low = (body[part].view(np.uint64) for part in (plan.high, plan.low))
    kernels.put_positions(positions, plan.low_bits, plan.step, high, low)
    _put_values(values, plan, key, body)
    kernels.scatter(x, positions, values)
    return torch.from_numpy(positions.view(np.int32))


def _add_decoded(buffer: torch.Tensor, plan: Layout, out: torch.Tensor, scale: float) -> None:
    body = buffer.numpy()
    if plan.dense:
        _add_values(out.numpy(), plan, body, np.float32(scale))
        return
    positions, values = np.empty(plan.k, np.uint32), np.zeros(plan.k, np.float32)
    high, low = (body[part].view(np.uint64) for part in (plan.high, plan.low))
    if not kernels.get_positions(high, low, plan.low_bits, plan.step, plan.n, positions):
        raise MalformedBuffer(f"its positions are not {plan.k} ascending ones below {plan.n}")
    _add_values(values, plan, body, np.float32(scale))
    kernels.scatter_add(out.numpy(), positions, values)


def _largest(x: Array, k: int) -> tuple[Array, Array]:
    """Positions, ascending, and a copy of the k elements of largest magnitude.

    Candidates are those above a threshold guessed from a sample; if that was a bad guess, all but the zeros, of which
    whole layers may consist. If those are too few, the first zeros join them.
    """
    bits = x.view(np.int32)
    stride, rank = sampling(x.size, k)
    guess, _ = kernels.kth_largest(bits[::stride].copy(), rank)
    for threshold, places in ((max(guess, 1), int(stride * (rank + 4 * rank**0.5))), (1, x.size)):
        positions, values = (np.empty(places + kernels.WORD, dtype) for dtype in (np.uint32, np.int32))
        found = kernels.passing(bits, threshold, positions, values)
        if found >= k:
            kernels.cut(positions[:found], values[:found], k)
            return positions[:k], values[:k].view(np.float32)
    zeros = np.flatnonzero(x[:k] == 0)[: k - found]
    positions = np.sort(np.concatenate([positions[:found], zeros.astype(np.uint32)]))
    return positions, x[positions]


def _put_values(x: Array, plan: Layout, key: int, body: Array) -> None:
    """Fill the scales and codes, and leave in x what was not sent."""
    codes = body[plan.codes]
    if plan.values == FP32:
        codes.view(np.float32)[:] = x
        x[:] = 0
    elif plan.values == BF16:
        kernels.put_bf16(x, codes.view(np.uint16))
    else:
        for first, count, rows in _rows(x):
            scale, code = _sections(body, plan, first, len(rows))
            if plan.values == SIGN:
                kernels.put_sign(rows, count, scale, code)
            elif plan.values == INT8:
                kernels.put_int8(rows, first, np.uint32(key), scale, code)
            else:
                kernels.put_int4(rows, first, np.uint32(key), scale, code)


def _add_values(x: Array, plan: Layout, body: Array, factor: np.float32) -> None:
    """Add the decoded values, times ``factor``, to x."""
    codes = body[plan.codes]
    if plan.values == FP32:
        kernels.add_fp32(x, codes.view(np.float32), factor)
    elif plan.values == BF16:
        kernels.add_bf16(x, codes.view(np.uint16), factor)
    else:
        add = {INT8: kernels.add_int8, INT4: kernels.add_int4, SIGN: kernels.add_sign}[plan.values]
        for first, _, rows in _rows(x):
            add(rows, *_sections(body, plan, first, len(rows)), factor)


def _rows(x: Array) -> Iterator[tuple[int, int, Array]]:
    """(index of the first block, values in each, rows of one block) for the whole blocks, and for the last, padded copy."""
    whole = x.size // BLOCK
    if whole:
        yield 0, BLOCK, x[: whole * BLOCK].reshape(whole, BLOCK)
    rest = x[whole * BLOCK :]
    if rest.size:
        row = np.zeros((1, BLOCK), np.float32)
        row[0, : rest.size] = rest
        yield whole, rest.size, row
        rest[:] = row[0, : rest.size]


def _sections(body: Array, plan: Layout, first: int, blocks: int) -> tuple[Array, Array]:
    """Scales and codes of some blocks."""
    scales, codes = body[plan.scales].view(np.float32), body[plan.codes].reshape(-1, BLOCK_BYTES[plan.values])
    return scales[first : first + blocks], codes[first : first + blocks]
