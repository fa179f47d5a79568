"""The worker program: ``python -m testbed.worker.program``.

Environment: NETSENSE_CELL_DIR (directory of the cell), NETSENSEML_LISTENER (what ties the session
to the cell), RANK, WORLD_SIZE, NETSENSE_RENDEZVOUS (init_method of the process group, default
env://), GLOO_SOCKET_IFNAME (interface of the shaped link).

Importing this module loads everything heavy and starts no thread, so that one process can import it
once and fork the workers. Nothing here may run a parallel operation of torch on import: its threads
would not survive the fork.
"""

import contextlib
import itertools
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# seconds of import that DDP would otherwise do in every worker when it is made
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import netsenseml.compress.kernels  # noqa: F401  compiled here, if need be: a confined worker may not keep them
from netsenseml.api import attach
from netsenseml.catalog import check_method
from netsenseml.failure import blames_peer
from netsenseml.hook import Session
from netsenseml.records import monotonic_s
from testbed import protocol
from testbed.worker.checkpoint import Checkpoints, from_environment
from testbed.worker.client import ControlClient
from testbed.worker.emulate import Emulated, Timing
from testbed.worker.listener import describe_error
from testbed.worker.zoo import Dataset, make_data, make_emulated, make_model, make_optimizer


def main() -> int:
    """Train the cell's workload as one rank; returns the exit status: 0, or 1 after a failure that
    stderr explains."""
    # end at once, whatever a parent process had installed
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    run = None
    try:
        run = Run.from_environment()
        run.train()
    except Exception as error:
        if run is None and isinstance(error, ValueError):
            print(f"testbed: {error}", file=sys.stderr)  # a bad configuration, said in one line
        else:
            traceback.print_exc()
        sys.stderr.flush()
        _report(error, run.session if run else None)
        return 1
    return 0


@dataclass
class Run:
    """What one rank trains, and for how long."""

    rank: int
    ranks: int
    seed: int
    batch: int
    last_step: float
    evaluate_every_s: float
    compute: "Compute"
    checkpoints: Checkpoints
    model: nn.Module
    data: Dataset | None
    optimizer: torch.optim.Optimizer | None
    adaptive: bool
    method_options: dict[str, Any]
    device: torch.device
    session: Session | None = None

    @classmethod
    def from_environment(cls) -> "Run":
        """Read the cell and build its parts; raises ValueError, one line, for a configuration that
        cannot work."""
        rank, ranks = _integer("RANK"), _integer("WORLD_SIZE")
        cell = protocol.read_cell(Path(_required(protocol.ENV_CELL_DIR)))
        check_method(cell["method"]["name"], cell["method"]["options"])
        workload = cell["workload"]
        if workload is None:
            raise ValueError("the cell has no workload: run its script instead")
        stop, compute = workload["stop"], workload["compute"]
        optimizer, options = _momentum_where_it_belongs(cell["method"], workload["optimizer"])
        name, model_options = workload["model"], workload["model_options"]
        model: nn.Module
        if isinstance(compute, dict) and "emulate_s" in compute:
            timing = Timing(
                Compute.of(compute, rank).seconds,
                compute["jitter"],
                seed=cell["seed"] * ranks + rank,
            )
            model, data, epoch_steps = make_emulated(name, model_options, timing), None, math.inf
        else:
            data = make_data(workload["data"], workload["data_options"])
            epoch_steps = len(data[0]) // (workload["batch"] * ranks)
            if not epoch_steps:
                raise ValueError(
                    f"{ranks} workers with batches of {workload['batch']} need more than"
                    f" {len(data[0])} training samples"
                )
            model = make_model(name, model_options, cell["seed"])
        device = _device(workload["device"], rank)
        model.to(device)  # made on the CPU, and so the same on all devices
        return cls(
            rank=rank,
            ranks=ranks,
            seed=cell["seed"],
            batch=workload["batch"],
            last_step=min(stop.get("steps", math.inf), stop.get("epochs", math.inf) * epoch_steps),
            evaluate_every_s=workload["evaluate_every_s"] or math.inf,
            compute=Compute.of(compute, rank),
            checkpoints=from_environment(workload["checkpoint_every"]),
            model=model,
            data=data,
            adaptive=optimizer["name"].startswith("adam"),
            optimizer=(
                None
                if isinstance(model, Emulated)
                else make_optimizer(model.parameters(), optimizer)
            ),
            method_options=options,
            device=device,
        )

    def train(self) -> None:
        """Form the group, train until the stop, evaluate, and take leave."""
        dist.init_process_group(
            "gloo",
            init_method=os.environ.get(protocol.ENV_RENDEZVOUS, "env://"),
            rank=self.rank,
            world_size=self.ranks,
        )
        begun = self._go_on() if os.environ.get(protocol.ENV_RESTARTS) else None
        # Every rank built the same replica from the seed: nothing has to cross the links before the
        # start.
        ddp = DistributedDataParallel(
            self.model,
            init_sync=False,
            # the gradients of a large model once are enough
            gradient_as_bucket_view=isinstance(self.model, Emulated),
        )
        # from here on dropout differs between ranks
        torch.manual_seed(self.seed * self.ranks + self.rank)
        self.session = session = attach(ddp, **self.method_options)
        self.checkpoints.steps_until_exchange = session.method.steps_until_exchange
        if begun is not None:
            session.load_state_dict(begun["session"])
            torch.set_rng_state(begun["random"])
        if isinstance(self.model, Emulated):
            self._emulate(self.model, ddp, session)
        else:
            assert self.data is not None and self.optimizer is not None
            self._train(ddp, session, self.data, self.optimizer)
        dist.destroy_process_group()

    def _go_on(self) -> dict[str, Any] | None:
        """Take model and optimizer from the newest checkpoint that all ranks have; returns the rest
        of it."""
        found = self.checkpoints.newest_of_all()
        if found is None:
            print("testbed: no checkpoint to go on from; training begins anew", file=sys.stderr)
            return None
        steps, state = found
        print(f"testbed: going on after step {steps}", file=sys.stderr)
        self.model.load_state_dict(state["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        return state

    def _checkpoint(self, session: Session) -> None:
        if not self.checkpoints.due(session.steps):
            return
        with session.pause():
            state = {
                "model": self.model.state_dict(),
                "session": session.state_dict(),
                "random": torch.get_rng_state(),
            }
            optimizer = {} if self.optimizer is None else {"optimizer": self.optimizer.state_dict()}
            self.checkpoints.save(session.steps, {**state, **optimizer})

    def _emulate(self, model: Emulated, ddp: DistributedDataParallel, session: Session) -> None:
        model.taken_s = lambda: session.blocked_s
        session.method.optimizer(adaptive=self.adaptive)  # of which nothing else is emulated
        x = torch.zeros(1, requires_grad=True, device=self.device)
        go_on = True
        while go_on:
            model.begin(self.compute.factor(session.elapsed_s))
            ddp.zero_grad(set_to_none=False)  # in place, so that no layer takes new memory
            ddp(x).backward()
            model.end()
            go_on = session.step(samples=self.batch) and session.steps < self.last_step
            self._checkpoint(session)
        session.close()

    def _train(
        self,
        ddp: DistributedDataParallel,
        session: Session,
        data: Dataset,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        pace = Pace(self.compute, session)
        next_evaluation_s = monotonic_s() + self.evaluate_every_s
        for x, y in self._batches(data, session.steps):
            pace.begin()
            loss = nn.functional.cross_entropy(ddp(x.to(self.device)), y.to(self.device))
            pace.wait()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not session.step(loss.detach(), samples=len(x)) or session.steps >= self.last_step:
                break
            self._checkpoint(session)
            if self.rank == 0 and monotonic_s() >= next_evaluation_s:
                with session.pause(), session.synchronized():
                    self._evaluate(session, data)
                next_evaluation_s = monotonic_s() + self.evaluate_every_s
        session.synchronize()
        session.close(*(self._evaluate(session, data) if self.rank == 0 else ()))

    def _batches(
        self, data: Dataset, first: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's share of every global batch from a step on, epoch after epoch, without end.

        An incomplete batch is dropped.
        """
        train_x, train_y, *_ = data
        size = self.batch * self.ranks
        epoch_steps = len(train_x) // size
        for epoch in itertools.count(first // epoch_steps):
            generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
            order = torch.randperm(len(train_x), generator=generator)
            for step in range(max(0, first - epoch * epoch_steps), epoch_steps):
                begin = step * size
                chosen = order[begin + self.rank : begin + size : self.ranks]
                yield train_x[chosen], train_y[chosen]

    def _evaluate(self, session: Session, data: Dataset) -> tuple[float, float]:
        """Accuracy and mean loss over the test set, recorded."""
        *_, test_x, test_y = data
        right = lost = 0.0
        self.model.eval()
        with torch.no_grad():
            for batch in zip(test_x.split(_TEST_BATCH), test_y.split(_TEST_BATCH), strict=True):
                x, y = (part.to(self.device) for part in batch)
                logits = self.model(x)
                right += (logits.argmax(dim=1) == y).sum().item()
                lost += nn.functional.cross_entropy(logits, y, reduction="sum").item()
        self.model.train()
        accuracy, loss = right / test_y.numel(), lost / test_y.numel()
        session.evaluated(accuracy, loss)
        return accuracy, loss


_TEST_BATCH = 512
"""Test samples in one forward, so that a large model needs no more memory than in training."""


@dataclass(frozen=True, slots=True)
class Compute:
    """How long a step of a rank is to compute. seconds: 0: as long as it takes. slow: (from_s,
    to_s, factor) after t = 0."""

    seconds: float
    slow: tuple[tuple[float, float, float], ...] = ()

    @classmethod
    def of(cls, compute: Any, rank: int) -> "Compute":
        """From cell.json (``protocol.WorkloadConfig``)."""
        match compute:
            case "real":
                return cls(0.0)
            case {"pace_s": float() | int() as seconds} | {"emulate_s": float() | int() as seconds}:
                factors = compute.get("factors")
                slow = tuple(
                    (from_s, to_s or math.inf, f)
                    for r, from_s, to_s, f in compute.get("slow", ())
                    if r == rank
                )
                return cls(float(seconds) * (factors[rank] if factors else 1.0), slow)
        raise ValueError(
            'compute must be "real", {"pace_s": seconds} or {"emulate_s": seconds}, not'
            f" {compute!r}"
        )

    def factor(self, t_s: float) -> float:
        """By how much longer a step takes that begins at this time."""
        return math.prod(factor for from_s, to_s, factor in self.slow if from_s <= t_s < to_s)


class Pace:
    """Stretches a step's compute to its pace by waiting between forward and backward.

    What follows the wait (backward up to the last gradient, optimizer) is taken to last as long as
    it did lately.
    """

    def __init__(self, compute: Compute, session: Session) -> None:
        self._compute = compute
        self._session = session
        self._began_s = self._waited_s = monotonic_s()
        self._rest_s = 0.0

    def begin(self) -> None:
        """A step begins."""
        now = monotonic_s()
        if self._session.last is not None:
            rest_s = self._session.last["compute_s"] - (self._waited_s - self._began_s)
            self._rest_s += (rest_s - self._rest_s) / 2
        self._began_s = now

    def wait(self) -> None:
        """Forward is done."""
        pace_s = self._compute.seconds * self._compute.factor(self._session.elapsed_s)
        time.sleep(max(0.0, self._began_s + pace_s - self._rest_s - monotonic_s()))
        self._waited_s = monotonic_s()


def _device(wanted: str, rank: int) -> torch.device:
    """Ranks share the GPUs of the machine in turn; raises ValueError, one line, if torch sees none
    where one is wanted."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"workload.device: cuda needs a torch that sees a GPU, and torch {torch.__version__}"
            " sees none"
        )
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _momentum_where_it_belongs(
    method: protocol.MethodConfig, optimizer: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(optimizer, options of the method): some methods have a momentum in place of the optimizer's.

    DGC applies that of the optimizer before it chooses what to send; one that the spec gives to dgc
    itself counts instead. DeMo's is its decay, where the optimizer steps by signs.
    """
    name, options = method["name"], method["options"]
    left = {key: value for key, value in optimizer.items() if key not in ("momentum", "nesterov")}
    if name == "dgc":
        return left, {"momentum": options.get("momentum", optimizer.get("momentum", 0.0))}
    if (
        name == "demo"
        and optimizer["name"] in ("adam", "adamw")
        and options.get("update") != "mean"
    ):
        return {**optimizer, "beta1": 0.0}, {}
    if name == "demo" and optimizer["name"] == "sgd" and options.get("update") == "sign":
        return left, {}
    return optimizer, {}


def _report(error: Exception, session: Session | None) -> None:
    """Tell the orchestrator, if it can still be reached."""
    with contextlib.suppress(OSError, ValueError):
        if session is None:
            path = Path(_required(protocol.ENV_CELL_DIR)) / protocol.SOCKET_FILE
            line = str(error).strip() if isinstance(error, ValueError) else ""
            ControlClient(path, _integer("RANK")).failed(
                line or describe_error(error), by_peer=blames_peer(error)
            )
        else:
            session.fail(error)


def _required(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise ValueError(f"the environment variable {name} is not set") from None


def _integer(name: str) -> int:
    try:
        return int(_required(name))
    except ValueError as error:
        raise ValueError(f"the environment variable {name} must be an integer: {error}") from None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # taking torch apart takes a second, and threads of Gloo that are still there can abort it
    os._exit(code)
