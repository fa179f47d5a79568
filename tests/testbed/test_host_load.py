"""What the load of a machine says of processes of ours, seen from outside as the kernel counts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from netsenseml.records import monotonic_s
from testbed.recording.host import HostMonitor
from testbed.results.tolerances import taken_share

pytestmark = pytest.mark.alone


@pytest.fixture
def busy_loops():
    """Two, on one processor."""
    one = str(min(os.sched_getaffinity(0)))
    loop = ["taskset", "--cpu-list", one, sys.executable, "-S", "-c", "while True: pass"]
    loops = [subprocess.Popen(loop) for _ in range(2)]
    yield loops
    for process in loops:
        process.kill()
        process.wait()


def watched(pid: int, directory: Path, seconds: float = 1.5) -> list[dict]:
    with HostMonitor([pid], monotonic_s(), directory):
        time.sleep(seconds)
    return [json.loads(line) for line in (directory / "host.jsonl").read_text().splitlines()]


def test_what_another_takes_from_a_process_is_told_though_processors_are_idle(
    busy_loops, tmp_path
) -> None:
    ours, _ = busy_loops
    last = watched(ours.pid, tmp_path)[-1]
    assert 0.3 < last["cpu_waited_share"] <= 1.0 and last["processors"] == os.cpu_count()
    assert taken_share(last) > 0.3 and not last["stopped"]


def test_what_our_own_processes_take_from_each_other_is_not(busy_loops, tmp_path) -> None:
    last = watched(os.getpid(), tmp_path)[-1]
    assert 0.3 < last["cpu_waited_share"] <= 1.0
    assert taken_share(last) < 0.15


def test_a_process_that_is_stopped_is_told(busy_loops, tmp_path) -> None:
    ours, _ = busy_loops
    ours.send_signal(signal.SIGSTOP)
    rows = watched(ours.pid, tmp_path, 0.5)
    assert [row["stopped"] for row in rows] == [True] * len(rows) and rows
