"""The orchestrator of one cell: lab up, workers ready, t = 0, stop, teardown; whatever happens, a result is written."""

import json
import os
import queue
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from netsenseml.listener import ENV_LISTENER
from netsenseml.records import RecordFile, monotonic_s
from testbed import protocol
from testbed.labs.base import Lab, LabPlan, Process
from testbed.links.calibration import calibrate, measurable
from testbed.plan import Cell, notes
from testbed.run.control import ControlServer
from testbed.run.door import LinkDoor
from testbed.run.driver import LinkDriver
from testbed.run.host import HostMonitor
from testbed.traffic.flows import TRAFFIC_PROGRAM

RESULT_FILE = "result.json"
READY_TIMEOUT_S = 180.0
SILENT_WORKER_S = 30.0
_POLL_S = 0.25
_LAST_WORDS_S = 1.0
"""How long a worker that ended has for its last message to arrive before it counts as crashed."""

OpenLab = Callable[[LabPlan], Lab]
Tick = Callable[[float, int], None]
"""Called some times a second with the seconds since t = 0 and the number of the step in work."""


class CellFailed(Exception):
    """A cell could not be run to its end; the message is one line."""


@dataclass
class CellResult:
    """How a cell ended, written to result.json. status: done, failed or interrupted. parameters: hash by rank.

    earlier: problems of a try before this one, which failed.
    """

    status: str = "interrupted"
    problems: list[str] = field(default_factory=list)
    earlier: list[str] = field(default_factory=list)
    parameters: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    final_accuracy: float | None = None
    final_loss: float | None = None
    t_end_s: float = 0.0


def run_cell(cell: Cell, open_lab: OpenLab, directory: Path, tick: Tick, earlier: Sequence[str] = ()) -> CellResult:
    """Run a cell in a fresh lab and leave its records in ``directory`` (run directory/cells/name), which ``prepare_cell`` made.

    earlier: why a try before this one failed. A failure of the cell is a result; LabError and KeyboardInterrupt pass through
    after the result is written.
    """
    result = CellResult(earlier=list(earlier))
    try:
        with (
            open_lab(cell.lab) as lab,
            ControlServer(directory / protocol.SOCKET_FILE, len(cell.workers)) as control,
        ):
            _Conductor(cell, lab, control, directory, result, tick).conduct()
        result.status = "done"
    except CellFailed as error:
        result.status = "failed"
        result.problems.append(str(error))
    finally:
        write_result(directory, result)
    return result


def prepare_cell(cell: Cell, directory: Path) -> None:
    """Make the cell's directory afresh, with cell.json; what an unfinished try left there is removed."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "logs").mkdir(parents=True)
    links = {name: state.to_json() for name, state in cell.lab.links.items()}
    config = {**cell.config(), "label": cell.method.label, "overrides": dict(cell.overrides), "links": links}
    config["dilation"] = cell.dilation
    config["tcp"] = asdict(cell.lab.tcp)
    config["engine"] = cell.lab.engine
    config["notes"] = notes(cell)
    config["calibrate"] = cell.calibrate and measurable(cell.lab)
    (directory / protocol.CELL_FILE).write_text(json.dumps(config, indent=1))


def write_result(directory: Path, result: CellResult) -> None:
    """Write result.json in one step; its presence says that the cell ended."""
    scratch = directory / (RESULT_FILE + ".tmp")
    scratch.write_text(json.dumps(asdict(result), indent=1))
    scratch.replace(directory / RESULT_FILE)


class _Conductor:
    """The conversation with the workers of one cell."""

    def __init__(self, cell: Cell, lab: Lab, control: ControlServer, directory: Path, result: CellResult, tick: Tick) -> None:
        self._cell, self._lab, self._control = cell, lab, control
        self._directory, self._result, self._tick = directory, result, tick
        self._processes: dict[int, Process] = {}
        self._traffic: dict[tuple[str, str], Process] = {}  # by flow and end
        self._traffic_ready: set[tuple[str, str]] = set()
        self._seen: dict[str, dict[int, dict[str, Any]]] = {}
        self._ended_s: dict[int, float] = {}
        self._heard_s: dict[int, float] = {}
        self._next_poll_s = 0.0
        self._step = 0
        self._holding = self._stopped = False

    def conduct(self) -> None:
        self._start_workers()
        self._start_traffic()
        self._wait_for("ready", monotonic_s() + READY_TIMEOUT_S)
        hashes = {message["parameters"] for message in self._seen["ready"].values()}
        if len(hashes) > 1:
            raise CellFailed("the workers do not begin with the same parameters; seed the model before it is built")
        if self._cell.calibrate:
            self._calibrate()
        t0_s = monotonic_s()
        self._control.broadcast({"type": "start", "t0": t0_s})
        with (
            HostMonitor([os.getpid(), *self._lab.pids], t0_s, self._directory),
            LinkDoor(self._directory) as door,
            LinkDriver(
                self._lab.links,
                self._cell.timeline,
                t0_s,
                self._directory,
                door,
                trunks=self._cell.lab.trunks,
                dilation=self._cell.dilation,
            ) as driver,
        ):
            try:
                self._watch(t0_s, driver)
            finally:
                self._result.t_end_s = round(monotonic_s() - t0_s, 6)
        done = self._seen["done"]
        self._result.parameters = {str(rank): message["parameters"] for rank, message in sorted(done.items())}
        self._result.steps = max(message["steps"] for message in done.values())
        for message in done.values():
            if message.get("accuracy") is not None:
                self._result.final_accuracy = message["accuracy"]
            if message.get("loss") is not None:
                self._result.final_loss = message["loss"]

    def _start_workers(self) -> None:
        hosts = [self._lab.hosts[name] for name in self._cell.workers]
        for rank, host in enumerate(hosts):
            directory = host.seen(self._directory)
            env = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(len(hosts)),
                "MASTER_ADDR": hosts[0].address,
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": host.interface,
                "OMP_NUM_THREADS": "1",
                protocol.ENV_RENDEZVOUS: f"file://{directory}/rendezvous",
                protocol.ENV_CELL_DIR: directory,
                ENV_LISTENER: protocol.LISTENER,
            }
            if self._cell.program:
                argv = ["python", f"{directory}/../../{self._cell.program[0]}", *self._cell.program[1:]]
            else:
                argv = ["python", "-m", "testbed.worker.program"]
            self._processes[rank] = host.start(argv, env, self._log(rank))

    def _calibrate(self) -> None:
        # Nothing else is on the links: workers and competing flows wait for the start.
        try:
            measurements = calibrate(self._lab, self._cell.lab, self._directory / "logs")
        except OSError as error:
            raise CellFailed(f"the links could not be calibrated: {error}") from error
        records = RecordFile(self._directory / "calibration.jsonl")
        records.append([measurement.to_json() for measurement in measurements])
        records.close()

    def _start_traffic(self) -> None:
        for flow in self._cell.flows:
            source, target = self._lab.hosts[flow.source], self._lab.hosts[flow.target]
            for end, host in (("receive", target), ("send", source)):
                program = ["python", "-m", TRAFFIC_PROGRAM, end, flow.to_json(), target.address, host.seen(self._directory)]
                self._traffic[flow.name, end] = host.start(program, {}, self._traffic_log(flow.name, end))

    def _traffic_log(self, flow: str, end: str) -> Path:
        return self._directory / "logs" / f"{flow}-{end}.log"

    def _log(self, rank: int) -> Path:
        return self._directory / "logs" / f"{self._cell.workers[rank]}.log"

    def _wait_for(self, kind: str, deadline_s: float) -> None:
        while len(self._seen.get(kind, {})) < len(self._processes) or len(self._traffic_ready) < len(self._traffic):
            if monotonic_s() > deadline_s:
                raise CellFailed(f"not all programs became {kind} in {READY_TIMEOUT_S:g} s; see {self._directory / 'logs'}")
            self._receive(0.2)
            self._check_processes(finished="")

    def _watch(self, t0_s: float, driver: LinkDriver) -> None:
        stop = self._cell.stop
        while len(self._seen.get("done", {})) < len(self._processes):
            now = monotonic_s() - t0_s
            if not self._holding and "seconds" in stop and now >= stop["seconds"]:
                self._hold()
            self._receive(min(0.1, stop["seconds"] - now) if stop.get("seconds", 0) > now else 0.1)
            self._check_processes(finished="done")
            if driver.failure is not None:
                raise CellFailed(f"a link could not be changed or read: {driver.failure}")
            self._tick(now, self._step)

    def _hold(self) -> None:
        self._holding = True
        self._control.broadcast({"type": "hold"})

    def _receive(self, timeout_s: float) -> None:
        try:
            message = self._control.inbox.get(timeout=max(0.001, timeout_s))
        except queue.Empty:
            return
        if "flow" in message:
            self._traffic_ready.add((message["flow"], message["end"]))
            return
        kind, rank = message["type"], message["rank"]
        self._heard_s[rank] = monotonic_s()
        self._seen.setdefault(kind, {})[rank] = message
        if kind == "failed":
            raise CellFailed(f"{self._cell.workers[rank]}: {message['error']}; see {self._log(rank)}")
        if kind == "fault":
            raise CellFailed(f"a worker sent something that is no message: {message['error']}")
        if kind == "heartbeat":
            self._step = max(self._step, message["step"])
        elif kind == "eval":
            target = self._cell.stop.get("accuracy")
            if target is not None and message["accuracy"] >= target and not self._holding:
                self._hold()
        elif kind in ("holding", "done") and self._holding and not self._stopped:
            self._agree_on_the_last_step()

    def _agree_on_the_last_step(self) -> None:
        # A rank that has ended by itself answers no more; the others are let go, and end by themselves after as many steps.
        ended = {rank: message["steps"] for rank, message in self._seen.get("done", {}).items()}
        held = {rank: message["step"] for rank, message in self._seen.get("holding", {}).items()}
        if len({**held, **ended}) == len(self._processes):
            self._stopped = True
            last = max([*held.values(), *ended.values()]) + 1
            self._control.broadcast({"type": "stop", "steps": last})

    def _check_processes(self, finished: str) -> None:
        now = monotonic_s()
        if now < self._next_poll_s:
            return
        self._next_poll_s = now + _POLL_S
        for (flow, end), program in self._traffic.items():
            if (code := program.poll()) is not None:
                what = f"the program that has to {end} the traffic {flow}"
                raise CellFailed(f"{what} {_end(code)}; {_last_line(self._traffic_log(flow, end))}")
        for rank, process in self._processes.items():
            if now - self._heard_s.get(rank, now) > SILENT_WORKER_S and rank not in self._seen.get("done", {}):
                raise CellFailed(
                    f"{self._cell.workers[rank]} has not been heard for {SILENT_WORKER_S:g} s; see {self._log(rank)}"
                )
            if rank in self._seen.get(finished, {}) or (code := process.poll()) is None:
                continue
            if now - self._ended_s.setdefault(rank, now) > _LAST_WORDS_S:
                what = f"{self._cell.workers[rank]} {_end(code)} before it was {finished or 'ready'}"
                raise CellFailed(f"{what}; {_last_line(self._log(rank))}")


def _end(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return f"its log ends with: {lines[-1]:.200} ({log})" if lines else f"its log is empty ({log})"


def read_result(directory: Path) -> Mapping[str, Any] | None:
    """Content of result.json, or None if the cell has not ended."""
    try:
        content: Mapping[str, Any] = json.loads((directory / RESULT_FILE).read_text())
    except (OSError, ValueError):
        return None
    return content
