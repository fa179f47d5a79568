"""Kill parts of running experiments over a swarm, and see what is left, lost and said.

    python tests/chaos/swarm_kills.py [--kills 20] [--seed 0] [--target agent]…

Three nodes on this machine (tests/swarm/swarm_nodes.py); needs root and the image. Each round runs
a small experiment and sends SIGKILL at a random moment of a cell:

    orchestrator   to ``testbed run``
    agent          to the agent of a node
    daemon         to dockerd of a node that is no manager; its containers live on without it
    manager        to dockerd of the node that is one, where ``testbed run`` goes on
    node           to all processes of such a node at once, as if it lost its power

Then the cell has to end within 15 s with one line that names the node, and is tried again on what is
left of the swarm; without a daemon it goes on to its end, for which it has as long. Afterwards the
daemon is started again, ``testbed clean`` is run, and nothing may be left on any node. What an
orchestrator that was killed had started ends by itself within 15 s, before ``testbed clean``, and all
of its records that were a second old must load.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "swarm"))

from swarm_nodes import Node, Nodes, end_all_in

from testbed import load_run

ROOT = Path(__file__).parents[2]
TARGETS = ("orchestrator", "agent", "daemon", "manager", "node")
_END_S = 15.0
_SECOND_TRY_S = 60.0
SPEC = {
    "name": "chaos",
    "lab": "swarm",
    "workers": 3,
    "network": {"link": {"rate": "20mbit"}},
    "schedule": [
        {"at": "1s", "set": {"rate": "10mbit"}},
        {"at": "2s", "ramp": {"rate": "20mbit"}, "over": "500ms"},
    ],
    "workload": {
        "model": {"name": "mlp", "hidden": [64]},
        "stop": {"seconds": 6},
        "compute": {"pace": "20ms"},
    },
    "methods": ["allreduce"],
    "calibrate": False,
}


@dataclass
class Outcome:
    """One round. at_s: when the signal came, after the first step. seconds: until the cell, or else
    the run, had ended. faults: what should not be; empty if all is well."""

    target: str
    at_s: float
    seconds: float = 0.0
    code: int | None = 0
    said: str = ""
    faults: list[str] = field(default_factory=list)


def one_round(nodes: Nodes, target: str, draw: random.Random, directory: Path) -> Outcome:
    outcome = Outcome(target, draw.uniform(0.2, 4.0))
    (directory / "chaos.yaml").write_text(yaml.safe_dump(SPEC))
    environment = {**nodes.manager.environment, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}

    def testbed(*arguments: str) -> list[str]:
        return nodes.manager.inside([sys.executable, "-m", "testbed.cli", *arguments])

    with open(directory / "printed.txt", "w") as log:
        command = testbed("run", str(directory / "chaos.yaml"), "--out", str(directory / "runs"))
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )
    if not _wait(lambda: _rows(directory) > 0 or process.poll() is not None, 60):
        outcome.faults.append("no step in 60 s")
    time.sleep(outcome.at_s)
    before = _rows(directory, older_s=1.0)
    victim = nodes.manager if target == "manager" else draw.choice(nodes.nodes[1:])
    _kill(target, victim, process.pid)
    killed_s = time.monotonic()
    printed = directory / "printed.txt"
    if target in ("agent", "node"):
        if not _wait(lambda: victim.name in printed.read_text(), _END_S):
            outcome.faults.append(f"{victim.name} is not named in {_END_S:g} s")
        outcome.seconds = time.monotonic() - killed_s
        outcome.said = next(
            (line.strip() for line in printed.read_text().splitlines() if victim.name in line), ""
        )
    try:
        outcome.code = process.wait(_SECOND_TRY_S)
    except subprocess.TimeoutExpired:
        outcome.faults.append("the run does not end")
        process.kill()
        process.wait()
    if target == "orchestrator" and not _wait(lambda: not _running(nodes), _END_S):
        outcome.faults.append(f"still running after {_END_S:g} s: {_running(nodes)}")
    if target in ("daemon", "manager"):
        outcome.seconds = max(0.0, _ended_s(directory) - killed_s)
    outcome.seconds = outcome.seconds or time.monotonic() - killed_s
    if outcome.seconds > _END_S:
        outcome.faults.append(f"it took {outcome.seconds:.1f} s")
    if "Traceback" in printed.read_text():
        outcome.faults.append("a traceback")
    if target in ("daemon", "manager", "node"):
        victim.process = None
        end_all_in(victim.namespace)
        victim.start()
        victim.wait()
    subprocess.run(testbed("clean"), env=environment, check=True, stdout=subprocess.DEVNULL)
    if left := nodes.left():
        outcome.faults.append(f"left: {left}")
    try:
        (run,) = (directory / "runs").iterdir()
        if target == "orchestrator" and (loaded := len(load_run(run).steps)) < before:
            outcome.faults.append(f"{before - loaded} rows older than a second are lost")
    except (OSError, ValueError) as error:
        outcome.faults.append(f"records: {error}")
    return outcome


def _kill(target: str, victim: Node, orchestrator: int) -> None:
    if target == "orchestrator":
        os.kill(orchestrator, signal.SIGKILL)
    elif target in ("daemon", "manager"):
        os.kill(victim.daemon, signal.SIGKILL)
    elif target == "node":
        end_all_in(victim.namespace)
    else:
        pids = subprocess.run(
            ["ip", "netns", "pids", victim.namespace], capture_output=True, text=True, check=True
        ).stdout
        for pid in map(int, pids.split()):
            if b"testbed.agent" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def _rows(directory: Path, older_s: float = 0.0) -> int:
    """Rows of steps that have come home; those that are older than so many seconds by the newest
    one."""
    steps = [
        path.read_bytes().splitlines()
        for path in directory.glob("runs/*/cells/*/hosts/*/steps.jsonl")
    ]
    per_second = 1 / 0.06
    return max(0, sum(map(len, steps)) - round(len(steps) * older_s * per_second))


def _running(nodes: Nodes) -> list[str]:
    """Containers that run on any node."""
    return [name for node in nodes.nodes for name in node.docker("ps", "-q").split()]


def _ended_s(directory: Path) -> float:
    """When the first try of the cell had ended, by its result, on the monotonic clock."""
    results = [path.stat().st_mtime for path in directory.glob("runs/*/cells/*/result.json")]
    return min(results, default=time.time()) - time.time() + time.monotonic()


def _wait(condition, seconds: float) -> bool:
    given_up_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > given_up_s:
            return False
        time.sleep(0.05)
    return True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=TARGETS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the nodes are ended
    targets = options.target or TARGETS
    draw = random.Random(options.seed)
    outcomes = []
    with Nodes(3) as nodes:
        for number in range(options.kills):
            scratch = Path(tempfile.mkdtemp(prefix="swarm-chaos-", dir="/var/tmp"))
            one = one_round(nodes, targets[number % len(targets)], draw, scratch)
            outcomes.append(one)
            verdict = "; ".join(one.faults) or "well"
            ended = f"ended after {one.seconds:.1f} s, exit code {one.code}"
            print(f"{number:3} {one.target:12} at {one.at_s:.1f} s: {ended}; {verdict}")
            if one.said:
                print(f"      {one.said}")
            sys.stdout.flush()
            if not one.faults:
                shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{'killed':14}{'rounds':>8}{'well':>8}{'median s':>10}{'most s':>8}")
    for target in targets:
        rounds = [one for one in outcomes if one.target == target]
        seconds = [one.seconds for one in rounds] or [float("nan")]
        well = sum(not one.faults for one in rounds)
        print(
            f"{target:14}{len(rounds):8}{well:8}{statistics.median(seconds):10.1f}{max(seconds):8.1f}"
        )
    return int(any(one.faults for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
