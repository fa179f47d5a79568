"""Latency and bandwidth of the network, from collectives that happen anyway."""

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from statistics import fmean
from typing import NamedTuple

from netsenseml.exchange.communicators import Cost, Plan
from netsenseml.exchange.mesh import CONCURRENT

# Chosen by hand, and tried together in tests/netsenseml/simulation.py; not each by a measurement of its own.
WINDOW = 16  # values that are smoothed
CHANGE = 0.3  # newest values that are all off by more are a change
SLOWER, FASTER = 3, 2  # so many newest: if a tenth of the steps are accidents, three in a row are every thousandth
TELLING = 0.2  # share of an exchange that bytes must take to tell the bandwidth
INCAST = 1.2  # times a ring's time for a byte, directly to all at once, until it was seen: 1.07 to 1.22 for 2 MB of 4 ranks


class Smooth:
    """Mean of the middle half of the newest values.

    Accidents fall out of it, and what alternates is averaged. ``SLOWER`` values in a row that are larger by ``CHANGE``, or
    ``FASTER`` that are smaller, are no accident, as accidents lengthen a time: what came before is forgotten.
    """

    def __init__(self, value: float | None = None) -> None:
        self.value = value
        self.values: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> bool:
        """Take a value; returns whether it showed a change."""
        self.values.append(value)
        newest, old = list(self.values)[-SLOWER:], self.value or value
        slower = min(newest) > (1 + CHANGE) * old
        changed = len(self.values) > SLOWER and (slower or max(newest[-FASTER:]) < old / (1 + CHANGE))
        if changed:
            self.values = deque(newest if slower else newest[-FASTER:], maxlen=WINDOW)
        ordered = sorted(self.values)
        cut = len(ordered) // 4
        self.value = fmean(ordered[cut : len(ordered) - max(cut, len(ordered) > 1)])  # of two or three, not the largest
        return changed

    def scale(self, factor: float) -> None:
        """Take all values for so many times as large."""
        self.values = deque((factor * value for value in self.values), maxlen=WINDOW)
        self.value = factor * self.value if self.value else self.value


class Bucket(NamedTuple):
    """One of a step, for a forecast. ready_s: before the last gradient, s <= 0. coding_s: encoding and decoding."""

    elements: int
    ready_s: float
    coding_s: float
    cost: Cost


class NetworkModel:
    """What a step's exchange takes.

    A bucket's bytes follow those of the one before through the link, and its latency passes beside that of others:

        seconds = latency terms x alpha + 8 x bytes of the host / beta        (Hockney 1994)

    alpha is measured directly: the exchange of statistics behind every step is a direct one that is nearly empty. What else a
    step's communication took is learnt for every communicator by itself: a part for its bytes, and a fixed part. So incast, a
    host's shared interface and slow start need no formula. What changes while a communicator stays is the network's, and
    changes all of them alike.
    """

    def __init__(self) -> None:
        self.latency = Smooth()
        """Of a direct exchange, s: between the farthest two ranks."""
        self.ring_share = 1.0
        """A ring passes all delays alike: mean of the ranks' round-trip times over the largest."""
        self._byte_s: dict[str, Smooth] = {}
        self._element_s: dict[str, Smooth] = {}
        self._plans: dict[str, tuple[str, float, Smooth]] = {}  # communicator, bytes and time of each since the last change
        self._communicator, self._steps = "", 0

    def start(self, byte_s: float) -> None:
        """What a first small exchange showed, seconds a byte."""
        self._byte_s[""] = Smooth(byte_s)

    def byte_s(self, communicator: str) -> float | None:
        """Seconds a byte with a communicator, or with the newest one if it was never seen; None before the first."""
        if communicator in self._byte_s:
            return self._byte_s[communicator].value
        newest = self._byte_s.get(self._communicator)
        more_direct = ("ring" not in communicator) - ("ring" not in self._communicator)
        return newest.value * INCAST**more_direct if newest and newest.value else None

    def bandwidth_bps(self) -> float | None:
        """Payload that a host's link carries, bits/s, with the newest communicator.

        A link that carries R bits/s of Ethernet frames carries R x 1448/1514 of TCP payload, less some 2 % for the
        acknowledgements of the opposite flow, less what competing flows take.
        """
        byte_s = self.byte_s(self._communicator)
        return 8 / byte_s if byte_s else None

    def forecast(self, plan: Plan, buckets: Sequence[Bucket], byte_s: float) -> tuple[float, float]:
        """(time in which a collective is under way, time from the last gradient to the end) of a step, if a byte takes so
        long."""
        latency_s = (self.latency.value or 0.0) * (self.ring_share if plan.communicator.endswith("ring") else 1.0)
        fixed = self._element_s.get(plan.communicator)
        element_s = fixed.value or 0.0 if fixed else 0.0
        coded = link = end = -1e9
        busy_s, running = 0.0, list[float]()
        for elements, ready_s, coding_s, cost in buckets:
            coded = max(coded, ready_s) + coding_s / 2
            start = max(coded, heappop(running)) if len(running) == CONCURRENT else coded
            link = max(link, start) + cost.host_bytes * byte_s + elements * element_s
            done = link + cost.latency_terms * latency_s
            heappush(running, done)
            busy_s += max(0.0, done - max(start, end))
            end = max(end, done)
        return busy_s, max(0.0, end + (buckets[-1].coding_s / 2 if buckets else 0.0))

    def learn(self, plan: Plan, buckets: Sequence[Bucket], seconds: float) -> bool:
        """Learn from the time in which a step's collectives were under way; returns whether the network has changed."""
        if plan.communicator != self._communicator:
            earlier, self._communicator, self._steps = self.byte_s(plan.communicator), plan.communicator, 0
            self._byte_s.setdefault(plan.communicator, Smooth(earlier))
        known = self._byte_s[plan.communicator]
        empty_s, _ = self.forecast(plan, buckets, 0.0)
        expected_s, _ = self.forecast(plan, buckets, known.value or 0.0)
        as_expected = seconds < (1 + CHANGE) * expected_s
        sent = sum(bucket.cost.host_bytes for bucket in buckets)
        _, _, taken = self._plans.setdefault(plan.name, (plan.communicator, sent, Smooth()))
        if changed := taken.add(seconds):
            self._plans = {plan.name: (plan.communicator, sent, taken)}
        seen = self._slope(plan, sent, taken.value or 0.0)
        if seen is None or not as_expected:
            if known.value and as_expected and expected_s - empty_s < TELLING * expected_s:
                seen = known.value  # so few bytes tell no more than that the bandwidth is still there
            else:
                seen = self._solve(plan, buckets, max(seconds, empty_s + TELLING * seconds))
        before, self._steps = known.value, self._steps + 1
        known.add(seen)
        if as_expected:
            self._fix(plan, buckets, seconds - self.forecast(plan, buckets, known.value or 0.0)[0])
        if before and known.value and self._steps > SLOWER:  # until then it is the communicator's
            for other in self._byte_s.values():
                if other is not known:
                    other.scale(known.value / before)
        return changed

    def _slope(self, plan: Plan, sent: float, taken_s: float) -> float | None:
        """Seconds a byte, by another plan of the same communicator that sent fewer or more since the last change."""
        others = [seen for name, seen in self._plans.items() if seen[0] == plan.communicator and name != plan.name]
        _, other_sent, other = max(others, key=lambda seen: abs(seen[1] - sent), default=("", sent, None))
        if other is None or abs(sent - other_sent) <= TELLING * sent:
            return None
        slope = (taken_s - (other.value or 0.0)) / (sent - other_sent)
        return max(slope, (self._byte_s[plan.communicator].value or 0.0) / 8, 1e-12)

    def _fix(self, plan: Plan, buckets: Sequence[Bucket], excess_s: float) -> None:
        """Learn what a communicator takes whatever it sends, from what a forecast was off by."""
        fixed = self._element_s.setdefault(plan.communicator, Smooth(0.0))
        fixed.add(max(0.0, (fixed.value or 0.0) + excess_s / sum(bucket.elements for bucket in buckets)))

    def _solve(self, plan: Plan, buckets: Sequence[Bucket], seconds: float) -> float:
        """Seconds a byte with which the forecast is what was seen, by bisection."""
        low, high = 0.0, seconds / max(sum(bucket.cost.host_bytes for bucket in buckets), 1)
        while self.forecast(plan, buckets, high)[0] < seconds and high < 1:
            low, high = high, 2 * high
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self.forecast(plan, buckets, middle)[0] < seconds else (low, middle)
        return high
