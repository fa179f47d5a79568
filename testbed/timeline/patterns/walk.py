"""``walk: {rate: [5mbit, 50mbit]}, every: 500ms, step: 20%, seed: 1``: a random walk between two
bounds."""

import random
from collections.abc import Iterator
from itertools import count

from pydantic import Field, StrictInt

from testbed.spec.models import Share
from testbed.timeline.duration import DurationEntry
from testbed.timeline.field_types import Interval
from testbed.timeline.pairs import ContinuousPair, values_at
from testbed.timeline.updates import StartContext, Update


class Walk(DurationEntry):
    """Steps of a random size up or down, reflected at the bounds; each value between them is
    equally likely at any time.

    Each link walks on its own; all properties of a link, and both its directions, walk together.
    """

    walk: ContinuousPair = Field(examples=["{rate: [5mbit, 50mbit]}"])
    """Bounds of the properties that walk."""
    every: Interval = 0.5
    """The time between two steps."""
    step: Share = Field(0.2, gt=0, examples=["20%"])
    """The largest step, as a share of the range; sizes are uniform."""
    seed: StrictInt = Field(0, ge=0, lt=2**31)
    """The same one gives the same walk on every machine."""

    def unbounded_updates(self, start: StartContext) -> Iterator[Update]:
        # Only a text as seed and random() itself are promised to be the same in all versions and on
        # all platforms.
        pairs = self.walk.pairs(start.trunk)
        numbers = random.Random(f"{self.seed} {start.link}")
        # uniform, which is what the walk keeps: it needs no time to settle
        place = numbers.random()
        for number in count():
            yield number * self.every, values_at(pairs, place)
            place = _reflected(place + (2 * numbers.random() - 1) * self.step)


def _reflected(place: float) -> float:
    """Fold a place that is at most 1 outside of 0 to 1 back into it."""
    return -place if place < 0 else 2 - place if place > 1 else place
