"""Does a link carry what its schedule says, in every second? Every pattern of a schedule and every
trace that is shipped.

    python experiments/bench/schedule_fidelity.py [SECONDS]

SECONDS: of each replay (default 8). Links with 1, 10, 50 and 500 Mbit/s at most follow a square, a
sawtooth, a walk and single steps, with a change every 20 ms, 100 ms and 1 s, and the traces of
experiments/traces, while UDP offers a fifth more than the most that they can carry. Prints carried
÷ integral of the limit, over all and in the worst of all seconds, by the kernel's counters, and
what a packet and the frame that keeps its rate after a rise (``testbed.links.qdiscs``) may make of
a second.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from private_namespaces import enter_sandbox
from rich.console import Console
from rich.table import Table

from netsenseml.records import monotonic_s, read_records
from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links import measurement_programs
from testbed.links.kernel_support import missing_kinds
from testbed.links.qdiscs import burst_bytes
from testbed.links.state import LinkParameters, LinkState
from testbed.recording.driver import LinkDriver
from testbed.spec.files import reader
from testbed.timeline import Change, expand
from testbed.timeline.patterns import parse_entry

TRACES = Path(__file__).parents[1] / "traces"
TOPS = (1, 10, 50, 500)
EVERY_MS = (20, 100, 1000)
PATTERNS = ("square", "sawtooth", "walk")
BEGIN_S = 1.0
_WINDOW_S = 1.0


def entry(pattern: str, top_mbps: int, every_ms: int) -> Mapping[str, Any]:
    """One line of a schedule between four fifths of a rate and the whole of it."""
    pair = [f"{top_mbps * 0.8:g}mbit", f"{top_mbps}mbit"]
    every = f"{every_ms}ms"
    match pattern:
        case "square":
            return {"square": {"rate": pair}, "period": f"{2 * every_ms}ms"}
        case "sawtooth":
            return {"sawtooth": {"rate": pair}, "period": f"{5 * every_ms}ms", "every": every}
        case _:
            return {"walk": {"rate": pair}, "every": every}


def replay(
    server: ForkServer, schedules: Mapping[str, tuple[Mapping[str, Any], int]], seconds: float
) -> dict[str, list[Any]]:
    """Name → (time in s, bytes) samples and the timeline, of links that follow one entry each, all
    at once.

    schedules: by name, the entry and the highest rate in bits/s.
    """
    links = {f"w{number}": name for number, name in enumerate(schedules)}
    first = {
        link: LinkState(LinkParameters(), LinkParameters(rate_bps=schedules[name][1]))
        for link, name in links.items()
    }
    entries = [
        parse_entry({"at": f"{BEGIN_S}s", "links": link, **schedules[name][0]})
        for link, name in links.items()
    ]
    timeline = expand(entries, first, end_s=BEGIN_S + seconds, read=reader(TRACES))
    states = {**first, **{f"bg{link[1:]}": LinkState() for link in links}}
    impaired = frozenset((change.link, "down") for change in timeline if change.state.down.impaired)
    plan = LabPlan(
        states, impaired=impaired, engine="userspace" if missing_kinds(["netem"]) else "netem"
    )
    with NetnsLab(plan, server) as lab, tempfile.TemporaryDirectory() as scratch:
        for link in links:
            top = max(change.state.down.rate_bps or 0 for change in timeline if change.link == link)
            lab.hosts[link].start(measurement_programs.command("ignore"), {}, Path(scratch, "log"))
            segments = max(1, min(40, top // 1000 // 8 // 1514))
            words = lab.hosts[link].address, 0, 1e6, 1.2 * top, 1514, segments
            lab.hosts[f"bg{link[1:]}"].start(
                measurement_programs.command("flood", *words), {}, Path(scratch, "log")
            )
        time.sleep(0.5)
        with LinkDriver(lab.links, timeline, monotonic_s(), Path(scratch)) as driver:
            time.sleep(BEGIN_S + seconds + 0.2)
        assert driver.failure is None, driver.failure
        rows, events = (
            list(read_records(Path(scratch, f"{name}.jsonl"))) for name in ("links", "events")
        )
    applied = {
        (event["link"], event["planned_s"]): event["applied_s"]
        for event in events
        if event["kind"] == "schedule"
    }
    return {
        name: [
            [
                (row["t_s"], row["bytes"])
                for row in rows
                if (row["link"], row["direction"]) == (link, "down")
            ],
            [
                Change(applied[link, change.at_s], link, change.state)
                for change in timeline
                if change.link == link and (link, change.at_s) in applied
            ],
        ]
        for link, name in links.items()
    }


def judged(
    samples: Sequence[tuple[float, int]], timeline: Sequence[Change]
) -> tuple[float, float, float, float]:
    """(carried ÷ integral over all, in the worst seconds below and above, what a packet and rises
    may take of a second)."""
    times = np.array([change.at_s for change in timeline])
    rates = np.array([change.state.down.rate_bps or 0 for change in timeline], dtype=float)
    passed = np.append(0.0, np.cumsum(rates[:-1] * np.diff(times)))
    packets = np.array([8 * burst_bytes(int(rate)) if rate else 0 for rate in rates], dtype=float)
    rises = [
        max(0.0, after - before) / before if before else 0.0 for before, after in pairwise(rates)
    ]
    kept = np.append(0.0, np.array(rises) * packets[:-1])
    inside = [(t_s, 8 * count) for t_s, count in samples if t_s >= times[0]]
    t_s, bits = (np.array(column, dtype=float) for column in zip(*inside, strict=True))
    number = np.searchsorted(times, t_s, side="right") - 1
    allowed = passed[number] + (t_s - times[number]) * rates[number]
    last = np.searchsorted(t_s, t_s + _WINDOW_S)
    first = np.flatnonzero(last < len(t_s))
    last = last[first]
    wanted = np.maximum(allowed[last] - allowed[first], 1.0)
    shares = (bits[last] - bits[first]) / wanted
    granted = [
        (packets[max(0, a - 1) : b + 1].max() + kept[a + 1 : b + 1].sum()) / w
        for a, b, w in zip(number[first], number[last], wanted, strict=True)
    ]
    enough = wanted > 10 * 8 * 1514  # in an outage a single frame is many times what may pass
    total = (bits[-1] - bits[0]) / (allowed[-1] - allowed[0])
    return (
        total,
        float(shares[enough].min()),
        float(shares[enough].max()),
        float(np.median(np.array(granted)[enough])),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seconds", type=float, nargs="?", default=8.0)
    seconds = parser.parse_args().seconds
    enter_sandbox()
    table = Table(
        "schedule",
        "most",
        "a change every",
        "carried",
        "worst seconds",
        "a packet and rises may take",
        box=None,
    )
    console = Console(width=130)
    with ForkServer() as server, console.status("replaying"):
        for pattern in PATTERNS:
            for every_ms in EVERY_MS:
                schedules = {f"{top}": (entry(pattern, top, every_ms), top * 10**6) for top in TOPS}
                for top, found in replay(server, schedules, seconds).items():
                    total, low, high, granted = judged(*found)
                    row = (
                        f"{top} Mbit/s",
                        f"{every_ms} ms",
                        f"{total:.4f}",
                        f"{low:.3f} … {high:.3f}",
                        f"{granted:.1%}",
                    )
                    table.add_row(pattern, *row)
        names = sorted(
            path.name for path in TRACES.iterdir() if path.suffix in (".csv", ".packets")
        )
        traces = {name: ({"trace": name, "repeat": True}, 100 * 10**6) for name in names}
        for name, found in replay(server, traces, 5 * seconds).items():
            total, low, high, granted = judged(*found)
            most = max(change.state.down.rate_bps or 0 for change in found[1]) / 1e6
            table.add_row(
                name,
                f"{most:.3g} Mbit/s",
                "–",
                f"{total:.4f}",
                f"{low:.3f} … {high:.3f}",
                f"{granted:.1%}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
