"""Does the verdict notice what is wrong with a cell, and only that? 40 planted deviations, and 40
honest cells.

    python experiments/bench/verdicts.py [CELLS OF EACH] [SEED]

Every trial is a cell of about 3 s as ``testbed run`` runs it: real namespaces, links that follow
some pattern of a schedule at 1, 10, 50 or 500 Mbit/s, calibrated before t = 0, and the verdict of
the summary. A flood, a TCP flow or a training loads the link of w1. In half of the cells something
is wrong behind the testbed's back:

    too fast, too slow    15 % more or 20 % less than the limit that is recorded, or nothing at all
                          after some time
    late                  a change is made 80 ms late, and that is recorded; or it is recorded as if
                          it had been on time
    lossy                 a queue is far too short, or the switch drops what it should forward for
                          0.3 s
    by hand               somebody changes a link of the live cell

Prints a line a trial, then a table; exit code 1 if a deviation is missed or an honest cell blamed.
An honest cell of which the verdict also says that other programs kept this machine busy proves
nothing, and is tried again.
"""

import argparse
import ipaddress
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from netsenseml.records import RecordFile, monotonic_s
from testbed import protocol
from testbed.labs import open_labs
from testbed.labs.base import LabPlan
from testbed.labs.netns import NetnsLab
from testbed.links import measurement_programs, shaper
from testbed.links.qdiscs import ETHERNET_FRAME_BYTES, Tree, compile_tree, tc_commands
from testbed.links.shaper import Applied, Prepared
from testbed.links.state import LinkParameters
from testbed.plan import make_plan
from testbed.recording import link_server
from testbed.results.load import load_run
from testbed.results.summary import summarize
from testbed.run.cell import prepare_cell, run_cell
from testbed.run.directory import SCRIPT
from testbed.run.sweep import PROGRAMS
from testbed.spec.load import validate
from testbed.worker.client import ControlClient

SECONDS = 3.0
PLANTED_AT_S = 0.5
LATE_S = 0.08
LOW = 0.5
RATES = (1_000_000, 10_000_000, 50_000_000, 500_000_000)
PATTERNS = ("constant", "fall", "square", "ramp", "walk", "trace")
LOADS = ("udp", "tcp", "training")
DEVIATIONS = ("too fast", "too slow", "late", "lossy", "by hand")
EXPECTED = {
    "too fast": "above its limit",
    "too slow": "below its limit",
    "late": ("came late", "above its limit"),
    "lossy": ("packets from", "came to no other link"),
    "by hand": "changed by hand",
}
"""Words of the problem that names a deviation."""
TRIES = 5


@dataclass(frozen=True)
class Trial:
    """One cell. deviation: "" if it is honest. variant: which of its kinds."""

    number: int
    deviation: str
    variant: int
    pattern: str
    rate_bps: int
    load: str

    @classmethod
    def draw(cls, number: int, deviation: str, variant: int, source: random.Random) -> "Trial":
        """A trial in which its deviation, if any, matters."""
        pattern, rate_bps, load = (
            source.choice(PATTERNS),
            source.choice(RATES),
            source.choice(LOADS),
        )
        match deviation:
            case "too fast":
                load = source.choice(("udp", "tcp"))
            case "too slow":
                load = "udp"
            case "lossy":
                # The next change of the link would make its queue right again.
                pattern = pattern if variant % 2 else source.choice(("constant", "fall"))
                load = "udp"
            case "late":
                # That a fall was recorded as if it had been on time shows in what was carried; of a
                # rise nobody could tell.
                pattern = "fall" if variant % 2 else source.choice(PATTERNS[1:])
                load = "udp" if variant % 2 else load
        return cls(number, deviation, variant, pattern, rate_bps, load)

    def __str__(self) -> str:
        return (
            f"{self.number:3} {self.deviation or 'clean':9} {self.pattern:9}"
            f" {self.rate_bps / 1e6:4g} Mbit/s  {self.load:9}"
        )


def spec_of(trial: Trial, source: random.Random, directory: Path) -> dict[str, Any]:
    """The spec of a trial: the link of w1 is the bottleneck and follows the schedule, between its
    rate and half of it.

    No rate holds for less than 20 frames take, or what the last frame before a rise still owes
    would count.
    """
    low, high, twice = (f"{round(share * trial.rate_bps)}bit" for share in (LOW, 1, 2))
    shortest_ms = max(20, round(20 * ETHERNET_FRAME_BYTES * 8 / (LOW * trial.rate_bps) * 1e3))
    step_ms = shortest_ms * source.choice((1, 2, 5))
    step = {"every": f"{step_ms}ms"}
    entry: dict[str, Any] = {"at": "0s", "links": "w1"}
    match trial.pattern:
        case "constant":
            schedule = []
        case "fall":
            schedule = [{**entry, "at": "1.2s", "set": {"rate": low}}]
        case "square":
            schedule = [{**entry, "square": {"rate": [high, low]}, "period": f"{2 * step_ms}ms"}]
        case "ramp":
            schedule = [{**entry, "at": "1s", "ramp": {"rate": low}, "over": "2s", **step}]
        case "walk":
            schedule = [{**entry, "walk": {"rate": [low, high]}, **step, "seed": trial.number}]
        case _:
            rates_mbps = (source.uniform(LOW, 1) * trial.rate_bps / 1e6 for _ in range(10))
            lines = [f"{number * step_ms},{rate:.3f}" for number, rate in enumerate(rates_mbps)]
            (directory / "trace.csv").write_text("\n".join(["t_ms,rate_mbps", *lines, ""]))
            schedule = [{**entry, "trace": "trace.csv", "repeat": True}]
    stop = {"seconds": SECONDS}
    arguments = ["load", trial.load, str(trial.rate_bps)]
    program: dict[str, Any] = {
        "script": {"file": f"{SCRIPT}/{Path(__file__).name}", "args": arguments, "stop": stop}
    }
    if trial.load == "training":
        compute = {"pace": source.choice(("20ms", "60ms"))}
        program = {
            "workload": {
                "model": {"name": "mlp", "hidden": [64]},
                "data": "digits",
                "compute": compute,
                "stop": stop,
            }
        }
    return {
        "name": "verdicts",
        "workers": 2,
        "network": {"link": {"rate": high, "queue": "200ms"}, "links": {"w0": {"rate": twice}}},
        "schedule": schedule,
        "methods": [source.choice(("allreduce", {"name": "topk", "ratio": 0.1}, "netsense"))],
        **program,
    }


class Saboteur:
    """Plants a deviation in a running cell; changes queues with programs of its own, not with the
    testbed's code."""

    def __init__(self, trial: Trial, directory: Path) -> None:
        self._trial, self._directory = trial, directory
        self._lab: NetnsLab | None = None
        self._compiled = compile_tree
        self._planted = False

    def opening(self, open_lab: Callable[[LabPlan], Any]) -> Callable[[LabPlan], Any]:
        """The factory of labs, which shows this one the lab."""

        def opened(plan: LabPlan) -> Any:
            self._lab = open_lab(plan)
            return self._lab

        return opened

    def tick(self, now_s: float, step: int) -> None:
        """Called some times a second from t = 0 on."""
        late = self._trial.deviation == "late"
        if not self._planted and self._trial.deviation and (late or now_s >= PLANTED_AT_S):
            self._planted = True
            getattr(self, "_" + self._trial.deviation.replace(" ", "_"))()

    def _too_fast(self) -> None:
        self._deviate(1.15)

    def _too_slow(self) -> None:
        self._deviate((0.8, 0.8, 0.8, 0.008)[self._trial.variant % 4])

    def _deviate(self, factor: float) -> None:
        """From now on w1's limits are not those that the testbed records, although the kernel
        confirms what it is sent."""

        def scaled(parameters: LinkParameters, **options: Any) -> Tree:
            return self._compiled(
                replace(parameters, rate_bps=max(8000, round((parameters.rate_bps or 0) * factor))),
                **options,
            )

        assert self._lab is not None
        shaper.compile_tree = scaled  # type: ignore[attr-defined]
        self._tc(tc_commands(scaled(self._lab.links.states["w1"].down), "w1"), "class")

    def _late(self) -> None:
        assert self._lab is not None
        commit = self._lab.links.commit

        def late(prepared: Prepared) -> dict[str, Applied]:
            on_time_s = monotonic_s()
            time.sleep(LATE_S)
            done = commit(prepared)
            lied = self._trial.variant % 2
            return {
                link: replace(one, applied_s=on_time_s) if lied else one
                for link, one in done.items()
            }

        self._lab.links.commit = late  # type: ignore[method-assign]

    def _lossy(self) -> None:
        assert self._lab is not None
        if self._trial.variant % 2:
            self._in_switch("bridge link set dev w1 state 0")
            time.sleep(0.3)
            self._in_switch("bridge link set dev w1 state 3")
        else:
            tree = self._lab.links.trees["w1", "down"]
            short = tuple(
                replace(node, limit_bytes=4000) if node.kind == "bfifo" else node for node in tree
            )
            self._tc(tc_commands(short, "w1"), "bfifo")

    def _by_hand(self) -> None:
        rate_bps = round(self._trial.rate_bps * (0.5, 1.0, 1.5)[self._trial.variant % 3])
        request = {"links": ["w1"], "set": {"rate": f"{rate_bps}bit"}}
        threading.Thread(
            target=link_server.send_request, args=(self._directory, request), daemon=True
        ).start()

    def _tc(self, commands: Sequence[str], word: str) -> None:
        (command,) = (command for command in commands if f" {word} " in command)
        self._in_switch(command)

    def _in_switch(self, command: str) -> None:
        assert self._lab is not None
        (switch,) = self._lab._switches.values()
        enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{switch.namespace}"]
        subprocess.run([*enter, *command.split()], check=True)

    def leave(self) -> None:
        """Undo what outlives the lab."""
        shaper.compile_tree = self._compiled  # type: ignore[attr-defined]


def verdict(
    trial: Trial, seed: int, open_lab: Callable[[LabPlan], Any], directory: Path
) -> list[str]:
    """What a trial's cell is blamed for."""
    directory.mkdir()
    (directory / SCRIPT).mkdir()
    (directory / SCRIPT / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
    raw = spec_of(trial, random.Random(f"{seed} {trial.number}"), directory)
    (directory / "spec.yaml").write_text(yaml.safe_dump(raw))
    (cell,) = make_plan(validate(raw), directory).cells
    place = directory / "cells" / cell.name
    prepare_cell(cell, place)
    saboteur = Saboteur(trial, place)
    try:
        run_cell(cell, saboteur.opening(open_lab), place, saboteur.tick)
    finally:
        saboteur.leave()
    problems: list[str] = summarize(load_run(directory))["problems"]
    return [problem.removeprefix(f"{cell.name}: ") for problem in problems]


def load(kind: str, rate_bps: str) -> None:
    """The worker of a cell without a training: rank 0 sends to rank 1 all it can."""
    rank, directory = int(os.environ["RANK"]), Path(os.environ[protocol.ENV_CELL_DIR])
    target = str(ipaddress.ip_address(os.environ["MASTER_ADDR"]) + 1)
    control = ControlClient(directory / protocol.SOCKET_FILE, rank)
    records = RecordFile(Path(os.environ[protocol.ENV_OUTPUT_DIR]) / protocol.STEPS_FILE)
    t0_s = control.ready("none")
    segments = 1 if float(rate_bps) < 50e6 else 40
    programs: Mapping[tuple[str, int], tuple[Callable[..., Any], Sequence[Any]]] = {
        ("udp", 0): (
            measurement_programs.flood,
            (target, monotonic_s(), 60, 1.3 * float(rate_bps), 1514, segments),
        ),
        ("udp", 1): (measurement_programs.ignore, ()),
        ("tcp", 0): (measurement_programs.source, (target, "cubic")),
        ("tcp", 1): (measurement_programs.sink, (0, 60)),
    }
    program, arguments = programs[kind, rank]
    threading.Thread(target=program, args=arguments, daemon=True).start()
    steps, go_on = 0, True
    while go_on:
        time.sleep(0.1)
        times = {"t_s": monotonic_s() - t0_s, "step_s": 0.1, "compute_s": 0.1, "comm_s": 0.0}
        records.append(
            [
                {
                    "rank": rank,
                    "step": steps,
                    **times,
                    "samples": 1,
                    "payload_bytes": 0,
                    "scheme": "none",
                }
            ]
        )
        steps += 1
        go_on = control.step_done(steps)
    control.send(
        {"type": "done", "steps": steps, "parameters": "none", "accuracy": None, "loss": None}
    )
    control.close()


def judged(trial: Trial, problems: Sequence[str]) -> bool:
    """True if a verdict is right."""
    if not trial.deviation:
        return not problems
    wanted = EXPECTED[trial.deviation]
    return any(
        words in problem
        for problem in problems
        for words in ([wanted] if isinstance(wanted, str) else wanted)
    )


def main() -> int:
    # not above: a copy of this file is the script of cells, without what lies beside it
    from private_namespaces import enter_sandbox

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("each", type=int, nargs="?", default=40)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    given = parser.parse_args()
    each = given.each
    enter_sandbox()
    source = random.Random(given.seed)
    kinds = [DEVIATIONS[n % len(DEVIATIONS)] for n in range(each)] + [""] * each
    trials = [Trial.draw(n, kind, n // len(DEVIATIONS), source) for n, kind in enumerate(kinds)]
    source.shuffle(trials)
    right: Counter[str] = Counter()
    began_s = monotonic_s()
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_labs("netns", Path(scratch), PROGRAMS) as open_lab,
    ):
        for trial in trials:
            for attempt in range(TRIES):
                problems = verdict(
                    trial, given.seed, open_lab, Path(scratch, f"{trial.number}-{attempt}")
                )
                if trial.deviation or not any("was too busy" in problem for problem in problems):
                    break
            right[trial.deviation] += judged(trial, problems)
            word = {
                (True, True): "noticed",
                (True, False): "MISSED",
                (False, True): "valid",
                (False, False): "BLAMED",
            }
            print(
                f"{trial} {word[bool(trial.deviation), judged(trial, problems)]:8}"
                f" {'; '.join(problems)}",
                flush=True,
            )
    print(f"\n{2 * each} cells in {monotonic_s() - began_s:.0f} s")
    for kind, number in Counter(kinds).items():
        what = "noticed" if kind else "not blamed"
        print(f"{kind or 'clean':9} {number:3} cells, {right[kind]:3} {what}")
    return 0 if right.total() == 2 * each else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        load(*sys.argv[2:])
    else:
        sys.exit(main())
