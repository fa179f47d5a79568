"""Calibration of real links, the load of the machine during a run, and the doctor, in the netns
lab."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

import testbed
from testbed.cli import app
from testbed.labs.netns import sandbox_command

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.netns

SPEC = {
    "name": "tiny",
    "workers": 3,
    "network": {"link": {"rate": "20mbit"}, "links": {"w2": {"rate": "5mbit"}}},
    "workload": {"model": {"name": "mlp", "hidden": [64]}, "batch": 32, "stop": {"seconds": 3}},
    "methods": ["allreduce"],
}


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "testbed.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )


def start(tmp_path, **changes):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**SPEC, **changes}))
    arguments = ["run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "runs")]
    return subprocess.Popen(
        [sys.executable, "-m", "testbed.cli", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
    )


def finished(process, tmp_path):
    """The loaded run of a spec, and the summary of its only cell."""
    assert process.wait(timeout=200) in (0, 3)
    (directory,) = (tmp_path / "runs").iterdir()
    loaded = testbed.load_run(directory)
    return loaded, loaded.summary["cells"][0]


def test_every_direction_of_unequal_links_is_measured_before_the_start(tmp_path):
    loaded, cell = finished(start(tmp_path), tmp_path)
    assert cell["calibrated"]
    calibration = loaded.calibration
    assert set(zip(calibration["link"], calibration["direction"], strict=True)) == {
        (link, side) for link in ("w0", "w1", "w2") for side in ("up", "down")
    }
    assert (
        calibration["expected"] == calibration["link"].map({"w0": 20e6, "w1": 20e6, "w2": 5e6})
    ).all()
    # On a machine that is shared, some attempt may miss; half of them would be no accident.
    assert calibration["within"].mean() > 0.5
    assert 0 < loaded.host["cpu_busy_share"].mean() <= 1.05
    assert len(loaded.host) > 15


def test_a_machine_that_others_keep_busy_makes_a_run_invalid_and_calibration_can_be_turned_off(
    tmp_path,
):
    process = start(
        tmp_path, calibrate=False, workload={**SPEC["workload"], "stop": {"seconds": 4}}
    )
    wait_until(lambda: list(tmp_path.glob("runs/*/cells/*/host.jsonl")))
    burn = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(burn) for _ in range(os.cpu_count() or 1)]
    try:
        wait_until(lambda: list(tmp_path.glob("runs/*/cells/*/result.json")))
    finally:
        for other in others:
            other.kill()
            other.wait()
    loaded, cell = finished(process, tmp_path)
    assert not loaded.summary["valid"]
    assert any(
        problem.startswith("this machine was too busy: other programs took")
        for problem in cell["problems"]
    )
    assert loaded.calibration.empty
    assert not cell["calibrated"]
    assert not any("calibrated" in problem for problem in cell["problems"])


def wait_until(condition):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def test_own_computing_is_not_taken_for_that_of_others(tmp_path):
    # In here /proc shows our processes alone, and the program that burns is one of them.
    script = tmp_path / "inside.py"
    script.write_text(f"""
import json, subprocess, sys, time, os
from pathlib import Path
from netsenseml.records import monotonic_s
from testbed.recording.host import HostMonitor
burner = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
with HostMonitor([os.getpid()], monotonic_s(), Path({str(tmp_path)!r})):
    time.sleep(2.5)
burner.kill()
""")
    subprocess.run(
        [*sandbox_command(), sys.executable, str(script)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    rows = [json.loads(line) for line in (tmp_path / "host.jsonl").read_text().splitlines()]
    cores = os.cpu_count() or 1
    own = [row["cpu_busy_share"] - row["cpu_foreign_share"] for row in rows[10:]]
    assert max(own) > 0.3 / cores
    assert all(0 <= row["cpu_busy_share"] <= 1.1 for row in rows)


def test_calibrate_measures_what_tcp_can_have(tmp_path):
    done = command("calibrate", "--rate", "37mbit", "--json")
    assert done.returncode in (0, 3), done.stderr
    result = json.loads(done.stdout)
    rows = {row["quantity"]: row for row in result["rows"]}
    assert list(rows) == ["rtt_min", "rtt_median", "goodput_one", "goodput_ring"]
    assert rows["goodput_one"]["expected"] == pytest.approx(37e6 * 1448 / 1514)
    assert rows["goodput_one"]["measured"] == pytest.approx(
        rows["goodput_one"]["expected"], rel=0.05
    )
    assert rows["goodput_ring"]["measured"] == pytest.approx(
        rows["goodput_ring"]["expected"], rel=0.10
    )
    assert result["valid"] == all(row["within"] for row in result["rows"]) == (done.returncode == 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "fast"], "'fast' is not a rate"),
        (["--delay", "10"], "'10' has no unit"),
        (["--loss", "110%"], "out of range"),
        (["--delay", "10ms", "--jitter", "5ms"], "at most a quarter of the delay"),
    ],
)
def test_bad_input_to_calibrate_is_refused(arguments, words):
    done = command("calibrate", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_modules_of_the_working_directory_are_not_taken_for_python_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random.py").write_text('open("ran", "w")')
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert not (tmp_path / "ran").exists()
    assert "ImportError" not in result.stdout
    assert json.loads(result.stdout)["labs"]["netns"]


def test_the_doctor_says_what_works_here():
    done = command("doctor", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["labs"]["netns"]
    verdicts = {finding["name"]: finding for finding in result["findings"]}
    assert (
        verdicts["lab netns"]["verdict"]
        == verdicts["tbf"]["verdict"]
        == verdicts["htb"]["verdict"]
        == "ok"
    )
    assert verdicts["limits"]["found"]
    assert all(finding["fix"] for finding in result["findings"] if finding["verdict"] == "missing")
    assert verdicts["delay line"]["verdict"] == "ok" or verdicts["delay line"]["fix"]
    assert verdicts["limits of workers"]["verdict"] == "ok" or verdicts["limits of workers"]["fix"]
    netem = verdicts["netem"]
    assert netem["verdict"] == "ok" or netem["fix"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_calibration_whose_parent_ends_leaves_nothing(tmp_path, number):
    rate_bps = 12_345_678
    arguments = [sys.executable, "-m", "testbed.cli", "calibrate", "--rate", f"{rate_bps}bit"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def left():
        commands = [one.info["cmdline"] or [""] for one in psutil.process_iter(["cmdline"])]
        return [
            words
            for words in commands
            if "testbed.calibrate" in words and str(rate_bps) in words[-1]
        ]

    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: list(tmp_path.glob("calibrate-*/cells/*")) and left())
        process.send_signal(number)
        assert process.wait(20) == (130 if number == signal.SIGINT else -number)
    wait_until(lambda: not left() and not list(tmp_path.iterdir()))
