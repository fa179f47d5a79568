"""Types and checks of the fields that several patterns have."""

from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from testbed.links.state import DIRECTIONS
from testbed.spec.models import LinkParametersSpec, LinkSpec, Time, written_as
from testbed.timeline.updates import values_of

MIN_INTERVAL_S = 0.001
"""Between two changes of a link: no driver is on time more often."""
CONTINUOUS = frozenset({"rate", "delay", "jitter", "loss", "duplicate", "corrupt", "reorder"})


def _positive(time_s: float) -> float:
    if time_s <= 0:
        raise ValueError("must be longer than 0s")
    return time_s


def _not_too_often(time_s: float) -> float:
    if time_s < MIN_INTERVAL_S:
        raise ValueError("changes are at least 1ms apart")
    return time_s


PositiveTime = Annotated[Time, AfterValidator(_positive), written_as("positive_time")]
Interval = Annotated[Time, AfterValidator(_not_too_often), written_as("positive_time")]


def check_changes(spec: LinkSpec, key: str) -> None:
    """Raise an error at ``key`` if a spec names no property."""
    if not values_of(spec, trunk=True):
        raise PydanticCustomError(
            "at_key", "changes nothing; name a property, for example rate: 10mbit", {"path": [key]}
        )


def check_continuous(spec: LinkSpec, *, at: tuple[str, ...] = (), instead: str) -> None:
    """Raise an error, ``at`` a place, if a property cannot change gradually. instead: the pattern
    that can have it."""
    for path, part in (((), spec), (("up",), spec.up), (("down",), spec.down)):
        if isinstance(part, LinkParametersSpec):
            given = {name for name in part.model_fields_set if getattr(part, name) is not None}
            bad = [(*path, name) for name in sorted(given - CONTINUOUS - {*DIRECTIONS})]
        else:
            bad = [] if part is None else [path]
        if bad:
            text = f"{bad[0][-1]} has no values in between; use {instead}"
            raise PydanticCustomError("at_key", text, {"path": [*at, *bad[0]]})
