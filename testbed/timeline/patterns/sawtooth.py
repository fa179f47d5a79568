"""``sawtooth: {rate: [10mbit, 50mbit]}, period: 4s``: straight from one value to another, then back
at once."""

from collections.abc import Iterator
from itertools import count
from typing import Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from testbed.timeline.duration import DurationEntry
from testbed.timeline.field_types import Interval, PositiveTime
from testbed.timeline.pairs import ContinuousPair, values_at
from testbed.timeline.updates import StartContext, Update


class Sawtooth(DurationEntry):
    """Equal steps of equal length: the first has the first value, the last the second one, so their
    mean is the middle."""

    sawtooth: ContinuousPair = Field(examples=["{rate: [10mbit, 50mbit]}"])
    """From the first value of a property straight to the second, then back at once."""
    period: PositiveTime = Field(examples=["4s"])
    """From jump to jump."""
    every: Interval = 0.1
    """The time between two steps, or a little longer so that they fill the period."""

    @model_validator(mode="after")
    def _has_steps(self) -> Self:
        if self._steps < 2:
            text = "is too short for two steps; make it longer, or every shorter"
            raise PydanticCustomError("at_key", text, {"path": ["period"]})
        return self

    @property
    def _steps(self) -> int:
        return int(self.period / self.every + 1e-9)

    def unbounded_updates(self, start: StartContext) -> Iterator[Update]:
        steps = self._steps
        pairs = self.sawtooth.pairs(start.trunk)
        for cycle in count():
            for step in range(steps):
                yield (cycle + step / steps) * self.period, values_at(pairs, step / (steps - 1))
