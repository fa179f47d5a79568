"""``set: {rate: 10mbit}``: at once."""

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import Field, model_validator

from testbed.spec.models import LinkChange, ScheduleEntry, written_as
from testbed.timeline.field_types import check_changes
from testbed.timeline.updates import StartContext, Update, values_of


class Step(ScheduleEntry):
    """New values from now on."""

    set: Annotated[LinkChange, written_as("LinkChange")] = Field(examples=["{rate: 10mbit}"])
    """The new values."""

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        check_changes(self.set, "set")
        return self

    def updates(self, start: StartContext) -> Iterator[Update]:
        yield 0.0, values_of(self.set, start.trunk)
