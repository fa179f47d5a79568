"""What is where in an encoded buffer: a function of the values' format, n and k alone, so that all ranks agree on it.

    header      16 bytes: magic, version, format of the values, values a block, n, k
    high, low   positions of the k elements that were kept; absent if all n were
    scales      one float32 a block of 256 kept values: int8, int4 and sign only
    codes       the values: 4 or 2 bytes each (fp32, bf16), or 256, 128 or 32 bytes a block (int8, int4, sign)

High and low end at a multiple of 8 bytes each, as does the buffer. All numbers are little-endian.

Positions p_0 < p_1 < ... are a bit vector in one of two ways, whichever is smaller:

- Bitmap, for more than about a quarter of the elements: bit p_j is set; n bits.
- Elias-Fano (P. Elias, Efficient storage and retrieval by content and address of static files, J. ACM 21, 1974; R. M.
  Fano, On the number of bits required to implement an associative memory, MIT 1971): the lowest l bits of every p_j are
  written as they are, and bit (p_j >> l) + j of a vector is set; k l + k + ((n - 1) >> l) bits. With the best l that is
  at most 0.56 bits an element above log2(e n / k), the least that random positions take: 8.56 bits at 1 %, 5.25 at 10 %.

Either has the same size whatever the data. Byte gaps with an escape, and offsets in blocks of 64 Ki, must be given room
for the worst case, and are larger on random positions, too.

Values that share a byte are not neighbours, so that the loops are vectorisable: byte i of a block has its values i and
i + 128 of int4, i, i + 32, ..., i + 224 of sign, from the lowest bits up.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

FP32, BF16, INT8, INT4, SIGN = range(5)

VALUES = {"fp32": FP32, "bf16": BF16, "int8": INT8, "int4": INT4, "sign": SIGN}

CODE_BYTES = {FP32: 4, BF16: 2}
BLOCK_BYTES = {INT8: 256, INT4: 128, SIGN: 32}

LEVELS = {INT8: 127, INT4: 7}
"""Largest code of a quantised value; the smallest is its negative."""

BLOCK = 256
"""Values that share a scale."""

LARGEST = float.fromhex("0x1.fffffcp127")
"""Largest value of which a scale is made: of the float32 above it, the last, 127 times the 127th part is infinite."""

SIGN_UNIT = 1 << 22
"""Parts of a block's largest magnitude in which the others are summed for their mean."""

_HEADER = struct.Struct("<4sBBHII")
_MAGIC = b"NSML"
_VERSION = 1


class MalformedBuffer(ValueError):
    """A buffer that no codec has written, or that has been damaged."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sections of a buffer, as byte ranges, and how its positions are written."""

    values: int
    n: int
    k: int
    low_bits: int
    """l of Elias-Fano; 0 for a bitmap."""
    step: int
    """What j adds to the place of element j in the bit vector: 1 for Elias-Fano, 0 for a bitmap."""
    high: slice
    low: slice
    scales: slice
    codes: slice
    nbytes: int

    @property
    def dense(self) -> bool:
        """True if all elements are there, and no positions."""
        return self.k == self.n

    def header(self) -> bytes:
        return _HEADER.pack(_MAGIC, _VERSION, self.values, BLOCK, self.n, self.k)


HEADER_BYTES = _HEADER.size


@lru_cache(maxsize=1024)
def layout(values: int, n: int, k: int) -> Layout:
    """Layout of k values out of n."""
    low_bits, step, high_bits = 0, 0, 0
    if k < n:
        coded, low_bits = min((k * bits + k + ((n - 1) >> bits), bits) for bits in range(32))
        step = int(coded < n)
        low_bits *= step
        high_bits = k + ((n - 1) >> low_bits) if step else n
    ends = [HEADER_BYTES]
    ends.append(ends[-1] + 8 * -(-high_bits // 64))
    ends.append(ends[-1] + 8 * -(-k * low_bits // 64))
    blocks = 0 if values in CODE_BYTES else -(-k // BLOCK)
    ends.append(ends[-1] + 4 * blocks)
    ends.append(ends[-1] + (CODE_BYTES[values] * k if values in CODE_BYTES else BLOCK_BYTES[values] * blocks))
    high, low, scales, codes = (slice(*pair) for pair in pairwise(ends))
    return Layout(values, n, k, low_bits, step, high, low, scales, codes, nbytes=-(-ends[-1] // 8) * 8)


def parse(header: bytes, nbytes: int) -> Layout:
    """Layout of a buffer of ``nbytes`` that begins with ``header``; raises MalformedBuffer, one line."""
    if len(header) < HEADER_BYTES:
        raise MalformedBuffer(f"a buffer of {nbytes} bytes is shorter than its header of {HEADER_BYTES}")
    magic, version, values, block, n, k = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise MalformedBuffer(f"not an encoded gradient: it begins with {magic!r}, not {_MAGIC!r}")
    if (version, block) != (_VERSION, BLOCK) or values not in VALUES.values():
        raise MalformedBuffer(f"unknown encoding: version {version}, values {values}, blocks of {block}")
    if k > n or (k == 0) != (n == 0) or n >= 1 << 31:
        raise MalformedBuffer(f"{k} elements out of {n} cannot be")
    found = layout(values, n, k)
    if found.nbytes != nbytes:
        raise MalformedBuffer(f"{k} elements out of {n} take {found.nbytes} bytes, not {nbytes}")
    return found
