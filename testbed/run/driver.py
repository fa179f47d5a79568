"""The thread that owns the links of a running cell: changes at absolute deadlines, counters in between."""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from netsenseml.agent.protocol import RecordFile, monotonic_s
from testbed.links.shaper import Shaper
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
        position = 0
        next_sample = 0.0
        while True:
            now = monotonic_s() - self._t0_s
            change_due = self._timeline[position].at_s if position < len(self._timeline) else float("inf")
            if change_due <= now:
                moment = self._timeline[position].at_s
                batch = []
                while position < len(self._timeline) and self._timeline[position].at_s <= moment:
                    batch.append(self._timeline[position])
                    position += 1
                self._apply(batch)
            elif next_sample <= now and change_due - now > _GUARD_S:
                self._sample()
                next_sample = max(next_sample + SAMPLE_S, now)
            else:
                pause = min(change_due, max(next_sample, now + 0.0002)) - now
                if self._stopping.wait(max(0.0, pause)):
                    break
                continue
            if self._stopping.is_set():
                break
        self._sample()

    def _record_initial(self) -> None:
        # The lab applied and verified the first states before t = 0.
        self._events.append([_event(0.0, 0.0, link, state, "initial", True) for link, state in self._links.states.items()])

    def _apply(self, batch: Sequence[Change]) -> None:
        results = self._links.apply({change.link: change.state for change in batch})
        self._events.append(
            [
                _event(c.at_s, results[c.link].applied_s - self._t0_s, c.link, c.state, "schedule", results[c.link].verified)
                for c in batch
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


def _event(planned_s: float, applied_s: float, link: str, state: LinkState, kind: str, verified: bool) -> dict[str, Any]:
    return {
        "planned_s": planned_s,
        "applied_s": round(applied_s, 6),
        "link": link,
        "state": state.to_json(),
        "kind": kind,
        "verified": verified,
    }
