"""How long a swarm lab takes to make and to remove, and how late links change in it.

    python tests/swarm/swarm_nodes.py -- python experiments/bench/swarm_scale.py [--hosts 8 32 64]

on three nodes of this machine, or without the first part on the manager of a swarm. Every link
changes ten times a second for three seconds; how late a change is, is by the clock of its node
against the orchestrator's.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from netsenseml.records import monotonic_s
from testbed.labs.base import LabError, LabPlan, View
from testbed.labs.swarm import Swarm, SwarmLab
from testbed.links.state import LinkParameters, LinkState
from testbed.recording.recorder import Recording
from testbed.spec.models import OVERLAY_MTU
from testbed.timeline import Change

SECONDS, PER_SECOND = 3, 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[8, 32, 64])
    options = parser.parse_args()
    begin_s = time.monotonic()
    with Swarm() as swarm:
        print(
            f"agents on {', '.join(swarm.agents())}: {time.monotonic() - begin_s:.1f} s", flush=True
        )
        for count in options.hosts:
            with tempfile.TemporaryDirectory() as scratch:
                measure(count, swarm, Path(scratch))


def measure(count: int, swarm: Swarm, directory: Path) -> None:
    hosts = [f"w{number}" for number in range(count)]
    cell = directory / "cells" / "scale"
    cell.mkdir(parents=True)
    view = View(directory, (), cell / "shared", {host: (cell / "hosts" / host,) for host in hosts})
    states = [
        LinkState(LinkParameters(rate), LinkParameters(rate)) for rate in (10_000_000, 20_000_000)
    ]
    plan = LabPlan(dict.fromkeys(hosts, states[0]), mtu=OVERLAY_MTU, view=view)
    moments = range(1, SECONDS * PER_SECOND + 1)
    timeline = [
        Change(one / PER_SECOND, host, states[one % 2]) for one in moments for host in hosts
    ]
    begin_s = time.monotonic()
    with SwarmLab(plan, swarm, directory) as lab:
        made_s = time.monotonic()
        with lab.recorder(Recording(cell, timeline)) as recorder:
            recorder.begin(monotonic_s())
            time.sleep(SECONDS + 1)
        ended_s = time.monotonic()
    removed_s = time.monotonic()
    events = pd.read_json(cell / "events.jsonl", lines=True)
    events = events[events["kind"] == "schedule"]
    late_ms = (events["applied_s"] - events["planned_s"]) * 1e3
    print(
        f"{count} hosts: made in {made_s - begin_s:.1f} s, removed in {removed_s - ended_s:.1f} s;"
        f" {len(events)} of {len(timeline)} changes, late by {late_ms.median():.2f} ms (median),"
        f" {late_ms.quantile(0.99):.2f} (p99), {late_ms.max():.2f} (most), unsure by"
        f" {events['unsure_s'].max() * 1e3:.2f} ms",
        flush=True,
    )


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(str(error))
