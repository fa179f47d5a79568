"""What the page shows of a run under way: its record files, read as they grow, as few numbers.
Imports no pandas."""

import json
import math
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from testbed.files import read_json
from testbed.live.bins import LONGEST_S, POINTS, Bins, newest
from testbed.live.tail import Tail
from testbed.protocol import (
    CELL_FILE,
    EVALS_FILE,
    RESULT_FILE,
    STEPS_FILE,
    cell_directories,
    host_directory,
    number,
    numbered,
    one_line,
    rank_name,
    ranks_per_worker,
)
from testbed.protocol import SOCKET_FILE as CONTROL_FILE
from testbed.recording.link_server import SOCKET_FILE as LINK_SOCKET_FILE
from testbed.report.palette import palette
from testbed.results.names import scenario
from testbed.results.tolerances import LATE_S, TAKEN_SHARE, taken_share
from testbed.run.directory import LOCK_FILE

DIRECTIONS = ("up", "down")
MOST_CELLS = 2000
_MOST_RANKS = 4096
_ALL_POINTS = 6000
"""Of one line in all cells together: a sweep of many has coarser ones."""
_LINKS_EVERY_S = 0.45
"""A bin is no shorter than half a second; samples of links in between are not even parsed."""
_CARRIED_OVER_S = 1.0
_BUSY_SAMPLES = 50
_MOST_EVENTS = 60
_NAMED_LINKS = 4
_TIME_FIRST = b'{"t_s": '
_ROWS = 10_000
_MOST_LINES = 20
_MOST_TAILS = 4 * _MOST_RANKS
"""About so many files of a cell are followed, however often its workers are started again."""


_Source = tuple[Tail, Callable[[Mapping[str, Any]], None]]


class CellView:
    """One cell: what its records hold so far, in the time and the rates of the experiment, as
    without dilation."""

    def __init__(self, directory: Path, points: int) -> None:
        self.name = directory.name
        self.directory = directory
        self.bins = Bins(points)
        self.stamp = _stamp(directory / CELL_FILE)
        config = read_json(directory / CELL_FILE) or {}
        self._dilation = _dilation(config.get("dilation"))
        self.method = _text(
            config.get("label") or _mapping(config.get("method")).get("name") or "unknown"
        )
        self._seed = number(config.get("seed"))
        self.scenario = _text(
            scenario({_text(k): _text(v) for k, v in _mapping(config.get("overrides")).items()}),
            300,
        )
        self._stop = _mapping(_mapping(config.get("workload")).get("stop"))
        self._earlier = _lines(config.get("earlier"))
        impaired = config.get("impaired")
        self.impaired = (
            frozenset(_text(link) for link in impaired)
            if isinstance(impaired, list)
            else frozenset()
        )
        """Links that can have a delay."""
        self._result: Mapping[str, Any] = {}
        self._result_stamp: tuple[int, int] | None = None
        self.ended_at_s = 0.0
        """When its result was written, as time.time() counts; 0: not yet."""

        self.t_s = 0.0
        self.steps = 0
        self._samples = 0.0
        self._steps_end_s = 0.0
        self._ranks_end_s: dict[object, float] = {}
        self._payload = (0.0, 0)
        self._latest: dict[str, Any] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=_MOST_EVENTS)
        self._states: dict[str, Mapping[str, Any]] = {}
        self._late_s = 0.0
        self._manual = 0
        self._unconfirmed: dict[str, None] = {}
        self._taken = (0.0, 0)
        self._sample_s = -math.inf
        self._sample: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._counted: deque[tuple[float, dict[tuple[str, str], float]]] = deque(maxlen=8)
        self._links: dict[str, dict[str, Any]] = {}

        self._per_host = ranks_per_worker(config)
        self._ranks = min(int(number(config.get("workers")) or 0) * self._per_host, _MOST_RANKS)
        self._restarts = 0
        self._failures: deque[str] = deque(maxlen=_MOST_LINES)
        self._furthest: dict[object, float] = {}
        self._sources: list[_Source] = []
        self._whole = False

    def _of_cell(self) -> Iterator["_Source"]:
        yield Tail(self.directory / "events.jsonl"), self._take_event
        yield Tail(self.directory / "links.jsonl", self._is_due), self._take_link
        yield Tail(self.directory / "host.jsonl"), self._take_load
        yield Tail(self.directory / "failures.jsonl"), self._take_failure
        yield from self._of_workers(0)

    def _of_workers(self, restarts: int) -> Iterator["_Source"]:
        """What workers record that have been started again so often."""
        for rank in range(self._ranks):
            own = host_directory(self.directory, rank_name(rank, self._per_host))
            yield Tail(own / numbered(STEPS_FILE, restarts)), _of_rank(rank, self._take_step)
            if rank == 0:
                yield Tail(own / numbered(EVALS_FILE, restarts)), self._take_evaluation

    # State

    def refresh(self) -> None:
        """Look if the cell has ended."""
        stamp = _stamp(self.directory / RESULT_FILE)
        if stamp != self._result_stamp:
            self._result_stamp = stamp
            self._result = read_json(self.directory / RESULT_FILE) or {}
            self.ended_at_s = stamp[1] / 1e9 if stamp else 0.0

    @property
    def state(self) -> str:
        """ "waiting", "starting", "running", or how it ended: "done", "failed", "interrupted"."""
        if self._result_stamp is not None:
            return _text(self._result.get("status") or "damaged", 20)
        if _exists(self.directory / LINK_SOCKET_FILE):
            return "running"
        return "starting" if _exists(self.directory / CONTROL_FILE) else "waiting"

    @property
    def share(self) -> float | None:
        """How much of it is done, 0 to 1; None if its end is not known."""
        shares = [now / limit for now, limit in self._towards_end() if limit]
        return _short(min(1.0, max(0.0, *shares))) if shares else None

    @property
    def reported_s(self) -> float:
        """Up to this time all workers have reported their steps."""
        return _short(min(self._ranks_end_s.values(), default=0.0)) or 0.0

    @property
    def planned_s(self) -> float | None:
        """How long it takes, if its end is a time."""
        seconds = number(self._stop.get("seconds"))
        return seconds / self._dilation if seconds and 0 < seconds < LONGEST_S else None

    def _towards_end(self) -> Iterator[tuple[float, float | None]]:
        yield self.t_s, self.planned_s
        yield self.steps, number(self._stop.get("steps"))

    def problems(self) -> list[str]:
        """What speaks against the cell so far; the verdict at its end knows more."""
        found = _lines(self._result.get("problems"))
        if self._result_stamp is not None and not self._result:
            found.append(f"{RESULT_FILE} is damaged")
        if self._manual:
            found.append("its links were changed by hand, so it is no evidence for its spec")
        if self._late_s > LATE_S:
            found.append(f"a change of its links came {self._late_s * 1e3:.0f} ms late")
        if self._unconfirmed:
            found.append(
                f"the kernel did not confirm a change of {_names(list(self._unconfirmed))}"
            )
        taken, samples = self._taken
        if samples >= _BUSY_SAMPLES and taken > TAKEN_SHARE * samples:
            found.append(
                f"other programs took {100 * taken / samples:.0f} % of the time of a process of it"
            )
        found += [f"{line}; all workers were to be started again" for line in self._failures]
        return found + [f"tried again after: {line}" for line in self._earlier]

    def row(self) -> dict[str, Any]:
        """Its line in the table; numbers that are not known are None."""
        payload, steps = self._payload
        return {
            "method": self.method,
            "seed": self._seed,
            "scenario": self.scenario,
            "state": self.state,
            "t_s": _short(self.t_s),
            "steps": self.steps,
            "share": self.share,
            "samples_per_s": (
                _short(self._samples / self._steps_end_s) if self._steps_end_s else None
            ),
            "payload_bytes": _short(payload / steps) if steps else None,
            "problems": self.problems(),
            **self._latest,
        }

    def links(self) -> dict[str, dict[str, Any]]:
        """By name: up and down, each [limit, carried (bits/s), waiting (bytes), dropped (packets)],
        and what else is so."""
        return {
            name: {
                **self._links.get(name, {}),
                "connected": state.get("connected") is not False,
                "delay_s": (
                    (number(_mapping(state.get("down")).get("delay_s")) or 0.0) / self._dilation
                ),
                "impaired": name in self.impaired,
            }
            for name, state in self._states.items()
        }

    def events(self) -> list[dict[str, Any]]:
        """The newest changes of links, the last one last; those of one moment that are alike are
        one."""
        return [
            {
                **{key: value for key, value in event.items() if key != "links"},
                "links": _names(event["links"]),
            }
            for event in self._events
        ]

    # Records

    def read(self, deadline_s: float) -> None:
        """Take in what was recorded since the last time, as far as that can be done by a time of
        ``time.monotonic``."""
        ended = self.ended_at_s > 0  # nothing more is recorded then
        if self._whole or not (ended or _exists(self.directory / "events.jsonl")):
            return
        if ended and not self._sample and _exists(self.directory / "steps.parquet"):
            self._read_tables()
            self._end_sample()
            self._whole = True
            self._sources.clear()
            return
        self._sources = self._sources or list(self._of_cell())
        for tail, take in self._sources:
            for row in tail.rows(deadline_s):
                take(row)
            if time.monotonic() > deadline_s:
                return
        if ended:
            self._end_sample()
            self._whole = True
            self._sources.clear()

    def _read_tables(self) -> None:
        """Of a cell that ended before this page was opened, in a run that goes on with others."""
        from testbed.results.records import read_table

        takes = {"events": self._take_event, "links": self._take_link, "host": self._take_load}
        takes |= {
            "steps": self._take_step,
            "evals": self._take_evaluation,
            "failures": self._take_failure,
        }
        for name, take in takes.items():
            try:
                frame = read_table(self.directory, name)
            except ValueError as error:
                self._earlier.append(_text(error, 500))
                continue
            if name == "steps":
                frame = frame.sort_values("t_s")
            if name == "links":
                frame = frame.dropna(subset=["t_s"])
                slot = frame["t_s"] // (_LINKS_EVERY_S * self._dilation)
                frame = frame[frame["t_s"] == frame.groupby(slot)["t_s"].transform("min")]
            # as dicts they take many times as much memory
            for first in range(0, len(frame), _ROWS):
                for row in frame.iloc[first : first + _ROWS].to_dict("records"):
                    take({str(key): value for key, value in row.items()})

    def _time(self, value: object) -> float | None:
        t_s = number(value)
        return (
            None
            if t_s is None or not 0 <= t_s / self._dilation <= LONGEST_S
            else t_s / self._dilation
        )

    def _take_step(self, row: Mapping[str, Any]) -> None:
        t_s = self._time(row.get("t_s"))
        if t_s is None:
            return
        self._ranks_end_s[row.get("rank")] = t_s
        step, samples = number(row.get("step")) or 0.0, number(row.get("samples"))
        took_s = self._time(row.get("step_s")) or 0.0
        self.t_s, self._steps_end_s = max(self.t_s, t_s), max(self._steps_end_s, t_s)
        self.steps = max(self.steps, int(step) + 1)
        if samples is not None:
            # Of a step that is done again, as workers were started again, one try counts.
            self._samples += samples if step > self._furthest.get(row.get("rank"), -1) else 0
            self.bins.spread("samples", max(0.0, t_s - took_s), t_s, samples)
        for column in ("loss", "ratio", "bandwidth_bps"):
            if (value := number(row.get(column))) is not None:
                self.bins.mean(
                    column, t_s, value * (self._dilation if column.endswith("_bps") else 1.0)
                )
        self._furthest[row.get("rank")] = max(step, self._furthest.get(row.get("rank"), -1))
        if (payload := number(row.get("payload_bytes"))) is not None:
            self._payload = self._payload[0] + payload, self._payload[1] + 1
        if row.get("rank") == 0:
            loss, bandwidth = number(row.get("loss")), number(row.get("bandwidth_bps"))
            self._latest["scheme"] = _text(row.get("scheme") or "", 40)
            self._latest["loss"] = loss if loss is None else _short(loss)
            self._latest["bandwidth_bps"] = (
                bandwidth if bandwidth is None else _short(bandwidth * self._dilation)
            )

    def _take_evaluation(self, row: Mapping[str, Any]) -> None:
        t_s, accuracy = self._time(row.get("t_s")), number(row.get("accuracy"))
        if t_s is not None and accuracy is not None:
            self.bins.add("accuracy", t_s, accuracy, newest)
            self._latest["accuracy"] = _short(accuracy)

    def _is_due(self, line: bytes) -> bool:
        try:
            t_s = (
                float(line[len(_TIME_FIRST) : line.index(b",")])
                if line.startswith(_TIME_FIRST)
                else math.inf
            )
        except ValueError:
            return True  # parsing it will tell
        return t_s == self._sample_s or t_s >= self._sample_s + _LINKS_EVERY_S * self._dilation

    def _take_link(self, row: Mapping[str, Any]) -> None:
        t_s, link, direction = number(row.get("t_s")), row.get("link"), row.get("direction")
        if (
            t_s is None
            or self._time(t_s) is None
            or not isinstance(link, str)
            or not isinstance(direction, str)
        ):
            return
        if t_s != self._sample_s:
            self._end_sample()
            self._sample_s, self._sample = t_s, {}
        self._sample[link, direction] = row

    def _end_sample(self) -> None:
        """A sample of all links is whole: what they carried since the one before, and what they
        may."""
        if not self._sample:
            return
        t_s = self._sample_s / self._dilation
        self.t_s = max(self.t_s, t_s)
        counted = {key: number(row.get("bytes")) or 0.0 for key, row in self._sample.items()}
        if self._counted:
            before_s, before = self._counted[-1]
            span_s = max(t_s - before_s, 1e-3)
            if rates := [
                (now - before[key]) * 8 / span_s for key, now in counted.items() if key in before
            ]:
                middle_s = (t_s + before_s) / 2
                self.bins.mean("carried_bps", middle_s, sum(rates) / len(rates))
                self.bins.add("least_bps", middle_s, min(rates), min)
                self.bins.add("most_bps", middle_s, max(rates), max)
        self._counted.append((t_s, counted))
        limits = [
            limit
            for row in self._sample.values()
            if (limit := number(row.get("rate_bps"))) is not None
        ]
        if limits:
            self.bins.add("limit_bps", t_s, min(limits) * self._dilation, min)
        since_s, since = next(
            (one for one in reversed(self._counted) if t_s - one[0] >= _CARRIED_OVER_S),
            self._counted[0],
        )
        for (link, direction), row in self._sample.items():
            limit = number(row.get("rate_bps"))
            carried = counted[link, direction] - since.get(
                (link, direction), counted[link, direction]
            )
            self._links.setdefault(link, {})[direction] = [
                None if limit is None else _short(limit * self._dilation),
                _short(carried * 8 / max(t_s - since_s, 1e-3)),
                number(row.get("backlog_bytes")),
                number(row.get("drops")),
            ]

    def _take_event(self, row: Mapping[str, Any]) -> None:
        kind, link, state = row.get("kind"), _text(row.get("link")), row.get("state")
        if isinstance(state, str):  # as tables keep it
            state = _mapping(_parsed(state))
        planned_s, applied_s = number(row.get("planned_s")), number(row.get("applied_s"))
        if kind not in ("initial", "schedule", "manual", "readback") or not isinstance(state, dict):
            return
        confirmed = row.get("verified") is True
        if not confirmed:
            self._unconfirmed.setdefault(link)
        if kind == "readback":
            return
        self._states[link] = state
        if kind == "initial":
            return
        self._manual += kind == "manual"
        if kind == "schedule" and planned_s is not None and applied_s is not None:
            self._late_s = max(self._late_s, applied_s - planned_s)
        up, down = (_mapping(state.get(direction)) for direction in DIRECTIONS)
        shown = {
            "t_s": None if planned_s is None else _short(planned_s / self._dilation),
            "kind": kind,
            "connected": state.get("connected") is not False,
            "up_bps": self._rate(up),
            "down_bps": self._rate(down),
            "delay_s": (number(down.get("delay_s")) or 0.0) / self._dilation,
            "confirmed": confirmed,
        }
        if self._events and {**self._events[-1], "links": 0} == {**shown, "links": 0}:
            self._events[-1]["links"].append(link)
        else:
            self._events.append({**shown, "links": [link]})

    def _rate(self, parameters: Mapping[str, Any]) -> float | None:
        rate_bps = number(parameters.get("rate_bps"))
        return None if rate_bps is None else _short(rate_bps * self._dilation)

    def _take_failure(self, row: Mapping[str, Any]) -> None:
        if row.get("kind") == "failure":
            t_s = _short((number(row.get("t_s")) or 0.0) / self._dilation)
            self._failures.append(
                f"at {t_s} s {_text(row.get('worker'))} {_text(row.get('text'), 300)}"
            )
            self._restarts += 1
            if len(self._sources) < _MOST_TAILS:
                self._sources += self._of_workers(self._restarts)

    def _take_load(self, row: Mapping[str, Any]) -> None:
        self._taken = self._taken[0] + taken_share(row), self._taken[1] + 1


class RunView:
    """All cells of a run directory. ``update``, then ``changes``: what a page that has had all
    before must be told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cells: dict[str, CellView] = {}
        self._sent: dict[str, Any] = {}
        self._sent_rows: dict[str, Any] = {}
        self._gone = False

    def update(self, at_most_s: float) -> None:
        """Read on for at most so long; what is left is for the next time. The cell that runs comes
        first."""
        self._find_cells()
        deadline_s = time.monotonic() + at_most_s
        for cell in sorted(
            self.cells.values(), key=lambda cell: -cell.ended_at_s if cell.ended_at_s else -math.inf
        ):
            cell.read(deadline_s)
            if time.monotonic() > deadline_s:
                return

    def _find_cells(self) -> None:
        found = cell_directories(self.directory)
        self._gone = not self.directory.is_dir()
        found = [path for path in found if not path.name.startswith(".")][:MOST_CELLS]
        points = max(30, min(POINTS, _ALL_POINTS // max(1, len(found))))
        known, self.cells = self.cells, {}
        for path in found:
            cell = known.get(path.name)
            # tried again, it begins anew
            if cell is None or cell.stamp != _stamp(path / CELL_FILE):
                cell = CellView(path, points)
            cell.refresh()
            self.cells[path.name] = cell

    def snapshot(self) -> dict[str, Any]:
        """All that ``changes`` has told so far, for a page that begins."""
        series = {name: self._series(cell, 0) for name, cell in self.cells.items()}
        return {**self._sent, "all": True, "rows": dict(self._sent_rows), "series": series}

    def changes(self) -> dict[str, Any]:
        """What is not as it was when this was last asked; {} if all is."""
        rows = {name: cell.row() for name, cell in self.cells.items()}
        parts = self._parts(rows)
        changed = {key: value for key, value in parts.items() if self._sent.get(key) != value}
        changed_rows = {name: row for name, row in rows.items() if self._sent_rows.get(name) != row}
        series = {
            name: self._series(cell, first)
            for name, cell in self.cells.items()
            if (first := cell.bins.take_changed()) is not None
        }
        self._sent, self._sent_rows = parts, rows
        return {
            **changed,
            **({"rows": changed_rows} if changed_rows else {}),
            **({"series": series} if series else {}),
        }

    def _series(self, cell: CellView, first: int) -> dict[str, Any]:
        bins = cell.bins
        return {
            "width_s": bins.width_s,
            "from": first,
            "reported_s": cell.reported_s,
            "columns": bins.values(first),
        }

    def _parts(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        current = self._current(rows)
        cell = self.cells[current] if current else None
        return {
            "name": _text(self.directory.name),
            "gone": self._gone,
            "order": list(rows),
            "styles": palette([row["method"] for row in rows.values()]),
            "current": current,
            "links": cell.links() if cell else {},
            "events": cell.events() if cell else [],
            "progress": self._progress(rows),
        }

    def _current(self, rows: Mapping[str, Mapping[str, Any]]) -> str | None:
        """The cell that runs, or else ended last."""
        live = [name for name, row in rows.items() if row["state"] in ("running", "starting")]
        ended = sorted(
            (cell.ended_at_s, name) for name, cell in self.cells.items() if cell.ended_at_s
        )
        return live[0] if live else ended[-1][1] if ended else next(iter(rows), None)

    def _progress(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        done = len(self.cells) - len(self._pending())
        running = next((row for row in rows.values() if row["state"] == "running"), None)
        share = (done + ((running["share"] or 0.0) if running else 0.0)) / max(1, len(rows))
        return {"cells": len(rows), "done": done, "share": _short(share), "left_s": self._left_s()}

    def _left_s(self) -> float | None:
        """By what cells have taken since the run was started or resumed; before one has ended, by
        what they are to take."""
        pending, began_s = self._pending(), self._began_s()
        ended = [cell.ended_at_s for cell in self.cells.values() if cell.ended_at_s > began_s]
        if began_s and pending and ended:
            each_s = (max(ended) - began_s) / len(ended)
            return round(max(0.0, each_s * len(pending) - (time.time() - max(ended))))
        left_s = [
            planned_s - (min(cell.t_s, planned_s) if cell.state == "running" else 0.0)
            for cell in pending
            if (planned_s := cell.planned_s) is not None
        ]
        return round(sum(left_s)) if len(left_s) == len(pending) else None

    def _began_s(self) -> float:
        """When the run was started, or resumed, as time.time() counts: who runs it has written so
        into its lock. 0: unknown."""
        stamp = _stamp(self.directory / LOCK_FILE)
        return stamp[1] / 1e9 if stamp else 0.0

    def _pending(self) -> list[CellView]:
        """Cells that are still to run; one that failed in an earlier run is tried again, and keeps
        its result until then."""
        began_s = self._began_s()
        return [
            cell
            for cell in self.cells.values()
            if not cell.ended_at_s or (cell.ended_at_s < began_s and cell.state != "done")
        ]


def _of_rank(
    rank: int, take: Callable[[Mapping[str, Any]], None]
) -> Callable[[Mapping[str, Any]], None]:
    """Only of its own steps a worker has a say."""

    def own(row: Mapping[str, Any]) -> None:
        if row.get("rank") == rank and not isinstance(row.get("rank"), bool):
            take(row)

    return own


def _names(links: list[str]) -> str:
    return (
        ", ".join(links) if len(links) <= _NAMED_LINKS else f"{links[0]} and {len(links) - 1} more"
    )


def _text(value: object, length: int = 80) -> str:
    """What anybody may have written, as a line."""
    try:
        return one_line(str(value).encode(errors="replace").decode(), length)
    except RecursionError:
        return ""


def _lines(value: object) -> list[str]:
    return [_text(line, 500) for line in value[:_MOST_LINES]] if isinstance(value, list) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _dilation(value: object) -> float:
    found = number(value)
    return found if found and 1e-3 <= found <= 1e6 else 1.0


def _short(value: float) -> float | None:
    """Five digits; None for what is beyond all bounds."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _exists(path: Path) -> bool:
    return _stamp(path, regular=False) is not None


def _stamp(path: Path, regular: bool = True) -> tuple[int, int] | None:
    """What changes when a file is replaced or written to; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return (
        (status.st_ino, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) or not regular else None
    )
