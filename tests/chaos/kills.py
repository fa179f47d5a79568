"""Kill parts of running experiments at random moments, and see what is left, lost and said.

    python tests/chaos/kills.py [--kills 20] [--first 0] [--seed 0] [--lab netns] [--lab docker]

Each round runs a small experiment, waits for one of its phases and then for a random moment, and
sends one signal to

    orchestrator   testbed run
    group          all processes of its process group, as a terminal or a scheduler does
    sandbox        the first process of the netns lab
    fork server    the process from which the netns lab forks its programs
    program        a worker, or a program of the traffic
    delay line     that of the netns lab, in half of its rounds
    container      the first process of one, in the Docker lab
    daemon         dockerd, which is started again afterwards

Then, after the stated clean-up (none; in Docker ``testbed clean``), nothing may be left of it, what
lay beside it must be as it was, all records that were a second old must load, and nobody may have
seen a traceback.
"""

import argparse
import collections
import contextlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from testbed import load_run

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TARGETS = {
    "netns": ("orchestrator", "group", "sandbox", "fork server", "program"),
    "docker": ("orchestrator", "group", "program", "container", "daemon"),
}
PHASES = {"start": 1.5, "lab and workers": 3.0, "calibration": 2.0, "steps": 3.0, "report": 3.0}
"""The signal comes within so many seconds of a phase's begin."""
_END_S = 15.0
SPEC = {
    "name": "chaos",
    "workers": 2,
    "network": {"link": {"rate": "20mbit"}},
    "schedule": [
        {"at": "700ms", "set": {"rate": "10mbit"}},
        {"at": "1s", "ramp": {"rate": "20mbit"}, "over": "500ms"},
    ],
    "traffic": [{"from": "bg0", "to": "w1", "at": "500ms", "udp": {"rate": "1mbit"}}],
    "workload": {
        "model": {"name": "mlp", "hidden": [64]},
        "stop": {"seconds": 2.5},
        "compute": {"pace": "20ms"},
    },
    "methods": ["allreduce", "topk"],
}


@dataclass
class Outcome:
    """One round. phase: in which the signal came. faults: what should not be; empty if all is well.
    printed: by the run."""

    lab: str
    phase: str = "nothing made"
    target: str = ""
    signal: str = ""
    seconds: float = 0.0
    code: int = 0
    faults: list[str] = field(default_factory=list)
    printed: str = ""


def one_round(lab: str, draw: random.Random, directory: Path) -> Outcome:
    spec = {**SPEC, "lab": lab}
    targets = TARGETS[lab]
    if lab == "netns" and draw.random() < 0.5:
        targets = (*targets, "delay line")
        spec["network"] = {"link": {"rate": "20mbit", "delay": "5ms"}, "engine": "userspace"}
    (directory / "chaos.yaml").write_text(yaml.safe_dump(spec))
    printed = directory / "printed.txt"
    with open(printed, "w") as log:
        command = [
            sys.executable,
            "-m",
            "testbed.cli",
            "run",
            str(directory / "chaos.yaml"),
            "--out",
            str(directory / "runs"),
        ]
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=ENV,
            start_new_session=True,
        )
    outcome = Outcome(lab)
    wanted, outcome.signal = draw.choice(targets), draw.choice(SIGNALS).name
    phase, cells = draw.choice(list(PHASES)), draw.choice((0, 1))
    later_s, kill_at_s = draw.uniform(0.0, PHASES[phase]), math.inf
    written: collections.deque[tuple[float, int]] = collections.deque()
    victims: Sequence[int] = ()
    while process.poll() is None and not victims:
        now_s = time.monotonic()
        written.append((now_s, _rows(directory)))
        outcome.phase, ended = _phase(directory)
        come = outcome.phase == phase and (phase in ("start", "report") or ended >= cells)
        if come and math.isinf(kill_at_s):
            kill_at_s = now_s + later_s
        if now_s >= kill_at_s:
            victims = _victims(process.pid, wanted, draw)
        time.sleep(0.05)
    killed_s = time.monotonic()
    outcome.target = wanted if victims else "it had ended"
    daemon = _words(victims[0]) if wanted == "daemon" and victims else []
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.Signals[outcome.signal])
    must_load = max((rows for at_s, rows in written if at_s < killed_s - 1), default=0)
    stops_all = wanted in ("orchestrator", "group") and bool(victims)
    try:
        process.wait(_END_S if stops_all else 90)
    except subprocess.TimeoutExpired:
        outcome.faults.append("did not end")
        process.kill()
        process.wait()
    if wanted == "daemon" and victims:
        _start_daemon(victims[0], daemon)
    outcome.code, outcome.seconds = process.returncode, time.monotonic() - killed_s
    outcome.printed = printed.read_text(errors="replace")
    outcome.faults += _faults(outcome, directory, must_load)
    return outcome


def _victims(orchestrator: int, wanted: str, draw: random.Random) -> list[int]:
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(orchestrator).children(recursive=True)
        if wanted == "orchestrator":
            return [orchestrator]
        if wanted == "group":
            return [pid for pid in psutil.pids() if _group(pid) == orchestrator]
        inits = _containers() if wanted in ("container", "program") else []
        if wanted == "container":
            return [draw.choice(inits)] if inits else []
        if wanted == "daemon":
            return [one.pid for one in psutil.process_iter() if one.name() == "dockerd"]
        words = {
            "sandbox": "testbed.run.sandbox_main",
            "fork server": "testbed.labs.forkserver",
            "delay line": "testbed.links.delayline",
        }
        if wanted in words:
            return [
                one.pid
                for one in below
                if words[wanted] in one.cmdline() and one.name() != "unshare"
            ][:1]
        servers = {one.pid for one in below if "testbed.labs.forkserver" in one.cmdline()}
        forked = [one.pid for one in below if one.ppid() in servers]
        forked += [one.pid for init in inits for one in psutil.Process(init).children()]
        return [draw.choice(forked)] if forked else []
    return []


def _words(pid: int) -> list[str]:
    return psutil.Process(pid).cmdline()


def _start_daemon(pid: int, command: list[str]) -> None:
    """Again, if the signal has ended it."""
    started: subprocess.Popen[bytes] | None = None
    while subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        # asked to end, it ends its containers first; and it gives up itself where what is left of
        # the last one's containerd is in its way
        if not psutil.pid_exists(pid) and (started is None or started.poll() is not None):
            nowhere = subprocess.DEVNULL
            started = subprocess.Popen(
                command, stdout=nowhere, stderr=nowhere, start_new_session=True
            )
        time.sleep(0.2)


def _group(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return 0


def _containers() -> list[int]:
    command = ["docker", "ps", "--quiet", "--filter", "label=netsense.testbed"]
    names = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if not names:
        return []
    ask = ["docker", "inspect", "--format", "{{.State.Pid}}", *names]
    pids = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()
    return [int(pid) for pid in pids if int(pid)]  # 0: has ended


def _rows(directory: Path) -> int:
    files = directory.glob("runs/*/cells/*/hosts/w0/steps.jsonl")
    with contextlib.suppress(OSError):
        return sum(file.read_bytes().count(b"\n") for file in files)
    return 0


def _phase(directory: Path) -> tuple[str, int]:
    """And how many cells have ended."""
    cells = list(directory.glob("runs/*/cells/*"))
    going = [cell for cell in cells if not (cell / "result.json").exists()]
    ended = len(cells) - len(going)
    if not cells:
        return "start", 0
    if not going:
        return "report", ended
    if any((cell / "host.jsonl").exists() for cell in going):
        return "steps", ended
    if any(list((cell / "logs").glob("*.log")) for cell in going):
        return "calibration", ended  # the workers have begun; it follows when they are ready
    return "lab and workers", ended


def _faults(outcome: Outcome, directory: Path, must_load: int) -> Iterator[str]:
    if "Traceback" in outcome.printed:
        yield "a traceback: " + outcome.printed.strip().splitlines()[-1]
    end = time.monotonic() + 5
    while (left := _left(directory)) and time.monotonic() < end:
        time.sleep(0.1)
    if left:
        yield f"left: {', '.join(left)}"
    if outcome.lab == "docker":
        subprocess.run(
            [sys.executable, "-m", "testbed.cli", "clean"],
            env=ENV,
            capture_output=True,
            check=False,
        )
        for kind in ("container", "network"):
            command = ["docker", kind, "ls", "--quiet", "--filter", "label=netsense.testbed"]
            if names := subprocess.run(
                command, capture_output=True, text=True, check=False
            ).stdout.split():
                yield f"left in Docker: {kind} {', '.join(names)}"
    for run in directory.glob("runs/*"):
        if (run / "spec.yaml").exists():
            steps = load_run(run).steps
            have = int((steps["rank"] == 0).sum())
            again = any((cell / "logs" / "earlier").exists() for cell in run.glob("cells/*"))
            if have < must_load and not again:  # a cell that is tried again begins anew
                yield f"{must_load - have} of {must_load} records lost"
    if (
        outcome.target in ("orchestrator", "group")
        and outcome.signal != "SIGKILL"
        and outcome.phase != "start"
    ):
        reported = any(directory.glob("runs/*/report.html"))  # its Python is about to end
        allowed = (130, 0, 3, *([-signal.Signals[outcome.signal]] if reported else []))
        if outcome.code not in allowed:
            yield f"exit code {outcome.code}"
    elif outcome.target == "sandbox" and outcome.signal != "SIGKILL" and outcome.code == 130:
        pass  # it ends in order, as when the orchestrator is asked to
    elif outcome.target == "daemon" and outcome.code == 4:
        pass  # there is none that could do it
    elif outcome.target not in ("orchestrator", "group") and outcome.code not in (0, 1, 3):
        yield f"exit code {outcome.code}"


def _left(directory: Path) -> list[str]:
    """Processes that name the directory, or run a program of the testbed without an
    orchestrator."""
    found = []
    for one in psutil.process_iter(["cmdline", "pid"]):
        words = " ".join(one.info["cmdline"] or [])
        if str(directory) in words and one.pid != os.getpid():
            found.append(f"{one.pid} {words[:60]}")
    return found


@contextlib.contextmanager
def bystanders(labs: Sequence[str]) -> Iterator[list[str]]:
    """Things of others beside the experiments; yields a list that has, at the end, what happened to
    them."""
    harmed: list[str] = []
    sleeper = subprocess.Popen(["sleep", "100000"], start_new_session=True)
    names = "netsense-chaos-bystander"
    docker = "docker" in labs
    if docker:
        subprocess.run(["docker", "network", "create", names], capture_output=True, check=True)
    try:
        yield harmed
        if sleeper.poll() is not None:
            harmed.append("a process of another")
        if (
            docker
            and subprocess.run(
                ["docker", "network", "inspect", names], capture_output=True, check=False
            ).returncode
        ):
            harmed.append("a network of another")
    finally:
        sleeper.kill()
        sleeper.wait()
        if docker:
            subprocess.run(["docker", "network", "rm", names], capture_output=True, check=False)


def main() -> int:
    """Prints every round and a table; exit code 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lab", action="append", choices=["netns", "docker"])
    options = parser.parse_args()
    labs = options.lab or ["netns"]
    # What nohup or a shell's & has ignored would be so by all that is killed here, too.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # so that what stands beside the runs is removed, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcomes = []
    with bystanders(labs) as harmed:
        for number in range(options.first, options.first + options.kills):
            draw = random.Random(f"{options.seed} {number}")
            scratch = Path(tempfile.mkdtemp(prefix="netsense-chaos-"))
            try:
                one = one_round(labs[number % len(labs)], draw, scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            outcomes.append(one)
            what = f"{one.signal} to {one.target} in {one.phase}"
            verdict = "; ".join(one.faults) or "well"
            print(
                f"{number:4} {one.lab:6} {what:50} exit code {one.code:4} after {one.seconds:5.1f}"
                f" s: {verdict}",
                flush=True,
            )
            if one.faults:
                print(one.printed, flush=True)
    table = collections.Counter((one.lab, one.phase, one.target, one.signal) for one in outcomes)
    bad = collections.Counter(
        (one.lab, one.phase, one.target, one.signal) for one in outcomes if one.faults
    )
    print(f"\n{'lab':7} {'phase':16} {'target':14} {'signal':8} {'rounds':>6} {'faults':>6}")
    for key, count in sorted(table.items()):
        print(f"{key[0]:7} {key[1]:16} {key[2]:14} {key[3]:8} {count:6} {bad[key]:6}")
    print(
        f"\n{len(outcomes)} rounds, {sum(bad.values())} with faults; harmed beside them:"
        f" {', '.join(harmed) or 'nothing'}"
    )
    return int(bool(bad) or bool(harmed))


if __name__ == "__main__":
    sys.exit(main())
