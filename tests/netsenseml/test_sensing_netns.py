"""Sensing on a real shaped link: what the kernel and the times of transfers say is what the link was set to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.labs.netns import enclosure

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.netns

# One rank "exchanges" with a peer that answers with a byte when all has come. After that it sends a byte on another connection,
# as ranks do when they agree, whose round trip waits behind no payload. Prints a JSON line a step.
SENDER = """
import json, random, socket, sys, time
from netsenseml.sensing.network import NetworkEstimate, Transfer
from netsenseml.sensing.tcp import TcpMonitor
def connected():
    while True:
        try: return socket.create_connection((sys.argv[1], 5001))
        except OSError: time.sleep(0.02)
peer, agreement = connected(), connected()
estimate, monitor, draw = NetworkEstimate(), TcpMonitor(), random.Random(0)
while True:
    payload = int((estimate.beta_bps or 10e6) / 8 * 0.06 * draw.uniform(0.5, 1))
    began_s = time.monotonic()
    peer.sendall(payload.to_bytes(4, "big") + bytes(payload))
    peer.recv(1)
    transfer = Transfer(payload, 2, time.monotonic() - began_s)
    sample = monitor.sample()
    estimate.update([transfer], sample.bandwidth_bps, sample.min_rtt_s)
    print(json.dumps([time.monotonic(), estimate.beta_bps, sample.bandwidth_bps, sample.min_rtt_s]), flush=True)
    agreement.send(b"?")
    agreement.recv(1)
    time.sleep(0.03)
"""
RECEIVER = """
import socket
with socket.create_server(("", 5001)) as server: (peer, _), (agreement, _) = server.accept(), server.accept()
while True:
    left = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
    while left: left -= len(peer.recv(min(left, 1 << 20)))
    peer.send(b"!")
    agreement.send(agreement.recv(1))
"""
LAB = f"""
import json, time
from pathlib import Path
from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.state import LinkState, Shape

def both(rate_bps):
    return LinkState(Shape(rate_bps=rate_bps), Shape(rate_bps=rate_bps))

rates, begins = (20_000_000, 100_000_000, 20_000_000), []
with ForkServer() as server:
    with NetnsLab(LabPlan({{n: both(rates[0]) for n in ("a", "b")}}), server) as lab:
        lab.hosts["b"].start(["python", "-c", {RECEIVER!r}], {{}}, Path("receiver"))
        lab.hosts["a"].start(["python", "-c", {SENDER!r}, lab.hosts["b"].address], {{}}, Path("sender"))
        while not Path("sender").exists() or not Path("sender").read_text(): time.sleep(0.05)
        for rate in rates:
            lab.links.apply({{name: both(rate) for name in lab.hosts}})
            begins.append(time.monotonic())
            time.sleep(3)
print(json.dumps(begins))
"""


def test_bandwidth_follows_a_link_and_latency_is_not_taken_from_it(tmp_path):
    done = subprocess.run(
        [*enclosure(), sys.executable, "-c", LAB],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    begins = json.loads(done.stdout)
    rows = [json.loads(line) for line in (tmp_path / "sender").read_text().splitlines()]
    for rate_mbit, begin_s, end_s in zip((20, 100, 20), begins, [*begins[1:], begins[-1] + 3], strict=True):
        phase = [row for row in rows if begin_s < row[0] < end_s][-10:]
        share_bps = rate_mbit * 1e6 * 1448 / 1514 * 0.98
        for _, beta_bps, kernel_bps, min_rtt_s in phase[-3:]:
            assert beta_bps == pytest.approx(share_bps, rel=0.2)
            assert kernel_bps == pytest.approx(share_bps, rel=0.3)
            assert min_rtt_s < 0.005
