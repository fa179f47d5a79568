"""Schedule → changes: who acts when, who takes over from whom, what the end of the run cuts off."""

from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

from testbed.links.state import DIRECTIONS, LinkState
from testbed.spec.errors import SpecError, did_you_mean, place_of
from testbed.spec.models import Entry, ScheduleEntry
from testbed.spec.units import format_time
from testbed.timeline.updates import PropertyKey, StartContext, with_values
from testbed.timeline.validation import state_error

MAX_CHANGES = 300_000
"""Of one timeline: eight links, ten times a second, for an hour. A change is one moment of one
link."""
# of one link: values by time (s after t = 0, to the microsecond)
_Tracks = dict[PropertyKey, list[tuple[float, Any]]]


@dataclass(frozen=True, slots=True)
class Change:
    """At ``at_s`` seconds after t = 0 a link gets a new state, which is complete: applying it needs
    no memory."""

    at_s: float
    link: str
    state: LinkState


def _no_files(name: str) -> str:
    raise ValueError(f"{name} cannot be read here")


def expand(
    schedule: Sequence[Entry],
    initial: Mapping[str, LinkState],
    workers: Sequence[str] | None = None,
    *,
    trunks: Container[str] = (),
    end_s: float | None = None,
    read: Callable[[str], str] = _no_files,
) -> tuple[Change, ...]:
    """All changes of links in a schedule in order of time, one for each moment and link.

    Entries act in order of their time, then of their place in the file; a later one takes the
    properties that it sets over from whatever set them before. Nothing happens at or after
    ``end_s``, the end of the run in seconds if that is known. initial: the links in their first
    state. workers: the links that ``all`` stands for; left out: every link. trunks: links on which
    every property holds in both directions. read: gives the text of a file named in the spec.
    Raises SpecError with the place of what cannot be done.
    """
    _check_first(initial)
    tracks: dict[str, _Tracks] = {link: {} for link in initial}
    left = MAX_CHANGES
    for index, entry in sorted(enumerate(schedule), key=lambda pair: pair[1].at):
        if not isinstance(entry, ScheduleEntry):
            continue
        with placed(index):
            check_end(entry, end_s)
            for link in _named_links(entry, initial, workers):
                start = StartContext(
                    link=link,
                    state=_state_at(entry.at, tracks[link], initial[link]),
                    left_s=None if end_s is None else end_s - entry.at,
                    trunk=link in trunks,
                    read=read,
                )
                left = _record(entry, start, tracks[link], end_s, left)
    _check_rates(initial, tracks)
    changes = [
        change for link, track in tracks.items() for change in _changes(link, track, initial[link])
    ]
    changes.sort(key=attrgetter("at_s", "link"))
    for change in changes:
        if error := state_error(change.state):
            raise SpecError(
                [("schedule", f"link {change.link} at {format_time(change.at_s)}: {error}")]
            )
    return tuple(changes)


def _check_first(initial: Mapping[str, LinkState]) -> None:
    for link, state in initial.items():
        if error := state_error(state):
            raise SpecError([("network", f"link {link}: {error}")])


def _check_rates(initial: Mapping[str, LinkState], tracks: Mapping[str, _Tracks]) -> None:
    for link, state in initial.items():
        for side in DIRECTIONS:
            aqm, rate_bps = getattr(state, side).aqm, getattr(state, side).rate_bps
            if aqm != "fifo" and rate_bps is None and (side, "rate_bps") not in tracks[link]:
                error = (
                    f"link {link}: {aqm} has nothing to manage where no rate makes packets wait;"
                    " give it a rate, too"
                )
                raise SpecError([("network", error)])


def _record(
    entry: ScheduleEntry, start: StartContext, tracks: _Tracks, end_s: float | None, left: int
) -> int:
    """Add the updates of one entry on one link to its tracks; returns how many more there may be.

    An update that changes nothing is left out, as the kernel may give a free burst with every
    change; but it is counted, or a pattern of nothing else would never end.
    """
    taken: _Tracks = {}
    last: Mapping[PropertyKey, Any] | None = None
    for offset_s, values in entry.updates(start):
        at_s = round(entry.at + offset_s, 6)
        if end_s is not None and at_s >= end_s:
            break
        if not left:
            error = (
                f"the schedule makes more than {MAX_CHANGES:,} changes; choose longer steps, a"
                " shorter for, or fewer links"
            )
            raise SpecError([("", error)])
        left -= 1
        if values == last:
            continue
        last = values
        if not taken:
            taken = {key: tracks.setdefault(key, []) for key in values}
            for track in taken.values():
                del track[_position(track, entry.at) :]
        for key, value in values.items():
            taken[key].append((at_s, value))
    return left


def _position(track: Sequence[tuple[float, Any]], at_s: float) -> int:
    return bisect_right(track, at_s, key=itemgetter(0))


def _state_at(at_s: float, tracks: _Tracks, initial: LinkState) -> LinkState:
    positions = {key: _position(track, at_s) for key, track in tracks.items()}
    return with_values(
        initial,
        {key: tracks[key][position - 1][1] for key, position in positions.items() if position},
    )


def _changes(link: str, tracks: _Tracks, state: LinkState) -> Iterator[Change]:
    moments: dict[float, dict[PropertyKey, Any]] = {}
    for key, track in tracks.items():
        for at_s, value in track:
            moments.setdefault(at_s, {})[key] = value
    for at_s in sorted(moments):
        state = with_values(state, moments[at_s])
        yield Change(at_s, link, state)


def _named_links(
    entry: ScheduleEntry, links: Mapping[str, LinkState], workers: Sequence[str] | None
) -> Sequence[str]:
    if entry.links == ["all"]:
        return list(links) if workers is None else workers
    for position, name in enumerate(entry.links):
        if name == "all":
            raise SpecError(
                [
                    (
                        place_of(["links", position]),
                        "all stands alone, for every worker; write links: all",
                    )
                ]
            )
        if name not in links:
            error = f"there is no link {name!r}; {did_you_mean(name, ['all', *links])}"
            raise SpecError([(place_of(["links", position]), error)])
    return entry.links


def check_end(entry: Entry, end_s: float | None) -> None:
    """Raise SpecError if an entry begins or ends after the run, which ends at ``end_s``."""
    if end_s is None:
        return
    last_s = entry.at + entry.length_s
    late = "at" if entry.at >= end_s else entry.LENGTH if last_s > end_s + 1e-9 else None
    if late:
        error = (
            f"{format_time(entry.at if late == 'at' else last_s)} comes after the end of the run at"
            f" {format_time(end_s)} (stop.seconds); make it earlier or the run longer"
        )
        raise SpecError([(late, error)])


@contextmanager
def placed(index: int) -> Iterator[None]:
    """Errors in the body name a place within the entry; put the entry's own place in front."""
    try:
        yield
    except SpecError as error:
        entry = place_of(["schedule", index])
        faults = [
            (f"{entry}.{place}" if place else entry, message) for place, message in error.errors
        ]
        raise SpecError(faults, error.source) from None
