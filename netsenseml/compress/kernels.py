"""Loops over gradients on the CPU: compiled when this module is imported, or loaded from the cache beside it.

They run on one thread, without the interpreter's lock, and start no threads: a process that has imported them may fork.
``layout`` says what they write; ``tensors`` writes the same bytes with torch operations.

The bits of a float32, as an int32 without the sign, order like magnitudes, with NaN above infinity. That is the order in
which elements are chosen; among equals the lower index wins.

The type of every constant and intermediate result is spelt out: Numba would widen them to 64 bits, and a vector would
hold half as many. Values come in rows of one block, as an index that the compiler knows to be positive is a plain address.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from netsenseml.compress import layout

F = TypeVar("F", bound=Callable[..., Any])
Array: TypeAlias = np.ndarray[Any, Any]

BLOCK = layout.BLOCK
WORD = 64
MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY = np.int32(0x7F800000)
NAN = np.float32(np.nan)
LEVELS_INT8 = np.float32(layout.LEVELS[layout.INT8])
LEVELS_INT4 = np.float32(layout.LEVELS[layout.INT4])
LARGEST = np.float32(layout.LARGEST)
SIGN_UNIT = np.float32(layout.SIGN_UNIT)


def _kernel(signature: str) -> Callable[[F], F]:
    """Compile now. In a signature, u4 is uint32, f4 float32; [::1] a contiguous array, [:, ::1] one of two dimensions."""

    def compiled(function: F) -> F:
        made: Any
        try:
            made = njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # nowhere to keep a cache: a read-only installation without a home
            made = njit(signature, nogil=True)(function)
        return made

    return compiled


def _part(function: F) -> F:
    """Compile into the kernels that call it."""
    made: Any = njit(function)
    return made


def _instruction(result: Any, argument: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """A function of one number that is one instruction of the machine."""

    @intrinsic
    def function(_: Any, number: Any) -> Any:
        return result(argument), lambda context, builder, signature, arguments: emit(builder, arguments[0])

    return function


_lowest_bit = _instruction(types.int64, types.uint64, lambda builder, word: builder.cttz(word, ir.Constant(ir.IntType(1), 1)))
_bits = _instruction(types.int32, types.float32, lambda builder, number: builder.bitcast(number, ir.IntType(32)))
_number = _instruction(types.float32, types.int32, lambda builder, bits: builder.bitcast(bits, ir.FloatType()))


@_part
def _magnitude(number: Any) -> Any:
    return np.int32(_bits(number) & MAGNITUDE)


# ---------------------------------------------------------------------------------------------------- selection


@_kernel("i8(i4[::1], i4, u4[::1], i4[::1])")
def passing(bits: Array, threshold: int, positions: Array, values: Array) -> int:
    """Positions, ascending, and bits of the elements with a magnitude of at least ``threshold``; their number.

    -1 if they may not fit: there must be WORD places more than elements that pass. The comparisons go into words, without
    a branch; then only the bits set are visited.
    """
    found = 0
    for word in range((bits.size + WORD - 1) // WORD):
        start = word * WORD
        hits = np.uint64(0)
        if start + WORD <= bits.size:
            for i in range(WORD):  # a constant, so that the loop becomes a few vector instructions
                hits |= np.uint64((bits[start + i] & MAGNITUDE) >= threshold) << np.uint64(i)
        else:
            for i in range(bits.size - start):
                hits |= np.uint64((bits[start + i] & MAGNITUDE) >= threshold) << np.uint64(i)
        if found + WORD > positions.size:
            return -1
        while hits:
            position = np.uint32(start + _lowest_bit(hits))
            positions[found] = position
            values[found] = bits[position]
            found += 1
            hits &= hits - np.uint64(1)
    return found


@_kernel("UniTuple(i8, 2)(i4[::1], i8)")
def kth_largest(bits: Array, k: int) -> tuple[int, int]:
    """The k-th largest magnitude, and how many of the k largest are equal to it.

    Radix selection by three digits of 11, 10 and 10 bits. Those that share the leading digits move on to the next.
    """
    counts = np.zeros(2048, np.int64)
    for i in range(bits.size):
        counts[(bits[i] & MAGNITUDE) >> 20] += 1
    leading, wanted = 2047, k
    while counts[leading] < wanted:
        wanted -= counts[leading]
        leading -= 1
    members = np.empty(counts[leading] + 1, np.int32)  # one place more, so that none is written by a branch
    size = 0
    for i in range(bits.size):
        magnitude = bits[i] & MAGNITUDE
        members[size] = magnitude
        size += (magnitude >> 20) == leading
    for shift in (10, 0):
        counts[:] = 0
        for i in range(size):
            counts[(members[i] >> shift) & 1023] += 1
        digit = 1023
        while counts[digit] < wanted:
            wanted -= counts[digit]
            digit -= 1
        leading = leading << 10 | digit
        kept = 0
        for i in range(size):
            magnitude = members[i]
            members[kept] = magnitude
            kept += (magnitude >> shift) == leading
        size = kept
    return leading, wanted


@_kernel("void(u4[::1], i4[::1], i8)")
def cut(positions: Array, values: Array, k: int) -> None:
    """Move those of the k largest magnitudes to the front, in their order; both arrays have the same size >= k."""
    if k == positions.size:
        return
    threshold, equals = kth_largest(values, k)
    kept = 0
    for i in range(positions.size):
        positions[kept] = positions[i]
        values[kept] = values[i]
        magnitude = values[i] & MAGNITUDE
        equal = (magnitude == threshold) & (equals > 0)
        equals -= equal
        kept += (magnitude > threshold) | equal


@_kernel("void(f4[::1], u4[::1], f4[::1])")
def scatter(x: Array, positions: Array, values: Array) -> None:
    for j in range(positions.size):
        x[positions[j]] = values[j]


@_kernel("void(f4[::1], u4[::1], f4[::1])")
def scatter_add(x: Array, positions: Array, values: Array) -> None:
    for j in range(positions.size):
        x[positions[j]] += values[j]


# ---------------------------------------------------------------------------------------------------- positions


@_kernel("void(u4[::1], i8, i8, u8[::1], u8[::1])")
def put_positions(positions: Array, low_bits: int, step: int, high: Array, low: Array) -> None:
    """See ``layout``. Words are filled in a register."""
    mask = (np.uint64(1) << np.uint64(low_bits)) - np.uint64(1)
    high[:] = 0
    at = word = filled = 0
    hits = fields = np.uint64(0)
    for j in range(positions.size):
        position: Any = np.int64(positions[j])
        bit = (position >> low_bits) + j * step
        if bit >> 6 != at:
            high[at] = hits
            at, hits = bit >> 6, np.uint64(0)
        hits |= np.uint64(1) << np.uint64(bit & 63)
        if low_bits:
            field = np.uint64(position) & mask
            fields |= field << np.uint64(filled)
            filled += low_bits
            if filled >= WORD:
                low[word] = fields
                word, filled = word + 1, filled - WORD
                fields = field >> np.uint64(low_bits - filled)
    high[at] = hits
    if filled:
        low[word] = fields


@_kernel("b1(u8[::1], u8[::1], i8, i8, i8, u4[::1])")
def get_positions(high: Array, low: Array, low_bits: int, step: int, n: int, positions: Array) -> bool:
    """Inverse of ``put_positions``; False unless there are as many as ``positions`` takes, ascending and below n."""
    mask = (np.uint64(1) << np.uint64(low_bits)) - np.uint64(1)
    found = word = filled = 0
    last: Any = -1
    fields = np.uint64(0)
    for start in range(high.size):
        hits = high[start]
        while hits:
            if found == positions.size:
                return False
            position = start * WORD + _lowest_bit(hits) - found * step
            hits &= hits - np.uint64(1)
            if low_bits:
                field = fields & mask
                fields >>= np.uint64(low_bits)
                filled -= low_bits
                if filled < 0:
                    following = low[word]
                    word += 1
                    field |= following << np.uint64(filled + low_bits) & mask
                    fields = following >> np.uint64(-filled)
                    filled += WORD
                position = position << low_bits | np.int64(field)
            if not last < position < n:
                return False
            positions[found] = position
            last = position
            found += 1
    return found == positions.size


# ---------------------------------------------------------------------------------------------------- values
# ``put`` codes rows of blocks and leaves in x what was not sent; ``add`` adds factor times what was coded.


@_kernel("void(f4[::1], f4[::1], f4)")
def add_fp32(x: Array, codes: Array, factor: Any) -> None:
    for i in range(x.size):
        x[i] += factor * codes[i]


@_kernel("void(f4[::1], u2[::1])")
def put_bf16(x: Array, codes: Array) -> None:
    """Round to nearest, to even in between; NaN becomes 0x7fc0."""
    for i in range(x.size):
        word = np.uint32(_bits(x[i]))
        half = np.uint32(word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        if _magnitude(x[i]) > INFINITY:
            half = np.uint32(0x7FC0)
        codes[i] = half
        sent = _number(np.int32(half << np.uint32(16)))
        x[i] = x[i] - sent if _magnitude(sent) < INFINITY else np.float32(0)


@_kernel("void(f4[::1], u2[::1], f4)")
def add_bf16(x: Array, codes: Array, factor: Any) -> None:
    for i in range(x.size):
        x[i] += factor * _number(np.int32(np.uint32(codes[i]) << np.uint32(16)))


@_part
def _noise(place: Any, key: Any) -> Any:
    """An odd multiple of 2**-17 between 0 and 1: the finaliser of MurmurHash3 (A. Appleby) over place ^ key.

    place: index of the value among those that are sent. A hash has no state: values may be coded in any order.
    """
    h = np.uint32(place ^ key)
    h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return (np.float32(np.int32(h >> np.uint32(16))) + np.float32(0.5)) * np.float32(2**-16)


@_part
def _quantise(x: Array, b: int, block: int, key: Any, levels: Any, codes: Array, row: int) -> Any:
    """Levels from -levels to levels for row b of x, by stochastic rounding, one a byte; returns their unit."""
    largest = np.int32(0)
    for i in range(BLOCK):
        largest = max(largest, _magnitude(x[b, i]))
    scale = min(_number(largest), LARGEST) / levels
    if largest >= INFINITY:
        for i in range(BLOCK):
            codes[row, i] = 0
            x[b, i] = 0
        return NAN
    if scale == 0:  # all are zero, or too small for a scale
        for i in range(BLOCK):
            codes[row, i] = 0
        return scale
    key = np.uint32(np.uint32(block * BLOCK) ^ key)  # with i it makes the place of the value ^ key
    for i in range(BLOCK):
        level = np.floor(x[b, i] / scale + _noise(np.uint32(i), key))
        level = min(max(level, -levels), levels)
        codes[row, i] = np.uint8(np.int32(level))
        x[b, i] -= level * scale
    return scale


@_kernel("void(f4[:, ::1], i8, u4, f4[::1], u1[:, ::1])")
def put_int8(x: Array, first: int, key: Any, scales: Array, codes: Array) -> None:
    for b in range(x.shape[0]):
        scales[b] = _quantise(x, b, first + b, key, LEVELS_INT8, codes, b)


@_kernel("void(f4[:, ::1], i8, u4, f4[::1], u1[:, ::1])")
def put_int4(x: Array, first: int, key: Any, scales: Array, codes: Array) -> None:
    levels = np.empty((1, BLOCK), np.uint8)
    for b in range(x.shape[0]):
        scales[b] = _quantise(x, b, first + b, key, LEVELS_INT4, levels, 0)
        for i in range(BLOCK // 2):
            codes[b, i] = (levels[0, i] & np.uint8(15)) | np.uint8(levels[0, BLOCK // 2 + i] << np.uint8(4))


@_kernel("void(f4[:, ::1], f4[::1], u1[:, ::1], f4)")
def add_int8(x: Array, scales: Array, codes: Array, factor: Any) -> None:
    for b in range(x.shape[0]):
        for i in range(BLOCK):
            x[b, i] += factor * (np.float32(np.int8(codes[b, i])) * scales[b])


@_kernel("void(f4[:, ::1], f4[::1], u1[:, ::1], f4)")
def add_int4(x: Array, scales: Array, codes: Array, factor: Any) -> None:
    for b in range(x.shape[0]):
        for i in range(BLOCK // 2):
            level = np.int8(np.uint8(codes[b, i] << np.uint8(4))) >> np.int8(4)
            x[b, i] += factor * (np.float32(level) * scales[b])
        for i in range(BLOCK // 2):
            level = np.int8(codes[b, i]) >> np.int8(4)
            x[b, BLOCK // 2 + i] += factor * (np.float32(level) * scales[b])


@_kernel("void(f4[:, ::1], i8, f4[::1], u1[:, ::1])")
def put_sign(x: Array, count: int, scales: Array, codes: Array) -> None:
    """Signs, and the mean magnitude of ``count`` values a block, the others being zero.

    The sum is one of whole numbers, parts of the largest, so that it has the same bits in whatever order it is formed.
    """
    for b in range(x.shape[0]):
        for i in range(BLOCK // 8):
            code = np.uint8(0)
            for part in range(8):
                sign = np.uint32(_bits(x[b, BLOCK // 8 * part + i])) >> np.uint32(31)
                code |= np.uint8(sign << np.uint32(part))
            codes[b, i] = code
        largest = np.int32(0)
        for i in range(BLOCK):
            largest = max(largest, _magnitude(x[b, i]))
        if largest >= INFINITY:
            scales[b] = NAN
            for i in range(BLOCK):
                x[b, i] = 0
            continue
        scale = unit = _number(largest)
        if largest:
            total = np.int32(0)
            for i in range(BLOCK):
                total = np.int32(total + np.int32(abs(x[b, i]) / unit * SIGN_UNIT))
            scale = unit * (np.float32(total) / (SIGN_UNIT * np.float32(count)))
        for i in range(BLOCK):
            x[b, i] -= -scale if _bits(x[b, i]) < 0 else scale
        scales[b] = scale


@_kernel("void(f4[:, ::1], f4[::1], u1[:, ::1], f4)")
def add_sign(x: Array, scales: Array, codes: Array, factor: Any) -> None:
    for b in range(x.shape[0]):
        for part in range(8):
            for i in range(BLOCK // 8):
                sign = np.float32(np.int32(1) - np.int32(2) * np.int32((codes[b, i] >> np.uint8(part)) & np.uint8(1)))
                x[b, BLOCK // 8 * part + i] += factor * (sign * scales[b])
