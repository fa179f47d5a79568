"""A lab over several nodes, each a network namespace with an agent of its own; one of them has
another clock, one drifts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pandas as pd
import pytest

import testbed
from testbed.labs.netns import sandbox_command
from testbed.results import validity
from testbed.results.tolerances import LATE_S

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.netns, pytest.mark.alone]
OFFSET_S = 1_000_000

SPEC = """
name: nodes
workers: 3
network: {link: {rate: 20mbit}}
schedule:
  - {at: 500ms, links: all, set: {rate: 10mbit}}
  - {at: 1200ms, links: [w1, w2], set: {rate: 5mbit}}
traffic:
  - {from: w0, to: w2, at: 300ms, for: 1s, udp: {rate: 3mbit}}
script: worker.py
methods: [allreduce]
seeds: [0, 1, 2]
"""

WORKER = """
import json, os, socket, time
from pathlib import Path
rank, out = int(os.environ["RANK"]), Path(os.environ["NETSENSE_OUTPUT_DIR"])
cell = json.loads(Path(os.environ["NETSENSE_CELL_DIR"], "cell.json").read_text())
os.chdir(os.environ["NETSENSE_CELL_DIR"])
line = socket.socket(socket.AF_UNIX)
line.connect("control.sock")
def say(**message):
    line.sendall(json.dumps(message).encode() + b"\\n")
say(type="hello", token=os.environ["NETSENSE_TOKEN"])
say(type="ready", pid=os.getpid(), parameters="same")
t0_s = next(m["t0"] for m in map(json.loads, line.makefile()) if m["type"] == "start")
with open(out / "steps.jsonl", "a", buffering=1) as steps:
    for step in range({0: 20, 1: 40}.get(cell["seed"], 10_000)):
        time.sleep(0.1)
        row = {"rank": rank, "step": step, "t_s": time.monotonic() - t0_s, "wall_s": time.time()}
        steps.write(json.dumps(row) + "\\n")
        say(type="heartbeat", step=step + 1)
print("rank", rank, "is done")
(out / "model.bin").write_bytes(bytes(3_000_000))
(out / "notes.jsonl").write_text('{"t_s": 5, "mine": 1}\\n{"half')
say(type="done", steps=step + 1, parameters="same", accuracy=None, loss=None)
"""

AGENT = """
import json, sys, time
import netsenseml.records
plain, drift, log = netsenseml.records.monotonic_s, float(sys.argv.pop(1)), sys.argv.pop(1)
began_s = plain()
netsenseml.records.monotonic_s = lambda: plain() + drift * (plain() - began_s)
from testbed.links.shaper import Shaper
from testbed.agent.__main__ import main
commit = Shaper.commit
def watched(self, prepared):
    applied = commit(self, prepared)
    with open(log, "a") as file:
        file.write(json.dumps([time.time(), sorted(prepared.changes)]) + "\\n")
    return applied
Shaper.commit = watched
sys.exit(main())
"""

ORCHESTRATOR = """
import json, os, subprocess, sys, threading, time
from contextlib import ExitStack
from pathlib import Path
import psutil
import nodes
from testbed.nodes import messages
from testbed.nodes.channel import Channel
from testbed.labs.remote import Nodes, RemoteLab, RemoteRecorder
from testbed.plan import make_plan
from testbed.results.records import finish_cell
from testbed.recording.link_server import send_request
from testbed.run import directory as run_directory
from testbed.run.cell import prepare_cell, run_cell
from testbed.spec.load import load_spec

scratch, offset_s = Path(sys.argv[1]), sys.argv[2]
found = {"t0": {}}
directory = run_directory.create(load_spec(scratch / "spec.yaml"), scratch / "runs", scratch)
found["run"] = str(directory)
plan = make_plan(load_spec(directory / "spec.yaml"), directory)
nodes.make_networks(3)
begin = RemoteRecorder.begin
def noted(self, t0_s):
    found["t0"][self._recording.directory.name] = time.time() - time.monotonic() + t0_s
    begin(self, t0_s)
RemoteRecorder.begin = noted

late_nodes = set()
send = Channel.send
def delayed(self, message, part=b""):
    if isinstance(message, messages.Time) and self._heard.__self__.name in late_nodes:
        threading.Timer(0.2, send, (self, message)).start()
    else:
        send(self, message, part)
Channel.send = delayed

def run(cell, during=None):
    place = directory / "cells" / cell.name
    prepare_cell(cell, place)
    hosts = {f"w{i}": (f"n{i + 1}", {"number": i + 1}) for i in range(3)}
    open_lab = lambda plan: RemoteLab(plan, directory, them, lambda: hosts)
    if during:
        threading.Thread(target=during, args=(place,), daemon=True).start()
    began_s = time.monotonic()
    result = run_cell(cell, open_lab, place, lambda t_s, step: None)
    found[cell.name] = {"status": result.status, "problems": result.problems, "took_s": time.monotonic() - began_s}
    return place

def agent(name, own_time=(), drift=0.0):
    program = [str(scratch / "agent.py"), str(drift), str(scratch / f"{name}.log")]
    return nodes.agent(name, listener.port, listener.secret, scratch, own_time, program)

def left(name):
    return [path.name for path in (scratch / name).iterdir()]

first, second, third = plan.cells
with ExitStack() as stack, Nodes() as listener:
    running = [stack.enter_context(agent("n1"))]
    second_agent = stack.enter_context(agent("n2", ["--time", "--monotonic", offset_s]))
    with agent("n3", drift=200e-6):
        them = listener.wait(["n1", "n2", "n3"], 40)
        found["clocks"] = {name: [node.clock.offset_s, node.clock.unsure_s] for name, node in them.items()}
        run(first)
        found["left"] = [left(name) for name in them]
    late_nodes.add("n3")
    while not them["n3"].lost:
        time.sleep(0.01)
    running.append(stack.enter_context(agent("n3")))
    them = listener.wait(["n1", "n2", "n3"], 40)

    def by_hand(place):
        while not (place / "hosts/w1/steps.jsonl").exists():
            time.sleep(0.01)
        time.sleep(1.5)  # until the schedule has done what it does
        asked = [
            {"links": ["w2", "w1"], "set": {"rate": "7mbit"}},
            {"links": []},
            {"links": ["w1"], "set": {"rate": "fast"}},
            {"links": ["w9"]},
            {"links": ["w0"], "set": {"delay": "5ms"}},
            {"host": "w2"},
        ]
        found["by_hand"] = [send_request(place, body) for body in asked]
    run(second, by_hand)

    def kill(place):
        while not (place / "hosts/w1/steps.jsonl").exists():
            time.sleep(0.01)
        time.sleep(1.5)
        found["killed"] = time.time()
        [own] = psutil.Process(second_agent.pid).children()
        own.kill()
    place = run(third, kill)
    found["left_later"] = left("n1")
    cut_s = time.monotonic()
    subprocess.run(["ip", "link", "set", "control1", "down"], check=True)
    found["cut"] = [running[0].wait(10), time.monotonic() - cut_s]
    while not them["n1"].lost and time.monotonic() - cut_s < 10:
        time.sleep(0.01)
    found["cut"] += [them["n1"].lost, time.monotonic() - cut_s]
    closed_s = time.monotonic()
    listener.__exit__(None, None, None)
    found["ended"] = [running[1].wait(10), time.monotonic() - closed_s]
    second_agent.wait(10)
    living = [process for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE]
    found["still_there"] = [process.name() for process in living if process.pid != os.getpid()]
for cell in plan.cells:
    finish_cell(directory / "cells" / cell.name)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What became of three cells: a good one; one with a node whose clock is known badly; one with
    a node that is lost."""
    scratch = tmp_path_factory.mktemp("nodes")
    for name, text in {
        "spec.yaml": SPEC,
        "worker.py": WORKER,
        "agent.py": AGENT,
        "orchestrator.py": ORCHESTRATOR,
    }.items():
        (scratch / name).write_text(text)
    command = [
        *sandbox_command(),
        sys.executable,
        str(scratch / "orchestrator.py"),
        str(scratch),
        str(OFFSET_S),
    ]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return {**json.loads(done.stdout.splitlines()[-1]), "scratch": scratch}


def tables(found, seed):
    run = testbed.load_run(found["run"])
    [cell] = run.cells[run.cells["seed"] == seed].to_dict("records")
    names = ("steps", "links", "events", "host", "traffic", "failures", "calibration", "delayline")
    return cell, {name: getattr(run, name)[lambda frame: frame["seed"] == seed] for name in names}


def test_a_cell_over_nodes_is_whole_and_valid(found) -> None:
    cell, of = tables(found, 0)
    assert found[cell["cell"]]["status"] == "done", found
    assert sorted(of["steps"]["rank"].value_counts()) == [20, 20, 20]
    assert set(of["links"]["link"]) == {"w0", "w1", "w2"} and set(of["host"]["node"]) == {
        "n1",
        "n2",
        "n3",
    }
    assert of["host"]["machine"].nunique() == 1
    assert of["calibration"]["within"].all() and len(of["calibration"]) >= 6
    assert len(of["traffic"]) > 5 and of["events"]["verified"].all()
    assert testbed.load_run(found["run"]).summary is None
    problems = validity.cell_problems({**cell, "workload": {}}, of)
    assert [problem for problem in problems if "too busy" not in problem] == []
    logs = Path(found["run"], "cells", cell["cell"], "logs")
    assert (logs / "w1.log").read_text() == "rank 1 is done\n"
    assert (logs.parent / "hosts/w1/model.bin").stat().st_size == 3_000_000
    assert (logs.parent / "hosts/w1/notes.jsonl").read_text() == '{"t_s": 5, "mine": 1}\n{"half'
    assert found["left"] == [[], [], []] and found["left_later"] == []


def test_changes_are_made_on_time_whatever_a_nodes_clock_says(found) -> None:
    cell, of = tables(found, 0)
    assert (
        found["clocks"]["n2"][0] == pytest.approx(-OFFSET_S, abs=1)
        and found["clocks"]["n2"][1] < 0.01
    )
    changes = of["events"][of["events"]["kind"] == "schedule"]
    late_s = changes["applied_s"] - changes["planned_s"]
    assert len(changes) == 5 and late_s.median() < 0.01 and late_s.between(0, LATE_S).all()
    assert changes["unsure_s"].median() < 0.01 and changes["unsure_s"].between(1e-6, LATE_S).all()
    t0_s, off_s = found["t0"][cell["cell"]], []
    for number, planned_s in enumerate([[0.5], [0.5, 1.2], [0.5, 1.2]]):
        log = (found["scratch"] / f"n{number + 1}.log").read_text().splitlines()
        applied_s = [when - t0_s for when, links in map(json.loads, log) if links == [f"w{number}"]]
        off_s += [
            abs(s - planned)
            for s, planned in zip([s for s in applied_s if 0.3 < s < 3], planned_s, strict=True)
        ]
    assert median(off_s) < 0.01 and max(off_s) <= LATE_S


def test_what_programs_write_is_in_the_orchestrators_time(found) -> None:
    _, of = tables(found, 0)
    ends_s = of["steps"].groupby("step")["t_s"]
    assert (ends_s.max() - ends_s.min()).max() < 0.09
    flow = of["events"][of["events"]["kind"] == "traffic"]
    assert (
        flow["applied_s"].tolist() == pytest.approx([0.3, 1.3], abs=0.05)
        and flow["unsure_s"].notna().all()
    )


def test_a_clock_that_is_known_badly_makes_the_cell_invalid(found) -> None:
    cell, of = tables(found, 1)
    assert found[cell["cell"]]["status"] == "done"
    [problem] = validity.unplaced_changes(of["events"])
    assert (
        "cannot be placed within 50 ms" in problem
        and "the machine of w2 was known only to 1" in problem
    )
    assert problem in validity.cell_problems({**cell, "workload": {}}, of)
    assert "samples of w2 cannot be placed within 50 ms" in "".join(
        validity.unplaced_samples(of["links"], of["host"])
    )


def test_links_of_all_nodes_can_be_seen_and_changed_by_hand(found) -> None:
    changed, seen, bad_rate, no_link, no_delay, host = found["by_hand"]
    assert list(changed["links"]) == ["w2", "w1"] and list(seen["links"]) == ["w0", "w1", "w2"]
    rates = {name: told["state"]["down"]["rate_bps"] for name, told in seen["links"].items()}
    assert rates["w1"] == rates["w2"] == 7_000_000 != rates["w0"]
    assert "carried_bps" in seen["links"]["w0"]["up"]
    assert "rate" in bad_rate["error"] and "no link 'w9'" in no_link["error"]
    assert no_delay["error"].startswith("node n1: w0 can have no delay")
    assert "on another machine, n3" in host["error"]
    _, of = tables(found, 1)
    manual = of["events"][of["events"]["kind"] == "manual"]
    assert sorted(manual["link"]) == ["w1", "w2"] and manual["verified"].all()


def test_a_lost_node_is_named_and_its_records_are_kept(found) -> None:
    cell, of = tables(found, 2)
    told = found[cell["cell"]]
    assert told["status"] == "failed" and told["problems"] == [
        "node n2 is lost: the connection was closed"
    ]
    t0_s = found["t0"][cell["cell"]]
    for rank in range(3):
        last_s = of["steps"][of["steps"]["rank"] == rank]["t_s"].max() + t0_s
        assert found["killed"] - last_s < 1.0, "no more than a second is lost"
    assert pd.notna(of["links"][of["links"]["link"] == "w1"]["t_s"].max())


def test_agents_end_with_all_they_have_started_when_the_orchestrator_is_lost(found) -> None:
    code, took_s = found["ended"]
    assert code == 0 and took_s < 5
    assert found["still_there"] == []


def test_an_end_that_falls_silent_is_lost_to_the_other(found) -> None:
    code, took_s, lost, seen_s = found["cut"]
    assert code == 0 and took_s < 5
    assert lost == "node n1 is lost: not heard for 3.5 s" and seen_s < 5
