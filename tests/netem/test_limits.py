"""Limits of a host's memory and processes, by control groups of version 2 under User-Mode Linux, or
of what the machine has."""

import time
from pathlib import Path

import pytest
from conftest import ENGINE, pair_state

from testbed.labs.base import LabError, LabPlan, Limits
from testbed.labs.cgroups import clean, groups_of_run
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab

pytestmark = pytest.mark.netem
LIMITS = Limits(memory_bytes=64 << 20, pids=32)
TAKE_MEMORY = "held = []\nwhile True: held.append(b'x' * (1 << 20))"
FORK = """import os, time
for n in range(100):
    try:
        if os.fork() == 0: time.sleep(20)
    except OSError as error:
        print(n, error.strerror, flush=True)
        break
"""
WAIT = "import time; time.sleep(20)"


@pytest.fixture
def groups():
    before = Path("/proc/self/cgroup").read_text()
    try:
        with groups_of_run(LIMITS.by_controller) as made:
            yield made
    except LabError as error:
        if ENGINE == "netem":
            raise  # User-Mode Linux has control groups
        pytest.skip(str(error))
    assert Path("/proc/self/cgroup").read_text() == before
    assert not any(path.exists() for path in made.values())


def ended(process):
    given_up_s = time.monotonic() + 20
    while (code := process.poll()) is None:
        assert time.monotonic() < given_up_s
        time.sleep(0.02)
    return code


def test_who_takes_more_than_a_host_may_is_stopped_and_other_hosts_go_on(groups, tmp_path):
    with (
        ForkServer() as server,
        NetnsLab(
            LabPlan(dict.fromkeys(("w0", "w1"), pair_state()), limits=LIMITS), server, groups
        ) as lab,
    ):
        assert sorted(path.name for path in groups["memory"].glob("host-*")) == [
            "host-w0",
            "host-w1",
        ]
        other = lab.hosts["w1"].start(["python", "-c", WAIT], {}, tmp_path / "w1.log")
        assert (
            ended(lab.hosts["w0"].start(["python", "-c", TAKE_MEMORY], {}, tmp_path / "memory.log"))
            == -9
        )
        forked = lab.hosts["w0"].start(["python", "-c", FORK], {}, tmp_path / "pids.log")
        assert ended(forked) == 0
        refused_at, _, why = (tmp_path / "pids.log").read_text().partition(" ")
        assert int(refused_at) < LIMITS.pids and why == "Resource temporarily unavailable\n"
        assert other.poll() is None
    assert not list(groups["memory"].glob("host-*")) and not list(groups["pids"].glob("host-*"))


def test_what_a_killed_run_has_left_is_removed_and_nothing_else(groups):
    """A run whose process is gone, one of another kind, and our own, which lives."""
    above = groups["memory"].parent
    pid, started, *rest = groups["memory"].name.split(":")
    left = above / ":".join([pid, str(int(started) + 1), *rest])
    (left / "host-w0").mkdir(parents=True)
    other = above / "netsense-of-somebody"
    other.mkdir()
    try:
        assert clean(dry_run=True) == [f"control group {left}"]
        assert left.exists()
        with groups_of_run([]):
            assert left.exists(), "nothing is touched unless limits are wanted"
        assert clean(dry_run=False) == [f"control group {left}"]
        assert not left.exists() and other.exists() and groups["memory"].exists()
        assert clean(dry_run=False) == []
    finally:
        other.rmdir()
