"""What the other ranks see, after how long, and how they exit, when a rank of three fails in the middle of training.

    python experiments/bench/peer_failure.py [--methods topk,netsense] [--failures kill,stop] [--repeat 10] [--json]

kill, stop: SIGKILL and SIGSTOP at any moment. raise: backward raises, and the process exits. stay: likewise, and it lives on.
plain is DDP without us. Times are from the failure on; code 1 is that of a traceback, 134 an abort, None a process that hung.
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
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import netsenseml
import netsenseml.hook  # before the ranks are forked

RANKS = 3
OPTIONS: dict[str, dict[str, Any]] = {"fixed": {"policy": "fixed", "schemes": ["int8"]}, "bdp": {"policy": "bdp"}}
METHODS = (
    "plain allreduce bf16 quantized topk topk12 randomk dgc signsgd qsgd powersgd netsense netsense:fixed netsense:bdp".split()
)
FAILURES = ("kill", "stop", "raise", "stay")
PATIENCE_S = 45.0


class Raising(torch.autograd.Function):
    """Raises in the middle of a backward, once it is told to."""

    now = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if Raising.now:
            raise ZeroDivisionError("raised in backward")
        return gradient


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 512), *(nn.Linear(512, 512) for _ in range(4)), nn.Linear(512, 10)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(Raising.apply(x) if number == 3 else x).relu()
        return x


def train(given: argparse.Namespace, method: str, failure: str, meet: str, rank: int, out: Path) -> None:
    """One rank; its own failures and those it sees go to a file."""

    def note(**what: Any) -> None:
        with open(out / f"{rank}.jsonl", "a") as file:
            file.write(json.dumps({"rank": rank, "at_s": time.monotonic(), **what}) + "\n")

    def fail() -> None:
        note(failed=True)
        os.kill(os.getpid(), signal.SIGKILL if failure == "kill" else signal.SIGSTOP)

    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=timedelta(seconds=given.timeout))
    torch.set_num_threads(1)
    model = DistributedDataParallel(Net(), bucket_cap_mb=0.5)
    name, _, variant = method.partition(":")
    session = None if name == "plain" else netsenseml.attach(model, name, **OPTIONS.get(variant, {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    note(trains=True)
    try:
        for step in itertools.count():
            if step == 8 and rank == given.victim and failure in ("kill", "stop"):
                threading.Timer(random.uniform(0, 0.1), fail).start()
            elif step == 8 and rank == given.victim:
                Raising.now = True
                note(failed=True)
            optimizer.zero_grad()
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
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
    """One failure: its ranks run at once."""

    def __init__(self, given: argparse.Namespace, method: str, failure: str, out: Path) -> None:
        self.method, self.failure, self.out, self.victim = method, failure, out, given.victim
        meet = f"tcp://127.0.0.1:{free_port()}" if given.meet == "tcp" else f"file://{out}/meet"
        self.codes: dict[int, int | None] = dict.fromkeys(range(RANKS))
        self.processes = {}
        for rank in range(RANKS):
            if not (process := os.fork()):
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                os.dup2(os.open(out / f"{rank}.log", os.O_WRONLY | os.O_CREAT, 0o644), 2)
                train(given, method, failure, meet, rank, out)
            self.processes[rank] = process

    def wait(self, until_s: float) -> None:
        others = set(self.processes) - ({self.victim} if self.failure in ("stop", "stay") else set())
        while any(self.codes[rank] is None for rank in others) and time.monotonic() < until_s:
            time.sleep(0.02)
            for rank in [rank for rank, code in self.codes.items() if code is None]:
                if (found := os.waitpid(self.processes[rank], os.WNOHANG))[0]:
                    self.codes[rank] = os.waitstatus_to_exitcode(found[1])
        for rank in [rank for rank, code in self.codes.items() if code is None]:
            os.kill(self.processes[rank], signal.SIGKILL)
            os.waitpid(self.processes[rank], 0)

    def rows(self) -> Iterator[dict[str, Any]]:
        """What each of the others saw; the victim's own row tells only how it left."""
        notes = {rank: [json.loads(line) for line in read(self.out / f"{rank}.jsonl")] for rank in self.processes}
        failed_s = next((note["at_s"] for note in notes[self.victim] if "failed" in note), math.nan)
        for rank, told in notes.items():
            saw = next((note for note in told if "text" in note), None)
            closed_s = next((note["at_s"] for note in told if "closed" in note), None)
            after_s, closing_s = saw and saw["at_s"] - failed_s, saw and closed_s and closed_s - saw["at_s"]
            yield {
                **{"method": self.method, "failure": self.failure, "rank": rank, "victim": rank == self.victim},
                **{"code": self.codes[rank], "after_s": after_s, "closing_s": closing_s},
                **{"type": saw and saw["type"], "text": saw and saw["text"]},
                "tracebacks": sum("Traceback (most recent" in line for line in read(self.out / f"{rank}.log")),
            }


def read(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--failures", default=",".join(FAILURES))
    parser.add_argument("--meet", default="file", choices=("file", "tcp"), help="rendezvous")
    parser.add_argument("--victim", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=5)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=4, help="cases that run beside each other")
    parser.add_argument("--close", action=argparse.BooleanOptionalAction, default=True, help="whether they close the session")
    parser.add_argument("--json", action="store_true", help="one line a rank")
    parser.add_argument("--keep", type=Path, help="folder for what the ranks wrote")
    given = parser.parse_args()
    out = given.keep or Path(tempfile.mkdtemp())
    wanted = list(itertools.product(range(given.repeat), given.methods.split(","), given.failures.split(",")))
    for group in (wanted[i : i + given.at_once] for i in range(0, len(wanted), given.at_once)):
        cases = []
        for number, method, failure in group:
            folder = out / f"{method}-{failure}-{number}"
            folder.mkdir(parents=True)
            cases.append(Case(given, method, failure, folder))
        until_s = time.monotonic() + given.timeout + PATIENCE_S
        for case in cases:
            case.wait(until_s)
            for row in case.rows():
                if given.json:
                    print(json.dumps(row), flush=True)
                elif row["victim"]:
                    print(f"{case.method:15} {case.failure:6} the victim exits with {row['code']}", flush=True)
                else:
                    after, closing = (
                        f"{row[key]:5.1f} s" if row[key] is not None else "      -" for key in ("after_s", "closing_s")
                    )
                    told = f"{row['type']}: {row['text']}"
                    print(
                        f"{'':15} {row['rank']:6} {after} {closing} {row['code']} {row['tracebacks']} {told[:150]}", flush=True
                    )


if __name__ == "__main__":
    main()
