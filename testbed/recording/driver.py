"""The thread that owns the links of a running cell: changes at absolute deadlines, counters in
between."""

import itertools
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

from netsenseml.records import RecordFile, monotonic_s
from testbed.clock import HERE, Clock
from testbed.links.qdiscs import QdiscCounters, bucket_of, queue_of
from testbed.links.shaper import Applied, Prepared, Shaper
from testbed.links.state import DIRECTIONS, LinkState
from testbed.recording.link_server import Request, Requests, check_name
from testbed.spec.load import parse_link
from testbed.timeline import Change
from testbed.timeline.validation import state_error

SAMPLE_S = 0.1
_READ_BACK_S = 1.0
"""So often the kernel is asked if links still are as they were set; it takes a few times as long as
a sample."""
_READ_BACK_GUARD = 6.0
_GUARD = 1.5
"""No sample is begun when a change is due sooner than this many times what the last one took: a
change must be on time."""
_OVERDUE_S = 0.5
"""But this late a sample comes first, or a dense timeline would leave no evidence; and a request
has waited for long enough."""


class Reachable(Protocol):
    """What a request may ask of a host (``labs.base.Host``)."""

    address: str
    interface: str

    @property
    def nsenter_target(self) -> Mapping[str, int | str]: ...


class LinkDriver:
    """Runs from entering to leaving. Records go to events.jsonl (every change), and ten times a
    second to links.jsonl, and to delayline.jsonl where there is a delay line.

    One thread does both, and answers ``requests`` as they come, so the netlink sockets need no
    lock. ``failure`` has the error that ended it early, if any. trunks: names of the links on which
    all properties hold in both directions.
    dilation: requests and answers have rates and delays as they would be without it. hosts: that
    requests may ask the way to. clock: this machine's against the orchestrator's, on which ``t0_s``
    is, and by which changes are due.
    """

    def __init__(
        self,
        links: Shaper,
        timeline: Sequence[Change],
        t0_s: float,
        directory: Path,
        requests: Requests | None = None,
        trunks: Collection[str] = (),
        dilation: float = 1.0,
        hosts: Mapping[str, Reachable] = MappingProxyType({}),
        clock: Callable[[], Clock] = lambda: HERE,
    ) -> None:
        self._hosts = hosts
        self._clock = clock
        self.failure: Exception | None = None
        self._requests: Requests = queue.Queue() if requests is None else requests
        self._trunks = trunks
        self._dilation = dilation
        self._carried = CarriedRates()
        self._links = links
        self._timeline = timeline
        self._t0_s = t0_s
        self._events = RecordFile(directory / "events.jsonl", new=True)
        self._samples = RecordFile(directory / "links.jsonl", new=True)
        self._line = (
            RecordFile(directory / "delayline.jsonl", new=True) if links.line is not None else None
        )
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._requests.put(Request({}))  # it may be waiting for one
        self._thread.join()
        self._events.close()
        self._samples.close()
        if self._line is not None:
            self._line.close()

    def arrived_bytes(self, links: Iterable[str]) -> int:
        """What has come down these links so far, with headers."""
        return self._carried.arrived_bytes(links)

    def _run(self) -> None:
        try:
            self._record_initial()
            self._loop()
        except Exception as error:  # the orchestrator ends the cell and reports it
            self.failure = error

    def _loop(self) -> None:
        pending = self._moments()
        due = next(pending, None)
        next_sample = reading_s = next_read_back = 0.0
        answering_s = looked_s = 0.0
        slot = 0
        while not self._stopping.is_set():
            now = self._since_t0(monotonic_s())
            overdue = now - next_sample > _OVERDUE_S
            if due is not None and due.at_s <= now and not overdue:
                self._apply(due)
                due = next(pending, None)
            elif next_sample <= now and (
                due is None or overdue or due.at_s - now > _GUARD * reading_s
            ):
                self._sample()
                # At a random moment of its tenth of a second: a training has a rhythm of its own,
                # and with samples that come regularly an idle time of each step could fall between
                # them every time.
                slot = max(slot + 1, int(now / SAMPLE_S))
                next_sample = max(SAMPLE_S * (slot + random.random()), now)
                reading_s = self._since_t0(monotonic_s()) - now
                if now >= next_read_back and (
                    due is None or due.at_s - now > _READ_BACK_GUARD * reading_s
                ):
                    self._read_back()
                    next_read_back = now + _READ_BACK_S
            else:
                moments = [next_sample] if next_sample > now else []
                moments += [] if due is None else [due.at_s]
                wait_s = max(0.0, min(moments) - now)
                room_s = wait_s
                if due is not None:
                    room_s = min(wait_s, due.at_s - now - _GUARD * max(reading_s, answering_s))
                if room_s > 0:
                    answering_s = self._answer_request(room_s) or answering_s
                    looked_s = now
                else:
                    self._stopping.wait(wait_s)
                continue
            if now - looked_s > _OVERDUE_S:  # behind a change, or a sample, there is the most room
                answering_s = self._answer_request(0.0) or answering_s
                looked_s = now
        self._sample()
        while self._answer_request(0.0):
            pass  # nobody shall wait for one that came at the end

    def _since_t0(self, own_s: float) -> float:
        """Seconds after t = 0 at a time of this machine."""
        return self._clock().reference(own_s) - self._t0_s

    def _read_back(self) -> None:
        own_s = monotonic_s()
        now, unsure_s = self._since_t0(own_s), self._clock().uncertainty_s(own_s)
        states = self._links.states
        events = [
            _event(now, now, link, states[link], "readback", False, unsure_s)
            for link in self._links.deviating()
        ]
        if events:
            self._events.append(events)

    def _answer_request(self, wait_s: float) -> float:
        """Answer the next one, if it comes in so long; returns how long that took."""
        try:
            request = self._requests.get(timeout=wait_s)
        except queue.Empty:
            return 0.0
        begin_s = monotonic_s()
        request.fulfil(self._host_info, self._answer_links)
        return monotonic_s() - begin_s

    def _host_info(self, name: str) -> Mapping[str, Any]:
        check_name("host", name, self._hosts)
        host = self._hosts[name]
        addresses = {other: self._hosts[other].address for other in self._hosts}
        return {"interface": host.interface, "addresses": addresses, **host.nsenter_target}

    def _answer_links(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        states = self._links.states
        names = list(request.get("links") or states)
        for name in names:
            check_name("link", name, states)
        if request.get("set"):
            wanted = parse_link(request["set"], self._links.mtu)
            wished = {
                name: wanted.applied_to(
                    states[name].slowed(1 / self._dilation), trunk=name in self._trunks
                )
                for name in names
            }
            for name, state in wished.items():
                if error := state_error(state):
                    raise ValueError(f"{name}: {error}")
            changes = {name: state.slowed(self._dilation) for name, state in wished.items()}
            impaired = {
                (link, side)
                for link, state in changes.items()
                for side in DIRECTIONS
                if getattr(state, side).impaired
            }
            if missing := impaired - self._links.impaired:
                raise ValueError(
                    f"{sorted(missing)[0][0]} can have no delay or loss, because nothing in its"
                    " schedule has any; give the link some delay in the spec to be able to change"
                    " it by hand"
                )
            asked_s = self._since_t0(monotonic_s())
            self._record(asked_s, "manual", changes, self._links.apply(changes))
        shown = {
            name: self._links.states[name].slowed(1 / self._dilation).to_json() for name in names
        }
        return {
            name: {"state": shown[name], **self._carried.of(name, self._dilation)} for name in names
        }

    def _moments(self) -> Iterator["_Moment"]:
        """The changes that are due together, encoded before they are due."""
        for at_s, group in itertools.groupby(self._timeline, key=lambda change: change.at_s):
            yield _Moment(
                at_s, self._links.prepare({change.link: change.state for change in group})
            )

    def _record_initial(self) -> None:
        # The lab applied and verified the first states before t = 0.
        unsure_s = self._clock().uncertainty_s(monotonic_s())
        self._events.append(
            [
                _event(0.0, 0.0, link, state, "initial", True, unsure_s)
                for link, state in self._links.states.items()
            ]
        )

    def _apply(self, moment: "_Moment") -> None:
        results = self._links.commit(moment.prepared)
        self._record(moment.at_s, "schedule", moment.prepared.changes, results)

    def _record(
        self,
        planned_s: float,
        kind: str,
        changes: Mapping[str, LinkState],
        results: Mapping[str, Applied],
    ) -> None:
        rows = []
        for link, state in changes.items():
            applied = results[link]
            unsure_s = self._clock().uncertainty_s(applied.applied_s)
            rows.append(
                _event(
                    planned_s,
                    self._since_t0(applied.applied_s),
                    link,
                    state,
                    kind,
                    applied.verified,
                    unsure_s,
                )
            )
        self._events.append(rows)

    def _sample(self) -> None:
        states = self._links.states
        begin_s = monotonic_s()
        counters = self._links.counters()
        # On a busy machine reading takes a while; the middle is at most half of that wrong.
        end_s = monotonic_s()
        # What the clock leaves unsure widens the time in which it was read.
        t_s = round(self._since_t0((begin_s + end_s) / 2), 6)
        reading_s = round(end_s - begin_s + 2 * self._clock().uncertainty_s(end_s), 6)
        self._carried.update(t_s, counters)
        self._samples.append(
            [
                {
                    "t_s": t_s,
                    "reading_s": reading_s,
                    "link": link,
                    "direction": direction,
                    "rate_bps": getattr(states[link], direction).rate_bps,
                    "burst_bytes": bucket_of(self._links.trees[link, direction]),
                    "queue_bytes": queue_of(self._links.trees[link, direction]),
                    "bytes": counted.bytes,
                    "packets": counted.packets,
                    "drops": counted.drops,
                    "lost": counted.lost,
                    "overlimits": counted.overlimits,
                    "backlog_bytes": counted.backlog_bytes,
                    "qlen": counted.qlen,
                }
                for (link, direction), counted in counters.items()
            ]
        )
        if self._line is not None and (line := self._links.line_counters) is not None:
            ways = line.directions.values()
            held = sum(way.held for way in ways)
            self._line.append(
                [
                    {
                        "t_s": t_s,
                        "cpu_s": line.cpu_s,
                        "frames": (
                            sum(
                                way.frames + way.duplicated - way.lost - way.overflowed
                                for way in ways
                            )
                            - held
                        ),
                        "late": sum(way.late for way in ways),
                        "latest_s": max((way.latest_s for way in ways), default=0.0),
                        "held": held,
                        "overflowed": sum(way.overflowed for way in ways) + line.refused,
                    }
                ]
            )


class CarriedRates:
    """What every link carries now, from the counters of the last second."""

    def __init__(self) -> None:
        self._history: deque[tuple[float, Mapping[tuple[str, str], QdiscCounters]]] = deque(
            maxlen=round(1 / SAMPLE_S) + 1
        )

    def update(self, t_s: float, counters: Mapping[tuple[str, str], QdiscCounters]) -> None:
        """Take a sample."""
        self._history.append((t_s, counters))

    def arrived_bytes(self, links: Iterable[str]) -> int:
        """What has come down some links so far; 0 before the first sample."""
        newest = self._history[-1][1] if self._history else {}
        return sum(newest[link, "down"].bytes for link in links if (link, "down") in newest)

    def of(self, link: str, dilation: float = 1.0) -> dict[str, dict[str, float]]:
        """By direction: carried_bps over the last second, as it would be without dilation,
        backlog_bytes now, drops so far."""
        if not self._history:  # before t = 0
            nothing = {"carried_bps": 0.0, "backlog_bytes": 0, "drops": 0}
            return dict.fromkeys(DIRECTIONS, nothing)
        (first_s, first), (last_s, last) = self._history[0], self._history[-1]
        span_s = max(last_s - first_s, 1e-3) / dilation
        return {
            direction: {
                "carried_bps": (
                    (last[link, direction].bytes - first[link, direction].bytes) * 8 / span_s
                ),
                "backlog_bytes": last[link, direction].backlog_bytes,
                "drops": last[link, direction].drops,
            }
            for direction in DIRECTIONS
        }


@dataclass(frozen=True, slots=True)
class _Moment:
    at_s: float
    prepared: Prepared


def _event(
    planned_s: float,
    applied_s: float,
    link: str,
    state: LinkState,
    kind: str,
    verified: bool,
    unsure_s: float,
) -> dict[str, Any]:
    return {
        "planned_s": planned_s,
        "applied_s": round(applied_s, 6),
        "link": link,
        "state": state.to_json(),
        "kind": kind,
        "verified": verified,
        "unsure_s": unsure_s,
    }
