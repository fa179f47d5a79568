"""The programs of competing traffic over loopback, with the orchestrator's own control socket."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from netsenseml.records import monotonic_s, read_records
from testbed import protocol
from testbed.run.control import ControlServer
from testbed.run.messages import Ready
from testbed.traffic.flows import TRAFFIC_PROGRAM, Duration, Flow, Streams

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.alone
FLOW = Flow("bg0-w1", "bg0", "w1", "tcp", port=5871)


@contextmanager
def running(directory, flow):
    """Both ends of a flow, ready; yields the server and the two processes by name."""
    programs = {}
    try:
        ends = ("receive", "send")
        with ControlServer(
            directory / protocol.SOCKET_FILE, [(flow.name, end) for end in ends]
        ) as control:
            for end in ends:
                env = {
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    protocol.ENV_TOKEN: control.tokens[flow.name, end],
                }
                env |= dict.fromkeys(
                    (protocol.ENV_CELL_DIR, protocol.ENV_OUTPUT_DIR), str(directory)
                )
                command = [sys.executable, "-m", TRAFFIC_PROGRAM, end, flow.to_json(), "127.0.0.1"]
                with open(directory / f"{end}.log", "w") as log:
                    programs[end] = subprocess.Popen(command, stderr=log, env=env)
            heard = [control.inbox.get(timeout=20) for _ in programs]
            assert {one.member for one in heard} == set(control.tokens)
            assert all(isinstance(one.message, Ready) for one in heard)
            yield control, programs
    finally:
        for program in programs.values():
            try:
                program.wait(timeout=5)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()


def records(directory, flow, seconds):
    """Rows of traffic and of events of a flow that ran for some seconds."""
    with running(directory, flow) as (control, programs):
        control.broadcast({"type": "start", "t0": monotonic_s()})
        time.sleep(seconds)
    assert [program.returncode for program in programs.values()] == [0, 0], (
        directory / "send.log"
    ).read_text()
    return [
        list(read_records(directory / f"{name}-{flow.name}.jsonl"))
        for name in ("traffic", "events")
    ]


def at(rows, t_s):
    """The first row at or after a time."""
    return next(row for row in rows if row["t_s"] >= t_s)


def test_tcp_streams_open_and_close_with_each_phase(tmp_path):
    flow = replace(
        FLOW,
        at_s=0.3,
        end_s=1.6,
        on=Duration(0.5),
        off=Duration(0.3),
        streams=Streams(1, 50),
        congestion="reno",
    )
    rows, events = records(tmp_path, flow, 2.0)
    assert [event["planned_s"] for event in events] == [0.3, 0.8, 1.1, 1.6]
    assert [event["state"]["streams"] for event in events[1::2]] == [0, 0]
    for event in events:
        assert event["kind"] == "traffic"
        assert 0 <= event["applied_s"] - event["planned_s"] < 0.1
    for t_s, state in ((0.65, events[0]["state"]), (1.45, events[2]["state"])):
        assert at(rows, t_s)["streams"] == state["streams"] > 0
    assert at(rows, 0.2)["bytes"] == 0
    assert at(rows, 0.95)["streams"] == at(rows, 1.8)["streams"] == 0
    assert (
        at(rows, 0.6)["bytes"]
        < at(rows, 0.95)["bytes"]
        == at(rows, 1.05)["bytes"]
        < at(rows, 1.8)["bytes"]
    )
    assert all(before["bytes"] <= after["bytes"] for before, after in pairwise(rows))
    assert set(rows[0]) == {
        "t_s",
        "flow",
        "from",
        "to",
        "kind",
        "streams",
        "bytes",
        "packets",
        "lost",
    }
    assert 19 <= len(rows) <= 23


def test_udp_keeps_its_rate_and_counts_every_datagram(tmp_path):
    flow = replace(FLOW, kind="udp", rate_bps=20_000_000, packet_bytes=1000, at_s=0.2, end_s=1.7)
    rows, _ = records(tmp_path, flow, 2.0)
    last = rows[-1]
    assert last["lost"] == 0
    assert last["bytes"] == last["packets"] * 1000
    assert last["bytes"] * 8 / 1.5 == pytest.approx(20_000_000, rel=0.01)
    # Even: no tenth of a second in the middle has twice its share. A loaded machine may shift some.
    steps = [
        after["bytes"] - before["bytes"]
        for before, after in pairwise(rows)
        if before["t_s"] > 0.3 and after["t_s"] < 1.6
    ]
    assert max(steps) < 2 * 250_000


def test_a_congestion_control_that_does_not_exist_ends_the_program_before_the_start(tmp_path):
    command = [
        sys.executable,
        "-m",
        TRAFFIC_PROGRAM,
        "send",
        replace(FLOW, congestion="nope").to_json(),
        "127.0.0.1",
    ]
    env = {**os.environ, protocol.ENV_OUTPUT_DIR: str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no congestion control 'nope'; valid: " in line
    assert "reno" in line
    assert "modprobe tcp_nope" in line


def test_a_sender_without_a_receiver_ends_and_says_why(tmp_path):
    with running(tmp_path, replace(FLOW, at_s=0.2)) as (control, programs):
        programs["receive"].kill()
        programs["receive"].wait()
        control.broadcast({"type": "start", "t0": monotonic_s()})
        assert programs["send"].wait(timeout=5) == 1
    assert "refused" in (tmp_path / "send.log").read_text().splitlines()[-1]


def test_what_a_killed_receiver_had_recorded_can_be_read(tmp_path):
    with running(tmp_path, FLOW) as (control, programs):
        control.broadcast({"type": "start", "t0": monotonic_s()})
        time.sleep(0.6)
        programs["receive"].send_signal(signal.SIGKILL)
    rows = list(read_records(tmp_path / "traffic-bg0-w1.jsonl"))
    assert len(rows) >= 4
    assert rows[-1]["bytes"] > 0


@pytest.mark.iperf3
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_iperf3_makes_the_same_phases(tmp_path, kind):
    flow = replace(
        FLOW, kind=kind, engine="iperf3", at_s=0.2, end_s=2.5, on=Duration(0.9), off=Duration(0.4)
    )
    flow = (
        replace(flow, streams=Streams(3, 3))
        if kind == "tcp"
        else replace(flow, rate_bps=10**7, packet_bytes=1000)
    )
    rows, events = records(tmp_path, flow, 2.8)
    assert [event["planned_s"] for event in events] == [0.2, 1.1, 1.5, 2.4]
    assert at(rows, 0.15)["bytes"] == 0
    assert (
        at(rows, 0.8)["bytes"]
        < at(rows, 1.3)["bytes"]
        == at(rows, 1.45)["bytes"]
        < rows[-1]["bytes"]
    )
    if kind == "tcp":
        assert [at(rows, t_s)["streams"] for t_s in (0.8, 1.4, 2.2)] == [3, 0, 3]
    else:
        assert at(rows, 1.3)["bytes"] * 8 / 0.9 == pytest.approx(10**7, rel=0.2)
        assert rows[-1]["lost"] == 0
