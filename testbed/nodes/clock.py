"""A machine's clock against the orchestrator's, measured by round trips.

The orchestrator reads its clock between the moments at which a question is sent and its answer
comes, so each round trip says between which two values the offset lies (Cristian 1989). The
shortest trips say most: one is kept of every ``_SPAN_S``. If the offset moves along a line, every
two of these bound its slope, and all of them together the offset at any moment.
"""

import itertools
from collections import deque

from testbed.clock import MOST_DRIFT, Clock

_SPAN_S = 2.0
_SPANS = 30
"""A minute in all: crystals change with the temperature, but in a minute by less than 1 ppm."""


class MeasuredClock:
    """Takes round trips; ``now`` is what they say so far. Not for several threads at once, but for
    reading ``now``."""

    def __init__(self) -> None:
        self.now = Clock(unsure_s=float("inf"))
        self._trips: deque[tuple[float, float, float]] = deque(maxlen=_SPANS)
        """The shortest of every span: the middle in own time, the least and the largest offset."""
        self._span_began_s = float("-inf")

    def add(self, sent_s: float, read_s: float, came_s: float) -> None:
        """A round trip: sent and answered at times of this machine, in between the orchestrator's
        clock was read."""
        trip = (sent_s + came_s) / 2, read_s - came_s, read_s - sent_s
        if sent_s - self._span_began_s >= _SPAN_S:
            self._trips.append(trip)
            self._span_began_s = sent_s
        elif came_s - sent_s < self._trips[-1][2] - self._trips[-1][1]:
            self._trips[-1] = trip
        self.now = self._fit(came_s)

    def _fit(self, at_s: float) -> Clock:
        while True:
            least, most = self._slopes()
            if least <= most:
                break
            self._trips.popleft()  # no line fits: the clock has changed its pace since
        # What each trip says of the offset now: the older it is, the less.
        low = max(low + least * (at_s - t_s) for t_s, low, _ in self._trips)
        high = min(high + most * (at_s - t_s) for t_s, _, high in self._trips)
        return Clock(
            (low + high) / 2, (least + most) / 2, at_s, abs(high - low) / 2, (most - least) / 2
        )

    def _slopes(self) -> tuple[float, float]:
        """The least and the largest that leave all trips true."""
        least, most = -MOST_DRIFT, MOST_DRIFT
        for (first_s, low, high), (last_s, later_low, later_high) in itertools.combinations(
            self._trips, 2
        ):
            least = max(least, (later_low - high) / (last_s - first_s))
            most = min(most, (later_high - low) / (last_s - first_s))
        return least, most
