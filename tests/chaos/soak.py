"""Does a run of hours keep its size? One cell whose links are changed and read ten times a second,
watched from outside.

    python tests/chaos/soak.py [--hours 2] [--links 64] [--workers 8] [--out DIRECTORY]
    python tests/chaos/soak.py --judge --out DIRECTORY

Eight workers train with netsense, and the other hosts send each other datagrams, two and two. All
links get a new rate ten times a second through the socket that ``testbed link`` uses; the links of
four workers have a timeline of ten changes a second besides. Every ten seconds the memory of each
process, its descriptors and its threads are written to soak.csv (/proc/PID/smaps_rollup).

Prints a table by kind of process: what memory each has to itself (USS), and all that is resident of
it (RSS), in the first tenth of the time, once it has settled for half an hour (a quarter of a
shorter run), and in the last; the most by which what is resident of one has grown, as a share of
what it has to itself; its descriptors. Exit code 1 if that is more than 2 % and 0.25 MiB, or if one
keeps descriptors, or if the run failed; whether other programs made it not valid is no matter here.

Of what is forked a page becomes its own when it is first written to, and was resident before: what
a worker has to itself goes on to grow a little by that, and is no measure of what it takes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import yaml

from testbed.recording.link_server import live_cell, send_request

ROOT = Path(__file__).parents[2]
CHANGES_PER_S = 10
GROWTH = 0.02
_NOISE_MIB = 0.25
_SETTLED_S = 1800.0
_EVERY_S = 10.0


def spec_of(seconds: float, links: int, workers: int) -> dict[str, Any]:
    others = [f"bg{n}" for n in range(links - workers)]
    pairs = zip(others[::2], others[1::2], strict=True)
    return {
        "name": "soak",
        "workers": workers,
        "network": {
            "link": {"rate": "5mbit"},
            "links": {name: {"rate": "5mbit"} for name in others},
        },
        "schedule": [
            {
                "at": "1s",
                "links": [f"w{n}" for n in range(min(4, workers))],
                "walk": {"rate": ["2mbit", "8mbit"]},
                "every": "100ms",
            }
        ],
        "traffic": [
            {"from": source, "to": target, "udp": {"rate": "100kbit"}} for source, target in pairs
        ],
        "workload": {
            "model": {"name": "mlp", "hidden": [64]},
            "stop": {"seconds": seconds},
            "compute": {"pace": "250ms"},
            "evaluate_every": "10s",
        },
        "methods": ["netsense"],
    }


def processes_of(orchestrator: int) -> Iterator[tuple[str, psutil.Process]]:
    """Every process of a run, with what it is."""
    with suppress(psutil.Error):
        first = psutil.Process(orchestrator)
        below = first.children(recursive=True)
        servers = {one.pid for one in below if "testbed.labs.forkserver" in _words(one)}
        yield "orchestrator", first
        for one in below:
            words = _words(one)
            if "testbed.run.sandbox_main" in words and "unshare" not in words[0]:
                yield "cell", one
            elif one.pid in servers and one.ppid() not in servers:
                yield "fork server", one
            elif one.pid in servers:
                # forked from it, and named like it; a worker's Gloo and recorder have threads
                yield ("worker" if one.num_threads() > 4 else "traffic"), one
            elif words:
                yield "unshare and inits", one


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def watched(orchestrator: int, begun_s: float) -> list[dict[str, Any]]:
    rows = []
    for kind, process in processes_of(orchestrator):
        with suppress(psutil.Error):
            memory = process.memory_full_info()
            rows.append(
                {
                    "t_s": round(time.monotonic() - begun_s, 1),
                    "kind": kind,
                    "pid": process.pid,
                    "uss_mib": memory.uss / 2**20,
                    "rss_mib": memory.rss / 2**20,
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                    "cpu_s": sum(process.cpu_times()[:2]),
                }
            )
    return rows


def soak(process: subprocess.Popen[bytes], runs: Path, out: Path, seconds: float) -> None:
    """Change all links ten times a second while the cell lives, and write soak.csv."""
    draw = random.Random(0)
    cell, begun_s, next_row_s, next_change_s, changes = None, 0.0, 0.0, 0.0, 0
    while process.poll() is None:
        now_s = time.monotonic()
        if cell is None:
            cell = next((found for run in runs.glob("*") if (found := live_cell(run))), None)
            if cell is not None and not (cell / "events.jsonl").exists():
                cell = None  # its links are not yet driven
            begun_s = next_row_s = next_change_s = now_s
            time.sleep(0.2)
            continue
        if now_s - begun_s > seconds - 1:
            break
        if now_s < next_change_s:
            time.sleep(next_change_s - now_s)
        next_change_s += 1 / CHANGES_PER_S
        with suppress(OSError, ValueError):
            changes += "links" in send_request(
                cell, {"links": [], "set": {"rate": f"{draw.randint(2, 8)}mbit"}}
            )
        if now_s >= next_row_s:
            next_row_s += _EVERY_S
            frame = pd.DataFrame(watched(process.pid, begun_s))
            frame.to_csv(
                out / "soak.csv", mode="a", header=not (out / "soak.csv").exists(), index=False
            )
            if round(now_s - begun_s) % 300 < _EVERY_S:
                sums = frame.groupby("kind")["uss_mib"].sum().round(1).to_dict()
                print(
                    f"{now_s - begun_s:6.0f} s, all links changed {changes} times, MiB: {sums}",
                    flush=True,
                )
    per_s = changes / (time.monotonic() - begun_s)
    print(f"all links changed {changes} times, {per_s:.1f} a second; the cell ends")


def judge(out: Path) -> bool:
    """Print the table; whether all kept their size."""
    rows = pd.read_csv(out / "soak.csv")
    end_s = rows["t_s"].max()
    begin_s = min(_SETTLED_S, end_s / 4)
    tenth_s = (end_s - begin_s) / 10
    first = rows[rows["t_s"].between(begin_s, begin_s + tenth_s)]
    last = rows[rows["t_s"] >= end_s - tenth_s]
    well = True
    print(f"{'':20}{'number':>7}{'own MiB':>16}{'resident MiB':>18}{'grown':>8}{'descriptors':>14}")
    for kind in rows["kind"].unique():
        measured = ["uss_mib", "rss_mib", "descriptors"]
        before, after = (
            part[part["kind"] == kind].groupby("pid")[measured].median() for part in (first, last)
        )
        own, resident = (
            f"{before[column].mean():.1f} → {after[column].mean():.1f}" for column in measured[:2]
        )
        grown = (after - before).dropna()
        share = grown["rss_mib"] / before["uss_mib"].reindex(grown.index)
        well &= not ((grown["rss_mib"] > _NOISE_MIB) & (share > GROWTH)).any()
        well &= not (grown["descriptors"] > 0).any()
        print(
            f"{kind:20}{len(before):7}{own:>16}{resident:>18}{share.max():8.1%}"
            f"{before['descriptors'].max():8.0f} → {after['descriptors'].max():.0f}"
        )
    return well


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--links", type=int, default=64)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="for the run and soak.csv (a new directory for temporary files)",
    )
    parser.add_argument("--judge", action="store_true", help="only what is in it already")
    options = parser.parse_args()
    if options.judge:
        if options.out is None:
            parser.error("--judge needs --out")
        return int(not judge(options.out))
    seconds = 3600 * options.hours
    out = options.out or Path(tempfile.mkdtemp(prefix="netsense-soak-"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "soak.csv").unlink(missing_ok=True)
    (out / "soak.yaml").write_text(yaml.safe_dump(spec_of(seconds, options.links, options.workers)))
    command = [
        sys.executable,
        "-m",
        "testbed.cli",
        "run",
        str(out / "soak.yaml"),
        "--out",
        str(out / "runs"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(out / "printed.txt", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )
    try:
        soak(process, out / "runs", out, seconds)
        peak_mib, begun_s = 0.0, time.monotonic()
        while process.poll() is None:
            peak_mib = max(
                [
                    peak_mib,
                    *(
                        row["rss_mib"]
                        for row in watched(process.pid, 0.0)
                        if row["kind"] == "orchestrator"
                    ),
                ]
            )
            time.sleep(1)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
    print((out / "printed.txt").read_text())
    print(
        f"exit code {process.returncode}; results and report took {time.monotonic() - begun_s:.0f}"
        f" s, {peak_mib:.0f} MiB at most"
    )
    return int(not judge(out) or process.returncode not in (0, 3))


if __name__ == "__main__":
    sys.exit(main())
