"""What is where in an encoded buffer: a function of the values' format, n and k alone, so that all
ranks agree on it.

    header      16 bytes: magic, version, format of the values, values a block (0: no blocks), n, k
    high, low   positions of the k elements that were kept; absent if all n were
    scales      one bfloat16 a block: int8 and sign have blocks of 128 kept values, int4 of 32, the
                others none
    codes       the values: 32, 16, 8, 4 or 1 bit each (fp32, bf16, int8, int4, sign)

With its scales a value takes 8.125 bits (int8), 4.5 (int4) or 1.125 (sign). These three come in
whole rows of 256 values, the last one filled up with zeros. High and low end at a multiple of 8
bytes each, as does the buffer. All numbers are little-endian.

Positions p_0 < p_1 < ... are a bit vector in one of two ways, whichever is smaller:

- Bitmap, for more than about a quarter of the elements: bit p_j is set; n bits.
- Elias-Fano (P. Elias, Efficient storage and retrieval by content and address of static files, J.
  ACM 21, 1974; R. M. Fano, On the number of bits required to implement an associative memory, MIT
  1971): the lowest l bits of every p_j are written as they are, and bit (p_j >> l) + j of a vector
  is set; k l + k + ((n - 1) >> l) bits. With the best l that is at most 0.56 bits an element above
  log2(e n / k), the least that random positions take: 8.56 bits at 1 %, 5.25 at 10 %.

Either has the same size whatever the data. Byte gaps with an escape, and offsets in blocks of 64
Ki, must be given room for the worst case, and are larger on random positions, too.

The codes of a row are W words, of 32 bits (W = 64 of int8, 32 of int4) or 8 bits (32 of sign).
Values that share a word are not neighbours, so that the loops over words are vectorisable: word w
has the values w, w + W, w + 2 W, ..., from the lowest bits up.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

FP32, BF16, INT8, INT4, SIGN = range(5)

VALUES = {"fp32": FP32, "bf16": BF16, "int8": INT8, "int4": INT4, "sign": SIGN}

BITS = {FP32: 32, BF16: 16, INT8: 8, INT4: 4, SIGN: 1}
"""Of a value's code."""

LEVELS = {INT8: 127, INT4: 7}
"""Largest code of a quantised value; the smallest is its negative."""

WORD = {INT8: 4, INT4: 4, SIGN: 1}
"""Bytes of the words that codes are packed in."""

WORD_BITS = 64
"""Of the words that positions are packed in, and found in."""

BLOCK = {INT8: 128, INT4: 32, SIGN: 128}
"""Values that share a scale."""

ROW = 256
"""Values that are coded together, a multiple of every block."""

LARGEST_SCALE = {INT8: 0x7C01, INT4: 0x7E12, SIGN: 0x7F7F}
"""Bits of the largest bfloat16 whose product with the largest code is a finite float32."""

SMALLEST_SCALE = 2.0**-126
"""Of int8 and int4: the smallest normal number, as the inverses of smaller ones may be infinite."""

SIGN_UNIT = 1 << 22
"""Parts of a block's largest magnitude in which the others are summed for their mean."""

_HEADER = struct.Struct("<4sBBHII")
_MAGIC = b"NSML"
_VERSION = 2


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
        return _HEADER.pack(
            _MAGIC, _VERSION, self.values, BLOCK.get(self.values, 0), self.n, self.k
        )


HEADER_BYTES = _HEADER.size


@lru_cache(maxsize=1024)
def layout(values: int, n: int, k: int) -> Layout:
    """Layout of k values out of n."""
    low_bits, step, high_bits = 0, 0, 0
    if k < n:
        size, low_bits = min((k * bits + k + ((n - 1) >> bits), bits) for bits in range(32))
        step = int(size < n)
        low_bits *= step
        high_bits = k + ((n - 1) >> low_bits) if step else n
    ends = [HEADER_BYTES]
    ends.append(ends[-1] + 8 * -(-high_bits // 64))
    ends.append(ends[-1] + 8 * -(-k * low_bits // 64))
    coded = -(-k // ROW) * ROW if values in BLOCK else k
    ends.append(ends[-1] + (2 * coded // BLOCK[values] if values in BLOCK else 0))
    ends.append(ends[-1] + BITS[values] * coded // 8)
    high, low, scales, codes = (slice(*pair) for pair in pairwise(ends))
    return Layout(
        values, n, k, low_bits, step, high, low, scales, codes, nbytes=-(-ends[-1] // 8) * 8
    )


def parse(header: bytes, nbytes: int) -> Layout:
    """Layout of a buffer of ``nbytes`` that begins with ``header``; raises MalformedBuffer, one
    line."""
    if len(header) < HEADER_BYTES:
        raise MalformedBuffer(
            f"a buffer of {nbytes} bytes is shorter than its header of {HEADER_BYTES}"
        )
    magic, version, values, block, n, k = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise MalformedBuffer(f"not an encoded gradient: it begins with {magic!r}, not {_MAGIC!r}")
    if version != _VERSION or values not in VALUES.values() or block != BLOCK.get(values, 0):
        raise MalformedBuffer(
            f"unknown encoding: version {version}, values {values}, blocks of {block}"
        )
    if k > n or (k == 0) != (n == 0) or n >= 1 << 31:
        raise MalformedBuffer(f"{k} elements out of {n} cannot be")
    found = layout(values, n, k)
    if found.nbytes != nbytes:
        raise MalformedBuffer(f"{k} elements out of {n} take {found.nbytes} bytes, not {nbytes}")
    return found
