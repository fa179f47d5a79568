"""How well does a link carry what a trace says? One link follows a trace under a flow that always
wants more.

    python experiments/bench/trace_fidelity.py [TRACE] [SECONDS] [FLOW]...

TRACE: a trace file (default: experiments/traces/cellular.csv). FLOW: udp (a third more than the
trace's highest rate), or tcp and a number of streams (default: udp tcp4 tcp1). Prints for each
flow, over the windows of about 100 ms between two readings of the kernel's counters, the
correlation between the trace's mean rate in the window and the rate that the link carried.

The trace's rate is the planned one, so a change that comes late counts against the link. With TCP
the reaction of the sender to the change is part of what is measured: it loses packets when the rate
falls, and needs a round trip to grow when it rises.
"""

import argparse
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from private_namespaces import enter_sandbox

from netsenseml.records import monotonic_s, read_records
from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.state import LinkParameters, LinkState
from testbed.recording.driver import LinkDriver
from testbed.spec.files import reader
from testbed.timeline import Change, expand
from testbed.timeline.patterns import parse_entry

WARM_S = 2.0
UDP_SINK = (
    "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 5001))\nwhile"
    " s.recv(2048): pass"
)
UDP_SOURCE = """import socket, sys, time
s = socket.socket(type=socket.SOCK_DGRAM); s.connect((sys.argv[1], 5001))
gap = 1514 * 8 / float(sys.argv[2]); sent = 0
begin = time.monotonic()
while True:
    while sent * gap < time.monotonic() - begin:
        try: s.send(bytes(1472))
        except OSError: pass
        sent += 1
    time.sleep(0.001)
"""
TCP_SINK = """import selectors, socket
server = socket.create_server(('', 5001)); chosen = selectors.DefaultSelector()
chosen.register(server, selectors.EVENT_READ)
while True:
    for key, _ in chosen.select():
        if key.fileobj is server: chosen.register(server.accept()[0], selectors.EVENT_READ)
        else: key.fileobj.recv(1 << 20)
"""
TCP_SOURCE = """import selectors, socket, sys
chosen = selectors.DefaultSelector()
for _ in range(int(sys.argv[2])):
    s = socket.create_connection((sys.argv[1], 5001)); s.setblocking(False)
    chosen.register(s, selectors.EVENT_WRITE)
while True:
    for key, _ in chosen.select(): key.fileobj.send(bytes(65536))
"""


def planned(trace: Path, seconds: float) -> tuple[Change, ...]:
    """The timeline of link w1: the trace after a time in which flows find their speed."""
    entry = parse_entry({"at": f"{WARM_S}s", "links": "w1", "trace": trace.name, "repeat": True})
    first = LinkState(LinkParameters(rate_bps=10_000_000), LinkParameters(rate_bps=10_000_000))
    return expand([entry], {"w1": first}, end_s=WARM_S + seconds, read=reader(trace.parent))


def mean_rate_bps(
    times: Sequence[float], rates: Sequence[float], start_s: float, end_s: float
) -> float:
    """Mean between two moments of a rate that holds from each of its times to the next."""
    inner = [start_s, *(at for at in times if start_s < at < end_s), end_s]
    return sum(rates[bisect_right(times, a) - 1] * (b - a) for a, b in pairwise(inner)) / (
        end_s - start_s
    )


def measure(
    server: ForkServer, timeline: Sequence[Change], flow: str, scratch: Path
) -> list[tuple[float, float, float]]:
    """(seconds, planned rate, carried rate) of each window, for a saturating flow from w0 to w1."""
    rates = [change.state.down.rate_bps or 0 for change in timeline]
    states = {"w0": LinkState(), "w1": timeline[0].state}
    end_s = timeline[-1].at_s
    with NetnsLab(LabPlan(states), server) as lab:
        source, sink = lab.hosts["w0"], lab.hosts["w1"]
        if flow == "udp":
            programs = (UDP_SINK, UDP_SOURCE, str(max(rates) * 4 / 3))
        else:
            programs = (TCP_SINK, TCP_SOURCE, flow.removeprefix("tcp") or "1")
        sink.start(["python", "-S", "-c", programs[0]], {}, scratch / "log")
        time.sleep(0.5)
        source.start(
            ["python", "-S", "-c", programs[1], sink.address, programs[2]], {}, scratch / "log"
        )
        with LinkDriver(lab.links, timeline, monotonic_s(), scratch) as driver:
            time.sleep(end_s + 0.5)
        assert driver.failure is None, driver.failure
    rows = [
        row
        for row in read_records(scratch / "links.jsonl")
        if (row["link"], row["direction"]) == ("w1", "down")
    ]
    times = [change.at_s for change in timeline]
    windows = []
    for a, b in pairwise(row for row in rows if WARM_S <= row["t_s"] <= end_s):
        length_s = b["t_s"] - a["t_s"]
        wanted_bps = mean_rate_bps(times, rates, a["t_s"], b["t_s"])
        windows.append((length_s, wanted_bps, (b["bytes"] - a["bytes"]) * 8 / length_s))
    return windows


def report(flow: str, windows: Sequence[tuple[float, float, float]]) -> None:
    """Print one line."""
    lengths, wanted, carried = zip(*windows, strict=True)
    errors = sorted((b - a) / 1e6 for a, b in zip(wanted, carried, strict=True))
    low, middle, high = (errors[len(errors) * share // 100] for share in (5, 50, 95))
    ratio = statistics.fmean(carried) / statistics.fmean(wanted)
    print(
        f"{flow}: correlation {statistics.correlation(wanted, carried):.4f} over {len(windows)}"
        f" windows of {statistics.median(lengths) * 1e3:.0f} ms; carried {ratio:.3f} of the trace;"
        f" carried - planned: p5 {low:+.2f}, median {middle:+.2f}, p95 {high:+.2f} Mbit/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cellular = Path(__file__).parents[1] / "traces" / "cellular.csv"
    parser.add_argument("trace", type=Path, nargs="?", default=cellular)
    parser.add_argument("seconds", type=float, nargs="?", default=60)
    parser.add_argument("flows", nargs="*", default=["udp", "tcp4", "tcp1"])
    given = parser.parse_args()
    enter_sandbox()
    timeline = planned(given.trace, given.seconds)
    print(f"{given.trace.name}: {len(timeline)} changes in {given.seconds:g} s")
    with ForkServer() as server:
        for flow in given.flows:
            with tempfile.TemporaryDirectory() as scratch:
                report(flow, measure(server, timeline, flow, Path(scratch)))


if __name__ == "__main__":
    main()
