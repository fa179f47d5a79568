"""What a pattern sees of a link when it starts, and the updates that it yields; what all patterns
have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from testbed.links.state import DIRECTIONS, LinkState, Loss
from testbed.spec.models import LinkSpec

LINK = "link"
PropertyKey = tuple[str, str]
"""(direction, property of ``LinkParameters``), or (LINK, property of ``LinkState``)."""
Update = tuple[float, Mapping[PropertyKey, Any]]
"""(seconds after the start of the entry, new values). All updates of a pattern have the same
keys."""


@dataclass(frozen=True, slots=True)
class StartContext:
    """What a pattern sees of one link when it starts.

    state: in force at that moment. left_s: seconds to the end of the run, None if that is not
    known. trunk: every property holds in both directions. read: gives the text of a file named in
    the spec; raises ValueError.
    """

    link: str
    state: LinkState
    left_s: float | None
    trunk: bool
    read: Callable[[str], str]


def values_of(spec: LinkSpec, trunk: bool) -> dict[PropertyKey, Any]:
    """The properties that a spec gives, with their values."""
    values = {
        (side, name): value
        for side, changes in spec.changes_by_direction(trunk).items()
        for name, value in changes.items()
    }
    return values | ({(LINK, "connected"): spec.up} if isinstance(spec.up, bool) else {})


def value_in(state: LinkState, key: PropertyKey) -> Any:
    """The value of one property."""
    place, name = key
    return getattr(state if place == LINK else getattr(state, place), name)


def with_values(state: LinkState, values: Mapping[PropertyKey, Any]) -> LinkState:
    """A copy with some properties replaced; all others stay as they are."""
    changes: dict[str, dict[str, Any]] = {}
    for (place, name), value in values.items():
        changes.setdefault(place, {})[name] = value
    sides = {
        side: getattr(state, side).with_changes(changes[side])
        for side in DIRECTIONS
        if side in changes
    }
    return replace(state, **sides, **changes.get(LINK, {}))


def interpolate(first: Any, second: Any, fraction: float) -> Any:
    """The value at a fraction (0 to 1) of the way between two of them; the ends are met exactly,
    whole numbers stay whole.

    Of a Loss every number moves; between random loss and bursts, the bursts hold all the way.
    """
    if fraction <= 0 or first == second:
        return first
    if fraction >= 1:
        return second
    if isinstance(first, Loss):
        return Loss(
            *(
                interpolate(getattr(first, part.name), getattr(second, part.name), fraction)
                for part in fields(Loss)
            )
        )
    if first is None or second is None:
        return second if first is None else first
    value = first + (second - first) * fraction
    return round(value) if isinstance(second, int) else value
