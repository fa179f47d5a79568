"""``square: {rate: [50mbit, 10mbit]}, period: 10s, duty: 50%``: to and fro between two values."""

from collections.abc import Iterator
from itertools import count
from typing import Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from testbed.spec.models import Share
from testbed.timeline.duration import DurationEntry
from testbed.timeline.field_types import PositiveTime
from testbed.timeline.pairs import AnyPair
from testbed.timeline.updates import StartContext, Update


class Square(DurationEntry):
    """The first value, then the second, again and again; ``square: {up: [true, false]}`` is a link
    that flaps."""

    square: AnyPair = Field(examples=["{rate: [50mbit, 10mbit]}"])
    """To and fro between two values of a property."""
    period: PositiveTime = Field(examples=["10s"])
    """Length of both together."""
    duty: Share = Field(0.5, gt=0, lt=1, examples=["50%"])
    """Share of the period that the first one has."""

    @model_validator(mode="after")
    def _not_too_often(self) -> Self:
        if min(self.duty, 1 - self.duty) * self.period < 0.001:
            text = "is too short; changes are at least 1ms apart"
            raise PydanticCustomError("at_key", text, {"path": ["period"]})
        return self

    def unbounded_updates(self, start: StartContext) -> Iterator[Update]:
        pairs = self.square.pairs(start.trunk)
        first, second = (
            {key: pair[position] for key, pair in pairs.items()} for position in (0, 1)
        )
        for cycle in count():
            yield cycle * self.period, first
            yield (cycle + self.duty) * self.period, second
