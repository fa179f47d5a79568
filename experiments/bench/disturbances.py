"""Does the verdict notice what other programs do to a comparison, and only that? 40 disturbed runs,
and 40 undisturbed ones.

    python experiments/bench/disturbances.py [--runs 40] [--seed 0] [--minutes 25] [--results
    disturbances.jsonl]

Every trial is a run as ``testbed run`` makes it: allreduce and top-k at 10 %, or the other way
round, four workers at 50 Mbit/s, whose compute is emulated, paced or real. In half of them
something else uses this machine while the second is trained:

    hog        busy loops, one or more for each processor
    pinned     a busy loop on one processor
    memory     copies of arrays far larger than the caches
    disk       files written and synced, in the run directory
    loopback   a flood of datagrams, whose processing takes interrupt time
    freeze     a worker stands still for a while, again and again, as in a virtual machine whose
               host is busy
    throttle   all workers stand still for half of the time, in turns so short as if the clock were
               slower

Prints a line a trial: its ratio of throughputs, and what it is blamed for. Then a table: how many
ratios are off by more than 5 % from the median of the undisturbed runs with such compute, whose own
spread stands below it: where that is not far less than 5 %, chance alone puts ratios off. Exit code
1 if a disturbed run with a ratio that is off is called valid, or if an undisturbed run with one
that is not off is called invalid; an undisturbed run that chance put off has nothing to be noticed.

Nothing else may run beside it. A trial takes 15 to 30 s. When the time is over, what has been tried
is judged; it is in the file of results, and started again with the same seed and number of runs,
the program goes on from there.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, stdev
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

import testbed
import testbed.report.html

OFF = 0.05
KINDS = ("hog", "pinned", "memory", "disk", "loopback", "freeze", "throttle")
CONDITIONS: Mapping[str, Any] = {
    "emulate": {"emulate": "60ms"},
    "pace": {"pace": "60ms"},
    "real": "real",
}
"""What computes."""
BUSY = "while True: pass"
MEMORY = """import numpy
a = numpy.zeros(1 << 26); b = a.copy()
while True: b[:] = a
"""
DISK = """import os, sys
while True:
    with open(sys.argv[1], "wb") as file:
        file.write(bytes(1 << 24)); file.flush(); os.fsync(file.fileno())
"""
LOOPBACK = """import socket
sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); sink.bind(("127.0.0.1", 0))
source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); source.connect(sink.getsockname())
while True: source.send(bytes(1400))
"""


@dataclass
class Trial:
    """One run. kind: "" if nothing disturbs it. strength: programs for each processor, or seconds
    of standing still.

    second: the method that is trained second, and disturbed. ratio: NaN if the run had none.
    """

    kind: str
    strength: float
    condition: str
    second: str
    ratio: float = math.nan
    problems: tuple[str, ...] = ()

    @classmethod
    def draw(cls, number: int, kind: str, source: random.Random) -> "Trial":
        strengths = {"freeze": (0.1, 0.3, 1.0), "throttle": (0.01, 0.02), "pinned": (1,)}.get(
            kind, (0.5, 1, 2)
        )
        strength = source.choice(strengths)
        return cls(
            kind,
            strength,
            list(CONDITIONS)[number % len(CONDITIONS)],
            source.choice(("allreduce", "topk-0.1")),
        )

    def __str__(self) -> str:
        what = f"{self.kind or 'undisturbed':11} {f'{self.strength:g}' if self.kind else '':4}"
        return (
            f"{what} {self.condition:7} {self.second:9} second {self.ratio:6.3f}"
            f" {'; '.join(self.problems)}"
        )


def spec_of(trial: Trial) -> dict[str, Any]:
    model = {"name": "mlp", "hidden": [256, 256]}
    methods = ["allreduce", {"name": "topk", "ratio": 0.1}]
    return {
        "name": "disturbances",
        "workers": 4,
        "network": {"link": {"rate": "50mbit"}},
        "workload": {
            "model": model,
            "data": "digits",
            "batch": 16,
            "compute": CONDITIONS[trial.condition],
            "stop": {"steps": 40},
        },
        "methods": methods[::-1] if trial.second == "allreduce" else methods,
    }


class Disturber(threading.Thread):
    """Waits for the second cell's first step, and disturbs it until it has ended."""

    def __init__(self, trial: Trial, out: Path) -> None:
        super().__init__(daemon=True)
        self._trial, self._out = trial, out
        self._over = threading.Event()
        self.planted = False

    def run(self) -> None:
        while not (begun := self._second_cell()):
            if self._over.wait(0.02):
                return
        with disturbance(self._trial, self._out):
            self.planted = True
            while not (begun / "result.json").exists() and not self._over.wait(0.05):
                pass

    def _second_cell(self) -> Path | None:
        cells = list(self._out.glob("*/cells/*"))
        ended = [cell for cell in cells if (cell / "result.json").exists()]
        begun = [
            cell for cell in cells if cell not in ended and list(cell.glob("hosts/w0/steps.jsonl"))
        ]
        return begun[0] if ended and begun else None

    def end(self) -> None:
        self._over.set()
        self.join()


@contextmanager
def disturbance(trial: Trial, out: Path) -> Iterator[None]:
    """What a trial plants, from entering to leaving."""
    programs = max(1, round(trial.strength * (os.cpu_count() or 1)))
    (run,) = out.iterdir()
    code = {"hog": BUSY, "pinned": BUSY, "memory": MEMORY, "disk": DISK, "loopback": LOOPBACK}.get(
        trial.kind
    )
    if code is None:
        still = threading.Event()
        hosts = hosts_with_torch()
        assert hosts, "the workers were not found, and so not disturbed"
        thread = threading.Thread(
            target=stop_and_go, args=(hosts, trial.kind == "throttle", trial.strength, still)
        )
        thread.start()
        try:
            yield
        finally:
            still.set()
            thread.join()
        return
    # They end with this program, in whatever way that ends.
    pinned = ["taskset", "--cpu-list", "0"] if trial.kind == "pinned" else []
    command = ["setpriv", "--pdeathsig", "KILL", *pinned, sys.executable, "-c", code]
    children = [
        subprocess.Popen([*command, str(run / f"disturbance-{n}")]) for n in range(programs)
    ]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def stop_and_go(
    hosts: list[list[psutil.Process]], everybody: bool, seconds: float, still: threading.Event
) -> None:
    """All hosts half of the time, or the first of them a quarter of the time, do nothing."""
    held = [process for host in (hosts if everybody else hosts[:1]) for process in host]
    while not still.is_set():
        for number, wait_s in (
            (signal.SIGSTOP, seconds),
            (signal.SIGCONT, seconds if everybody else 3 * seconds),
        ):
            for process in held:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            time.sleep(wait_s)


def hosts_with_torch() -> list[list[psutil.Process]]:
    """The processes below this one that have PyTorch, by host: what is in a network of its own, and
    not the testbed's."""
    found: dict[str, list[psutil.Process]] = {}
    others = {str(Path("/proc/self/ns/net").readlink())}
    for process in psutil.Process().children(recursive=True):
        with suppress(OSError, psutil.NoSuchProcess):
            network = str(Path(f"/proc/{process.pid}/ns/net").readlink())
            if "testbed.run.sandbox_main" in process.cmdline():
                others.add(network)
            if "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text():
                found.setdefault(network, []).append(process)
    return [processes for network, processes in found.items() if network not in others]


def run_trial(trial: Trial, out: Path) -> None:
    """Run it, and write down its ratio and what it is blamed for."""
    out.mkdir()
    disturber = Disturber(trial, out)
    if trial.kind:
        disturber.start()
    testbed.report.html.write_report = lambda *_: None  # which takes seconds, and nobody reads
    try:
        with open(os.devnull, "w") as nowhere:
            run = testbed.run_experiment(spec_of(trial), out=out, console=Console(file=nowhere))
    finally:
        if trial.kind:
            disturber.end()
    assert run.summary is not None
    (comparison,) = run.summary["comparisons"]
    assert disturber.planted or not trial.kind, (
        "the second cell was over before it could be disturbed"
    )
    trial.ratio, trial.problems = (
        comparison["throughput_ratio"] or math.nan,
        tuple(run.summary["problems"]),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=int, default=40, help="so many disturbed ones, and so many undisturbed (40)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="what decides which, and in which order (0)"
    )
    parser.add_argument(
        "--minutes", type=float, default=25, help="begin no trial after so long (25)"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("disturbances.jsonl"), help="what has been tried"
    )
    given = parser.parse_args()
    source = random.Random(given.seed)
    trials = [Trial.draw(n // len(KINDS), KINDS[n % len(KINDS)], source) for n in range(given.runs)]
    trials += [Trial.draw(n, "", source) for n in range(given.runs)]
    source.shuffle(trials)
    done = given.results.read_text().splitlines() if given.results.exists() else []
    for trial, line in zip(trials, map(json.loads, done), strict=False):
        ratio, problems = line.pop("ratio"), line.pop("problems")
        if not {*line.items()} <= {*asdict(trial).items()} or len(done) > len(trials):
            sys.exit(
                f"{given.results} is of other runs or of another seed; name another file with"
                " --results"
            )
        trial.ratio, trial.problems = math.nan if ratio is None else ratio, tuple(problems)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, given.results.open("a") as results:
        for number, trial in enumerate(trials):
            if number >= len(done):
                if time.monotonic() - began_s > 60 * given.minutes:
                    print(f"the {given.minutes:g} minutes are over; start it again for the rest")
                    trials = trials[:number]
                    break
                run_trial(trial, Path(scratch, str(number)))
                row = {**asdict(trial), "ratio": None if math.isnan(trial.ratio) else trial.ratio}
                results.write(json.dumps(row) + "\n")
                results.flush()
            print(f"{number + 1:3}/{2 * given.runs} {trial}", flush=True)
    print(f"\n{len(trials) - len(done)} runs in {time.monotonic() - began_s:.0f} s")
    return judge(trials)


def judge(trials: Sequence[Trial]) -> int:
    """Print what was right and wrong; the exit code."""
    undisturbed = [trial for trial in trials if not trial.kind and not math.isnan(trial.ratio)]
    ratios = {
        name: [trial.ratio for trial in undisturbed if trial.condition == name] or [math.nan]
        for name in CONDITIONS
    }
    quiet = {name: median(of_condition) for name, of_condition in ratios.items()}
    table = Table(
        "disturbed by",
        "runs",
        "off by more than 5 %",
        "of these called valid",
        "not off, and called not valid",
    )
    wrong = 0
    for kind in (*KINDS, ""):
        ours = [trial for trial in trials if trial.kind == kind]
        off = [trial for trial in ours if abs(trial.ratio / quiet[trial.condition] - 1) > OFF]
        missed = [trial for trial in off if not trial.problems]
        blamed = [trial for trial in ours if trial.problems and trial not in off]
        wrong += len(missed if kind else blamed)
        table.add_row(
            kind or "nothing", *(str(len(group)) for group in (ours, off, missed, blamed))
        )
    Console().print(table)
    for name, of_condition in ratios.items():
        spread = stdev(of_condition) / quiet[name] if len(of_condition) > 1 else math.nan
        print(
            f"undisturbed, {name}: {len(of_condition)} ratios, median {quiet[name]:.3f}, standard"
            f" deviation {spread:.1%}"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
