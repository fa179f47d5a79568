"""Quantities as people write them ("200mbit", "10ms", "64KiB", "1%") ↔ SI numbers. Converted at the
edge, once."""

import math
import re
import string
from collections.abc import Mapping

_DIGITS = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(rf"\s*([+-]?{_DIGITS})\s*([a-zA-Zµ%/]*)\s*", re.IGNORECASE)

RATES: Mapping[str, int] = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
TIMES: Mapping[str, float] = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_SHARES: Mapping[str, float] = {"%": 0.01, "": 1.0}
_ALSO_TIMES: Mapping[str, float] = {"µs": 1e-6}
SIZES: Mapping[str, int] = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}

_A_SECOND = "/s"

MIN_RATE_BPS = 8_000
"""Shapers count in bytes/s; below 1 kB/s one frame takes longer than any sensible step."""
MAX_RATE_BPS = 100 * 10**9
MAX_DELAY_S = 1000
"""Of a link; far beyond any, and slowed down 1000 times still no more than the kernel can count in
ns."""


def parse_rate(text: object) -> int:
    """A rate in bits/s from "50mbit", "1.5gbit" or "200mbit/s". Raises ValueError with the valid
    units."""
    value = _quantity(text, RATES, "a rate", "50mbit", drop=_A_SECOND)
    if not MIN_RATE_BPS <= value <= MAX_RATE_BPS:
        raise ValueError(f"{_shown(text)} is out of range; a rate lies between 8kbit and 100gbit")
    return round(value)


def parse_time(text: object) -> float:
    """A time in seconds from "10ms", "1.5s", "2min" or plain 0. Raises ValueError with the valid
    units."""
    if text == 0 and not isinstance(text, bool):
        return 0.0
    value = _quantity(text, TIMES, "a time", "10ms", also=_ALSO_TIMES)
    if value < 0 or value > 1e7:
        raise ValueError(f"{_shown(text)} is out of range; a time lies between 0s and 10000000s")
    # 9 * 1e-3 is not 0.009, which is what its shortest text would be read as
    return round(value, 12)


def parse_size(text: object) -> int:
    """A size in bytes from "64KiB", "1.5MB" or "1500B". Raises ValueError with the valid units."""
    return _size(text, "a size", "64KiB", 1, 2**32 - 1)


def parse_memory(text: object) -> int:
    """A size of memory in bytes from "2GiB" or "500MB". Raises ValueError with the valid units."""
    return _size(text, "a size of memory", "2GiB", 2**24, 2**44)


def _size(text: object, what: str, example: str, least: int, most: int) -> int:
    value = _quantity(text, SIZES, what, example)
    if not least <= value <= most:
        between = f"{format_size(least)} and {format_size(most >> 20 << 20)}"
        raise ValueError(f"{_shown(text)} is out of range; {what} lies between {between}")
    return round(value)


def parse_share(text: object) -> float:
    """A share between 0 and 1 from "1%" or 0.01. Raises ValueError, also for the whole number 1,
    which may mean either end."""
    if text == 1 and isinstance(text, int) and not isinstance(text, bool):
        raise ValueError("1 may be meant as 1% or as 100%; write it with its %")
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        value = float(text)
    else:
        value = _quantity(text, _SHARES, "a share", "1%")
    if not 0 <= value <= 1:
        raise ValueError(f"{_shown(text)} is out of range; a share lies between 0% and 100%")
    return value


def _pattern(*names: str, then: str = "", positive: bool = False) -> str:
    # ECMA 262, which has no flag for letters of both cases within a pattern.
    units = "|".join(
        "".join(f"[{one}{one.upper()}]" if one in string.ascii_lowercase else one for one in name)
        for name in names
    )
    sign = r"(?=[^eE]*[1-9])\s*\+?" if positive else r"(?!\s*-[^eE]*[1-9])\s*[+-]?"
    return rf"^{sign}{_DIGITS}\s*(?:{units}){then}\s*$"


RATE_PATTERN = _pattern(*RATES, then="(?:/[sS])?", positive=True)
TIME_PATTERN = _pattern(*TIMES, *_ALSO_TIMES)
POSITIVE_TIME_PATTERN = _pattern(*TIMES, *_ALSO_TIMES, positive=True)
SIZE_PATTERN = _pattern(*SIZES, positive=True)
QUEUE_PATTERN = _pattern(*TIMES, *_ALSO_TIMES, *SIZES)
SHARE_PATTERN = _pattern(*_SHARES)
"""What a parser takes as text, but for its range: regular expressions of ECMA 262 and of Python,
for ``re.search``."""


def format_rate(rate_bps: float) -> str:
    """The shortest exact text of a rate in bits/s: 50000000 → "50mbit"."""
    return _shortest(rate_bps, RATES)


def format_time(time_s: float) -> str:
    """The shortest exact text of a time in seconds: 0.01 → "10ms"."""
    if time_s == 0:
        return "0s"
    return _shortest(time_s, {"us": 1e-6, "ms": 1e-3, "s": 1.0})


def format_size(size_bytes: int) -> str:
    """The shortest exact text of a size in bytes: 65536 → "64KiB"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes % factor == 0 and size_bytes:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"


def _quantity(
    text: object,
    units: Mapping[str, float],
    what: str,
    example: str,
    *,
    drop: str = "",
    also: Mapping[str, float] | None = None,
) -> float:
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        raise ValueError(
            f"{text} has no unit; write {what} like {example} (units: {', '.join(units)})"
        )
    if not isinstance(text, str):
        raise ValueError(
            f"{_shown(text)} is not {what}; write it like {example} (units: {', '.join(units)})"
        )
    match = _NUMBER.fullmatch(text)
    if not match:
        raise ValueError(
            f"{_shown(text)} is not {what}; write it like {example} (units: {', '.join(units)})"
        )
    unit = match[2].lower()
    factors = {**units, **(also or {})}
    if drop and unit not in factors:
        unit = unit.removesuffix(drop)
    if unit not in factors:
        if "" in factors or unit:
            raise ValueError(
                f"{_shown(text)}: unknown unit {match[2]!r}; valid units are"
                f" {', '.join(u for u in units if u)}"
            )
        raise ValueError(
            f"{_shown(text)} has no unit; write {what} like {example} (units: {', '.join(units)})"
        )
    number = float(match[1])
    if number < 0:
        raise ValueError(f"{_shown(text)} is negative; {what} is not, write it like {example}")
    value = number * factors[unit]
    if not math.isfinite(value):
        raise ValueError(f"{_shown(text)} is not a finite number")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _shortest(value: float, units: Mapping[str, float]) -> str:
    candidates = []
    for unit, factor in units.items():
        number = f"{value / factor:.12g}"
        if "e" not in number and math.isclose(float(number) * factor, value, rel_tol=1e-12):
            candidates.append(number + unit)
    return (
        min(candidates, key=lambda text: (len(text), "." in text))
        if candidates
        else f"{value:.12g}"
    )
