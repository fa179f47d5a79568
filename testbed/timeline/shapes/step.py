"""``set: {rate: 10mbit}``: at once."""

from collections.abc import Iterator
from typing import Self

from pydantic import model_validator

from testbed.spec.models import LinkChange, ScheduleEntry
from testbed.timeline.keys import check_changes
from testbed.timeline.moves import Move, Start, values_of


class Step(ScheduleEntry):
    """New values from now on."""

    set: LinkChange

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        check_changes(self.set, "set")
        return self

    def moves(self, start: Start) -> Iterator[Move]:
        yield 0.0, values_of(self.set, start.trunk)
