"""Does the estimate of the network follow the links? Four Gloo workers on shaped links, the
estimate decides what they send.

    python experiments/bench/sensing.py [SECONDS] [FIGURE.html] [RTT_MS]

SECONDS: length of each phase (default 6). RTT_MS: of every path, made by netem or the delay line
(default 0). Every step computes for 60 ms (a ResNet-18 whose arithmetic is waiting), and netsense
exchanges its gradients as it sees fit. In the last phase a TCP flow competes for the link into one
worker.

Prints for each phase the true share (``NetworkModel.bandwidth_bps``), the estimate after 20 steps
(the last one, if there are fewer) with its error, that of the round-trip time, the errors from
there to the end of the phase (10th and 90th percentile), and how many steps it took to come within
20 %, counted from the first step that ended after the change. Beside a competing flow the true
share is what that flow left over, as a median over 16 steps. Writes a figure, and beside it the
steps as JSON lines.
"""

import argparse
import json
import math
import os
import selectors
import statistics
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from private_namespaces import enter_sandbox

from netsenseml.records import RecordFile, monotonic_s, read_records
from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.kernel_support import missing_kinds
from testbed.links.state import LinkParameters, LinkState
from testbed.traffic import tcp as traffic
from testbed.traffic.flows import Flow, Phase

RANKS = 4
COMPUTE_S = 0.06
RATES = (20e6, 100e6, 500e6, 100e6, 20e6, 100e6, 500e6, 100e6)
"""Of the phases; in the last one there is competition."""
PAYLOAD_SHARE = 1448 / 1514
"""TCP payload in an Ethernet frame."""
ACKNOWLEDGED = 0.98
"""What the acknowledgements of the opposite flow leave."""
SETTLED_STEPS, CLOSE = 20, 0.2
SCHEME_STEPS = 25
SLICE_S = 0.005


def worker(rank: int, address: str, directory: Path) -> None:
    """Train until killed, with a model that only takes its time."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import netsenseml
    from testbed.worker.emulate import Timing
    from testbed.worker.zoo import make_emulated

    os.environ.update(MASTER_ADDR=address, MASTER_PORT="29500", GLOO_SOCKET_IFNAME="eth0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    model = make_emulated("resnet18", {}, Timing(COMPUTE_S, 0.02, seed=rank))
    ddp = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    session = netsenseml.attach(ddp, "netsense", record=directory / f"steps-{rank}.jsonl")
    (directory / f"origin-{rank}").write_text(str(monotonic_s() - session.elapsed_s))
    model.taken_s = lambda: session.blocked_s
    x = torch.zeros(1, requires_grad=True)
    while True:
        model.begin()
        ddp.zero_grad(set_to_none=False)
        ddp(x).backward()
        model.end()
        session.step()


def compete(end: str, address: str, directory: Path) -> None:
    """Be one end of a TCP flow until killed; the receiving end notes every 5 ms what has come."""
    flow = Flow(name="rival", source="bg", target="w1", kind="tcp")
    with selectors.SelectSelector() as selector:
        if end == "send":
            sender = traffic.Sender(flow, address, selector)
            sender.begin(Phase(0, math.inf, 1))
        else:
            receiver = traffic.Receiver(flow, address, selector)
            rows = RecordFile(directory / "rival.jsonl")
        due_s = 0.0
        while True:
            for key, _ in selector.select(SLICE_S):
                key.data()
            if end == "receive" and monotonic_s() >= due_s:
                receiver.collect()
                rows.append([{"t_s": monotonic_s(), "bytes": receiver.bytes}])
                due_s = monotonic_s() + SLICE_S


def both(rate_bps: float, rtt_s: float) -> LinkState:
    parameters = LinkParameters(rate_bps=round(rate_bps), queue_s=max(0.05, rtt_s))
    return LinkState(parameters, replace(parameters, delay_s=rtt_s / 2))


def measure(server: ForkServer, seconds: float, scratch: Path, rtt_s: float) -> list[float]:
    """Run the phases; returns when each began, by the clock of rank 0's records."""
    names = [f"w{rank}" for rank in range(RANKS)]
    states = {name: both(RATES[0], rtt_s) for name in names} | {"bg": both(1e9, 0)}
    impaired = frozenset((name, "down") for name in names) if rtt_s else frozenset()
    engine = "userspace" if missing_kinds(["netem"]) else "netem"
    begins = []
    with NetnsLab(LabPlan(states, impaired=impaired, engine=engine), server) as lab:

        def start(host: str, *arguments: str) -> Any:
            program = ["python", str(Path(__file__).resolve()), *arguments, str(scratch)]
            return lab.hosts[host].start(program, {}, scratch / "log")

        workers = [
            start(name, "worker", str(rank), lab.hosts["w0"].address)
            for rank, name in enumerate(names)
        ]
        steps = scratch / "steps-0.jsonl"
        while not (steps.exists() and steps.stat().st_size):
            assert not any(process.poll() for process in workers), (scratch / "log").read_text()
            time.sleep(0.1)
        for number, rate_bps in enumerate(RATES):
            if number == len(RATES) - 1:
                start("w1", "receive", lab.hosts["w1"].address)
                time.sleep(1)
                start("bg", "send", lab.hosts["w1"].address)
            lab.links.apply({name: both(rate_bps, rtt_s) for name in names})
            begins.append(monotonic_s())
            time.sleep(seconds)
        begins.append(monotonic_s())
        origin_s = float((scratch / "origin-0").read_text())
    return [begin_s - origin_s for begin_s in begins]


def rival_bps(
    steps: Sequence[dict[str, Any]], rival: Sequence[dict[str, Any]], origin_s: float
) -> list[float]:
    """Rate in bits/s of the rival during each step's exchange."""
    times = [row["t_s"] for row in rival]

    def carried(at_s: float) -> float:
        i = min(max(bisect_right(times, at_s), 1), len(times) - 1)
        a, b = rival[i - 1], rival[i]
        share = min(max((at_s - a["t_s"]) / (b["t_s"] - a["t_s"]), 0.0), 1.0)
        return a["bytes"] + share * (b["bytes"] - a["bytes"])

    ends = [(origin_s + row["t_s"], row["comm_s"]) for row in steps]
    return [
        8 * (carried(end_s) - carried(end_s - took_s)) / max(took_s, 1e-3) for end_s, took_s in ends
    ]


def report(
    begins: Sequence[float],
    steps: Sequence[dict[str, Any]],
    windows: Sequence[dict[str, Any]],
    rival: Sequence[dict[str, Any]],
    rtt_s: float,
    origin_s: float,
) -> None:
    """Add to every step its true share, and print the table. windows: the steps of the rank that
    the rival sends to."""
    print(
        "rate         true share  after 20   error   RTT  p10 … p90 later  steps to 20 %   steps "
        " mostly by"
    )
    for number, rate_bps in enumerate(RATES):
        phase = [row for row in steps if begins[number] <= row["t_s"] < begins[number + 1]]
        competing = number == len(RATES) - 1
        taken = (
            rival_bps(windows[steps.index(phase[0]) :][: len(phase)], rival, origin_s)
            if competing
            else [0.0] * len(phase)
        )
        shares = [(rate_bps * PAYLOAD_SHARE - rate) * ACKNOWLEDGED for rate in taken]
        for row, share in zip(phase, shares, strict=True):
            row["share_bps"] = share
        if competing:  # what a flow takes varies from step to step; nobody could follow that
            shares = [statistics.median(shares[max(0, i - 15) : i + 1]) for i in range(len(shares))]
        errors = [
            row["bandwidth_bps"] / share - 1 for row, share in zip(phase, shares, strict=True)
        ]
        near = next((str(i + 1) for i, error in enumerate(errors) if abs(error) <= CLOSE), "never")
        settled = min(SETTLED_STEPS, len(phase)) - 1  # a phase on a thin link may have fewer
        rest = sorted(errors[settled:])
        after = phase[settled]["bandwidth_bps"]
        round_trip = phase[settled]["min_rtt_s"]
        rtt = f"{round_trip / rtt_s - 1:+.1%}" if rtt_s and round_trip else "–"
        print(
            f"{rate_bps / 1e6:3.0f}"
            f" Mbit/s{'*' if competing else ' '}{shares[settled] / 1e6:11.1f}{after / 1e6:10.1f}"
            f"{errors[settled]:+8.1%}{rtt:>7}{rest[len(rest) // 10]:+8.1%}"
            f" … {rest[len(rest) * 9 // 10]:+6.1%}{near:>12}{len(phase):10} "
            f" {statistics.mode(row['scheme'] for row in phase[settled:])}",
            flush=True,
        )
    print(
        "* beside a TCP flow, behind whose packets all have to queue: a part of the time is"
        " latency, not bandwidth"
    )


def draw(steps: Sequence[dict[str, Any]], target: Path) -> None:
    """Write the figure."""
    import plotly.graph_objects as go

    begin_s = steps[0]["t_s"]
    figure = go.Figure()
    for name, key, line in (
        ("true share", "share_bps", {"color": "black", "shape": "hv", "width": 1.5}),
        ("estimate", "bandwidth_bps", {"color": "#d62728", "width": 2}),
    ):
        values = [row.get(key) and row[key] / 1e6 for row in steps]
        figure.add_scatter(
            x=[row["t_s"] - begin_s for row in steps], y=values, name=name, line=line
        )
    figure.update_yaxes(type="log", title="payload, Mbit/s").update_xaxes(title="time, s")
    figure.update_layout(title="Estimate and true share of the link", template="plotly_white")
    figure.write_html(target)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "worker":
        return worker(int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    if len(sys.argv) > 1 and sys.argv[1] in ("send", "receive"):
        return compete(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seconds", type=float, nargs="?", default=6)
    figure = Path(__file__).parents[2] / "runs" / "sensing.html"
    parser.add_argument("figure", type=Path, nargs="?", default=figure)
    parser.add_argument("rtt_ms", type=float, nargs="?", default=0)
    given = parser.parse_args()
    seconds, target, rtt_s = given.seconds, given.figure, given.rtt_ms / 1e3
    enter_sandbox()
    with ForkServer() as server, tempfile.TemporaryDirectory() as scratch:
        begins = measure(server, seconds, Path(scratch), rtt_s)
        steps, windows, rival = (
            list(read_records(Path(scratch) / name))
            for name in ("steps-0.jsonl", "steps-1.jsonl", "rival.jsonl")
        )
        origin_s = float((Path(scratch) / "origin-1").read_text())
        report(
            begins,
            [row for row in steps if row["bandwidth_bps"]],
            windows[: len(steps)],
            rival,
            rtt_s,
            origin_s,
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    draw(steps, target)
    target.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    print(f"figure: {target}")
    return None


if __name__ == "__main__":
    main()
