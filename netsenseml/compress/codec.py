"""Gradients as bytes: which elements are sent, and how their values and positions are written."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
import torch

from netsenseml.compress import kernels, layout, tensors
from netsenseml.compress.kernels import Array
from netsenseml.compress.layout import HEADER_BYTES, ROW, VALUES, Layout, MalformedBuffer, parse
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

    values, with the largest error of a value x; m is the largest magnitude in its block, the values that share a scale:

    ====  ====================================================================================================
    fp32  none
    bf16  2**-8 |x|: rounded to nearest, to even in between
    int8  half a step, rounded to nearest, to even in between. A step is m / 127, rounded up to a bfloat16 (by at most a
          128th) lest the largest value need one level more; 128 values a block
    int4  likewise, with steps of m / 7; 32 values a block
    sign  m: all become +s or -s with s = the mean magnitude of the block, to the nearest bfloat16, which leaves the least
          energy, namely sum(x**2) - count * s**2; 128 values a block
    ====  ====================================================================================================

    To that comes what is below the smallest normal numbers: 2**-133 for bf16 and sign, 2**-127 for int8 and int4. A block
    with a value that is not finite decodes to NaN as a whole. See ``layout`` for the bytes.

    stochastic: int8 and int4 round up or down by chance, so that the mean over seeds is x (within 2**-16 steps), with an
    error of up to a step, and twice the energy lost. For sums without error feedback; neither name nor bytes tell of it.
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
            raise ValueError(f"unknown codec '{name}'; there are {choices} and, such as sparse-bf16@1%, sparse ones") from None

    def elements(self, n: int) -> int:
        """Elements sent out of n."""
        return slots(n, self.density)

    def nbytes(self, n: int) -> int:
        """Size of the buffer for n elements, whatever they are."""
        return self._layout(n).nbytes

    def _layout(self, n: int) -> Layout:
        return layout.layout(VALUES[self.values], n, self.elements(n))

    def encode(self, compensated: torch.Tensor, seed: int, *, sent: Sent | None = None) -> torch.Tensor:
        """The buffer, uint8 of shape (nbytes(n),), for gradient plus residual; what was not sent stays in ``compensated``.

        compensated: contiguous float32 of shape (n,), n < 2**31. Buffer and new residual make up the old values, up to
        float32 rounding, and exactly where nothing was sent. Where the buffer holds something that is not finite the
        residual is 0: like after an all-reduce, all ranks see it, once.

        seed: of stochastic rounding, else without effect. The same input and seed give the same bytes on every machine
        and device.
        """
        x, cpu = compensated, compensated.device.type == "cpu"
        if x.dtype != torch.float32 or x.dim() != 1 or not x.is_contiguous():
            raise ValueError(f"only contiguous float32 of shape (n,) can be encoded, not {x.dtype} {tuple(x.shape)}")
        plan = self._layout(x.numel())
        # NumPy asks for huge pages. With small ones, the first touch of the buffer takes longer than the rest of the work.
        buffer = torch.from_numpy(np.empty(plan.nbytes, np.uint8)) if cpu else x.new_empty(plan.nbytes, dtype=torch.uint8)
        buffer[-8:] = 0  # the padding behind the codes
        buffer[:HEADER_BYTES] = torch.frombuffer(bytearray(plan.header()), dtype=torch.uint8)
        key = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
        backend = _encode if cpu else tensors.encode
        positions = backend(x.detach(), plan, key if self.stochastic else None, buffer)
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


def _encode(compensated: torch.Tensor, plan: Layout, key: int | None, buffer: torch.Tensor) -> torch.Tensor | None:
    """Fill the sections of ``buffer``; returns the positions sent, or None for all. key: of stochastic rounding, or None."""
    x, body = compensated.numpy(), buffer.numpy()
    if plan.dense:
        _encode_values(x, plan, key, body)
        return None
    positions, values = _largest(x, plan.k)
    high, low = (body[part].view(np.uint64) for part in (plan.high, plan.low))
    kernels.encode_positions(positions, plan.low_bits, plan.step, high, low)
    _encode_values(values, plan, key, body)
    kernels.scatter(x, positions, values)
    return torch.from_numpy(positions.view(np.int32))


def _add_decoded(buffer: torch.Tensor, plan: Layout, out: torch.Tensor, scale: float) -> None:
    body = buffer.numpy()
    if plan.dense:
        _decode_add_values(out.numpy(), plan, body, np.float32(scale))
        return
    positions, values = np.empty(plan.k, np.uint32), np.zeros(plan.k, np.float32)
    high, low = (body[part].view(np.uint64) for part in (plan.high, plan.low))
    if not kernels.decode_positions(high, low, plan.low_bits, plan.step, plan.n, positions):
        raise MalformedBuffer(f"its positions are not {plan.k} ascending ones below {plan.n}")
    _decode_add_values(values, plan, body, np.float32(scale))
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
        found = kernels.select(bits, threshold, positions, values)
        if found >= k:
            kernels.keep_largest(positions[:found], values[:found], k)
            return positions[:k], values[:k].view(np.float32)
    zeros = np.flatnonzero(x[:k] == 0)[: k - found]
    positions = np.sort(np.concatenate([positions[:found], zeros.astype(np.uint32)]))
    return positions, x[positions]


def _encode_values(x: Array, plan: Layout, key: int | None, body: Array) -> None:
    """Fill the scales and codes, and leave in x what was not sent."""
    codes = body[plan.codes]
    if plan.values == layout.FP32:
        codes.view(np.float32)[:] = x
        x[:] = 0
    elif plan.values == layout.BF16:
        kernels.encode_bf16(x, codes.view(np.uint16))
    else:
        for first, count, rows in _rows(x):
            sections = _sections(body, plan, first, len(rows))
            if plan.values == layout.SIGN:
                kernels.encode_sign(rows, count, *sections)
            else:
                kernels.encode_levels[plan.values, key is not None](rows, first, np.uint32(key or 0), *sections)


def _decode_add_values(x: Array, plan: Layout, body: Array, factor: np.float32) -> None:
    """Add the decoded values, times ``factor``, to x."""
    codes = body[plan.codes]
    if plan.values == layout.FP32:
        kernels.decode_add_fp32(x, codes.view(np.float32), factor)
    elif plan.values == layout.BF16:
        kernels.decode_add_bf16(x, codes.view(np.uint16), factor)
    else:
        add = kernels.decode_add_sign if plan.values == layout.SIGN else kernels.decode_add_levels[plan.values]
        for first, _, rows in _rows(x):
            add(rows, *_sections(body, plan, first, len(rows)), factor)


def _rows(x: Array) -> Iterator[tuple[int, int, Array]]:
    """(index of the first row, values in each, rows) for the whole rows, and for the last, a padded copy."""
    whole = x.size // ROW
    if whole:
        yield 0, ROW, x[: whole * ROW].reshape(whole, ROW)
    rest = x[whole * ROW :]
    if rest.size:
        row = np.zeros((1, ROW), np.float32)
        row[0, : rest.size] = rest
        yield whole, rest.size, row
        rest[:] = row[0, : rest.size]


def _sections(body: Array, plan: Layout, first: int, rows: int) -> tuple[Array, Array]:
    """Scales, as bits of bfloat16, and codes of some rows."""
    scales = body[plan.scales].view(np.uint16).reshape(-1, ROW // layout.BLOCK[plan.values])
    codes = body[plan.codes].view(f"u{layout.WORD[plan.values]}").reshape(len(scales), -1)
    return scales[first : first + rows], codes[first : first + rows]
