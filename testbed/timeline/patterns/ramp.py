"""``ramp: {rate: 50mbit}, over: 4s, every: 200ms``: in a straight line."""

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from testbed.spec.errors import SpecError
from testbed.spec.models import LinkChange, ScheduleEntry, written_as
from testbed.timeline.field_types import Interval, PositiveTime, check_changes, check_continuous
from testbed.timeline.updates import StartContext, Update, interpolate, value_in, values_of


class Ramp(ScheduleEntry):
    """From the values in force to new ones, which are met exactly at the end."""

    LENGTH: ClassVar[str] = "over"

    ramp: Annotated[LinkChange, written_as("GradualLinkChange")] = Field(
        examples=["{rate: 50mbit}"]
    )
    """The new values."""
    over: PositiveTime = Field(examples=["4s"])
    """How long it takes."""
    every: Interval = 0.1
    """The time between its steps."""

    @model_validator(mode="after")
    def _has_values_in_between(self) -> Self:
        check_changes(self.ramp, "ramp")
        check_continuous(self.ramp, at=("ramp",), instead="set")
        return self

    @property
    def length_s(self) -> float:
        """Seconds from its start to its end."""
        return self.over

    def updates(self, start: StartContext) -> Iterator[Update]:
        targets = values_of(self.ramp, start.trunk)
        origins = {key: value_in(start.state, key) for key in targets}
        if None in origins.values():
            error = f"link {start.link} has no rate to start from; give network.link.rate"
            raise SpecError([("ramp.rate", error)])
        steps = max(1, math.ceil(self.over / self.every - 1e-9))
        for step in range(1, steps + 1):
            fraction = step * self.every / self.over if step < steps else 1.0
            yield (
                self.over * fraction,
                {key: interpolate(origins[key], targets[key], fraction) for key in targets},
            )
