"""Loops over gradients on the CPU, for Numba to compile; ``kernels`` keeps what comes of it, and
imports this only then.

They run on one thread, and take no memory but the stack's: so the code that comes of them needs
nothing of Numba's. ``layout`` says what they write; ``tensors`` writes the same bytes with torch
operations.

The bits of a float32, as an int32 without the sign, order like magnitudes, with NaN above infinity.
That is the order in which elements are chosen; among equals the lower index wins.

The type of every constant and intermediate result is spelt out: Numba would widen them to 64 bits,
and a vector would hold half as many. Values come in rows, as an index that the compiler knows to be
positive is a plain address.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, njit, types  # type: ignore[attr-defined]  # the first is public, but not declared so
from numba.core import cgutils
from numba.extending import intrinsic

from netsenseml.compress import layout

F = TypeVar("F", bound=Callable[..., Any])
Array: TypeAlias = np.ndarray[Any, Any]

ROW = layout.ROW
PAGE = 4  # rows of 1 KiB that are read ahead, as the processor fetches no further by itself
WORD = layout.WORD_BITS
MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY = np.int32(0x7F800000)
NAN_BF16 = np.uint16(0x7FC0)
SMALLEST_SCALE = np.float32(layout.SMALLEST_SCALE)
SIGN_UNIT = np.float32(layout.SIGN_UNIT)
TO_INTEGER = np.float32(1.5 * 2**23)
"""Added to a float32 up to 2**22 it rounds to nearest, to even in between, and the lowest bits are
the whole number's."""


_kernels: dict[str, tuple[Callable[..., Any], str]] = {}


def _kernel(signature: str, name: str = "") -> Callable[[F], F]:
    """A function to be called. In its signature, u4 is uint32, f4 float32; [::1] a contiguous
    array, [:, ::1] one of two dimensions."""

    def noted(function: F) -> F:
        _kernels[name or function.__name__] = function, signature
        return function

    return noted


def build(machine: Any) -> tuple[dict[str, str], bytes]:
    """(signatures by name, an object file with a function ``void name(int64_t *call)`` for each),
    for a machine of LLVM's.

    ``call``: [0] takes the result, [1] is of no use; then come the arguments as Numba hands them to
    its own functions: a number in one place, and an array in several (``kernels`` knows which).
    """
    modules = []
    for name, (function, signature) in _kernels.items():
        compiled: Any = njit(signature, nogil=True, error_model="numpy")(function)
        (found,), (text,) = compiled.overloads.values(), compiled.inspect_llvm().values()
        inner = found.fndesc.llvm_func_name
        types_of = [
            str(argument.type)
            for argument in llvm.parse_assembly(text).get_function(inner).arguments
        ]
        places = [f"%p{i} = getelementptr i64, ptr %call, i64 {i}" for i in range(len(types_of))]
        loads = [f"%a{i} = load {kind}, ptr %p{i}" for i, kind in enumerate(types_of) if i >= 2]
        arguments = ", ".join(
            f"{kind} %{'a' if i >= 2 else 'p'}{i}" for i, kind in enumerate(types_of)
        )
        body = "\n".join(
            [*places, *loads, f'%status = call i32 @"{inner}"({arguments})', "ret void"]
        )
        module = llvm.parse_assembly(f'{text}\ndefine void @"{name}"(ptr %call) {{\n{body}\n}}\n')
        for other in module.functions:
            if not other.is_declaration and other.name != name:
                other.linkage = "internal"
        modules.append(module)
    whole, *others = modules
    for module in others:
        whole.link_in(module)
    passes = llvm.create_new_module_pass_manager()
    # what would make Python objects of arguments and results
    passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    passes.run(whole, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    needless = [
        f.name for f in whole.functions if f.is_declaration and f.name.startswith(_NEEDLESS)
    ]
    whole.link_in(
        llvm.parse_assembly(
            "\n".join(f'define void @"{name}"() {{ unreachable }}' for name in needless)
        )
    )
    return {name: signature for name, (_, signature) in _kernels.items()}, machine.emit_object(
        whole
    )


_NEEDLESS = ("NRT_", "numba_", "Py", "_Py")
"""Beginnings of the names of what only arrays with an owner need, and errors; there are none of
either here."""


def _part(function: F) -> F:
    """Compile into the kernels that call it."""
    made: Any = njit(function)
    return made


def _instruction(result: Any, argument: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """A function of one number that is one instruction of the machine."""

    @intrinsic
    def function(_: Any, number: Any) -> Any:
        return result(argument), lambda context, builder, signature, arguments: emit(
            builder, arguments[0]
        )

    return function


def _room(element: Any, places: int) -> Any:
    """A function that takes memory of the stack, for so many numbers."""

    @intrinsic
    def function(_: Any) -> Any:
        taken = types.CPointer(element)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return cgutils.alloca_once(builder, context.get_data_type(element), size=places)

        return taken(), emit

    return function


_lowest_bit = _instruction(
    types.int64,
    types.uint64,
    lambda builder, word: builder.cttz(word, ir.Constant(ir.IntType(1), 1)),
)
_bits = _instruction(
    types.int32, types.float32, lambda builder, number: builder.bitcast(number, ir.IntType(32))
)
_number = _instruction(
    types.float32, types.int32, lambda builder, bits: builder.bitcast(bits, ir.FloatType())
)


@_part
def _magnitude(number: Any) -> Any:
    return np.int32(_bits(number) & MAGNITUDE)


@_part
def _widened(half: Any) -> Any:
    """The float32 of a bfloat16's bits."""
    return _number(np.int32(np.uint32(half) << np.uint32(16)))


# ---------------------------------------------------------------------------------------- selection


@_kernel("i8(i4[::1], i4, u4[::1], i4[::1])")
def select(bits: Array, threshold: int, positions: Array, values: Array) -> int:
    """Positions, ascending, and bits of the elements with a magnitude of at least ``threshold``;
    their number.

    -1 if they may not fit: there must be WORD places more than elements that pass. The comparisons
    go into words, without a branch; then only the bits set are visited.
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


_counts = _room(types.int64, 2048)


@_part
def _kth_largest(bits: Array, k: int, members: Array) -> tuple[int, int]:
    """The k-th largest magnitude, and how many of the k largest are equal to it.

    Radix selection by three digits of 11, 10 and 10 bits. Those that share the leading digits move
    on to the next, into ``members``, which has one place more than ``bits``, so that none is
    written by a branch.
    """
    counts = carray(_counts(), 2048)
    counts[:] = 0
    for i in range(bits.size):
        counts[(bits[i] & MAGNITUDE) >> 20] += 1
    leading, rank = 2047, k
    while counts[leading] < rank:
        rank -= counts[leading]
        leading -= 1
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
        while counts[digit] < rank:
            rank -= counts[digit]
            digit -= 1
        leading = leading << 10 | digit
        kept = 0
        for i in range(size):
            magnitude = members[i]
            members[kept] = magnitude
            kept += (magnitude >> shift) == leading
        size = kept
    return leading, rank


@_kernel("i8(i4[::1], i8, i4[::1])")
def kth_largest(bits: Array, k: int, members: Array) -> int:
    """The k-th largest magnitude; ``members``: room, one place more than ``bits`` has."""
    return _kth_largest(bits, k, members)[0]


@_kernel("void(u4[::1], i4[::1], i8, i4[::1])")
def keep_largest(positions: Array, values: Array, k: int, members: Array) -> None:
    """Move those of the k largest magnitudes to the front, in their order; both arrays have the
    same size >= k.

    ``members``: room, one place more.
    """
    if k == positions.size:
        return
    threshold, equals = _kth_largest(values, k, members)
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


# ---------------------------------------------------------------------------------------- positions


@_kernel("void(u4[::1], i8, i8, u8[::1], u8[::1])")
def encode_positions(positions: Array, low_bits: int, step: int, high: Array, low: Array) -> None:
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
def decode_positions(
    high: Array, low: Array, low_bits: int, step: int, n: int, positions: Array
) -> bool:
    """Inverse of ``encode_positions``; False unless there are as many as ``positions`` takes,
    ascending and below n."""
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


# ------------------------------------------------------------------------------------------- values
# ``encode`` codes values and leaves in x what was not sent; ``decode_add`` adds factor times what
# was coded.


@_kernel("void(f4[::1], f4[::1], f4)")
def decode_add_fp32(x: Array, codes: Array, factor: Any) -> None:
    for i in range(x.size):
        x[i] += factor * codes[i]


@_kernel("void(f4[::1], u2[::1])")
def encode_bf16(x: Array, codes: Array) -> None:
    """Round to nearest, to even in between; NaN becomes 0x7fc0."""
    for i in range(x.size):
        word = np.uint32(_bits(x[i]))
        half = np.uint32(
            word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
        ) >> np.uint32(16)
        if _magnitude(x[i]) > INFINITY:
            half = np.uint32(NAN_BF16)
        codes[i] = half
        sent = _widened(half)
        x[i] = x[i] - sent if _magnitude(sent) < INFINITY else np.float32(0)


@_kernel("void(f4[::1], u2[::1], f4)")
def decode_add_bf16(x: Array, codes: Array, factor: Any) -> None:
    for i in range(x.size):
        x[i] += factor * _widened(codes[i])


@_part
def _noise(place: Any, key: Any) -> Any:
    """An odd multiple of 2**-17 between -1/2 and 1/2: the finaliser of MurmurHash3 (A. Appleby)
    over place ^ key.

    place: index of the value among those that are sent. A hash has no state: values may be coded in
    any order.
    """
    h = np.uint32(place ^ key)
    h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return (np.float32(np.int32(h >> np.uint32(16))) + np.float32(0.5)) * np.float32(
        2**-16
    ) - np.float32(0.5)


@_part
def _find_largest(x: Array, start: int, stop: int, size: int, largest: Array) -> None:
    """Bits of the largest magnitude of every block of some rows; blocks in which that is not finite
    are cleared.

    size: of a block. Were it a constant, the compiler would unroll the loop and not vectorise it.
    """
    for row in range(start, stop):
        for b in range(largest.shape[1]):
            found = np.int32(0)
            for i in range(size):
                found = max(found, _magnitude(x[row, b * size + i]))
            largest[row - start, b] = found
            if found >= INFINITY:
                for i in range(size):
                    x[row, b * size + i] = 0


def _level_encoder(form: int, stochastic: bool) -> None:
    """Encode values as whole numbers from -levels to levels, times a scale."""
    bits, block, parts = (
        layout.BITS[form],
        layout.BLOCK[form],
        8 * layout.WORD[form] // layout.BITS[form],
    )
    levels, largest_scale = (
        np.float32(layout.LEVELS[form]),
        np.int32(layout.LARGEST_SCALE[form] << 16),
    )
    words, blocks, mask = ROW // parts, ROW // block, np.uint32(2**bits - 1)
    of_scale, of_inverse, of_noise = (
        _room(types.float32, blocks),
        _room(types.float32, blocks),
        _room(types.float32, ROW),
    )
    of_largest = _room(types.int32, PAGE * blocks)

    @_kernel(
        "void(f4[:, ::1], i8, u4, u2[:, ::1], u4[:, ::1])", f"encode_levels_{form}_{stochastic}"
    )
    def encode(x: Array, first: int, key: Any, scales: Array, codes: Array) -> None:
        """first: index of the first row; key: of the noise."""
        scale, inverse, noise = (
            carray(of_scale(), blocks),
            carray(of_inverse(), blocks),
            carray(of_noise(), ROW),
        )
        largest, size = carray(of_largest(), (PAGE, blocks)), x.shape[1] // blocks
        for start in range(0, x.shape[0], PAGE):
            stop = min(start + PAGE, x.shape[0])
            _find_largest(x, start, stop, size, largest)
            for row in range(start, stop):
                for b in range(blocks):
                    finite = largest[row - start, b] < INFINITY
                    exact = max(
                        _number(largest[row - start, b] if finite else np.int32(0)) / levels,
                        SMALLEST_SCALE,
                    )
                    # Rounded up, so that no value has a level beyond the last.
                    rounded = np.int32(
                        min(np.int32(_bits(exact) + np.int32(0xFFFF)), largest_scale)
                        & np.int32(-0x10000)
                    )
                    scale[b] = _number(rounded)
                    inverse[b] = np.float32(1) / scale[b]
                    scales[row, b] = np.uint16(rounded >> 16) if finite else NAN_BF16
                if stochastic:
                    # with i it makes the place of the value ^ key
                    row_key = np.uint32(np.uint32((first + row) * ROW) ^ key)
                    for i in range(ROW):
                        noise[i] = _noise(np.uint32(i), row_key)
                for w in range(words):
                    word = np.uint32(0)
                    for part in range(parts):
                        i, b = part * words + w, part * words // block
                        level = x[row, i] * inverse[b]
                        if stochastic:
                            level = min(max(level, -levels), levels) + noise[i]
                        level += TO_INTEGER
                        word |= np.uint32(
                            (np.uint32(_bits(level)) & mask) << np.uint32(part * bits)
                        )
                        x[row, i] -= (level - TO_INTEGER) * scale[b]
                    codes[row, w] = word


def _level_decoder(form: int) -> None:
    """Inverse of ``_level_encoder``."""
    bits, block, parts = (
        layout.BITS[form],
        layout.BLOCK[form],
        8 * layout.WORD[form] // layout.BITS[form],
    )
    words, mask, sign = ROW // parts, np.uint32(2**bits - 1), np.uint32(2 ** (bits - 1))

    @_kernel("void(f4[:, ::1], u2[:, ::1], u4[:, ::1], f4)", f"decode_add_levels_{form}")
    def decode_add(x: Array, scales: Array, codes: Array, factor: Any) -> None:
        for row in range(x.shape[0]):
            for w in range(words):
                for part in range(parts):
                    code = np.uint32(np.uint32(codes[row, w] >> np.uint32(part * bits)) & mask)
                    # it was a two's complement
                    level = np.float32(np.int32(code ^ sign)) - np.float32(sign)
                    x[row, part * words + w] += factor * (
                        level * _widened(scales[row, part * words // block])
                    )


for _form in layout.LEVELS:
    _level_encoder(_form, stochastic=False)
    _level_encoder(_form, stochastic=True)
    _level_decoder(_form)

SIGN_BLOCK = layout.BLOCK[layout.SIGN]
SIGN_BYTES = ROW // 8
SIGN_LARGEST = np.int32(layout.LARGEST_SCALE[layout.SIGN])
_of_largest = _room(types.int32, ROW // SIGN_BLOCK)


@_kernel("void(f4[:, ::1], i8, u2[:, ::1], u1[:, ::1])")
def encode_sign(x: Array, count: int, scales: Array, codes: Array) -> None:
    """Signs, and the mean magnitude of a block. In every row the first ``count`` values are real,
    the others are padding.

    The sum is one of whole numbers, parts of the largest, so that it has the same bits in whatever
    order it is formed.
    """
    largest, size = carray(_of_largest(), (1, ROW // SIGN_BLOCK)), x.shape[1] // (ROW // SIGN_BLOCK)
    for row in range(x.shape[0]):
        _find_largest(x, row, row + 1, size, largest)
        for i in range(SIGN_BYTES):
            code = np.uint8(0)
            for part in range(8):
                sign = np.uint32(_bits(x[row, SIGN_BYTES * part + i])) >> np.uint32(31)
                code |= np.uint8(sign << np.uint32(part))
            codes[row, i] = code
        for b in range(largest.shape[1]):
            start, unit, total = b * SIGN_BLOCK, _number(largest[0, b]), np.int32(0)
            if largest[0, b] == 0 or largest[0, b] >= INFINITY:  # all are zero
                scales[row, b] = NAN_BF16 if largest[0, b] else 0
                continue
            for i in range(SIGN_BLOCK):
                total = np.int32(total + np.int32(abs(x[row, start + i]) / unit * SIGN_UNIT))
            mean = unit * (
                np.float32(total) / (SIGN_UNIT * np.float32(min(count - start, SIGN_BLOCK)))
            )
            half = min(
                np.int32(np.int32(_bits(mean) + np.int32(0x8000)) >> np.int32(16)), SIGN_LARGEST
            )
            scales[row, b], scale = half, _widened(half)
            for i in range(SIGN_BLOCK):
                x[row, start + i] -= -scale if _bits(x[row, start + i]) < 0 else scale


@_kernel("void(f4[:, ::1], u2[:, ::1], u1[:, ::1], f4)")
def decode_add_sign(x: Array, scales: Array, codes: Array, factor: Any) -> None:
    for row in range(x.shape[0]):
        for i in range(SIGN_BYTES):
            for part in range(8):
                sign = np.uint32(np.uint32(codes[row, i]) << np.uint32(31 - part)) & np.uint32(
                    0x80000000
                )
                scale = np.uint32(scales[row, SIGN_BYTES * part // SIGN_BLOCK]) << np.uint32(16)
                x[row, SIGN_BYTES * part + i] += factor * _number(np.int32(scale ^ sign))
