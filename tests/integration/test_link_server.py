"""``testbed link`` against a live run: what it shows is the kernel's, what it changes is recorded
as manual."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import testbed

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.netns, pytest.mark.shared]
SPEC = {
    "name": "links",
    "workers": 2,
    "network": {"link": {"rate": "20mbit"}},
    "workload": {"batch": 32, "stop": {"seconds": 10}, "compute": {"pace": "10ms"}},
    "methods": ["allreduce"],
    "dilation": 2,  # the kernel has half of the rates that people name and see
}


def command(*arguments):
    return [sys.executable, "-m", "testbed.cli", *map(str, arguments)]


def link(run, *arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command("link", "--run", run, *arguments),
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )


def pcap(data):
    """The packets in a file of libpcap's format."""
    magic, *_, link_type = struct.unpack_from("=IHHiIII", data)
    assert (magic, link_type) == (0xA1B23C4D, 1), "nanoseconds, Ethernet"
    place, packets = 24, []
    while place < len(data):
        size = struct.unpack_from("=IIII", data, place)[2]
        packets.append(data[place + 16 : place + 16 + size])
        place += 16 + size
    assert place == len(data)
    return packets


def on_host(run, host, *argv):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command("exec", "--run", run, host, "--", *argv),
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )


def test_show_and_change_a_link_of_a_live_run(tmp_path):
    path = tmp_path / "links.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command("run", path, "--out", tmp_path / "runs"),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/cells/*/links.sock")):
        assert time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    (run,) = tmp_path.glob("runs/*")
    time.sleep(2)

    shown = json.loads(link(run, "--json").stdout)
    assert set(shown) == {"w0", "w1"}
    assert shown["w0"]["state"]["up"]["rate_bps"] == 20_000_000
    assert 10e6 < shown["w0"]["up"]["carried_bps"] < 21e6

    changed = link(run, "w1", "--set", "rate=4mbit", "--set", "down.queue=20ms")
    assert changed.returncode == 0, changed.stderr
    assert "4 Mbit/s" in changed.stdout.replace("\xa0", " ")

    told = on_host(
        run, "w1", "sh", "-c", "cat /proc/net/fib_trie; pwd; echo $0 $1; exit 7", "w0", "w9"
    )
    assert told.returncode == 7, told.stderr
    assert "10.77.0.2" in told.stdout and "10.77.0.1\n" not in told.stdout, "in w1's network"
    assert told.stdout.splitlines()[-2:] == [str(Path.cwd()), "10.77.0.1 w9"]
    nowhere = subprocess.run(
        command("capture", "--run", run, "w0", "--out", tmp_path / "none" / "w0.pcap"),
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert nowhere.returncode == 1 and nowhere.stderr.endswith("No such file or directory\n"), (
        nowhere.stderr
    )
    assert nowhere.stderr.count("\n") == 1
    wrong = on_host(run, "w7", "true")
    assert wrong.returncode == 2 and "there is no host 'w7'; did you mean" in wrong.stderr

    for arguments, words in (
        (("w9",), "did you mean"),
        (("w0", "--set", "rate=fast"), "'fast' is not a rate"),
        (("w0", "--set", "rat=5mbit"), "did you mean 'rate'?"),
        (("w0", "--set", "delay=5ms"), "can have no delay or loss"),
        (("w0", "--set", "down.jitter=5ms"), "needs a delay of 10ms or more"),
        (("w0", "--set", "queue=100B"), "one frame"),
    ):
        refused = link(run, *arguments)
        assert refused.returncode == 2, refused.stdout
        assert words in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1

    seen = command("capture", "--run", run, "w0", "--out", tmp_path / "w0.pcap")
    told = subprocess.run(
        ["timeout", "-s", "INT", "2.5", *seen], capture_output=True, text=True, env=env, check=False
    )
    packets = pcap((tmp_path / "w0.pcap").read_bytes())
    assert told.stderr == f"{len(packets)} packets captured, 0 dropped for want of time\n"
    assert len(packets) > 20 and {packet[12:14] for packet in packets} == {b"\x08\x00"}, "IPv4 only"
    w0, w1 = bytes([10, 77, 0, 1]), bytes([10, 77, 0, 2])
    assert {(packet[26:30], packet[30:34]) for packet in packets} == {(w0, w1), (w1, w0)}

    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3, out  # what was changed by hand is no evidence for the spec
    assert "by hand" in out
    loaded = testbed.load_run(run)
    (event,) = loaded.events[loaded.events["kind"] == "manual"].to_dict("records")
    assert event["link"] == "w1"
    assert event["verified"]
    assert json.loads(event["state"])["down"]["rate_bps"] == 2_000_000
    after = loaded.links[
        (loaded.links["link"] == "w1") & (loaded.links["t_s"] > event["applied_s"] + 0.5)
    ]
    assert set(after["rate_bps"]) == {4_000_000}

    gone = link(run)
    assert gone.returncode == 2
    assert "no cell is running" in gone.stderr


def test_a_capture_ends_with_its_interface_and_says_what_it_has_seen(tmp_path):
    file = tmp_path / "v0.pcap"
    commands = f"""
        ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
        {sys.executable} -m testbed.links.capture v0 {file} &
        while ! test -s {file}; do sleep 0.1; done
        ip link set v0 down; wait $!"""
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", commands],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=30,
    )
    packets = pcap(file.read_bytes())
    assert done.stderr == f"{len(packets)} packets captured, 0 dropped for want of time\n"
    assert done.returncode == 0
