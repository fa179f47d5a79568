"""What the shapes that go on for some time have in common."""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import takewhile
from typing import ClassVar

from pydantic import Field

from testbed.spec.errors import SpecError
from testbed.spec.models import ScheduleEntry
from testbed.timeline.keys import PositiveTime
from testbed.timeline.moves import Move, Start


class LastingEntry(ScheduleEntry):
    """A shape that goes on until the end of the run, or for a time."""

    LENGTH: ClassVar[str] = "for"

    duration: PositiveTime | None = Field(None, alias="for", examples=["60s"])
    """How long it goes on. After it the link stays as it is at that moment."""

    @property
    def length_s(self) -> float:
        """Seconds from its start to its last possible change."""
        return self.duration or 0.0

    def endless(self, start: Start) -> bool:
        """True if the pattern never ends by itself."""
        return True

    @abstractmethod
    def pattern(self, start: Start) -> Iterator[Move]:
        """The moves, not yet cut off at any end."""

    def moves(self, start: Start) -> Iterator[Move]:
        duration_s = self.duration if self.duration is not None else start.left_s
        if duration_s is None and self.endless(start):
            raise SpecError(
                [("for", "is missing, as the run has no stop.seconds to end it; say how long, for example for: 60s")]
            )
        return takewhile(lambda move: duration_s is None or round(move[0], 6) < duration_s, self.pattern(start))
