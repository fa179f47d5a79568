"""Changing 64 links ten times a second while they carry traffic: how late, at what cost, and does
the rate follow?

    python experiments/bench/link_changes.py [LINKS] [SECONDS]

1. Lateness: every link gets a new rate ten times a second; prints the percentiles of applied_s -
planned_s from the event log.
2. Rate after a change: a saturated link alternates between two rates; prints carried ÷ set in the
   first 200 ms after one, for UDP, which is there at once, and for one TCP flow, which has to find
   the new rate.
3. Cost: one change of all links as netlink batches against one call of tc for each qdisc, in turn.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from private_namespaces import enter_sandbox

from netsenseml.records import monotonic_s, read_records
from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links import measurement_programs
from testbed.links.qdiscs import compile_tree, tc_commands
from testbed.links.state import LinkParameters, LinkState
from testbed.recording.driver import LinkDriver
from testbed.timeline import Change

SINK = (
    "import socket; s = socket.create_server(('0.0.0.0', 5001)); c, _ = s.accept()\nwhile c.recv(1"
    " << 20): pass"
)
SOURCE = """import socket, sys, time
while True:
    try: s = socket.create_connection((sys.argv[1], 5001)); break
    except OSError: time.sleep(0.1)
while True: s.send(b"x" * 65536)
"""
LOW, HIGH = 2_000_000, 4_000_000
SLOW, FAST = 20_000_000, 100_000_000


def both(rate_bps: int) -> LinkState:
    return LinkState(LinkParameters(rate_bps=rate_bps), LinkParameters(rate_bps=rate_bps))


def plan(names: Sequence[str], *rates: int) -> LabPlan:
    return LabPlan({name: both(rates[0]) for name in names})


def start_ring(lab: NetnsLab, log: Path) -> None:
    """Every host sends to the next one, as fast as it can."""
    hosts = list(lab.hosts.values())
    for host in hosts:
        host.start(["python", "-S", "-c", SINK], {}, log)
    for host, following in zip(hosts, hosts[1:] + hosts[:1], strict=True):
        host.start(["python", "-S", "-c", SOURCE, following.address], {}, log)
    time.sleep(1 + 0.05 * len(hosts))


def lateness(server: ForkServer, links: int, seconds: float, scratch: Path) -> None:
    names = [f"w{i}" for i in range(links)]
    timeline = [
        Change(round(1 + step / 10, 6), name, both(LOW + (HIGH - LOW) * ((step + i) % 11) // 10))
        for step in range(round(seconds * 10))
        for i, name in enumerate(names)
    ]
    with NetnsLab(plan(names, HIGH, LOW), server) as lab:
        start_ring(lab, scratch / "log")
        before = {place: counters.bytes for place, counters in lab.links.counters().items()}
        with LinkDriver(lab.links, timeline, monotonic_s(), scratch) as driver:
            time.sleep(seconds + 1.5)
        assert driver.failure is None, driver.failure
        carried = statistics.mean(
            c.bytes - before[place] for place, c in lab.links.counters().items()
        )
    events = [row for row in read_records(scratch / "events.jsonl") if row["kind"] == "schedule"]
    late_ms = sorted((row["applied_s"] - row["planned_s"]) * 1e3 for row in events)
    at = {
        f"p{share}": late_ms[min(len(late_ms) - 1, len(late_ms) * share // 100)]
        for share in (50, 90, 99)
    }
    print(
        f"lateness over {len(events)} changes of {links} links in {seconds:g} s, each carrying "
        f"{carried * 8 / (seconds + 1.5) / 1e6:.2f} Mbit/s: "
        + ", ".join(f"{name} {value:.2f} ms" for name, value in at.items())
        + f", max {late_ms[-1]:.2f} ms; verified {all(row['verified'] for row in events)}"
    )


def start_flood(lab: NetnsLab, log: Path) -> None:
    """w0 sends UDP to w1 at more than the higher rate."""
    lab.hosts["w1"].start(measurement_programs.command("ignore"), {}, log)
    words = (
        lab.hosts["w1"].address,
        monotonic_s(),
        60,
        1.3 * FAST,
        measurement_programs.UDP_HEADERS_BYTES + 1448,
    )
    lab.hosts["w0"].start(measurement_programs.command("flood", *words), {}, log)
    time.sleep(1)


def rate_after_change(
    server: ForkServer, start: Callable[[NetnsLab, Path], None], name: str, scratch: Path
) -> None:
    ratios = []
    with NetnsLab(plan(["w0", "w1"], FAST, SLOW), server) as lab:
        start(lab, scratch / "log")
        for step in range(20):
            rate = (SLOW, FAST)[step % 2]
            lab.links.apply({name: both(rate) for name in lab.hosts})
            begin, first = time.monotonic(), lab.links.counters()["w0", "up"].bytes
            time.sleep(0.2)
            last, end = lab.links.counters()["w0", "up"].bytes, time.monotonic()
            ratios.append((last - first) * 8 / (end - begin) / rate)
            time.sleep(0.5)
    falls, rises = ratios[::2], ratios[1::2]
    print(
        f"carried ÷ set in the first 200 ms ({name}), 100 → 20 Mbit/s: median"
        f" {statistics.median(falls):.3f} (from {min(falls):.3f} to {max(falls):.3f}); 20 → 100"
        f" Mbit/s: median {statistics.median(rises):.3f} (from {min(rises):.3f} to"
        f" {max(rises):.3f})"
    )


def cost(server: ForkServer, links: int, scratch: Path) -> None:
    names = [f"w{i}" for i in range(links)]
    ours, theirs = [], []
    tree = compile_tree(LinkParameters(rate_bps=LOW))
    for command in tc_commands(tree, "lo"):
        subprocess.run(command.split(), check=True)
    with NetnsLab(plan(names, HIGH, LOW), server) as lab:
        for step in range(5):
            changes = {name: both(LOW + step) for name in names}
            begin = time.perf_counter()
            assert all(applied.verified for applied in lab.links.apply(changes).values())
            ours.append(time.perf_counter() - begin)
            after = compile_tree(LinkParameters(rate_bps=HIGH + step))
            commands, tree = tc_commands(after, "lo", before=tree), after
            begin = time.perf_counter()
            for command in 2 * links * commands:
                subprocess.run(command.split(), check=True)
            theirs.append(time.perf_counter() - begin)
    mine, tc = statistics.median(ours), statistics.median(theirs)
    print(
        f"one change of {links} links, up and down: {mine * 1e3:.1f} ms, with tc {tc * 1e3:.1f} ms,"
        f" ratio {tc / mine:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("links", type=int, nargs="?", default=64)
    parser.add_argument("seconds", type=float, nargs="?", default=60)
    given = parser.parse_args()
    links, seconds = given.links, given.seconds
    enter_sandbox()
    with ForkServer() as server, tempfile.TemporaryDirectory() as scratch:
        cost(server, links, Path(scratch))
        rate_after_change(server, start_flood, "UDP", Path(scratch))
        rate_after_change(server, start_ring, "TCP", Path(scratch))
        lateness(server, links, seconds, Path(scratch))


if __name__ == "__main__":
    main()
