"""Whole runs in the netns lab through the command line: results, interrupts, kills, refusals."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

import testbed
from testbed.catalog import CIFAR_FILES
from testbed.labs.base import LabError
from testbed.labs.cgroups import clean, groups_of_run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.netns

SPEC = {
    "name": "tiny",
    "workers": 2,
    "network": {"link": {"rate": "20mbit"}},
    "schedule": [
        {"at": "1s", "set": {"rate": "5mbit"}},
        {"at": "2s", "ramp": {"rate": "20mbit"}, "over": "500ms"},
    ],
    "workload": {
        "model": {"name": "mlp", "hidden": [64]},
        "batch": 32,
        "stop": {"seconds": 4},
        "compute": {"pace": "20ms"},
    },
    "methods": ["allreduce", "netsense"],
}


def launch(tmp_path, **changes):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {key: value for key, value in {**SPEC, **changes}.items() if value is not None}
        )
    )
    return subprocess.Popen(
        [sys.executable, "-m", "testbed.cli", "run", str(path), "--out", str(tmp_path / "runs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def run(tmp_path, **changes):
    process = launch(tmp_path, **changes)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_an_experiment_from_python(tmp_path, capsys):
    spec = {**SPEC, "schedule": [], "methods": ["allreduce"]}
    with pytest.raises(
        ValueError, match=r"spec.yaml: workload.batch: .*greater than or equal to 1"
    ):
        testbed.run_experiment(spec, overrides=["workload.batch=0"], out=tmp_path)
    assert not list(tmp_path.iterdir()), "nothing was touched"
    found = testbed.run_experiment(spec, overrides=["workload.stop={steps: 10}"], out=tmp_path)
    assert found.path.parent == tmp_path and set(found.cells["status"]) == {"done"}
    assert len(found.steps) == 20 and found.summary["cells"][0]["replicas_identical"]
    assert "report:" in capsys.readouterr().out


def test_an_experiment_from_python_that_is_interrupted_says_so(tmp_path):
    spec = {
        **SPEC,
        "schedule": [],
        "methods": ["allreduce"],
        "workload": {**SPEC["workload"], "stop": {"seconds": 60}},
    }

    def interrupt():
        while not any(
            path.stat().st_size for path in tmp_path.glob("*/cells/*/hosts/w0/steps.jsonl")
        ):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="the records so far are in"):
        testbed.run_experiment(spec, out=tmp_path)
    (directory,) = tmp_path.iterdir()
    assert len(testbed.load_run(directory).steps) > 0


def only_run(tmp_path):
    (directory,) = (tmp_path / "runs").iterdir()
    return directory


def descendants_of(directory):
    """Processes that name the run directory on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(directory).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def make_cifar10(folder, samples=20):
    """A data set in the form of CIFAR-10's Python version, with less in it."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for file in CIFAR_FILES["cifar10"]:
        images = draw.integers(256, size=(samples, 3 * 32 * 32), dtype=np.uint8)
        (folder / file).write_bytes(
            pickle.dumps({b"data": images, b"labels": [i % 10 for i in range(samples)]})
        )


def rows_written(tmp_path, cell):
    return sum(
        path.read_bytes().count(b"\n")
        for path in tmp_path.glob(f"runs/*/cells/{cell}/hosts/w0/steps.jsonl")
    )


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("finished")
    code, out, err = run(tmp_path)
    assert code == 0, out + err
    return out, testbed.load_run(only_run(tmp_path))


def test_summary_says_who_won_and_all_replicas_agree(finished):
    out, loaded = finished
    summary = json.loads((loaded.path / "summary.json").read_text())
    assert summary["valid"]
    assert [cell["method"] for cell in summary["cells"]] == ["allreduce", "netsense"]
    assert all(cell["replicas_identical"] for cell in summary["cells"])
    assert all(
        cell["steps"] > 0 and cell["throughput_samples_per_s"] > 0 for cell in summary["cells"]
    )
    assert "report.html" in out
    assert (loaded.path / "report.html").stat().st_size > 100_000
    assert not list(loaded.path.rglob("*.jsonl"))


def test_all_ranks_did_the_same_steps_and_the_time_limit_held(finished):
    _, loaded = finished
    for _, cell in loaded.steps.groupby("cell"):
        assert cell.groupby("rank")["step"].max().nunique() == 1
        assert 3.0 <= cell["t_s"].max() <= 6.0


def test_every_change_was_made_on_time_and_read_back(finished):
    _, loaded = finished
    changes = loaded.events[loaded.events["kind"] == "schedule"]
    assert len(changes) == 2 * 2 * (1 + 5)  # cells x links x (set + five steps of the ramp)
    assert changes["verified"].all()
    assert (changes["applied_s"] - changes["planned_s"]).between(0, 0.05).all()


def test_bytes_in_the_records_are_the_bytes_that_the_kernel_counted(finished):
    _, loaded = finished
    for name, cell in loaded.steps.groupby("cell"):
        sent = cell.groupby("rank")["payload_bytes"].sum()
        links = loaded.links[(loaded.links["cell"] == name) & (loaded.links["direction"] == "up")]
        carried = links.groupby("link")["bytes"].max() - links.groupby("link")["bytes"].min()
        for rank, payload in sent.items():
            # Headers come on top; and in every step some thirty small packets: acknowledgements of
            # the other side's data, the notes with which Gloo announces its messages, and
            # netsense's reports and decisions.
            most = payload * 1.05 + cell["step"].nunique() * 3000 + 50_000
            assert payload <= carried[f"w{rank}"] <= most, (name, rank)


def test_telemetry_runs_ten_times_a_second(finished):
    _, loaded = finished
    for _, series in loaded.links.groupby(["cell", "link", "direction"]):
        assert series["t_s"].diff().median() == pytest.approx(0.1, abs=0.02)
        assert (series["bytes"].diff().dropna() >= 0).all()


@pytest.mark.shared
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_within_five_seconds_and_keeps_the_records(tmp_path, number):
    process = launch(tmp_path, workload={**SPEC["workload"], "stop": {"seconds": 60}})
    wait_until(lambda: rows_written(tmp_path, "allreduce-s0") > 10, 60)
    process.send_signal(number)
    start = time.monotonic()
    process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    loaded = testbed.load_run(only_run(tmp_path))
    assert len(loaded.steps) > 5
    assert len(loaded.links) > 5
    assert loaded.cells["status"].tolist() == ["interrupted", "unfinished"]
    wait_until(lambda: not descendants_of(tmp_path), 2)


@pytest.mark.shared
def test_an_interrupt_waits_until_the_labs_first_process_can_obey(tmp_path):
    """Sent when its Python has hardly begun to load, it used to end in a traceback, exit code 3."""

    def loading():
        for pid in descendants_of(tmp_path):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"testbed.run.sandbox_main" in words and b"unshare" not in words[0]:
                    return pid
        return 0

    process = launch(tmp_path)
    while not (pid := loading()):
        assert process.poll() is None
    os.kill(pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in out + err, out + err
    wait_until(lambda: not descendants_of(tmp_path), 2)


def no_control_groups():
    """Why workers of netns labs cannot be limited on this machine; nothing if they can."""
    try:
        with groups_of_run(("memory", "pids")):
            return ""
    except LabError as error:
        return str(error)


@pytest.mark.shared
def test_sigkill_leaves_no_process_and_keeps_the_records_and_resume_finishes(tmp_path):
    limits = {} if no_control_groups() else {"memory": "4GiB", "pids": 1000}
    process = launch(tmp_path, limits=limits)
    wait_until(lambda: rows_written(tmp_path, "netsense-s0") > 10, 90)
    process.kill()
    process.communicate()
    wait_until(lambda: not descendants_of(tmp_path), 8)
    assert bool(limits) == bool(clean(dry_run=True)), (
        "what is left waits for the next run, or testbed clean"
    )
    directory = only_run(tmp_path)
    loaded = testbed.load_run(directory)
    assert set(loaded.cells["cell"]) == {"allreduce-s0", "netsense-s0"}
    assert len(loaded.steps[loaded.steps["cell"] == "netsense-s0"]) > 5
    before = (directory / "cells" / "allreduce-s0" / "result.json").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "testbed.cli", "run", "--resume", str(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    # 3: all is done, but the machine was too busy for a valid figure, which is not what this is
    # about.
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert testbed.load_run(directory).cells["status"].tolist() == ["done", "done"]
    assert (directory / "cells" / "allreduce-s0" / "result.json").read_text() == before
    assert clean(dry_run=True) == []


@pytest.mark.shared
def test_a_sweep_that_is_killed_three_times_runs_every_cell_once(tmp_path):
    spec = {
        **SPEC,
        "schedule": [],
        "workload": {**SPEC["workload"], "stop": {"steps": 20}},
        "seeds": [0, 1, 2],
    }
    process = launch(tmp_path, **spec)
    done: dict[Path, int] = {}

    def ended():
        found = {
            path: json.loads(path.read_text())
            for path in tmp_path.glob("runs/*/cells/*/result.json")
        }
        return {
            path: path.stat().st_mtime_ns
            for path, result in found.items()
            if result["status"] == "done"
        }

    def one_more(than):
        return lambda: len(ended()) > than

    for _ in range(3):
        wait_until(one_more(than=len(done)), 90)
        process.kill()
        process.communicate()
        wait_until(lambda: not descendants_of(tmp_path), 8)
        done = ended() | done  # what had ended before must not be written again
        command = [sys.executable, "-m", "testbed.cli", "run", "--resume", str(only_run(tmp_path))]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    out, err = process.communicate(timeout=180)
    assert process.returncode in (0, 3), out + err
    assert {path: ended()[path] for path in done} == done
    loaded = testbed.load_run(only_run(tmp_path))
    assert set(loaded.cells["cell"]) == {
        f"{method}-s{seed}" for method in ("allreduce", "netsense") for seed in range(3)
    }
    assert set(loaded.cells["status"]) == {"done"}
    assert set(loaded.steps.groupby(["cell", "rank"]).size()) == {20}


@pytest.mark.shared
def test_a_worker_that_dies_fails_its_cell_and_says_why(tmp_path):
    code, out, _ = run(
        tmp_path,
        workload={**SPEC["workload"], "model": "no_such_module:build"},
        methods=["allreduce"],
    )
    assert code == 1
    assert "no_such_module" in out
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert not summary["valid"]
    assert "no_such_module" in summary["problems"][0]
    [cell] = summary["cells"]
    assert len(cell["earlier_failures"]) == 1  # it was tried twice

    command = [sys.executable, "-m", "testbed.cli", "run", "--resume", str(only_run(tmp_path))]
    resumed = subprocess.run(
        command, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert resumed.returncode == 1
    [cell] = json.loads((only_run(tmp_path) / "summary.json").read_text())["cells"]
    assert len(cell["earlier_failures"]) == 3


SCRIPT = """
import os, sys, time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import netsenseml

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(8, 8))
session = netsenseml.attach(model, record=os.environ["NETSENSE_OUTPUT_DIR"] + f"/own.py-{dist.get_rank()}.jsonl")
last, slow_from, pause_s = map(int, sys.argv[1:])
for step in range(last):
    model(torch.randn(2, 8)).sum().backward()
    if step >= slow_from and dist.get_rank() == 1:
        time.sleep(pause_s)
    if not session.step(0.0, samples=2):
        break
session.close()
print("steps", session.steps)
"""


def test_ranks_of_a_worker_share_its_link_and_what_is_between_them_stays_off_it(tmp_path):
    told = (
        'print(*(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE",'
        ' "LOCAL_WORLD_SIZE")))\n'
    )
    # 288 kB
    (tmp_path / "own.py").write_text(SCRIPT.replace("Linear(8, 8)", "Linear(8, 8000)") + told)
    methods = [
        "allreduce",
        {"name": "netsense", "label": "host", "policy": "fixed", "schemes": ["host-int8"]},
    ]
    changes = {
        "network": {"link": {"rate": "50mbit"}, "connections": 2},
        "workload": None,
        "schedule": None,
        "methods": methods,
    }
    code, out, err = run(
        tmp_path,
        ranks_per_worker=2,
        script={"file": "own.py", "args": ["15", "15", "0"]},
        **changes,
    )
    assert code == 0, out + err
    loaded = testbed.load_run(only_run(tmp_path))
    assert all(cell["replicas_identical"] for cell in loaded.summary["cells"])
    for name, steps in loaded.steps.groupby("cell"):
        logs = loaded.path / "cells" / name / "logs"
        for rank in range(4):
            assert f"{rank} {rank % 2} 4 2\n" in (logs / f"w{rank // 2}-{rank % 2}.log").read_text()
        said = steps.groupby("rank")["payload_bytes"].sum()
        links = loaded.links[(loaded.links["cell"] == name) & (loaded.links["direction"] == "up")]
        for worker, carried in (
            links.groupby("link")["bytes"].agg(lambda total: total.max() - total.min()).items()
        ):
            first, second = (said[2 * int(worker[1:]) + local] for local in (0, 1))
            assert second == pytest.approx(first, rel=0.02)
            # in a ring one of them sends to the other worker
            leaves = first + second if name == "host-s0" else first
            assert leaves <= carried <= 1.06 * leaves + 15 * 6000 + 50_000, name


def test_a_time_limit_that_meets_the_last_step_does_not_hang(tmp_path):
    """One rank has ended by itself when the orchestrator asks all to hold, the other is still in
    its last step."""
    (tmp_path / "own.py").write_text(SCRIPT)
    script = {"file": "own.py", "args": ["5", "4", "3"], "stop": {"seconds": 2}}
    code, out, err = run(tmp_path, workload=None, schedule=[], script=script, methods=["allreduce"])
    assert code == 0, out + err
    assert set(testbed.load_run(only_run(tmp_path)).steps.groupby("rank").size()) == {5}
    assert len(list(tmp_path.rglob("own.py-*.jsonl"))) == 2  # its own records, beside the cell's


def test_ranks_that_come_late_to_the_last_step_end_after_the_same_one(tmp_path):
    """One rank has been told the last step, has done it and ended, while the other still is in
    it."""
    (tmp_path / "own.py").write_text(SCRIPT)
    script = {"file": "own.py", "args": ["1000", "0", "1"], "stop": {"seconds": 2}}
    code, out, err = run(tmp_path, workload=None, schedule=[], script=script, methods=["allreduce"])
    assert code == 0, out + err
    by_rank = testbed.load_run(only_run(tmp_path)).steps.groupby("rank").size()
    assert len(set(by_rank)) == 1


LONG = {"link": {"rate": "20mbit", "delay": "20ms"}}


def kernel_has_netem():
    from testbed.labs.netns import sandbox_command

    asked = subprocess.run(
        [*sandbox_command(), sys.executable, "-m", "testbed.links.kernel_support", "htb", "netem"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    ).stdout.split()
    return "netem" not in asked


def test_netem_is_refused_before_anything_starts_where_the_kernel_lacks_it(tmp_path):
    code, out, err = run(tmp_path, network={**LONG, "engine": "netem"}, methods=["allreduce"])
    if kernel_has_netem():
        assert code == 0, out + err
    else:
        assert code == 4
        assert "modprobe sch_netem" in err
        assert "network.engine: auto" in err
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "runs").exists()


def test_a_delay_is_had_on_every_kernel_and_the_run_says_how(tmp_path):
    changes = [{"at": "1s", "set": {"delay": "40ms", "loss": "1%"}}]
    code, out, err = run(tmp_path, network=LONG, schedule=changes, methods=["allreduce"])
    assert code in (0, 3), out + err
    loaded = testbed.load_run(only_run(tmp_path))
    assert loaded.cells["status"].tolist() == ["done"]
    engine = loaded.spec["network"]["engine"]
    assert engine == ("netem" if kernel_has_netem() else "userspace")
    assert loaded.events["verified"].all()
    assert loaded.links.groupby("direction")["lost"].max()["down"] > 0
    rtt = loaded.calibration[loaded.calibration["quantity"] == "rtt"]
    assert (rtt["measured"] - 0.04).abs().max() < 2e-3
    assert (len(loaded.delayline) > 0) == (engine == "userspace")
    if engine == "userspace":
        assert "delay line" in out
        assert loaded.delayline["frames"].iloc[-1] > 1000
        assert "delay line" in (only_run(tmp_path) / "report.html").read_text()


def test_without_the_right_to_tap_devices_the_delay_line_is_one_line_and_nothing_is_made(tmp_path):
    path = tmp_path / "far.yaml"
    path.write_text(yaml.safe_dump({**SPEC, "network": {**LONG, "engine": "userspace"}}))
    (tmp_path / "empty").mkdir()
    hidden = (
        f"mount --bind {tmp_path}/empty /dev/net && exec {sys.executable} -m testbed.cli run {path}"
        f" --out {tmp_path}/runs"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", hidden],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    if "unshare failed" in done.stderr:
        pytest.fail(done.stderr)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "modprobe tun" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.shared
def test_a_killed_delay_line_fails_its_cell_in_one_line_and_leaves_nothing(tmp_path):
    process = launch(
        tmp_path, network={**LONG, "engine": "userspace"}, methods=["allreduce"], calibrate=False
    )
    end = time.monotonic() + 60
    killed_s = 0.0
    while not killed_s:
        assert time.monotonic() < end, process.communicate()
        time.sleep(0.1)
        started = list(tmp_path.glob("runs/*/cells/*/links.jsonl"))
        for child in psutil.Process(process.pid).children(recursive=True) if started else ():
            if "testbed.links.delayline" in child.cmdline():
                killed_s = time.monotonic()
                child.kill()
    reason = "a link could not be changed or read: the delay line was ended by signal 9"
    while reason not in (line := process.stdout.readline()):
        assert line
    assert time.monotonic() < killed_s + 5
    # The failed cell is tried once more, and that try is left alone.
    out, err = process.communicate(timeout=120)
    assert process.returncode in (0, 3), out + err
    assert "Traceback" not in out + err
    assert testbed.load_run(only_run(tmp_path)).cells["earlier"].tolist() == [[reason]]
    assert not descendants_of(tmp_path)


def test_sixty_four_workers_train(tmp_path):
    workload = {
        "model": {"name": "mlp", "hidden": [16]},
        "batch": 4,
        "stop": {"steps": 3},
        "compute": {"pace": "500ms"},
    }
    workload["evaluate_every"] = "60s"
    code, out, err = run(
        tmp_path,
        workers=64,
        workload=workload,
        schedule=None,
        methods=["allreduce"],
        calibrate=False,
    )
    # so many may be too much for this machine, but not for the kernel
    assert code in (0, 3), out + err
    loaded = testbed.load_run(only_run(tmp_path))
    assert loaded.cells["status"].tolist() == ["done"]
    assert loaded.steps["rank"].nunique() == 64
    assert loaded.summary["cells"][0]["replicas_identical"]


@pytest.mark.shared
def test_workers_talk_ipv6_in_large_frames(tmp_path):
    network = {"link": {"rate": "20mbit"}, "ip": 6, "mtu": 4000}
    traffic = [{"from": "bg0", "to": "w1", "at": "1s", "tcp": {"streams": 2}}]
    traffic += [{"from": "w0", "to": "w1", "udp": {"rate": "1mbit"}}]
    code, out, err = run(
        tmp_path, network=network, schedule=None, traffic=traffic, methods=["netsense"]
    )
    assert code in (0, 3), out + err
    loaded = testbed.load_run(only_run(tmp_path))
    assert loaded.cells["status"].tolist() == ["done"]
    assert loaded.calibration["within"].any()
    assert (loaded.traffic.groupby("kind")["bytes"].max() > 100_000).all()
    assert loaded.steps["bandwidth_bps"].notna().any()  # TCP_INFO of IPv6 sockets, too


@pytest.mark.shared
def test_cifar_is_read_from_a_folder_beside_the_spec(tmp_path):
    make_cifar10(tmp_path / "cifar")
    workload = {
        "model": {"name": "resnet18", "classes": 10},
        "data": {"name": "cifar10", "folder": "cifar"},
        "batch": 2,
    }
    workload |= {"stop": {"steps": 2}}
    network = {"link": {"rate": "1gbit"}}
    code, out, err = run(
        tmp_path,
        workload=workload,
        network=network,
        schedule=None,
        methods=["allreduce"],
        calibrate=False,
    )
    assert code in (0, 3), out + err  # two steps are too few to be sure of the machine
    directory = only_run(tmp_path)
    assert testbed.load_run(directory).cells["status"].tolist() == ["done"]
    data = yaml.safe_load((directory / "spec.yaml").read_text())["workload"]["data"]
    assert data["options"] == {"folder": "data/cifar"}
    assert (directory / "data" / "cifar").resolve() == tmp_path / "cifar"
    result = json.loads((directory / "summary.json").read_text())["cells"][0]
    assert result["final_accuracy"] is not None and result["replicas_identical"]
