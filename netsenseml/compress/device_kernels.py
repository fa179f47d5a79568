"""The codec on a CUDA device, by Triton kernels: the same bytes as ``kernels`` on the CPU, and the
same bits back.

Triton comes with torch. Products and sums must not be fused, or they would be rounded once instead
of twice.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from netsenseml.compress import layout
from netsenseml.compress.layout import (
    BITS,
    BLOCK,
    HEADER_BYTES,
    LARGEST_SCALE,
    LEVELS,
    ROW,
    SIGN_UNIT,
    SMALLEST_SCALE,
    WORD,
    Layout,
    MalformedBuffer,
)
from netsenseml.compress.sparsify import sampling

_LANES = 1024
"""Elements of one program."""
_WORD_TYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


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
    with torch.cuda.device_of(compensated):  # where Triton launches
        buffer[:HEADER_BYTES] = _header(plan.header(), buffer.device)
        buffer[plan.codes.stop :] = 0
        return _encode(compensated, plan, key, buffer, chosen)


def add_decoded(buffer: torch.Tensor, plan: Layout, out: torch.Tensor, scale: float) -> None:
    """Add ``scale`` times the decoded buffer; raises MalformedBuffer for positions that cannot
    be."""
    with torch.cuda.device_of(out):
        _add(buffer, plan, out, scale)


def _encode(
    compensated: torch.Tensor,
    plan: Layout,
    key: int | None,
    buffer: torch.Tensor,
    chosen: torch.Tensor | None,
) -> torch.Tensor | None:
    positions = None
    if not plan.dense:
        positions = _largest(compensated, plan.k) if chosen is None else chosen.int()
        bits = buffer[plan.high.start : plan.low.stop].zero_().view(torch.int32)
        low_at = (plan.low.start - plan.high.start) // 4
        _encode_positions[_grid(plan.k)](
            positions, bits, bits[low_at:], plan.k, plan.low_bits, plan.step, _LANES
        )
    codes, scales = _sections(buffer, plan)
    at = compensated if positions is None else positions
    if plan.values in (layout.FP32, layout.BF16):
        _encode_floats[_grid(plan.k)](
            compensated,
            at,
            codes,
            plan.k,
            positions is not None,
            plan.values == layout.BF16,
            _LANES,
            enable_fp_fusion=False,
        )
        return positions
    block, words = BLOCK[plan.values], _words_of_a_row(plan.values)
    _encode_blocks[_grid(plan.k)](
        compensated,
        at,
        codes,
        scales,
        plan.k,
        (key or 0) - (1 << 32) * ((key or 0) >> 31),  # as a signed number
        positions is not None,
        key is not None,
        plan.values == layout.SIGN,
        LEVELS.get(plan.values, 1),
        LARGEST_SCALE[plan.values],
        SMALLEST_SCALE,
        SIGN_UNIT,
        BITS[plan.values],
        _LANES // ROW,
        ROW // block,
        block // words,
        words,
        enable_fp_fusion=False,
    )
    return positions


def _add(buffer: torch.Tensor, plan: Layout, out: torch.Tensor, scale: float) -> None:
    positions = None if plan.dense else _positions(buffer, plan)
    codes, scales = _sections(buffer, plan)
    _add_decoded[_grid(plan.k)](
        out,
        out if positions is None else positions,
        codes,
        scales,
        plan.k,
        scale,
        positions is not None,
        plan.values,
        BITS[plan.values],
        BLOCK.get(plan.values, 1),
        _words_of_a_row(plan.values) if plan.values in BLOCK else 1,
        _LANES,
        enable_fp_fusion=False,
    )


@lru_cache(maxsize=1024)
def _header(header: bytes, device: torch.device) -> torch.Tensor:
    """On the device, as a copy from pageable memory waits for it."""
    return torch.frombuffer(bytearray(header), dtype=torch.uint8).to(device)


def _grid(elements: int) -> tuple[int]:
    return (triton.cdiv(elements, _LANES),)


def _words_of_a_row(values: int) -> int:
    return ROW * BITS[values] // (8 * WORD[values])


def _sections(buffer: torch.Tensor, plan: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in the words that they are packed in, and scales as bits of bfloat16."""
    word = WORD.get(plan.values, BITS[plan.values] // 8)
    return buffer[plan.codes].view(_WORD_TYPE[word]), buffer[plan.scales].view(torch.int16)


def _largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """Positions, ascending, int32, of the k elements of largest magnitude; see ``sparsify.largest``
    for their order.

    Candidates are those above a threshold guessed from a sample; if that was a bad guess, all but
    the zeros, of which whole layers may consist. If those are too few, the first zeros join them.
    """
    bits = x.view(torch.int32)
    stride, rank = sampling(len(x), k)
    magnitudes = bits[::stride] & _MAGNITUDE
    guess = magnitudes.topk(rank).values[-1]  # kthvalue may be refused as not deterministic
    for threshold in (guess.clamp_(min=1), torch.ones_like(guess)):
        counts = torch.empty(triton.cdiv(len(x), _LANES), dtype=torch.int32, device=x.device)
        _count[(len(counts),)](bits, threshold, counts, len(x), _LANES)
        ends = counts.cumsum(0)
        found = int(ends[-1])
        if found >= k:
            break
    positions, magnitudes = torch.empty(2, found, dtype=torch.int32, device=x.device)
    if found:
        _collect[(len(counts),)](
            bits, threshold, ends - counts, positions, magnitudes, len(x), _LANES
        )
    if found > k:
        # among equals, the first come first
        order = magnitudes.sort(descending=True, stable=True).indices[:k]
        positions = positions[order].sort().values
    elif found < k:
        zeros = (x[:k] == 0).nonzero().squeeze(1)[: k - found]
        positions = torch.cat([positions, zeros.int()]).sort().values
    return positions


_MAGNITUDE = 0x7FFFFFFF


def _positions(buffer: torch.Tensor, plan: Layout) -> torch.Tensor:
    """Read and checked, int32."""
    high, low = buffer[plan.high].view(torch.int32), buffer[plan.low].view(torch.int32)
    words = 32
    counts = torch.empty(len(high), dtype=torch.int32, device=buffer.device)
    grid = (triton.cdiv(len(high), words),)
    _count_bits[grid](high, counts, len(high), words)
    ends = counts.cumsum(0)
    positions = torch.empty(plan.k, dtype=torch.int32, device=buffer.device)
    _decode_positions[grid](
        high,
        low,
        ends,
        counts,
        positions,
        plan.k,
        plan.low_bits,
        plan.step,
        len(high),
        len(low),
        words,
    )
    wrong = (ends[-1:] != plan.k).int()
    _check_positions[_grid(plan.k)](positions, wrong, plan.k, plan.n, _LANES)
    if int(wrong):
        raise MalformedBuffer(f"its positions are not {plan.k} ascending ones below {plan.n}")
    return positions


@triton.jit
def _count(bits, threshold, counts, n, lanes: tl.constexpr):
    at = tl.program_id(0) * lanes + tl.arange(0, lanes)
    magnitude = tl.load(bits + at, mask=at < n, other=0) & 0x7FFFFFFF
    tl.store(
        counts + tl.program_id(0), tl.sum((magnitude >= tl.load(threshold)).to(tl.int32), axis=0)
    )


@triton.jit
def _collect(bits, threshold, begins, positions, magnitudes, n, lanes: tl.constexpr):
    at = tl.program_id(0) * lanes + tl.arange(0, lanes)
    magnitude = tl.load(bits + at, mask=at < n, other=0) & 0x7FFFFFFF
    chosen = magnitude >= tl.load(threshold)
    place = tl.load(begins + tl.program_id(0)) + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(positions + place, at, mask=chosen)
    tl.store(magnitudes + place, magnitude, mask=chosen)


@triton.jit
def _encode_positions(positions, high, low, k, low_bits, step, lanes: tl.constexpr):
    j = tl.program_id(0) * lanes + tl.arange(0, lanes)
    inside = j < k
    position = tl.load(positions + j, mask=inside, other=0)
    place = (position >> low_bits) + j * step
    one = tl.full((lanes,), 1, tl.int32)
    tl.atomic_or(high + (place >> 5), one << (place & 31), mask=inside)
    part = (position & ((1 << low_bits) - 1)).to(tl.uint32)
    first = j.to(tl.int64) * low_bits
    word, offset = (first >> 5).to(tl.int32), (first & 31).to(tl.uint32)
    tl.atomic_or(
        low + word, (part << offset).to(tl.int32, bitcast=True), mask=inside & (low_bits > 0)
    )
    over = inside & (offset + low_bits > 32)
    tl.atomic_or(
        low + word + 1, (part >> ((32 - offset) & 31)).to(tl.int32, bitcast=True), mask=over
    )


@triton.jit
def _count_bits(high, counts, size, words: tl.constexpr):
    at = tl.program_id(0) * words + tl.arange(0, words)
    word = tl.load(high + at, mask=at < size, other=0)
    bits = (word[:, None] >> tl.arange(0, 32)[None, :]) & 1
    tl.store(counts + at, tl.sum(bits, axis=1), mask=at < size)


@triton.jit
def _decode_positions(
    high,
    low,
    ends,
    counts,
    positions,
    k,
    low_bits,
    step,
    size,
    low_size,
    words: tl.constexpr,
):
    at = tl.program_id(0) * words + tl.arange(0, words)
    word = tl.load(high + at, mask=at < size, other=0)
    bits = (word[:, None] >> tl.arange(0, 32)[None, :]) & 1
    begin = (
        tl.load(ends + at, mask=at < size, other=0) - tl.load(counts + at, mask=at < size, other=0)
    ).to(tl.int32)
    j = begin[:, None] + tl.cumsum(bits, axis=1) - 1
    place = at[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = (bits == 1) & (j < k)
    first = j.to(tl.int64) * low_bits
    lower, offset = (first >> 5).to(tl.int32), (first & 31).to(tl.uint32)
    here = tl.load(low + lower, mask=inside & (lower < low_size), other=0).to(
        tl.uint32, bitcast=True
    )
    next_one = tl.load(
        low + lower + 1, mask=inside & (lower + 1 < low_size) & (offset > 0), other=0
    ).to(tl.uint32, bitcast=True)
    part = (here >> offset) | tl.where(offset > 0, next_one << ((32 - offset) & 31), 0)
    part = part.to(tl.int32, bitcast=True) & ((1 << low_bits) - 1)
    tl.store(positions + j, ((place - j * step) << low_bits) | part, mask=inside)


@triton.jit
def _check_positions(positions, wrong, k, n, lanes: tl.constexpr):
    j = tl.program_id(0) * lanes + tl.arange(0, lanes)
    position = tl.load(positions + j, mask=j < k, other=0)
    before = tl.load(positions + j - 1, mask=(j > 0) & (j < k), other=-1)
    bad = (j < k) & ((position <= before) | (position >= n))
    count = tl.sum(bad.to(tl.int32), axis=0)
    if count > 0:
        tl.atomic_or(wrong, 1)


@triton.jit
def _encode_floats(
    x, positions, codes, k, sparse: tl.constexpr, half: tl.constexpr, lanes: tl.constexpr
):
    j = tl.program_id(0) * lanes + tl.arange(0, lanes)
    inside = j < k
    at = tl.load(positions + j, mask=inside, other=0) if sparse else j
    value = tl.load(x + at, mask=inside, other=0.0)
    if half:
        word = value.to(tl.uint32, bitcast=True)
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        rounded = tl.where((word & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        sent = (rounded << 16).to(tl.float32, bitcast=True)
        left = tl.where((rounded & 0x7F80) == 0x7F80, 0.0, value - sent)
        tl.store(codes + j, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
        tl.store(x + at, left, mask=inside)
    else:
        tl.store(codes + j, value.to(tl.int32, bitcast=True), mask=inside)
        tl.store(x + at, tl.zeros((lanes,), tl.float32), mask=inside)


@triton.jit(do_not_specialize=["key"])
def _encode_blocks(
    x,
    positions,
    codes,
    scales,
    k,
    key,
    sparse: tl.constexpr,
    stochastic: tl.constexpr,
    sign: tl.constexpr,
    levels: tl.constexpr,
    largest_scale: tl.constexpr,
    smallest_scale: tl.constexpr,
    sign_unit: tl.constexpr,
    bits: tl.constexpr,
    rows: tl.constexpr,
    blocks: tl.constexpr,
    shares: tl.constexpr,
    words: tl.constexpr,
):
    """Whole rows of 256 values: ``blocks`` in a row have a scale each, and of each, ``shares``
    values are in one of the row's ``words``."""
    block = tl.program_id(0) * rows * blocks + tl.arange(0, rows * blocks)
    within = tl.arange(0, shares)[:, None] * words + tl.arange(0, words)[None, :]
    j = block[:, None, None] * (shares * words) + within[None, :, :]
    inside = j < k
    at = tl.load(positions + j, mask=inside, other=0) if sparse else j
    given = tl.load(x + at, mask=inside, other=0.0)
    magnitude = given.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.max(magnitude, axis=2), axis=1)
    bad = largest >= 0x7F800000
    value = tl.where(bad[:, None, None], 0.0, given)
    unit = tl.where(bad, 0, largest).to(tl.float32, bitcast=True)
    if sign:
        code = (value.to(tl.int32, bitcast=True) < 0).to(tl.int32)
        whole = tl.where(unit > 0, unit, 1.0)
        part = (
            tl.div_rn(tl.abs(value), tl.broadcast_to(whole[:, None, None], value.shape)) * sign_unit
        ).to(tl.int32)
        total = tl.sum(tl.sum(part, axis=2), axis=1).to(tl.float32)
        count = tl.minimum(tl.maximum(k - block * (shares * words), 1), shares * words).to(
            tl.float32
        )
        scale = unit * tl.div_rn(total, sign_unit * count)
        half = (scale.to(tl.int32, bitcast=True) + 0x8000) >> 16
    else:
        scale = tl.maximum(tl.div_rn(unit, tl.full(unit.shape, levels, tl.float32)), smallest_scale)
        half = (scale.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    half = tl.minimum(half, largest_scale)
    scale = (half << 16).to(tl.float32, bitcast=True)
    if sign:
        negative = (code == 1) & (unit > 0)[:, None, None]
        # Triton's -x is 0 - x, which has no negative zero
        sent = tl.where(negative, -1.0, 1.0) * scale[:, None, None]
    else:
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        level = value * inverse[:, None, None]
        level = tl.minimum(tl.maximum(level, -1.0 * levels), 1.0 * levels)
        if stochastic:
            h = j.to(tl.uint32) ^ key.to(tl.uint32)
            h = (h ^ (h >> 16)) * 0x85EBCA6B
            h = (h ^ (h >> 13)) * 0xC2B2AE35
            level += ((h >> 16).to(tl.float32) + 0.5) * 0.0000152587890625 - 0.5
        level = (level + 12582912.0) - 12582912.0  # to the nearest integer, to even in between
        code = level.to(tl.int32)
        sent = code.to(tl.float32) * scale[:, None, None]
    tl.store(x + at, value - sent, mask=inside)
    share = tl.arange(0, rows * blocks)[:, None] % blocks * shares + tl.arange(0, shares)[None, :]
    packed = tl.sum((code & ((1 << bits) - 1)) << (share * bits)[:, :, None], axis=1)
    packed = tl.sum(tl.reshape(packed, (rows, blocks, words)), axis=1)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    there = (row * 256 < k)[:, None]
    tl.store(
        codes + row[:, None] * words + tl.arange(0, words)[None, :],
        packed.to(codes.dtype.element_ty),
        mask=there,
    )
    half = tl.where(bad, 0x7FC0, half)
    tl.store(scales + block, half.to(tl.int16), mask=block // blocks * 256 < k)


@triton.jit
def _add_decoded(
    out,
    positions,
    codes,
    scales,
    k,
    factor,
    sparse: tl.constexpr,
    form: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    words: tl.constexpr,
    lanes: tl.constexpr,
):
    j = tl.program_id(0) * lanes + tl.arange(0, lanes)
    inside = j < k
    if form == 0:
        value = tl.load(codes + j, mask=inside, other=0).to(tl.float32, bitcast=True)
    elif form == 1:
        half = tl.load(codes + j, mask=inside, other=0).to(tl.int32) & 0xFFFF
        value = (half << 16).to(tl.float32, bitcast=True)
    else:
        place = j % 256
        word = tl.load(codes + j // 256 * words + place % words, mask=inside, other=0).to(tl.int32)
        # the second shift copies the sign downwards
        level = (word << (32 - bits - place // words * bits)) >> (32 - bits)
        if form == 4:
            level = 1 + 2 * level
        half = tl.load(scales + j // block, mask=inside, other=0).to(tl.int32) & 0xFFFF
        value = level.to(tl.float32) * (half << 16).to(tl.float32, bitcast=True)
    value = value * factor
    if sparse:
        at = tl.load(positions + j, mask=inside, other=0)
        value = value + 0.0  # as the kernels of the CPU do, which makes a zero of its negative
    else:
        at = j
    tl.store(out + at, tl.load(out + at, mask=inside, other=0.0) + value, mask=inside)
