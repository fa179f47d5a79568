"""What the other ranks see, after how long, and how they exit, when one of three ranks fails in the
middle of training.

    python experiments/bench/peer_failure.py [--methods topk,netsense] [--failures kill,stop]
    [--repeat 10] [--json]

kill, stop: SIGKILL and SIGSTOP at any moment. raise: backward raises, and the process exits. stay:
likewise, but it lives on. plain is DDP without us. A line a rank: the failure, who, seconds from
the failure to the error and for closing, exit code (1 of a traceback, -6 of an abort, None of a
process that hangs, or is to), number of tracebacks, the error.
"""

import argparse
import itertools
import json
import math
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # seconds that DDP would otherwise take in every rank
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import netsenseml.api  # before the ranks are forked
import netsenseml.compress.arrays

RANKS, PATIENCE_S = 3, 45.0
OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"policy": "fixed", "schemes": ["int8"]},
    "bdp": {"policy": "bdp"},
    "often": {"inner_steps": 1, "values": "int8"},
    "apart": {"policy": "fixed", "schemes": ["int8/2"]},
    "late": {"policy": "fixed", "schemes": ["int8+1"]},
    "behind": {"policy": "fixed", "schemes": ["int8/2+1"]},
}
METHODS = (
    "plain,allreduce,bf16,quantized,topk,topk12,randomk,dgc,signsgd,qsgd,powersgd,demo,localsgd,diloco:often,sparseloco,"
    "netsense,netsense:fixed,netsense:bdp,netsense:apart,netsense:late,netsense:behind"
)


def train(
    given: argparse.Namespace, method: str, failure: str, meet: str, rank: int, out: Path
) -> None:
    """One rank; its own failure and what it sees of another's go to a file."""

    def note(**what: Any) -> None:
        with open(out / f"{rank}.jsonl", "a") as file:
            file.write(json.dumps({"at_s": time.monotonic(), **what}) + "\n")

    def fail() -> None:
        note(failed=True)
        if failure in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if failure == "kill" else signal.SIGSTOP)
        broken.append(True)

    dist.init_process_group(
        "gloo",
        init_method=meet,
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=given.timeout),
    )
    torch.set_num_threads(1)
    broken: list[bool] = []
    net = nn.Sequential(
        nn.Linear(64, 512), *(nn.Linear(512, 512) for _ in range(4)), nn.Linear(512, 10)
    )
    # several buckets before the last are on their way
    net[2].weight.register_hook(lambda _: 1 / 0 if broken else None)
    model = DistributedDataParallel(net, bucket_cap_mb=0.5)
    name, _, variant = method.partition(":")
    session = (
        None if name == "plain" else netsenseml.attach(model, name, **OPTIONS.get(variant, {}))
    )
    try:
        for step in itertools.count():
            if step == 8 and rank == given.victim:
                threading.Timer(random.uniform(0, 0.1), fail).start()
            model(torch.randn(8, 64)).square().mean().backward()
            if session is not None:
                session.step()
    except BaseException as error:
        note(type=type(error).__name__, text=str(error).splitlines()[0])
        if rank == given.victim and failure == "stay":
            time.sleep(1000)
        raise
    finally:
        if session is not None and given.close:
            session.close()
            note(closed=True)


class Case:
    """One failure: its ranks begin to run."""

    def __init__(self, given: argparse.Namespace, method: str, failure: str, out: Path) -> None:
        self.method, self.failure, self.out, self.victim = method, failure, out, given.victim
        out.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            meet = (
                f"tcp://127.0.0.1:{server.getsockname()[1]}"
                if given.meet == "tcp"
                else f"file://{out}/meet"
            )
        self.codes: dict[int, int | None] = dict.fromkeys(range(RANKS))
        self.processes = {}
        for rank in range(RANKS):
            if not (process := os.fork()):  # its end is that of a script, by a traceback
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                os.dup2(os.open(out / f"{rank}.log", os.O_WRONLY | os.O_CREAT, 0o644), 2)
                train(given, method, failure, meet, rank, out)
            self.processes[rank] = process

    def wait(self, until_s: float) -> None:
        stays = {self.victim} if self.failure in ("stop", "stay") else set()
        while self._running() - stays and time.monotonic() < until_s:
            time.sleep(0.02)
        for rank in self._running():
            os.kill(self.processes[rank], signal.SIGKILL)
            os.waitpid(self.processes[rank], 0)

    def _running(self) -> set[int]:
        for rank in [rank for rank, code in self.codes.items() if code is None]:
            if (found := os.waitpid(self.processes[rank], os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(found[1])
        return {rank for rank, code in self.codes.items() if code is None}

    def rows(self) -> Iterator[dict[str, Any]]:
        files = [self.out / f"{rank}.jsonl" for rank in range(RANKS)]
        notes = [
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            for path in files
        ]
        failed_s = next((note["at_s"] for note in notes[self.victim] if "failed" in note), math.nan)
        for rank, told in enumerate(notes):
            saw = next(
                (note for note in told if "text" in note),
                {"at_s": math.nan, "type": None, "text": None},
            )
            closed_s = next((note["at_s"] for note in told if "closed" in note), math.nan)
            row = {
                "method": self.method,
                "failure": self.failure,
                "rank": rank,
                "victim": rank == self.victim,
            }
            row |= {
                "after_s": saw["at_s"] - failed_s,
                "closing_s": closed_s - saw["at_s"],
                "code": self.codes[rank],
            }
            row["tracebacks"] = (
                (self.out / f"{rank}.log")
                .read_text(errors="replace")
                .count("Traceback (most recent")
            )
            yield row | {"type": saw["type"], "text": saw["text"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers: dict[str, Any] = {"victim": 2, "timeout": 5.0, "repeat": 1, "at-once": 4}
    for name, default in {
        "methods": METHODS,
        "failures": "kill,stop,raise,stay",
        **numbers,
    }.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--meet", default="file", choices=("file", "tcp"), help="rendezvous")
    parser.add_argument(
        "--close",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether they close the session",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--keep", type=Path, default=Path(tempfile.gettempdir()) / f"peer-failure-{os.getpid()}"
    )
    given = parser.parse_args()
    wanted = list(
        itertools.product(given.methods.split(","), given.failures.split(","), range(given.repeat))
    )
    for begin in range(0, len(wanted), given.at_once):
        cases = [
            Case(given, m, f, given.keep / f"{m}-{f}-{n}")
            for m, f, n in wanted[begin : begin + given.at_once]
        ]
        until_s = time.monotonic() + given.timeout + PATIENCE_S
        for case in cases:
            case.wait(until_s)
            for row in case.rows():
                text = (
                    "{method:14} {failure:5} rank {rank} {after_s:6.1f} {closing_s:5.1f} {code}"
                    " {tracebacks} {type}: {text}"
                )
                print(json.dumps(row) if given.json else text.format(**row), flush=True)


if __name__ == "__main__":
    main()
