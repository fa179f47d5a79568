"""Between real hosts: only of the connections to peers is the kernel asked."""

import json

import pytest
from sandbox import run_in_sandbox

pytestmark = pytest.mark.netns

# One host connects to two others and to itself, and looks at each by itself. It waits for the lab
# to cut the second one off.
CHOOSER = """
import json, os, socket, sys, time
from pathlib import Path
from netsenseml.sensing.tcp import TcpMonitor, local_address, read
def connected(host):
    while True:
        try: return socket.create_connection((host, 5001))
        except OSError: time.sleep(0.02)
hosts = own, listed, other = sys.argv[1:]
family = socket.AF_INET6 if ":" in own else socket.AF_INET
with socket.create_server((own, 5001), family=family):
    home, near, far = map(connected, hosts)
    socket.setdefaulttimeout(5)
    socket.gethostname = lambda: own
    for connection, size in ((home, 50_000), (near, 30_000), (far, 40_000)):
        connection.sendall(bytes(size))
        while read(connection.fileno()).bytes_acked < size: time.sleep(0.001)
    monitors = [TcpMonitor(peers) for peers in ([own], [own, listed], [other], hosts)]
    acked = [sample and sample.acked_bytes for sample in (monitor.sample() for monitor in monitors)]
    blocking = [os.get_blocking(connection.fileno()) for connection in (home, near, far)]
    print(json.dumps([acked, blocking, local_address("eth0,lo"), local_address(None)]), flush=True)
    while not Path("cut").exists(): time.sleep(0.01)
    near.sendall(bytes(1000))
    far.sendall(bytes(1000))
    def retransmits(): return [read(connection.fileno()).retransmits for connection in (near, far)]
    while retransmits()[0] >= retransmits()[1]: time.sleep(0.01)
    before = retransmits()
    samples = [monitor.sample().retransmits for monitor in monitors[1:3]]
    print(json.dumps([before, samples, retransmits()]), flush=True)
"""
LISTENER = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 5001), family=family) as server: peer, _ = server.accept()
while peer.recv(1 << 16): pass
"""
CUT_LAB = f"""
import sys, time
from pathlib import Path
from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.state import LinkState

def lines(count):
    while not Path("chooser.log").exists() or Path("chooser.log").read_text().count("\\n") < count:
        assert chooser.poll() in (None, 0)
        time.sleep(0.02)

with ForkServer() as server:
    with NetnsLab(LabPlan({{n: LinkState() for n in ("a", "b", "c")}}, ip=int(sys.argv[1])), server) as lab:
        addresses = [host.address for host in lab.hosts.values()]
        for name in ("b", "c"):
            lab.hosts[name].start(["python", "-c", {LISTENER!r}, lab.hosts[name].address], {{}}, Path(f"{{name}}.log"))
        chooser = lab.hosts["a"].start(["python", "-c", {CHOOSER!r}, *addresses], {{}}, Path("chooser.log"))
        lines(1)
        lab.links.apply({{"c": LinkState(connected=False)}})
        Path("cut").touch()
        lines(2)
"""


@pytest.mark.parametrize("ip", ["4", "6"])
def test_only_connections_to_the_peers_count_and_stay_blocking(tmp_path, ip):
    run_in_sandbox(CUT_LAB, tmp_path, ip)
    (acked, blocking, *addresses), (before, samples, after) = map(
        json.loads, (tmp_path / "chooser.log").read_text().splitlines()
    )
    assert acked[0] is None  # to itself
    # SYN counts
    assert acked[1:] == [pytest.approx(size, abs=1) for size in (30_000, 40_000, 40_000)]
    assert blocking == [True, True, True]
    assert addresses == ["10.77.0.1" if ip == "4" else "fd77::1"] * 2
    assert before[0] <= samples[0] <= after[0]
    assert before[1] <= samples[1] <= after[1]
    assert samples[0] < samples[1]
