"""``trace: traces/example.csv, repeat: true, scale: {rate: 0.5, time: 2}, offset: 10s``: what was
recorded elsewhere."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, model_validator

from testbed.links.state import DIRECTIONS, Loss
from testbed.spec.errors import SpecError
from testbed.spec.models import Model, Time
from testbed.spec.units import MAX_DELAY_S, MAX_RATE_BPS, MIN_RATE_BPS, format_time
from testbed.timeline.duration import DurationEntry
from testbed.timeline.field_types import MIN_INTERVAL_S, Interval
from testbed.timeline.recording import DEFAULT_WINDOW_S, Recording, parse_recording
from testbed.timeline.updates import PropertyKey, StartContext, Update

Factor = Annotated[StrictFloat, Field(gt=0, le=1e6, allow_inf_nan=False)]
_BOTH_DIRECTIONS = ("rate_bps",)
_SCALED = {"rate": {"rate_bps"}, "delay": {"delay_s", "jitter_s"}, "loss": {"loss"}}
"""Columns by the factor of ``Scale`` that acts on them."""


class Scale(Model):
    """Factors, written as one number for the rate or as a mapping."""

    rate: Factor = 1.0
    """Of the rate."""
    delay: Factor = 1.0
    """Of the delay, and of the jitter, too."""
    loss: Factor = 1.0
    """Of the loss."""
    time: Factor = 1.0
    """2 takes twice as long."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"rate": data} if isinstance(data, int | float) else data


class Trace(DurationEntry):
    """Replay of a file (``timeline.recording`` has the formats), which is named relative to the
    spec.

    A rate of 0 is an outage: nothing passes, and what comes waits in the queue. Any other rate
    below 8kbit becomes 8kbit, the least of a link.
    """

    trace: str = Field(min_length=1, max_length=4096, examples=["traces/cellular.csv"])
    """A CSV file, or one of Mahimahi's packet-delivery files, relative to the spec."""
    repeat: StrictBool = False
    """Begin again at its end."""
    scale: Scale = Field(Scale(), examples=["{rate: 0.5, time: 2}"])
    """Factors on what was recorded."""
    offset: Time = 0.0
    """Where in the recording to begin, in its own time."""
    every: Interval | None = Field(None, examples=["100ms"])
    """Width of the windows in which a packet-delivery file is counted."""
    direction: Literal[*DIRECTIONS] | None = None  # type: ignore[valid-type]
    """Replay it in this direction only. Otherwise the rate holds in both, all else on down (on a
    trunk in both)."""

    def endless(self, start: StartContext) -> bool:
        """True if it begins again and again; a recording of a constant, such as Mahimahi's of 12
        Mbit/s, has no need to."""
        return self.repeat and any(
            len(set(values)) > 1 for values in self._columns(self._recording(start), start).values()
        )

    def unbounded_updates(self, start: StartContext) -> Iterator[Update]:
        recording = self._recording(start)
        columns = self._columns(recording, start)
        for at_s, index in recording.replay(self.offset, repeat=self.endless(start)):
            yield at_s * self.scale.time, {key: values[index] for key, values in columns.items()}

    def _recording(self, start: StartContext) -> Recording:
        try:
            recording = parse_recording(start.read(self.trace), self.every or DEFAULT_WINDOW_S)
        except ValueError as error:
            raise SpecError([("trace", f"{self.trace} {error}")]) from None
        self._check(recording, start.trunk)
        return recording

    def _check(self, recording: Recording, trunk: bool) -> None:
        key = error = ""
        given = recording.columns.keys()
        delays = [value for name in _SCALED["delay"] & given for value in recording.columns[name]]
        if self.every is not None and not recording.counted:
            key, error = (
                "every",
                f"is for packet-delivery files; {self.trace} has times of its own, remove it",
            )
        elif self.offset >= recording.length_s:
            key, error = (
                "offset",
                (
                    f"{format_time(self.offset)} is not within {self.trace}, which ends at"
                    f" {recording.length_s:g}s"
                ),
            )
        elif recording.shortest_s * self.scale.time < MIN_INTERVAL_S - 1e-9:
            key, error = (
                "trace",
                f"{self.trace} has rows less than 1ms apart; scale its time or thin it out",
            )
        elif max(recording.columns.get("rate_bps", (0.0,))) * self.scale.rate > MAX_RATE_BPS:
            key, error = "trace", f"{self.trace} has rates above 100gbit; scale them down"
        elif max(delays, default=0.0) * self.scale.delay > MAX_DELAY_S:
            key, error = (
                "trace",
                f"{self.trace} has delays above {format_time(MAX_DELAY_S)}; scale them down",
            )
        elif missing := [
            name for name in _SCALED if getattr(self.scale, name) != 1 and not given & _SCALED[name]
        ]:
            key, error = (
                f"scale.{missing[0]}",
                f"{self.trace} has no {missing[0]} that could be scaled; remove it",
            )
        elif self.direction == "up" and not trunk and given - {*_BOTH_DIRECTIONS}:
            key, error = (
                "direction",
                (
                    f"{self.trace} has more than a rate, and all else exists on the down direction"
                    " only"
                ),
            )
        if key:
            raise SpecError([(key, error)])

    def _columns(
        self, recording: Recording, start: StartContext
    ) -> dict[PropertyKey, Sequence[Any]]:
        columns = {
            name: [self._scaled(name, value) for value in values]
            for name, values in recording.columns.items()
        }
        sides = (self.direction,) if self.direction else DIRECTIONS
        return {
            (side, name): values
            for side in sides
            for name, values in columns.items()
            if side == "down" or start.trunk or name in _BOTH_DIRECTIONS
        }

    def _scaled(self, name: str, value: float) -> Any:
        if name == "rate_bps":
            return max(MIN_RATE_BPS, math.floor(value * self.scale.rate + 0.5)) if value else 0
        if name == "loss":
            return Loss(min(1.0, value * self.scale.loss))
        return value * self.scale.delay
