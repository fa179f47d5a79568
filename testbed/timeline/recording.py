"""Recorded conditions of a link: the text of a trace file → times and values. Two formats, told
apart by the first line.

CSV: the first line names the columns, t and any of rate, delay, jitter and loss. With a unit in its
name (t_s, t_ms, t_us; rate_bps, rate_kbps, rate_mbps, rate_gbps; delay_s, delay_ms, delay_us and so
for jitter; loss_percent) a column has plain numbers; without one its cells are written as in the
spec (12mbit, 10ms, 1%), where a plain t is in seconds and a plain loss is a share. A row holds
until the next one, the last row as long as the one before it. t counts from the first row and
increases.

Packet-delivery file (Mahimahi, mm-link(1)): each line is a whole number of milliseconds, at which
one packet of 1500 bytes could be delivered. The packets are counted in windows; the file is as long
as its last time.

Blank lines and lines that begin with # count for nothing.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from testbed.spec.errors import did_you_mean
from testbed.spec.units import RATES, parse_rate, parse_share, parse_time

DEFAULT_WINDOW_S = 0.1
MAX_WINDOWS = 1_000_000
PACKET_BITS = 1500 * 8

_Lines = Sequence[tuple[int, str]]  # numbers from 1


@dataclass(frozen=True, slots=True)
class Recording:
    """Conditions over time.

    times_s: when each row begins; from 0, increasing. columns: the values of its rows by property
    of ``LinkParameters``, in its units; loss as a share. length_s: the end of the last row.
    counted: True if made from single packets.
    """

    times_s: tuple[float, ...]
    columns: Mapping[str, tuple[float, ...]]
    length_s: float
    counted: bool = False

    @property
    def shortest_s(self) -> float:
        """Length of the shortest row in seconds."""
        return min(b - a for a, b in pairwise((*self.times_s, self.length_s)))

    def replay(self, offset_s: float = 0.0, repeat: bool = False) -> Iterator[tuple[float, int]]:
        """(seconds since the start of the replay, index of the row that begins), starting inside
        the recording."""
        first = bisect_right(self.times_s, offset_s) - 1
        yield 0.0, first
        for index in range(first + 1, len(self.times_s)):
            yield self.times_s[index] - offset_s, index
        cycle = 1
        while repeat:
            for index, at_s in enumerate(self.times_s):
                yield cycle * self.length_s + at_s - offset_s, index
            cycle += 1


@lru_cache(maxsize=32)  # all links of all cells replay the same few files
def parse_recording(text: str, window_s: float = DEFAULT_WINDOW_S) -> Recording:
    """The recording in a trace file; window_s: for packet-delivery files. Raises ValueError "line
    7: what is wrong"."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(
            "is empty; write a CSV with the header t_s,rate_mbps, or a packet-delivery file"
        )
    return _packets(lines, window_s) if _is_whole(lines[0][1]) else _csv(lines)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _packets(lines: _Lines, window_s: float) -> Recording:
    """Delivery times → rates. A packet at t ms belongs to the window that ends at or after t, the
    first at 0 to the first."""
    times_ms: list[int] = []
    for number, line in lines:
        if not _is_whole(line) or len(line) > 10:
            raise ValueError(
                f"line {number}: {line!r:.40} is not a whole number of milliseconds, as on the"
                " lines before"
            )
        times_ms.append(int(line))
        if len(times_ms) > 1 and times_ms[-1] < times_ms[-2]:
            raise ValueError(
                f"line {number}: {line} ms comes before the {times_ms[-2]} ms of the line before;"
                " sort it"
            )
    end_ms, window_ms = times_ms[-1], window_s * 1e3
    if end_ms == 0:
        raise ValueError(
            f"line {lines[-1][0]}: it ends at 0 ms; the last time is the length of the file and"
            " must be positive"
        )
    # The last window takes the remainder, so that no sliver of a window gets a rate out of all
    # proportion.
    windows = max(1, round(end_ms / window_ms))
    if windows > MAX_WINDOWS:
        raise ValueError(
            f"makes {windows:,} windows in its {end_ms / 1e3:g} s; choose a longer every"
        )
    counts = [0] * windows
    for time_ms in times_ms:
        counts[min(windows, max(1, math.ceil(time_ms / window_ms - 1e-9))) - 1] += 1
    starts_s = [index * window_s for index in range(windows)]
    length_s = end_ms / 1e3
    rates = (
        count * PACKET_BITS / (b - a)
        for count, (a, b) in zip(counts, pairwise([*starts_s, length_s]), strict=True)
    )
    return Recording(tuple(starts_s), {"rate_bps": tuple(rates)}, length_s, counted=True)


def _csv(lines: _Lines) -> Recording:
    number, header = lines[0]
    names = _cells(header)
    readers = [_reader(name, number) for name in names]
    properties = [name.partition("_")[0] for name in names]
    for position, name in enumerate(properties):
        if name in properties[:position]:
            raise ValueError(f"line {number}: {name} has two columns; remove one")
    if "t" not in properties:
        raise ValueError(
            f"line {number}: the header has no column for the time; name it t_s or t_ms"
        )
    if len(names) < 2:
        raise ValueError(
            f"line {number}: the header has no column besides the time; add for example rate_mbps"
        )
    if len(lines) < 3:
        raise ValueError(
            f"line {number}: has less than two rows below its header; for a single value use set"
        )
    table = [_row(line, number, names, readers) for number, line in lines[1:]]
    columns = dict(zip(properties, zip(*table, strict=True), strict=True))
    times = columns.pop("t")
    for (before, after), (number, _) in zip(pairwise(times), lines[2:], strict=True):
        if after <= before:
            raise ValueError(
                f"line {number}: t is {after:g} s after {before:g} s on the line before; it must"
                " increase"
            )
    times_s = tuple(time - times[0] for time in times)
    length_s = 2 * times_s[-1] - times_s[-2]
    return Recording(
        times_s, {_PROPERTIES[name]: values for name, values in columns.items()}, length_s
    )


def _cells(line: str) -> list[str]:
    return [cell.strip().strip('"').strip() for cell in line.split(",")]


def _row(
    line: str, number: int, names: Sequence[str], readers: Sequence[Callable[[str], float]]
) -> list[float]:
    cells = _cells(line)
    if len(cells) != len(names):
        raise ValueError(f"line {number}: has {len(cells)} cells, the header has {len(names)}")
    row: list[float] = []
    for name, read, cell in zip(names, readers, cells, strict=True):
        try:
            row.append(read(cell))
        except ValueError as error:
            raise ValueError(f"line {number}: {name}: {error}") from None
    return row


def _reader(name: str, number: int) -> Callable[[str], float]:
    """The function that reads the cells of a column, by its name."""
    if name in _AS_IN_SPEC:
        return _AS_IN_SPEC[name]
    if name not in _FACTORS:
        if re.fullmatch(r"[-+.\d].*", name):
            raise ValueError(
                f"line {number}: {name!r:.40} is neither the header of a CSV, such as"
                " t_s,rate_mbps, nor a whole number of milliseconds as in a packet-delivery file"
            )
        raise ValueError(
            f"line {number}: unknown column {name!r:.40};"
            f" {did_you_mean(name, [*_AS_IN_SPEC, *_FACTORS])}"
        )
    factor, limit = _FACTORS[name], 1.0 if name == "loss_percent" else math.inf

    def read(cell: str) -> float:
        value = _number(cell) * factor
        if value > limit:
            raise ValueError(f"{cell} is out of range; a loss lies between 0 and 100 percent")
        return value

    return read


def _number(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        text = (
            f"{cell!r:.40} is not a number"
            if cell
            else "is empty; give a value in every row, or leave the column out"
        )
        raise ValueError(text) from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{cell} is not a number from 0 upwards")
    return value


def _plain_or(parse: Callable[[object], float]) -> Callable[[str], float]:
    """A reader that takes a plain number, too."""
    return lambda cell: _number(cell) if not cell or _PLAIN.fullmatch(cell) else parse(cell)


def _rate(cell: str) -> float:
    """A rate in bits/s as in the spec, but from 0 upwards: outages are part of what was
    recorded."""
    if match := _RATE.fullmatch(cell.lower()):
        return float(match[1]) * RATES[match[2]]
    return 0.0 if _PLAIN.fullmatch(cell) and float(cell) == 0 else parse_rate(cell)


_PLAIN = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)
_RATE = re.compile(rf"(\d+\.?\d*|\.\d+)\s*({'|'.join(RATES)})(?:/s)?")
_PROPERTIES = {"rate": "rate_bps", "delay": "delay_s", "jitter": "jitter_s", "loss": "loss"}
_AS_IN_SPEC: Mapping[str, Callable[[str], float]] = {
    "t": _plain_or(parse_time),
    "rate": _rate,
    "delay": parse_time,
    "jitter": parse_time,
    "loss": parse_share,
}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_FACTORS: Mapping[str, float] = {
    **{f"t_{unit}": factor for unit, factor in _TIMES.items()},
    **{
        f"rate_{unit}": factor
        for unit, factor in (("bps", 1.0), ("kbps", 1e3), ("mbps", 1e6), ("gbps", 1e9))
    },
    **{f"{name}_{unit}": factor for name in ("delay", "jitter") for unit, factor in _TIMES.items()},
    "loss_percent": 0.01,
}
