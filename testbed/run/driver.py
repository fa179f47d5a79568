"""The thread that owns the links of a running cell: changes at absolute deadlines, counters in between."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from netsenseml.agent.protocol import RecordFile, monotonic_s
from testbed.links.shaper import Prepared, Shaper
from testbed.links.state import DIRECTIONS, LinkState
from testbed.timeline import Change

SAMPLE_S = 0.1
_GUARD_S = 0.005
"""No sample is begun when a change is due this soon: a dump takes some ms, a change must be on time."""


class LinkDriver:
    """Runs from entering to leaving. Records go to events.jsonl (every change) and links.jsonl (ten times a second).

    One thread does both, so the netlink sockets need no lock. ``failure`` has the error that ended it early, if any.
    """

    def __init__(self, links: Shaper, timeline: Sequence[Change], t0_s: float, directory: Path) -> None:
        self.failure: Exception | None = None
        self._links = links
        self._timeline = timeline
        self._t0_s = t0_s
        self._events = RecordFile(directory / "events.jsonl")
        self._samples = RecordFile(directory / "links.jsonl")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join()
        self._events.close()
        self._samples.close()

    def _run(self) -> None:
        try:
            self._record_initial()
            self._loop()
        except Exception as error:  # the orchestrator ends the cell and reports it
            self.failure = error

    def _loop(self) -> None:
        pending = self._moments()
        due = next(pending, None)
        next_sample = 0.0
        while not self._stopping.is_set():
            now = monotonic_s() - self._t0_s
            if due is not None and due.at_s <= now:
                self._apply(due)
                due = next(pending, None)
            elif next_sample <= now and (due is None or due.at_s - now > _GUARD_S):
                self._sample()
                next_sample = max(next_sample + SAMPLE_S, now)
            else:
                wake = max(next_sample, now + 0.0002) if due is None else min(due.at_s, max(next_sample, now + 0.0002))
                self._stopping.wait(max(0.0, wake - now))
        self._sample()

    def _moments(self) -> Iterator["_Moment"]:
        """The changes that are due together, encoded before they are due."""
        for at_s, group in itertools.groupby(self._timeline, key=lambda change: change.at_s):
            changes = list(group)
            yield _Moment(at_s, changes, self._links.prepare({change.link: change.state for change in changes}))

    def _record_initial(self) -> None:
        # The lab applied and verified the first states before t = 0.
        self._events.append([_event(0.0, 0.0, link, state, "initial", True) for link, state in self._links.states.items()])

    def _apply(self, moment: "_Moment") -> None:
        results = self._links.commit(moment.prepared)
        self._events.append(
            [
                _event(
                    change.at_s,
                    results[change.link].applied_s - self._t0_s,
                    change.link,
                    change.state,
                    "schedule",
                    results[change.link].verified,
                )
                for change in moment.changes
            ]
        )

    def _sample(self) -> None:
        t_s = round(monotonic_s() - self._t0_s, 6)
        states = self._links.states
        rows: list[dict[str, Any]] = []
        for (link, direction), counters in self._links.counters().items():
            shape = states[link].up if direction == DIRECTIONS[0] else states[link].down
            rows.append(
                {
                    "t_s": t_s,
                    "link": link,
                    "direction": direction,
                    "rate_bps": shape.rate_bps,
                    "bytes": counters.bytes,
                    "packets": counters.packets,
                    "drops": counters.drops,
                    "overlimits": counters.overlimits,
                    "backlog_bytes": counters.backlog_bytes,
                    "qlen": counters.qlen,
                }
            )
        self._samples.append(rows)


@dataclass(frozen=True, slots=True)
class _Moment:
    at_s: float
    changes: Sequence[Change]
    prepared: Prepared


def _event(planned_s: float, applied_s: float, link: str, state: LinkState, kind: str, verified: bool) -> dict[str, Any]:
    return {
        "planned_s": planned_s,
        "applied_s": round(applied_s, 6),
        "link": link,
        "state": state.to_json(),
        "kind": kind,
        "verified": verified,
    }
