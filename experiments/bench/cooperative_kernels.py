"""What may take the place of ``netsenseml.compress.device_kernels``, which writes the same bytes
with more launches.

It ran in Triton's interpreter, also with several programs at once, and is compiled for sm_90
without spilling; no device has run it yet. tests/gpu/test_gpu_codec.py tells whether a device does
it right, gpu.py which of the two is faster. It needs Triton 3.4 (masked histograms, cooperative
launches).

Triton comes with torch. Products and sums must not be fused, or they would be rounded once instead
of twice.

A launch costs the CPU more than these kernels take, so a sparse buffer is written, and read, by
one. Its programs are all resident at once (a cooperative launch) and wait for each other between
the steps. The host waits for nothing but the word whether a buffer is malformed.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl

from netsenseml.compress import layout
from netsenseml.compress.layout import (
    BITS,
    BLOCK,
    LARGEST_SCALE,
    LEVELS,
    ROW,
    SIGN_UNIT,
    SMALLEST_SCALE,
    WORD,
    Layout,
    MalformedBuffer,
)

_LANES = 1024
"""Values that a program codes at once: whole rows."""
_TILE = 4096
"""Elements that a program searches at once."""
_WARPS, _REGISTERS, _RESIDENT = 8, 128, 2
"""Of a program that encodes a sparse buffer, registers a thread; so many such programs fit on a
multiprocessor."""
_SAMPLE = 4096
"""Elements from which every program guesses the threshold for itself."""
_MOST = 1024
"""Programs that wait for each other, at most."""
_ROUNDS, _BINS = 4, 256
"""The k-th largest magnitude is found by digits of 8 bits, highest first, from a histogram of
each."""


def _constants(values: int) -> tuple[int, ...]:
    """What a kernel is compiled for: the format, begin of the header, bits, block, words of a row,
    levels, largest scale."""
    header = int.from_bytes(layout.layout(values, 1, 1).header()[:8], "little")
    words = ROW * BITS[values] // (8 * WORD[values]) if values in BLOCK else 1
    return (
        values,
        header,
        BITS[values],
        BLOCK.get(values, 1),
        words,
        LEVELS.get(values, 1),
        LARGEST_SCALE.get(values, 0),
    )


_CONSTANTS = {values: _constants(values) for values in BITS}


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
    signed = 0 if key is None else key - (1 << 32) * (key >> 31)
    with torch.cuda.device_of(compensated):  # where Triton launches
        if plan.dense:
            _encode_all[(max(triton.cdiv(plan.n, _LANES), 1),)](
                compensated,
                buffer,
                plan.n,
                plan.scales.start,
                plan.codes.start,
                plan.codes.stop,
                signed,
                key is not None,
                *_CONSTANTS[plan.values],
                _LANES,
                enable_fp_fusion=False,
            )
            return None
        stride, rank = sampling(plan.n, plan.k)
        room = min(plan.n, math.ceil(stride * (rank + 4 * rank**0.5))) if chosen is None else 0
        programs = _programs(compensated.device, triton.cdiv(plan.n, _TILE), _RESIDENT)
        scratch = compensated.new_zeros(
            1 + _ROUNDS * _BINS + 3 * programs + 2 * room, dtype=torch.int32
        )
        positions = (
            compensated.new_empty(plan.k, dtype=torch.int32) if chosen is None else chosen.int()
        )
        _encode_some[(programs,)](
            compensated,
            positions,
            scratch,
            buffer,
            plan.n,
            plan.k,
            plan.low_bits,
            plan.step,
            plan.low.start,
            plan.scales.start,
            plan.codes.start,
            plan.codes.stop,
            stride,
            rank,
            room,
            signed,
            chosen is None,
            key is not None,
            *_CONSTANTS[plan.values],
            _LANES,
            num_warps=_WARPS,
            maxnreg=_REGISTERS,
            launch_cooperative_grid=True,
            enable_fp_fusion=False,
        )
        return positions


def sampling(n: int, k: int) -> tuple[int, int]:
    """As ``sparsify.sampling``, with a sample of at most ``_SAMPLE``."""
    stride = max(-(-n // _SAMPLE), 8) | 1
    expected = k / stride
    return stride, min(-(-n // stride), math.ceil(expected + 3 * math.sqrt(expected) + 1))


def add_decoded(buffer: torch.Tensor, plan: Layout, out: torch.Tensor, scale: float) -> None:
    """Add ``scale`` times the decoded buffer; raises MalformedBuffer for positions that cannot
    be."""
    values, _, bits, block, words, _, _ = _CONSTANTS[plan.values]
    with torch.cuda.device_of(out):
        if plan.dense:
            _add_all[(triton.cdiv(plan.n, _LANES),)](
                buffer,
                out,
                plan.n,
                plan.scales.start,
                plan.codes.start,
                scale,
                values,
                bits,
                block,
                words,
                _LANES,
                enable_fp_fusion=False,
            )
            return
        programs = _programs(
            out.device, triton.cdiv(max(8 * (plan.high.stop - plan.high.start), plan.k), _LANES), 1
        )
        scratch = out.new_zeros(2 + programs + plan.k, dtype=torch.int32)
        _add_some[(programs,)](
            buffer,
            out,
            scratch,
            plan.n,
            plan.k,
            plan.low_bits,
            plan.step,
            plan.low.start,
            plan.scales.start,
            plan.codes.start,
            scale,
            values,
            bits,
            block,
            words,
            _LANES,
            launch_cooperative_grid=True,
            enable_fp_fusion=False,
        )
        if int(scratch[1]):
            raise MalformedBuffer(f"its positions are not {plan.k} ascending ones below {plan.n}")


def _programs(device: torch.device, useful: int, resident: int) -> int:
    """So many can wait for each other. Triton's interpreter runs one after the other."""
    return min(useful, _MOST, resident * _multiprocessors(device)) if device.type == "cuda" else 1


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_HEADER = tl.constexpr(layout.HEADER_BYTES)
_SIGN_PARTS = tl.constexpr(SIGN_UNIT)
_SMALLEST = tl.constexpr(SMALLEST_SCALE)
_SEARCHED = tl.constexpr(_TILE)
_SAMPLED = tl.constexpr(_SAMPLE)
_TOGETHER = tl.constexpr(_MOST)
_DIGITS = tl.constexpr(_ROUNDS)
_OF_A_DIGIT = tl.constexpr(_BINS)


@triton.jit
def _wait(arrived, expected):
    """Until so many programs, all those of the grid once more, have come here; each sees what the
    others wrote before."""
    tl.debug_barrier()
    here = tl.atomic_add(arrived, 1, sem="acq_rel") + 1
    while here < expected:
        here = tl.atomic_add(arrived, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _magnitudes(bits, tile, size):
    """Of one tile, as integers, which have the order of ``sparsify.largest``; -1 beyond the end."""
    at = tile * _SEARCHED + tl.arange(0, _SEARCHED)
    if tile < size // _SEARCHED:  # without a mask several are loaded at once
        magnitude = tl.load(bits + at) & _MAGNITUDE
    else:
        magnitude = tl.where(
            at < size, tl.load(bits + at, mask=at < size, other=0) & _MAGNITUDE, -1
        )
    return magnitude


@triton.jit
def _guess(bits, n, stride, rank):
    """The magnitude of that rank in an evenly spaced sample, at least 1: its bits, highest
    first."""
    at = tl.arange(0, _SAMPLED).to(tl.int64) * stride
    magnitude = tl.load(bits + at, mask=at < n, other=0) & _MAGNITUDE
    guess = 0
    for bit in range(31):
        trial = guess | (1 << (30 - bit))
        guess = tl.where(tl.sum((magnitude >= trial).to(tl.int32), axis=0) >= rank, trial, guess)
    return tl.maximum(guess, 1)


@triton.jit
def _write_header(buffer, n, k, end, header: tl.constexpr):
    """And the zeros behind the codes, which end there, up to a multiple of 8 bytes."""
    tl.store(buffer.to(tl.pointer_type(tl.int64), bitcast=True), header)
    sizes = buffer.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(sizes + 2, n)
    tl.store(sizes + 3, k)
    behind = tl.arange(0, 8)
    tl.store(
        buffer + end + behind, tl.zeros((8,), tl.uint8), mask=end + behind < (end + 7) // 8 * 8
    )


@triton.jit(do_not_specialize=["n", "scales", "codes", "end", "key"])
def _encode_all(
    x,
    buffer,
    n,
    scales,
    codes,
    end,
    key,
    stochastic: tl.constexpr,
    form: tl.constexpr,
    header: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    words: tl.constexpr,
    levels: tl.constexpr,
    largest_scale: tl.constexpr,
    lanes: tl.constexpr,
):
    if tl.program_id(0) == 0:
        _write_header(buffer, n, n, end, header)
    if form < 2:
        _encode_floats(tl.program_id(0), x, x, buffer, n, 0, 0, 0, codes, form, False, lanes)
    else:
        _encode_blocks(
            tl.program_id(0), x, x, buffer, n, 0, 0, 0, scales, codes, key,
            stochastic, form, bits, block, words, levels, largest_scale, False, lanes,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "n",
        "k",
        "low_bits",
        "step",
        "low",
        "scales",
        "codes",
        "end",
        "stride",
        "rank",
        "room",
        "key",
    ]
)
def _encode_some(
    x,
    positions,
    scratch,
    buffer,
    n,
    k,
    low_bits,
    step,
    low,
    scales,
    codes,
    end,
    stride,
    rank,
    room,
    key,
    search: tl.constexpr,
    stochastic: tl.constexpr,
    form: tl.constexpr,
    header: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    words: tl.constexpr,
    levels: tl.constexpr,
    largest_scale: tl.constexpr,
    lanes: tl.constexpr,
):
    """scratch: zeros; programs that arrived, histograms, three counts a program, magnitudes and
    positions of candidates."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    if program == 0:
        _write_header(buffer, n, k, end, header)
    of_positions = (buffer + _HEADER).to(tl.pointer_type(tl.int64), bitcast=True)
    for part in range(program, (scales - _HEADER) // 8 // lanes + 1, programs):
        at = part * lanes + tl.arange(0, lanes)
        tl.store(of_positions + at, tl.zeros((lanes,), tl.int64), mask=at < (scales - _HEADER) // 8)
    if search:
        _find_largest(x, positions, scratch, n, k, stride, rank, room)
    else:
        _wait(scratch, programs)
    for part in range(program, (k - 1) // lanes + 1, programs):
        if form < 2:
            _encode_floats(
                part, x, positions, buffer, k, low_bits, step, low, codes, form, True, lanes
            )
        else:
            _encode_blocks(
                part, x, positions, buffer, k, low_bits, step, low, scales, codes, key,
                stochastic, form, bits, block, words, levels, largest_scale, True, lanes,
            )  # fmt: skip


@triton.jit
def _find_largest(x, positions, scratch, n, k, stride, rank, room):
    """Positions, ascending, of the k elements of largest magnitude; see ``sparsify.largest`` for
    their order.

    Candidates are those above a threshold guessed from a sample. If they are too few or too many,
    all elements are. Every program writes those of its share behind those of the programs before
    it, first the candidates, and at last the largest.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    histograms = scratch + 1
    counts = histograms + _DIGITS * _OF_A_DIGIT
    candidates = counts + 3 * programs
    values = x.to(tl.pointer_type(tl.int32), bitcast=True)
    lane, other = tl.arange(0, _SEARCHED), tl.arange(0, _TOGETHER)

    guess = _guess(values, n, stride, rank)
    begin, stop = _share(n)
    reached = tl.zeros((_SEARCHED,), tl.int32)
    for tile in range(begin, stop):
        reached += (_magnitudes(values, tile, n) >= guess).to(tl.int32)
    tl.store(counts + program, tl.sum(reached, axis=0))
    _wait(scratch, programs)

    found = tl.load(counts + other, mask=other < programs, other=0)
    size = tl.sum(found, axis=0)
    guessed = (size >= k) & (size <= room)
    if guessed:
        source = candidates
        before = tl.sum(tl.where(other < program, found, 0), axis=0)
        for tile in range(begin, stop):
            magnitude = _magnitudes(values, tile, n)
            candidate = (magnitude >= guess).to(tl.int32)
            place = before + tl.cumsum(candidate, axis=0) - 1
            tl.store(candidates + place, magnitude, mask=candidate == 1)
            tl.store(candidates + room + place, tile * _SEARCHED + lane, mask=candidate == 1)
            before += tl.sum(candidate, axis=0)
    else:
        source = values
        size = n
    _wait(scratch, 2 * programs)

    threshold = 0
    missing = k
    bins = tl.arange(0, _OF_A_DIGIT)
    for digit in range(_DIGITS):
        shift = 24 - 8 * digit
        count = tl.zeros((_OF_A_DIGIT,), tl.int32)
        for tile in range(program, (size - 1) // _SEARCHED + 1, programs):
            magnitude = _magnitudes(source, tile, size)
            count += tl.histogram(
                (magnitude >> shift) & 255, _OF_A_DIGIT, mask=(magnitude >> shift >> 8) == threshold
            )
        histogram = histograms + digit * _OF_A_DIGIT + bins
        tl.atomic_add(histogram, count, mask=count > 0, sem="relaxed")
        _wait(scratch, (3 + digit) * programs)
        count = tl.load(histogram)
        value = tl.sum((tl.cumsum(count, axis=0, reverse=True) >= missing).to(tl.int32), axis=0) - 1
        missing -= tl.sum(tl.where(bins > value, count, 0), axis=0)
        threshold = (threshold << 8) | value

    begin, stop = _share(size)
    above = tl.zeros((_SEARCHED,), tl.int32)
    equal = tl.zeros((_SEARCHED,), tl.int32)
    for tile in range(begin, stop):
        magnitude = _magnitudes(source, tile, size)
        above += (magnitude > threshold).to(tl.int32)
        equal += (magnitude == threshold).to(tl.int32)
    tl.store(counts + programs + program, tl.sum(above, axis=0))
    tl.store(counts + 2 * programs + program, tl.sum(equal, axis=0))
    _wait(scratch, (3 + _DIGITS) * programs)

    before = tl.sum(tl.load(counts + programs + other, mask=other < program, other=0), axis=0)
    ties = tl.sum(tl.load(counts + 2 * programs + other, mask=other < program, other=0), axis=0)
    for tile in range(begin, stop):
        magnitude = _magnitudes(source, tile, size)
        # half a word each
        both = (magnitude > threshold).to(tl.int32) + ((magnitude == threshold).to(tl.int32) << 16)
        so_far = tl.cumsum(both, axis=0)
        tie = ties + (so_far >> 16)
        j = before + (so_far & 0xFFFF) + tl.minimum(tie, missing) - 1
        chosen = (magnitude > threshold) | ((magnitude == threshold) & (tie <= missing))
        at = tile * _SEARCHED + lane
        if guessed:
            at = tl.load(candidates + room + at, mask=chosen, other=0)
        tl.store(positions + j, at, mask=chosen)
        of_tile = tl.sum(both, axis=0)
        before += of_tile & 0xFFFF
        ties += of_tile >> 16
    _wait(scratch, (4 + _DIGITS) * programs)


@triton.jit
def _share(size):
    """The tiles, from and to, that are this program's."""
    tiles = (size - 1) // _SEARCHED + 1
    share = (tiles - 1) // tl.num_programs(0) + 1
    begin = tl.minimum(tl.program_id(0) * share, tiles)
    return begin, tl.minimum(begin + share, tiles)


@triton.jit
def _encode_position(position, j, inside, buffer, low_bits, step, low):
    high = (buffer + _HEADER).to(tl.pointer_type(tl.int32), bitcast=True)
    lower = (buffer + low).to(tl.pointer_type(tl.int32), bitcast=True)
    place = (position >> low_bits) + j * step
    tl.atomic_or(
        high + (place >> 5),
        tl.full(j.shape, 1, tl.int32) << (place & 31),
        mask=inside,
        sem="relaxed",
    )
    part = (position & ((1 << low_bits) - 1)).to(tl.uint32)
    first = j.to(tl.int64) * low_bits
    word, offset = (first >> 5).to(tl.int32), (first & 31).to(tl.uint32)
    there = inside & (low_bits > 0)
    tl.atomic_or(
        lower + word, (part << offset).to(tl.int32, bitcast=True), mask=there, sem="relaxed"
    )
    over = inside & (offset + low_bits > 32)
    rest = (part >> ((32 - offset) & 31)).to(tl.int32, bitcast=True)
    tl.atomic_or(lower + word + 1, rest, mask=over, sem="relaxed")


@triton.jit
def _encode_floats(
    part,
    x,
    positions,
    buffer,
    k,
    low_bits,
    step,
    low,
    codes,
    form: tl.constexpr,
    sparse: tl.constexpr,
    lanes: tl.constexpr,
):
    j = part * lanes + tl.arange(0, lanes)
    inside = j < k
    at = j
    if sparse:
        at = tl.load(positions + j, mask=inside, other=0)
        _encode_position(at, j, inside, buffer, low_bits, step, low)
    value = tl.load(x + at, mask=inside, other=0.0)
    if form == 1:
        word = value.to(tl.uint32, bitcast=True)
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        rounded = tl.where((word & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        sent = (rounded << 16).to(tl.float32, bitcast=True)
        left = tl.where((rounded & 0x7F80) == 0x7F80, 0.0, value - sent)
        halves = (buffer + codes).to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(halves + j, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
        tl.store(x + at, left, mask=inside)
    else:
        tl.store(
            (buffer + codes).to(tl.pointer_type(tl.float32), bitcast=True) + j, value, mask=inside
        )
        tl.store(x + at, tl.zeros((lanes,), tl.float32), mask=inside)


@triton.jit
def _encode_blocks(
    part,
    x,
    positions,
    buffer,
    k,
    low_bits,
    step,
    low,
    scales,
    codes,
    key,
    stochastic: tl.constexpr,
    form: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    words: tl.constexpr,
    levels: tl.constexpr,
    largest_scale: tl.constexpr,
    sparse: tl.constexpr,
    lanes: tl.constexpr,
):
    """Whole rows of 256 values: ``blocks`` in a row have a scale each, and of each, ``shares``
    values are in one of the row's ``words``."""
    rows: tl.constexpr = lanes // 256
    blocks: tl.constexpr = 256 // block
    shares: tl.constexpr = block // words
    number = part * rows * blocks + tl.arange(0, rows * blocks)
    within = tl.arange(0, shares)[:, None] * words + tl.arange(0, words)[None, :]
    j = number[:, None, None] * block + within[None, :, :]
    inside = j < k
    at = j
    if sparse:
        at = tl.load(positions + j, mask=inside, other=0)
        _encode_position(at, j, inside, buffer, low_bits, step, low)
    given = tl.load(x + at, mask=inside, other=0.0)
    magnitude = given.to(tl.int32, bitcast=True) & _MAGNITUDE
    largest = tl.max(tl.max(magnitude, axis=2), axis=1)
    bad = largest >= 0x7F800000
    value = tl.where(bad[:, None, None], 0.0, given)
    unit = tl.where(bad, 0, largest).to(tl.float32, bitcast=True)
    if form == 4:
        code = (value.to(tl.int32, bitcast=True) < 0).to(tl.int32)
        whole = tl.where(unit > 0, unit, 1.0)
        share = (
            tl.div_rn(tl.abs(value), tl.broadcast_to(whole[:, None, None], value.shape))
            * _SIGN_PARTS
        ).to(tl.int32)
        total = tl.sum(tl.sum(share, axis=2), axis=1).to(tl.float32)
        count = tl.minimum(tl.maximum(k - number * block, 1), block).to(tl.float32)
        scale = unit * tl.div_rn(total, _SIGN_PARTS * count)
        half = (scale.to(tl.int32, bitcast=True) + 0x8000) >> 16
    else:
        scale = tl.maximum(tl.div_rn(unit, tl.full(unit.shape, levels, tl.float32)), _SMALLEST)
        half = (scale.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    half = tl.minimum(half, largest_scale)
    scale = (half << 16).to(tl.float32, bitcast=True)
    if form == 4:
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
    place = tl.arange(0, rows * blocks)[:, None] % blocks * shares + tl.arange(0, shares)[None, :]
    packed = tl.sum((code & ((1 << bits) - 1)) << (place * bits)[:, :, None], axis=1)
    packed = tl.sum(tl.reshape(packed, (rows, blocks, words)), axis=1)
    row = part * rows + tl.arange(0, rows)
    to = row[:, None] * words + tl.arange(0, words)[None, :]
    there = (row * 256 < k)[:, None]
    if form == 4:
        tl.store(buffer + codes + to, packed.to(tl.uint8), mask=there)
    else:
        tl.store(
            (buffer + codes).to(tl.pointer_type(tl.int32), bitcast=True) + to, packed, mask=there
        )
    half = tl.where(bad, 0x7FC0, half)
    halves = (buffer + scales).to(tl.pointer_type(tl.int16), bitcast=True)
    tl.store(halves + number, half.to(tl.int16), mask=number // blocks * 256 < k)


@triton.jit(do_not_specialize=["n", "scales", "codes", "factor"])
def _add_all(
    buffer,
    out,
    n,
    scales,
    codes,
    factor,
    form: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    words: tl.constexpr,
    lanes: tl.constexpr,
):
    j = tl.program_id(0) * lanes + tl.arange(0, lanes)
    value = _decoded(buffer, j, n, scales, codes, form, bits, block, words) * factor
    tl.store(out + j, tl.load(out + j, mask=j < n, other=0.0) + value, mask=j < n)


@triton.jit(do_not_specialize=["n", "k", "low_bits", "step", "low", "scales", "codes", "factor"])
def _add_some(
    buffer,
    out,
    scratch,
    n,
    k,
    low_bits,
    step,
    low,
    scales,
    codes,
    factor,
    form: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    words: tl.constexpr,
    lanes: tl.constexpr,
):
    """Nothing is added if the positions cannot be.

    scratch: zeros; programs that arrived, whether the positions cannot be, a count a program, and k
    positions.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    counts = scratch + 2
    positions = counts + programs
    width: tl.constexpr = lanes // 32
    high = (buffer + _HEADER).to(tl.pointer_type(tl.int32), bitcast=True)
    lower = (buffer + low).to(tl.pointer_type(tl.int32), bitcast=True)
    size, low_size = (low - _HEADER) // 4, (scales - low) // 4
    tiles = (size - 1) // width + 1
    share = (tiles - 1) // programs + 1
    begin = tl.minimum(program * share, tiles)
    stop = tl.minimum(begin + share, tiles)

    count = tl.zeros((width, 32), tl.int32)
    for tile in range(begin, stop):
        count += _bits_of(high, tile, size, width)
    tl.store(counts + program, tl.sum(tl.sum(count, axis=1), axis=0))
    _wait(scratch, programs)

    other = tl.arange(0, _TOGETHER)
    count = tl.load(counts + other, mask=other < programs, other=0)
    before = tl.sum(tl.where(other < program, count, 0), axis=0)
    wrong = (tl.sum(count, axis=0) != k).to(tl.int32)
    for tile in range(begin, stop):
        bit = _bits_of(high, tile, size, width)
        of_words = tl.sum(bit, axis=1)
        j = before + (tl.cumsum(of_words, axis=0) - of_words)[:, None] + tl.cumsum(bit, axis=1) - 1
        place = (tile * width + tl.arange(0, width))[:, None] * 32 + tl.arange(0, 32)[None, :]
        inside = (bit == 1) & (j < k)
        first = j.to(tl.int64) * low_bits
        word, offset = (first >> 5).to(tl.int32), (first & 31).to(tl.uint32)
        here = tl.load(lower + word, mask=inside & (word < low_size), other=0).to(
            tl.uint32, bitcast=True
        )
        after = tl.load(
            lower + word + 1, mask=inside & (word + 1 < low_size) & (offset > 0), other=0
        )
        after = after.to(tl.uint32, bitcast=True) << ((32 - offset) & 31)
        part = ((here >> offset) | tl.where(offset > 0, after, 0)).to(tl.int32, bitcast=True) & (
            (1 << low_bits) - 1
        )
        tl.store(positions + j, ((place - j * step) << low_bits) | part, mask=inside)
        before += tl.sum(of_words, axis=0)
    _wait(scratch, 2 * programs)

    for part in range(program, (k - 1) // lanes + 1, programs):
        j = part * lanes + tl.arange(0, lanes)
        position = tl.load(positions + j, mask=j < k, other=0)
        previous = tl.load(positions + j - 1, mask=(j > 0) & (j < k), other=-1)
        wrong += tl.sum(((j < k) & ((position <= previous) | (position >= n))).to(tl.int32), axis=0)
    if wrong > 0:
        tl.atomic_or(scratch + 1, 1)
    _wait(scratch, 3 * programs)

    if tl.load(scratch + 1) == 0:
        for part in range(program, (k - 1) // lanes + 1, programs):
            j = part * lanes + tl.arange(0, lanes)
            at = tl.load(positions + j, mask=j < k, other=0)
            value = _decoded(buffer, j, k, scales, codes, form, bits, block, words) * factor
            value = value + 0.0  # as the kernels of the CPU do, which makes a zero of its negative
            tl.store(out + at, tl.load(out + at, mask=j < k, other=0.0) + value, mask=j < k)


@triton.jit
def _bits_of(words, tile, size, width: tl.constexpr):
    at = tile * width + tl.arange(0, width)
    word = tl.load(words + at, mask=at < size, other=0)
    return (word[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def _decoded(
    buffer,
    j,
    k,
    scales,
    codes,
    form: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    words: tl.constexpr,
):
    inside = j < k
    if form == 0:
        value = tl.load(
            (buffer + codes).to(tl.pointer_type(tl.float32), bitcast=True) + j,
            mask=inside,
            other=0.0,
        )
    elif form == 1:
        half = tl.load(
            (buffer + codes).to(tl.pointer_type(tl.int16), bitcast=True) + j, mask=inside, other=0
        )
        value = ((half.to(tl.int32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)
    else:
        place = j % 256
        at = j // 256 * words + place % words
        if form == 4:
            word = tl.load(buffer + codes + at, mask=inside, other=0).to(tl.int32)
        else:
            word = tl.load(
                (buffer + codes).to(tl.pointer_type(tl.int32), bitcast=True) + at,
                mask=inside,
                other=0,
            )
        # the second shift copies the sign downwards
        level = (word << (32 - bits - place // words * bits)) >> (32 - bits)
        if form == 4:
            level = 1 + 2 * level
        half = tl.load(
            (buffer + scales).to(tl.pointer_type(tl.int16), bitcast=True) + j // block,
            mask=inside,
            other=0,
        )
        value = level.to(tl.float32) * ((half.to(tl.int32) & 0xFFFF) << 16).to(
            tl.float32, bitcast=True
        )
    return value
