"""The orchestrator of one cell: lab up, workers ready, t = 0, stop, teardown; whatever happens, a
result is written."""

import contextlib
import itertools
import json
import math
import os
import queue
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from netsenseml.listener import ENV_LISTENER
from netsenseml.records import RecordFile, monotonic_s
from testbed import protocol
from testbed.files import (
    everything_in,
    explained,
    no_room,
    open_regular,
    read_json,
    remove_tree,
    replacing,
)
from testbed.labs.base import Host, HostFailed, Lab, LabPlan, Process, View
from testbed.labs.calibration import calibrate, measurable
from testbed.plan import Cell, notes
from testbed.recording.link_server import LinkServer
from testbed.recording.recorder import Recorder, Recording
from testbed.run import messages
from testbed.run.control import ControlServer, Disconnected, Member, ProtocolViolation, Received
from testbed.run.directory import DATA, SCRIPT, is_nearly_full, machine, release_reserve
from testbed.spec.units import format_size, format_time
from testbed.timeline.workers import Kills
from testbed.traffic.flows import TRAFFIC_PROGRAM

READY_TIMEOUT_S = 180.0
SILENT_WORKER_S = 30.0
_POLL_S = 0.25
_LAST_WORDS_S = 1.0
"""So long others are waited for: to say that they have failed, too, or what they are doing, or a
last word after their end."""
_CUT_S = 30.0
"""When the time of a cell is over and a link is cut, the step in work has so long to show that it
goes on."""
_FUTILE_RESTARTS = 3
"""So often in a row workers are started again that come no further; what they fail of then is no
accident."""
_KILLED_S = 10.0
"""A killed process has ended after so long, or never will."""
_PORT = 29500
_MOVED_BYTES = 4096
"""So much must arrive for gradients to count as moving; TCP asks now and then whether a link that
is cut works again."""

OpenLab = Callable[[LabPlan], Lab]
Tick = Callable[[float, int], None]
"""Called some times a second with the seconds since t = 0 and the number of the step in work."""


class CellFailed(Exception):
    """A cell could not be run to its end; the message is one line."""


class WorkersFailed(CellFailed):
    """Workers failed at a time (CLOCK_MONOTONIC), and may be started again. worker: the first, ""
    if there is none."""

    def __init__(self, worker: str, text: str, at_s: float) -> None:
        super().__init__(f"{worker} {text}".strip())
        self.worker, self.text, self.at_s = worker, text, at_s


@dataclass
class CellResult:
    """How a cell ended, written to result.json. status: done, failed or interrupted. parameters:
    hash by rank.

    earlier: problems of a try before this one, which failed. machine: where it ran
    (``directory.machine``).
    """

    status: str = "interrupted"
    problems: list[str] = field(default_factory=list)
    earlier: list[str] = field(default_factory=list)
    parameters: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    final_accuracy: float | None = None
    final_loss: float | None = None
    t_end_s: float = 0.0
    machine: Mapping[str, Any] = field(default_factory=machine)


def run_cell(
    cell: Cell, open_lab: OpenLab, directory: Path, tick: Tick, earlier: Sequence[str] = ()
) -> CellResult:
    """Run a cell in a fresh lab and leave its records in ``directory`` (run directory/cells/name),
    which ``prepare_cell`` made.

    earlier: why a try before this one failed. A failure of the cell is a result; LabError and
    KeyboardInterrupt pass through after the result is written.
    """
    result = CellResult(earlier=list(earlier))
    try:
        with (
            # it is what hosts are shown
            ControlServer(directory / protocol.SOCKET_FILE, _members(cell)) as control,
            open_lab(replace(cell.lab, view=_view(cell, directory))) as lab,
        ):
            _CellRunner(cell, lab, control, directory, result, tick).run()
        result.status = "done"
    except (CellFailed, HostFailed) as error:
        result.status = "failed"
        result.problems.append(str(error))
    except OSError as error:
        result.status = "failed"
        result.problems.append(explained(error))
    finally:
        write_result(directory, result)
    return result


def _members(cell: Cell) -> list[Member]:
    """Who speaks on the control socket: ranks, and the programs of the traffic."""
    return [*cell.ranks, *((flow.name, end) for flow in cell.flows for end in ("receive", "send"))]


def prepare_cell(cell: Cell, directory: Path, earlier: Sequence[str] = ()) -> None:
    """Make the cell's directory afresh, with cell.json; of an earlier try only the logs are kept,
    in logs/earlier.

    earlier: why it failed before.
    """
    logs = directory / "logs"
    kept = directory.with_name(f".{directory.name}-logs")
    if logs.is_dir() and any(logs.iterdir()):
        remove_tree(kept)
        logs.rename(kept)
    remove_tree(directory)
    logs.mkdir(parents=True)
    for made in (
        directory / protocol.SHARED,
        *itertools.chain.from_iterable(_own(cell, directory).values()),
    ):
        made.mkdir(parents=True)
    if kept.is_dir():
        kept.rename(logs / "earlier")
    links = {name: state.to_json() for name, state in cell.lab.links.items()}
    config = {
        **cell.config(),
        "label": cell.method.label,
        "overrides": dict(cell.overrides),
        "links": links,
    }
    config["dilation"] = cell.dilation
    config["earlier"] = list(earlier)
    config["flows"] = {flow.name: [flow.source, flow.target] for flow in cell.flows}
    config["tcp"] = asdict(cell.lab.tcp)
    config["engine"] = cell.lab.engine
    config["impaired"] = sorted({link for link, _ in cell.lab.impaired})
    config["notes"] = notes(cell)
    config["calibrate"] = cell.calibrate and measurable(cell.lab)
    (directory / protocol.CELL_FILE).write_text(json.dumps(config, indent=1))


def _view(cell: Cell, directory: Path) -> View:
    """What the programs of a cell see of the run directory."""
    run = directory.parents[1]
    copied = [run / name for name in (SCRIPT, DATA) if (run / name).exists()]
    for path in itertools.chain.from_iterable(
        map(everything_in, (directory / protocol.CELL_FILE, *copied))
    ):
        # whatever umask and the originals have: the programs may be another user's
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    reads = (directory / protocol.CELL_FILE, directory / protocol.SOCKET_FILE, *copied)
    return View(run, reads, directory / protocol.SHARED, _own(cell, directory))


def _own(cell: Cell, directory: Path) -> dict[str, tuple[Path, ...]]:
    """By host, where its programs write: its directory, and those of its ranks if it has
    several."""
    names = {host: [host] for host in cell.lab.hosts}
    for worker in cell.workers:
        names[worker] += [
            protocol.rank_name(rank, cell.ranks_per_worker) for rank in cell.ranks_of(worker)
        ]
    return {
        host: tuple(protocol.host_directory(directory, one) for one in dict.fromkeys(own))
        for host, own in names.items()
    }


def write_result(directory: Path, result: CellResult) -> None:
    """Write result.json in one step; its presence says that the cell ended."""
    try:
        _write_result(directory, result)
    except OSError as error:
        if not no_room(error):
            raise
        release_reserve(directory.parents[1])
        _write_result(directory, result)


def _write_result(directory: Path, result: CellResult) -> None:
    with replacing(directory / protocol.RESULT_FILE) as path:
        path.write_text(json.dumps(asdict(result), indent=1))


@dataclass(frozen=True, slots=True)
class _Failure:
    """What ended a program, and when it was noticed (CLOCK_MONOTONIC). by_peer: it says that
    another rank did."""

    at_s: float
    text: str
    by_peer: bool = False


class _CellRunner:
    """The conversation with the programs of one cell: its workers by rank, those of its traffic by
    flow and end."""

    def __init__(
        self,
        cell: Cell,
        lab: Lab,
        control: ControlServer,
        directory: Path,
        result: CellResult,
        tick: Tick,
    ) -> None:
        self._cell, self._lab, self._control = cell, lab, control
        self._directory, self._result, self._tick = directory, result, tick
        self._ranks = cell.ranks
        self._processes: dict[Member, Process] = {}
        self._codes: dict[Member, int] = {}
        self._failures: dict[Member, _Failure] = {}
        self._first_noticed_s = 0.0
        self._ready: dict[Member, messages.Ready] = {}
        self._done: dict[Member, messages.Done] = {}
        self._in_work: dict[Member, int] = {}
        """The step that a rank was in when it was heard last."""
        self._held: dict[Member, int] = {}
        self._at: dict[Member, str] = {}
        self._heard_s: dict[Member, float] = {}
        self._lost_s: dict[Member, float] = {}
        self._next_poll_s = 0.0
        self._oom_kills = _oom_kills()
        self._holding = self._stopped = False
        self._kills = deque(cell.kills)
        self._killed: set[Member] = set()
        """Those that the schedule has killed, since the last start."""
        self._wanted = False
        """So that all are started again."""
        self._restarts = self._futile = self._furthest = 0
        self._records = (
            RecordFile(directory / "failures.jsonl", new=True) if cell.may_restart else None
        )

    def run(self) -> None:
        self._start_workers()
        self._start_traffic()
        self._wait_until_ready()
        if len({self._ready[rank].parameters for rank in self._ranks}) > 1:
            raise CellFailed(
                "the workers do not begin with the same parameters; seed the model before it is"
                " built"
            )
        if self._cell.calibrate:
            self._calibrate()
        trunks = tuple(self._cell.lab.trunks)
        with (
            LinkServer(self._directory) as server,
            self._lab.recorder(
                Recording(
                    self._directory,
                    self._cell.timeline,
                    server.requests,
                    trunks,
                    self._cell.dilation,
                )
            ) as recorder,
        ):
            t0_s = monotonic_s()
            self._control.broadcast({"type": "start", "t0": t0_s})
            recorder.begin(t0_s)
            try:
                self._watch(t0_s, recorder)
            finally:
                if self._records is not None:
                    self._records.close()
                if not self._result.t_end_s:
                    self._result.t_end_s = round(monotonic_s() - t0_s, 6)
        done = [self._done[rank] for rank in self._ranks]
        self._result.parameters = {
            str(rank): message.parameters for rank, message in enumerate(done)
        }
        self._result.steps = max(message.steps for message in done)
        for message in done:
            if message.accuracy is not None:
                self._result.final_accuracy = message.accuracy
            if message.loss is not None:
                self._result.final_loss = message.loss

    def _start_workers(self) -> None:
        hosts = [self._lab.hosts[name] for name in self._cell.workers]
        per_host = self._cell.ranks_per_worker
        for rank in self._ranks:
            host = hosts[rank // per_host]
            directory, met = (
                host.path_on_host(self._directory),
                f"{protocol.SHARED}/rendezvous-{self._restarts}",
            )
            env = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % per_host),
                "WORLD_SIZE": str(len(self._ranks)),
                "LOCAL_WORLD_SIZE": str(per_host),
                "MASTER_ADDR": hosts[0].address,
                "MASTER_PORT": str(_PORT + self._restarts),
                "GLOO_SOCKET_IFNAME": ",".join([host.interface] * self._cell.connections),
                "OMP_NUM_THREADS": "1",
                **(
                    {protocol.ENV_RENDEZVOUS: f"file://{directory}/{met}"}
                    if self._lab.shared_files
                    else {}
                ),
                **({protocol.ENV_RESTARTS: str(self._restarts)} if self._restarts else {}),
                **self._environment(rank, host),
                ENV_LISTENER: protocol.LISTENER,
            }
            if self._cell.program:
                script = host.path_on_host(self._directory.parents[1] / self._cell.program[0])
                argv = ["python", script, *self._cell.program[1:]]
            else:
                argv = ["python", "-m", "testbed.worker.program"]
            self._processes[rank] = host.start(argv, env, self._log(rank))

    def _start_traffic(self) -> None:
        for flow in self._cell.flows:
            source, target = self._lab.hosts[flow.source], self._lab.hosts[flow.target]
            for end, host in (("receive", target), ("send", source)):
                member = flow.name, end
                program = ["python", "-m", TRAFFIC_PROGRAM, end, flow.to_json(), target.address]
                self._processes[member] = host.start(
                    program, self._environment(member, host), self._log(member)
                )

    def _environment(self, member: Member, host: Host) -> dict[str, str]:
        """What every program finds the control socket by, and the place for what it writes."""
        output = protocol.host_directory(
            self._directory, self._name(member) if isinstance(member, int) else host.name
        )
        return {
            protocol.ENV_CELL_DIR: host.path_on_host(self._directory),
            protocol.ENV_OUTPUT_DIR: host.path_on_host(output),
            protocol.ENV_TOKEN: self._control.tokens[member],
        }

    def _calibrate(self) -> None:
        # Nothing else is on the links: workers and competing flows wait for the start.
        try:
            measurements = calibrate(self._lab, self._cell.lab, self._directory / "logs")
        except OSError as error:
            raise CellFailed(f"the links could not be calibrated: {error}") from error
        records = RecordFile(self._directory / "calibration.jsonl", new=True)
        records.append([measurement.to_json() for measurement in measurements])
        records.close()

    def _most_written(self) -> str:
        """Which host has written most of what this cell has."""
        own = _own(self._cell, self._directory)
        logs = self._directory / "logs"
        written = {
            host: sum(
                map(
                    _size_bytes,
                    (*own[host], *logs.glob(f"{host}.log"), *logs.glob(f"{host}-*.log")),
                )
            )
            for host in own
        }
        host = max(written, key=lambda host: written[host])
        return (
            f"{host} has written {written[host] / 1e6:,.0f} MB, most of this cell's"
            f" ({own[host][0]}, {logs})"
        )

    def _name(self, member: Member) -> str:
        if isinstance(member, int):
            return protocol.rank_name(member, self._cell.ranks_per_worker)
        return f"the program that has to {member[1]} the traffic {member[0]}"

    def _log(self, member: Member) -> Path:
        name = self._name(member) if isinstance(member, int) else "-".join(member)
        return self._directory / "logs" / f"{name}.log"

    def _wait_until_ready(self) -> None:
        deadline_s = monotonic_s() + READY_TIMEOUT_S
        while missing := [member for member in self._processes if member not in self._ready]:
            if monotonic_s() > deadline_s:
                late = ", ".join(map(self._name, missing))
                raise CellFailed(
                    f"not ready in {READY_TIMEOUT_S:g} s: {late};"
                    f" {_last_line(self._log(missing[0]))}"
                )
            self._receive(0.2)
            self._check_programs()

    def _watch(self, t0_s: float, recorder: Recorder) -> None:
        stop = self._cell.stop
        progress = _Progress(monotonic_s(), self._cell)
        while not all(self._codes.get(rank) == 0 and rank in self._done for rank in self._ranks):
            now_s = monotonic_s() - t0_s
            if not self._holding and "seconds" in stop and now_s >= stop["seconds"]:
                self._hold()
            done = len(self._done) == len(self._ranks)
            if done and not self._result.t_end_s:
                self._result.t_end_s = round(now_s, 6)
            poll_s = 0.02 if done else 0.1
            due_s = [
                at_s
                for at_s in (stop.get("seconds", 0.0), *(kill.at_s for kill in self._kills))
                if at_s > now_s
            ]
            self._receive(min(poll_s, *(at_s - now_s for at_s in due_s)) if due_s else poll_s)
            while self._kills and self._kills[0].at_s <= monotonic_s() - t0_s:
                self._kill(self._kills.popleft(), t0_s)
            if error := recorder.failure:
                raise CellFailed(error)
            if is_nearly_full(self._directory):
                raise CellFailed(f"the disk is nearly full; {self._most_written()}")
            try:
                self._check_programs()
                step = max(self._in_work.values(), default=0)
                progress.update(
                    monotonic_s(), step + done, recorder.arrived_bytes(self._cell.workers)
                )
                cut = self._holding and not done and bool(self._links_cut_for_good(now_s))
                if waited_s := progress.too_long(monotonic_s(), cut):
                    raise WorkersFailed("", self._standstill(waited_s), monotonic_s())
            except WorkersFailed as failure:
                self._restart(failure, t0_s)
                progress = _Progress(monotonic_s(), self._cell)
                continue
            self._tick(now_s, step)

    def _kill(self, kill: Kills, t0_s: float) -> None:
        for worker in kill.workers:
            alive = [
                rank
                for rank in self._cell.ranks_of(worker)
                if rank not in self._codes and rank not in self._done
            ]
            for rank in alive:
                self._processes[rank].kill()
            if alive:
                self._record(monotonic_s() - t0_s, worker, "kill", planned_s=kill.at_s)
                self._killed.update(alive)
                self._wanted = self._wanted or kill.restart

    def _record(
        self, t_s: float, worker: str, kind: str, text: str = "", planned_s: float | None = None
    ) -> None:
        if self._records is not None:
            row = {
                "planned_s": planned_s,
                "t_s": round(t_s, 6),
                "worker": worker,
                "kind": kind,
                "text": text,
            }
            self._records.append([row])

    def _restart(self, failure: WorkersFailed, t0_s: float) -> None:
        """Start all workers again, at t = 0 of before; raises the failure if that is not wanted, or
        has helped no more."""
        while True:
            if not self._cell.restarts and not self._wanted:
                raise failure
            self._record(failure.at_s - t0_s, failure.worker, "failure", failure.text)
            reached = max(self._in_work.values(), default=0)
            self._futile = 0 if reached > self._furthest or self._wanted else self._futile + 1
            self._furthest = max(self._furthest, reached)
            if self._futile >= _FUTILE_RESTARTS:
                raise CellFailed(
                    f"{failure}; {self._futile} new starts in a row came no further than step"
                    f" {self._furthest}"
                )
            self._end_workers()
            self._restarts += 1
            try:
                self._start_workers()
                self._wait_until_ready()
            except WorkersFailed as another:
                failure = another
                continue
            self._control.broadcast({"type": "start", "t0": t0_s})
            if self._holding:
                self._hold()
            self._record(monotonic_s() - t0_s, "", "restart")
            return

    def _end_workers(self) -> None:
        """Kill them all, and forget what they have said."""
        for rank in self._ranks:
            self._processes[rank].kill()
        given_up_s = monotonic_s() + _KILLED_S
        while (
            any(self._processes[rank].poll() is None for rank in self._ranks)
            and monotonic_s() < given_up_s
        ):
            time.sleep(0.01)
        self._control.renew(self._ranks)
        said: tuple[dict[Member, Any], ...] = (
            *(
                self._codes,
                self._failures,
                self._ready,
                self._done,
                self._in_work,
                self._held,
                self._at,
            ),
            *(self._heard_s, self._lost_s),
        )
        for by_member in said:
            for rank in self._ranks:
                by_member.pop(rank, None)
        self._stopped = False
        self._killed.clear()
        self._wanted = False
        self._oom_kills = _oom_kills()

    def _standstill(self, waited_s: float) -> str:
        """What to say of a cell in which nothing moves; asks the workers what they are doing."""
        waiting = f"for {format_time(round(waited_s))}"
        late = [rank for rank in self._ranks if rank not in self._codes]
        self._control.broadcast({"type": "where"})
        asked_s = monotonic_s()
        while monotonic_s() - asked_s < _LAST_WORDS_S and not all(
            rank in self._at for rank in late
        ):
            self._receive(0.1)
        logs = self._directory / "logs"
        if len(self._done) == len(self._ranks):
            still = ", ".join(f"{self._name(rank)}{self._at.get(rank, '')}" for rank in late)
            return f"{still} was done and has not ended {waiting}; see {logs}"
        doing = [
            f"{self._name(r)} in step {self._in_work.get(r, 0)}{self._at.get(r, '')}"
            for r in late
            if r not in self._done
        ]
        cut = self._links_cut_for_good(math.inf)
        why = f", and {', '.join(cut)} is cut off" if cut else ""
        what = "the last step has not ended" if self._holding else "no step has ended"
        return f"{what} and no gradient moved {waiting}{why}: {', '.join(doing)}; see {logs}"

    def _links_cut_for_good(self, now_s: float) -> list[str]:
        """Links of workers, and trunks, that are cut and that no change after a time connects
        again."""
        joined = {
            change.link
            for change in self._cell.timeline
            if change.at_s > now_s and change.state.connected
        }
        needed = {*self._cell.workers, *self._cell.lab.trunks} - joined
        return [
            link
            for link, state in self._lab.links.states.items()
            if link in needed and not state.connected
        ]

    def _hold(self) -> None:
        self._holding = True
        self._control.broadcast({"type": "hold"})

    def _receive(self, timeout_s: float) -> None:
        try:
            self._take(self._control.inbox.get(timeout=max(0.001, timeout_s)))
            while True:
                self._take(self._control.inbox.get_nowait())
        except queue.Empty:
            return

    def _take(self, heard: Received) -> None:
        member = heard.member
        if heard.token != self._control.tokens[member]:
            return  # a last word of one that has been started again since
        self._heard_s[member] = heard.at_s
        if not isinstance(member, int) and not isinstance(
            heard.message, messages.Ready | ProtocolViolation | Disconnected
        ):
            self._note(member, _Failure(heard.at_s, "said what is for workers to say"))
            return
        match heard.message:
            case Disconnected():
                self._lost_s.setdefault(member, heard.at_s)
            case ProtocolViolation(error):
                self._note(
                    member, _Failure(heard.at_s, f"sent something that is no message: {error}")
                )
            case messages.Failed(error=error, by_peer=by_peer):
                self._note(
                    member,
                    _Failure(heard.at_s, f"failed: {protocol.one_line(error, 500)}", by_peer),
                )
            case messages.Ready():
                self._ready[member] = heard.message
            case messages.Heartbeat(step=step):
                self._in_work[member] = step
            case messages.Holding(step=step):
                self._held[member] = self._in_work[member] = step
                self._agree_on_the_last_step()
            case messages.Evaluated(accuracy=accuracy):
                target = self._cell.stop.get("accuracy")
                if target is not None and accuracy >= target and not self._holding:
                    self._hold()
            case messages.Where(at=at):
                self._at[member] = f" at {protocol.one_line(at)}"
            case messages.Done():
                self._done[member] = heard.message
                self._agree_on_the_last_step()

    def _agree_on_the_last_step(self) -> None:
        # A rank that has ended by itself answers no more; the others are let go, and end by
        # themselves after as many steps.
        ended = {member: message.steps for member, message in self._done.items()}
        if self._holding and not self._stopped and len({**self._held, **ended}) == len(self._ranks):
            self._stopped = True
            last = max([*self._held.values(), *ended.values()]) + 1
            self._control.broadcast({"type": "stop", "steps": last})

    def _note(self, member: Member, failure: _Failure) -> None:
        if not self._failures:
            self._first_noticed_s = monotonic_s()
        self._failures.setdefault(member, failure)

    def _check_programs(self) -> None:
        """Raise CellFailed if one has failed: for whoever failed first, once the others have had
        time to say that they have."""
        now_s = monotonic_s()
        everyone_done = len(self._done) == len(self._ranks)
        if now_s < self._next_poll_s and not everyone_done:
            return
        self._next_poll_s = now_s + _POLL_S
        for member, process in self._processes.items():
            if member not in self._codes and (code := process.poll()) is not None:
                self._codes[member] = code
                if code != 0 or not isinstance(member, int):
                    why = ""
                    if member in self._killed:
                        why = ", as the schedule has it,"
                    elif code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
                        limit = self._cell.lab.limits.memory_bytes
                        most = "" if limit is None else f" (limits.memory is {format_size(limit)})"
                        why = f", out of memory{most},"
                    self._note(
                        member,
                        _Failure(
                            self._lost_s.get(member, now_s), _end(code) + why + self._when(member)
                        ),
                    )
        for rank in self._ranks:
            if (
                rank not in self._codes
                and rank not in self._done
                and now_s - self._heard_s.get(rank, now_s) > SILENT_WORKER_S
            ):
                self._note(rank, _Failure(now_s, f"has not been heard for {SILENT_WORKER_S:g} s"))
            # Its last words may still be on their way.
            if (
                self._codes.get(rank) == 0
                and rank not in self._done
                and now_s - self._ended_s(rank) > _LAST_WORDS_S
            ):
                text = "ended with exit code 0 before it was done"
                hint = (
                    ""
                    if rank not in self._ready or not self._cell.program
                    else ", without session.close()"
                )
                self._note(rank, _Failure(now_s, text + hint))
        all_ended = all(rank in self._codes for rank in self._ranks)
        if self._failures and (all_ended or now_s - self._first_noticed_s > _LAST_WORDS_S):
            member, failure = min(
                self._failures.items(), key=lambda found: (found[1].by_peer, found[1].at_s)
            )
            text = f"{failure.text}; {_last_line(self._log(member))}"
            if isinstance(member, int):
                raise WorkersFailed(self._name(member), text, failure.at_s)
            raise CellFailed(f"{self._name(member)} {text}")

    def _ended_s(self, rank: int) -> float:
        return self._lost_s.setdefault(rank, monotonic_s())

    def _when(self, member: Member) -> str:
        if member in self._done:
            return " after its last step"
        return (
            " before it was " + ("done" if member in self._ready else "ready")
            if isinstance(member, int)
            else ""
        )


class _Progress:
    """Tells when a cell stands still: no step ends, and nothing arrives at the workers.

    A step over a thin link may take an hour, but then gradients arrive all the time. Competing
    flows, which end up at workers too, hide that; then steps alone count.
    """

    def __init__(self, now_s: float, cell: Cell) -> None:
        self._timeout_s = cell.step_timeout_s
        self._counts_arrivals = not cell.flows
        self._step = 0
        self._arrived = 0
        self._moved_s = now_s

    def update(self, now_s: float, step: int, arrived_bytes: int) -> None:
        """step: the newest in work; being done is one more. arrived_bytes: of all workers together,
        so far."""
        if step > self._step:
            self._step, self._moved_s = step, now_s
        if self._counts_arrivals and arrived_bytes - self._arrived > _MOVED_BYTES:
            self._moved_s = now_s
            self._arrived = arrived_bytes

    def too_long(self, now_s: float, cut: bool) -> float:
        """Seconds without progress, if these are too many; else 0. cut: time is up, and a link is
        cut for good."""
        waited_s = now_s - self._moved_s
        limit_s = min(self._timeout_s, _CUT_S) if cut else self._timeout_s
        return waited_s if waited_s > limit_s else 0.0


def _end(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _oom_kills() -> int:
    """How many processes the kernel has ended so far for want of memory, in any control group
    (/proc/vmstat, Linux 4.13)."""
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counters.get("oom_kill", 0))


def _size_bytes(tree: Path) -> int:
    size = 0
    for path in everything_in(tree):
        with contextlib.suppress(OSError):  # it may have been removed meanwhile
            size += path.lstat().st_blocks * 512
    return size


def _last_line(log: Path) -> str:
    lines = [line for line in map(protocol.one_line, _tail(log).splitlines()) if line]
    return f"its log ends with: {lines[-1]} ({log})" if lines else f"its log is empty ({log})"


def _tail(log: Path, length: int = 1 << 16) -> str:
    try:
        with open_regular(log) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - length))
            return file.read(length).decode(errors="replace")
    except OSError:
        return ""


def read_result(directory: Path) -> Mapping[str, Any] | None:
    """Content of result.json, or None if the cell has not ended."""
    return read_json(directory / protocol.RESULT_FILE)
