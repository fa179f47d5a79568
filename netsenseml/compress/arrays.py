"""The codec on the CPU, by the kernels: the same bytes as ``tensors``, and the same bits back."""

from collections.abc import Iterator

import numpy as np
import torch

from netsenseml.compress import kernels, layout
from netsenseml.compress.kernels import Array
from netsenseml.compress.layout import ROW, Layout, MalformedBuffer
from netsenseml.compress.sparsify import sampling


def encode(
    compensated: torch.Tensor,
    plan: Layout,
    key: int | None,
    buffer: torch.Tensor,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Fill ``buffer``; returns the positions sent, or None for all.

    key: of stochastic rounding, or None. chosen: positions in place of the largest.
    """
    x, body = compensated.numpy(), buffer.numpy()
    body[-8:] = 0  # the padding behind the codes
    body[: layout.HEADER_BYTES] = np.frombuffer(plan.header(), np.uint8)
    if plan.dense:
        _encode_values(x, plan, key, body)
        return None
    if chosen is None:
        positions, values = _largest(x, plan.k)
    else:
        positions = chosen.numpy().astype(np.uint32)
        values = x[positions]
    high, low = (body[part].view(np.uint64) for part in (plan.high, plan.low))
    kernels.encode_positions(positions, plan.low_bits, plan.step, high, low)
    _encode_values(values, plan, key, body)
    kernels.scatter(x, positions, values)
    return torch.from_numpy(positions.view(np.int32))


def add_decoded(buffer: torch.Tensor, plan: Layout, out: torch.Tensor, scale: float) -> None:
    """Add ``scale`` times the decoded buffer; raises MalformedBuffer for positions that cannot
    be."""
    body = buffer.numpy()
    if plan.dense:
        _decode_add_values(out.numpy(), plan, body, scale)
        return
    positions, values = np.empty(plan.k, np.uint32), np.zeros(plan.k, np.float32)
    high, low = (body[part].view(np.uint64) for part in (plan.high, plan.low))
    if not kernels.decode_positions(high, low, plan.low_bits, plan.step, plan.n, positions):
        raise MalformedBuffer(f"its positions are not {plan.k} ascending ones below {plan.n}")
    _decode_add_values(values, plan, body, scale)
    kernels.scatter_add(out.numpy(), positions, values)


def _largest(x: Array, k: int) -> tuple[Array, Array]:
    """Positions, ascending, and a copy of the k elements of largest magnitude.

    Candidates are those above a threshold guessed from a sample; if that was a bad guess, all but
    the zeros, of which whole layers may consist. If those are too few, the first zeros join them.
    """
    bits = x.view(np.int32)
    stride, rank = sampling(x.size, k)
    sample = bits[::stride].copy()
    guess = kernels.kth_largest(sample, rank, np.empty(sample.size + 1, np.int32))
    for threshold, places in ((max(guess, 1), int(stride * (rank + 4 * rank**0.5))), (1, x.size)):
        positions, values = (
            np.empty(places + layout.WORD_BITS, dtype) for dtype in (np.uint32, np.int32)
        )
        found = kernels.select(bits, threshold, positions, values)
        if found >= k:
            kernels.keep_largest(
                positions[:found], values[:found], k, np.empty(found + 1, np.int32)
            )
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
                kernels.encode_levels[plan.values, key is not None](
                    rows, first, key or 0, *sections
                )


def _decode_add_values(x: Array, plan: Layout, body: Array, factor: float) -> None:
    """Add the decoded values, times ``factor``, to x."""
    codes = body[plan.codes]
    if plan.values == layout.FP32:
        kernels.decode_add_fp32(x, codes.view(np.float32), factor)
    elif plan.values == layout.BF16:
        kernels.decode_add_bf16(x, codes.view(np.uint16), factor)
    else:
        add = (
            kernels.decode_add_sign
            if plan.values == layout.SIGN
            else kernels.decode_add_levels[plan.values]
        )
        for first, _, rows in _rows(x):
            add(rows, *_sections(body, plan, first, len(rows)), factor)


def _rows(x: Array) -> Iterator[tuple[int, int, Array]]:
    """(index of the first row, values in each, rows) for the whole rows, and for the last, a padded
    copy."""
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
