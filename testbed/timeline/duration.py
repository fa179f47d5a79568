"""What the entries that go on for some time have in common."""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import takewhile
from typing import ClassVar

from pydantic import Field

from testbed.spec.errors import SpecError
from testbed.spec.models import ScheduleEntry
from testbed.timeline.field_types import PositiveTime
from testbed.timeline.updates import StartContext, Update


class DurationEntry(ScheduleEntry):
    """A pattern that goes on until the end of the run, or for a time."""

    LENGTH: ClassVar[str] = "for"

    duration: PositiveTime | None = Field(None, alias="for", examples=["60s"])
    """How long it goes on. After it the link stays as it is at that moment."""

    @property
    def length_s(self) -> float:
        """Seconds from its start to its last possible change."""
        return self.duration or 0.0

    def endless(self, start: StartContext) -> bool:
        """True if the pattern never ends by itself."""
        return True

    @abstractmethod
    def unbounded_updates(self, start: StartContext) -> Iterator[Update]:
        """The updates, not yet cut off at any end."""

    def updates(self, start: StartContext) -> Iterator[Update]:
        duration_s = self.duration if self.duration is not None else start.left_s
        if duration_s is None and self.endless(start):
            raise SpecError(
                [
                    (
                        "for",
                        (
                            "is missing, as the run has no stop.seconds to end it; say how long,"
                            " for example for: 60s"
                        ),
                    )
                ]
            )
        return takewhile(
            lambda update: duration_s is None or round(update[0], 6) < duration_s,
            self.unbounded_updates(start),
        )
