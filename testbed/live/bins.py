"""Series of a cell over time, in so few bins that they can be sent and drawn: wider ones as the
cell becomes longer."""

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

POINTS = 300
"""A line of more points than this shows nothing more."""
MIN_BIN_S = 0.5
LONGEST_S = 1e7
"""A time beyond this, a hundred days, is none that a cell has had."""

Combine = Callable[[float, float], float]
_COUNT = "/count"


def newest(_: float, later: float) -> float:
    """Of two values the later one."""
    return later


@dataclass
class _Column:
    combine: Combine
    values: list[float | None] = field(default_factory=list)

    def put(self, place: int, value: float) -> None:
        self.values += [None] * (place + 1 - len(self.values))
        before = self.values[place]
        self.values[place] = value if before is None else self.combine(before, value)

    def merge_pairs(self) -> None:
        pairs = itertools.zip_longest(self.values[::2], self.values[1::2])
        self.values = [b if a is None else a if b is None else self.combine(a, b) for a, b in pairs]


class Bins:
    """Columns of sums, means, extremes and newest values, by the bin of the time that they are of.

    width_s: of every bin; doubled when a time lies beyond the last of ``most`` bins. A bin of which
    nothing was said has None.
    """

    def __init__(self, most: int = POINTS) -> None:
        self.width_s = MIN_BIN_S
        self._most = most
        self._columns: dict[str, _Column] = {}
        self._changed_from: int | None = None

    def add(self, column: str, t_s: float, value: float, combine: Combine = operator.add) -> None:
        """Put a value into the bin of a time; combine: what becomes of it and what is there
        already."""
        while t_s >= self.width_s * self._most:
            self._widen()
        self._put(column, int(t_s / self.width_s), value, combine)

    def mean(self, column: str, t_s: float, value: float) -> None:
        """Put a value into the bin of a time, which has the mean of all its values."""
        self.add(column, t_s, value)
        self.add(column + _COUNT, t_s, 1.0)

    def spread(self, column: str, from_s: float, to_s: float, amount: float) -> None:
        """Put an amount that came evenly between two times into the bins in between.

        A slow step then looks like one, and not like a pause and a peak.
        """
        while to_s >= self.width_s * self._most:
            self._widen()
        first, last = int(from_s / self.width_s), int(to_s / self.width_s)
        for place in range(first, last + 1):
            inside_s = min(to_s, (place + 1) * self.width_s) - max(from_s, place * self.width_s)
            share = inside_s / (to_s - from_s) if to_s > from_s else 1.0
            self._put(column, place, amount * share, operator.add)

    def _put(self, column: str, place: int, value: float, combine: Combine) -> None:
        self._columns.setdefault(column, _Column(combine)).put(place, value)
        self._changed_from = place if self._changed_from is None else min(place, self._changed_from)

    def _widen(self) -> None:
        self.width_s *= 2
        for column in self._columns.values():
            column.merge_pairs()
        self._changed_from = 0

    def values(self, first: int = 0) -> dict[str, list[float | None]]:
        """Every column from a bin on, in four digits, which is what a figure shows."""
        found = {}
        for name, column in self._columns.items():
            if not name.endswith(_COUNT):
                counts = self._columns.get(name + _COUNT)
                values = column.values[first:]
                by = counts.values[first:] if counts else [1.0] * len(values)
                found[name] = [
                    None if a is None or not b else _short(a / b)
                    for a, b in zip(values, by, strict=True)
                ]
        return found

    def take_changed(self) -> int | None:
        """The first bin that is not as it was when this was last asked, None if all are."""
        changed, self._changed_from = self._changed_from, None
        return changed


def _short(value: float) -> float:
    return float(f"{value:.4g}")
