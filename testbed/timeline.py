"""The schedule as absolute changes of whole link states; pure data.

A change carries the complete new state of one link, so that applying it needs no memory of what came before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.links.state import DIRECTIONS, LinkState
from testbed.spec.errors import SpecError, did_you_mean, place_of
from testbed.spec.models import ScheduleEntry

DEFAULT_RAMP_STEP_S = 0.1
_Key = tuple[str, str, str]  # link, direction, property


@dataclass(frozen=True, slots=True)
class Change:
    """At ``at_s`` seconds after t = 0 a link gets a new state."""

    at_s: float
    link: str
    state: LinkState


def expand(schedule: Sequence[ScheduleEntry], initial: Mapping[str, LinkState]) -> tuple[Change, ...]:
    """All changes of a schedule in order of time, one for each moment and link.

    Entries act in order of their time, then of their place in the file; a later one takes a property over from a ramp that
    is still running. A ramp starts from the value in force at its start and ends exactly at its target.
    Raises SpecError for a link that does not exist and for a ramp of a rate that has no limit to start from.
    """
    updates: dict[_Key, list[tuple[float, Any]]] = {}
    for index, entry in sorted(enumerate(schedule), key=lambda pair: pair[1].at):
        for link in _named_links(entry, index, initial):
            for key, target in _properties(entry, link):
                track = updates.setdefault(key, [])
                now = next((value for at, value in reversed(track) if at <= entry.at), None)
                if now is None:
                    now = getattr(getattr(initial[link], key[1]), key[2])
                track[:] = [(at, value) for at, value in track if at <= entry.at]
                if entry.ramp is None:
                    track.append((entry.at, target))
                else:
                    if now is None:
                        place = place_of(["schedule", index, "ramp", "rate"])
                        raise SpecError([(place, f"link {link} has no rate to start from; give network.link.rate")])
                    track.extend(_ramp(entry, now, target))
    return _merge(updates, initial)


def _named_links(entry: ScheduleEntry, index: int, links: Mapping[str, LinkState]) -> list[str]:
    if entry.links == ["all"]:
        return list(links)
    for position, name in enumerate(entry.links):
        if name not in links:
            place = place_of(["schedule", index, "links", position])
            raise SpecError([(place, f"there is no link {name!r}; {did_you_mean(name, ['all', *links])}")])
    return entry.links


def _properties(entry: ScheduleEntry, link: str) -> list[tuple[_Key, Any]]:
    wanted = entry.set if entry.set is not None else entry.ramp
    assert wanted is not None  # the model admits exactly one of the two
    return [
        ((link, side, name), value)
        for side, changes in wanted.changes_by_direction().items()
        for name, value in changes.items()
    ]


def _ramp(entry: ScheduleEntry, start: float, target: float) -> list[tuple[float, Any]]:
    assert entry.over is not None
    steps = max(1, math.ceil(entry.over / (entry.every or DEFAULT_RAMP_STEP_S) - 1e-9))
    points: list[tuple[float, Any]] = []
    for step in range(1, steps + 1):
        share = min(1.0, step * (entry.every or DEFAULT_RAMP_STEP_S) / entry.over) if step < steps else 1.0
        value = target if share == 1.0 else start + (target - start) * share
        points.append((entry.at + entry.over * share, round(value) if isinstance(target, int) else value))
    return points


def _merge(updates: Mapping[_Key, list[tuple[float, Any]]], initial: Mapping[str, LinkState]) -> tuple[Change, ...]:
    moments: dict[tuple[float, str], dict[str, dict[str, Any]]] = {}
    for (link, side, name), track in updates.items():
        for at, value in track:
            moments.setdefault((round(at, 6), link), {}).setdefault(side, {})[name] = value
    states = dict(initial)
    changes = []
    for at, link in sorted(moments):
        sides = moments[at, link]
        state = states[link]
        states[link] = LinkState(*(getattr(state, side).with_changes(sides.get(side, {})) for side in DIRECTIONS))
        changes.append(Change(at, link, states[link]))
    return tuple(changes)
