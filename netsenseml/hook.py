"""The DDP communication hook and its state: the public door of the package."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from netsenseml.agent import protocol
from netsenseml.agent.client import ControlClient
from netsenseml.agent.protocol import monotonic_s
from netsenseml.ledger import Ledger
from netsenseml.methods import make_method
from netsenseml.sensing.tcp import TcpMonitor, TcpSample


def attach(
    ddp: DistributedDataParallel,
    method: str | None = None,
    *,
    record: str | os.PathLike[str] | None = None,
    **options: Any,
) -> "Session":
    """Let ``ddp`` exchange its gradients by ``method``, on every rank with the same arguments.

    method: a name of ``agent.catalog.METHODS``, one registered as an entry point of the group ``netsenseml.methods``, or
        ``package.module:Class``; ``options`` are its options. Without it the method of the testbed's cell is used.
    record: file that receives one JSON line a step (``protocol.STEP_COLUMNS``), beside that of a cell.

    In a cell of the testbed this also reports to the orchestrator, and waits until all workers are there.
    Raises ValueError, one line, if no method is known or a name or option does not exist.
    """
    cell_dir = os.environ.get(protocol.ENV_CELL_DIR)
    if cell_dir is not None:
        if protocol.steps_file(Path(cell_dir), ddp.process_group.rank()).exists():
            raise ValueError("this process has joined its cell already; only one model of a worker can be measured")
        told = protocol.read_cell(Path(cell_dir))["method"]["name"]
        if method not in (None, told):
            raise ValueError(f"the spec names the method '{told}', the script '{method}'; leave it to the spec: attach(model)")
        method = None
    if method is None:
        if cell_dir is None:
            raise ValueError(
                f"no method: call attach(ddp, method=...), or run in the testbed, which sets {protocol.ENV_CELL_DIR}"
            )
        configured = protocol.read_cell(Path(cell_dir))["method"]
        method, options = configured["name"], {**configured["options"], **options}
    session = Session(ddp, method, record=record, **options)
    ddp.register_comm_hook(session, comm_hook)
    if cell_dir is not None:
        session.join_cell(Path(cell_dir))
    return session


def comm_hook(session: "Session", bucket: GradBucket) -> Future[torch.Tensor]:
    """The hook of the plain pair: ``ddp.register_comm_hook(Session(ddp, "topk", ratio=0.01), comm_hook)``."""
    return session.exchange(bucket)


class Session:
    """State of the hook: one method at work in one DDP model, with the records of its steps.

    Call ``step`` after every ``optimizer.step()``. A script that never does gets the same records; a step then ends
    where the next backward hands over its first bucket, and loss and samples are null.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        method: str,
        *,
        record: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """As ``attach``, without registering the hook and without the testbed."""
        self._module: torch.nn.Module = ddp.module
        self._rank = ddp.process_group.rank()
        self._ranks = ddp.process_group.size()
        self.method = make_method(method, ddp.module, ddp.process_group, options)
        self.last: Mapping[str, Any] | None = None
        """The newest row of the records."""
        self.steps = 0
        """Steps that are done."""
        self.blocked_s = 0.0
        """Time that backward has waited in the hook, over all steps."""
        self._records = [protocol.RecordFile(Path(record))] if record is not None else []
        self._evaluations: protocol.RecordFile | None = None
        self._control: ControlClient | None = None
        self._tcp = TcpMonitor()
        self._sample: TcpSample | None = None
        self._lock = threading.Lock()
        self._pending = 0  # buckets handed over and not yet exchanged
        self._all_launched = False
        self._closed_by_step = False
        self._start(monotonic_s())

    def _start(self, t0: float) -> None:
        self._t0 = t0
        self._ledger = Ledger(self._ranks)
        self._ready_s = self._exchanged_s = self._ledger.began_s

    def join_cell(self, directory: Path) -> None:
        """Report to the orchestrator of the cell in ``directory``, and wait for its start."""
        self._records.append(protocol.RecordFile(protocol.steps_file(directory, self._rank)))
        if self._rank == 0:
            self._evaluations = protocol.RecordFile(directory / protocol.EVALS_FILE)
        self._control = ControlClient(directory / protocol.SOCKET_FILE, self._rank)
        self._start(self._control.ready(parameters_hash(self._module)))

    def exchange(self, bucket: GradBucket) -> Future[torch.Tensor]:
        """Exchange one bucket; DDP calls this through ``comm_hook``."""
        arrived_s = monotonic_s()
        if bucket.index() == 0:
            if not self._closed_by_step and self._ledger.elements:
                self._close_step(arrived_s, None, None)
            self._ledger.begin_backward()
            self.method.begin()
        ledger, elements, last = self._ledger, bucket.buffer().numel(), bucket.is_last()
        with self._lock:
            ledger.elements += elements
            ledger.bucket_elements.append(elements)
            ledger.ready_s.append(arrived_s)
            self._pending += 1
            if last:
                self._all_launched = True
                self._ready_s = arrived_s
                ledger.window_s += arrived_s - self._exchanged_s
        done = self.method.exchange(bucket, ledger).then(self._exchanged)
        blocked_s = monotonic_s() - arrived_s
        self.blocked_s += blocked_s
        if not last:
            ledger.comm_s += blocked_s
        return done

    def _exchanged(self, done: Future[torch.Tensor]) -> torch.Tensor:
        result = done.value()
        with self._lock:
            self._pending -= 1
            if self._pending or not self._all_launched:
                return result
            self._all_launched = False
        self._exchanged_s = monotonic_s()
        self._ledger.comm_s += self._exchanged_s - self._ready_s
        self._ledger.tcp = self._sensed()
        self.method.finish(self._ledger)
        return result

    def _sensed(self) -> TcpSample | None:
        if self.method.asks_kernel:
            self._sample = self._tcp.sample()
        elif self._sample is not None:
            self._sample = self._sample.stale()
        return self._sample

    def step(self, loss: torch.Tensor | float | None = None, samples: int | None = None) -> bool:
        """End a step; returns False when the run should end.

        loss, samples: training loss and size of this rank's batch, for the records.
        In a cell this waits while the orchestrator asks to hold, so that all ranks end after the same step.
        """
        self._closed_by_step = True
        self._close_step(monotonic_s(), loss.item() if isinstance(loss, torch.Tensor) else loss, samples)
        if self._control is None:
            return True
        with self.pause():
            return self._control.step_done(self.steps)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Between two steps: time spent inside belongs to no step of this rank. Others wait for it in their next exchange."""
        began_s = monotonic_s()
        try:
            yield
        finally:
            paused_s = monotonic_s() - began_s
            self._ledger.began_s += paused_s
            self._exchanged_s += paused_s

    def evaluated(self, accuracy: float, loss: float) -> None:
        """Record an evaluation after the steps done so far; accuracy from 0 to 1. Call it on rank 0."""
        row = {"step": self.steps, "t_s": monotonic_s() - self._t0, "accuracy": accuracy, "loss": loss}
        if self._evaluations is not None:
            self._evaluations.append([row])
        if self._control is not None:
            self._control.send({"type": "eval", **row})

    def close(self, accuracy: float | None = None, loss: float | None = None) -> None:
        """End the run after its last step, with the final evaluation if this rank made one. Call it on every rank."""
        if self._ledger.elements:
            self._close_step(monotonic_s(), None, None)
        try:
            self.method.close()
        finally:
            self._leave(accuracy, loss)

    def _leave(self, accuracy: float | None, loss: float | None) -> None:
        if self._control is not None:
            done = {"type": "done", "steps": self.steps, "parameters": parameters_hash(self._module)}
            self._control.send({**done, "accuracy": accuracy, "loss": loss})
            self._control.close()
        for file in filter(None, (*self._records, self._evaluations)):
            file.close()
        self._control = self._evaluations = None
        self._records.clear()

    def fail(self, error: str) -> None:
        """Tell the orchestrator, if there is one, that this worker failed; one line."""
        if self._control is not None:
            self._control.send({"type": "failed", "error": error})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of the method on this rank: its error feedback, and what it has learnt of the network.

        Call it between two steps, on the thread that trains, and on all ranks after the same step.
        """
        return self.method.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint made with the same method."""
        self.method.load_state_dict(state)

    def _close_step(self, ended_s: float, loss: float | None, samples: int | None) -> None:
        ledger, tcp = self._ledger, self._ledger.tcp
        sensed = tcp if self.method.senses else None
        step_s = ended_s - ledger.began_s
        self.last = {
            "rank": self._rank,
            "step": self.steps,
            "t_s": ended_s - self._t0,
            "loss": loss,
            "samples": samples,
            "step_s": step_s,
            "compute_s": step_s - ledger.comm_s,
            "comm_s": ledger.comm_s,
            "encode_s": ledger.encode_s,
            "payload_bytes": ledger.payload_bytes,
            "dense_bytes": ledger.dense_bytes,
            "scheme": ledger.scheme,
            "ratio": ledger.ratio,
            "lost_energy": ledger.lost_energy,
            "bandwidth_bps": self.method.bandwidth_bps,
            "rtt_s": sensed and sensed.rtt_s,
            "min_rtt_s": sensed and sensed.min_rtt_s,
            "retransmits": tcp and tcp.retransmits,
        }
        self.steps += 1
        for file in self._records:
            file.append([self.last])
        self._ledger = Ledger(self._ranks)


def parameters_hash(module: torch.nn.Module) -> str:
    """SHA-256 over all parameters, in order: equal for replicas that are equal bit by bit.

    Buffers are left out: DDP makes those of all ranks equal only before a forward, so that the running statistics of
    normalisation differ after the last one.
    """
    digest = hashlib.sha256()
    for tensor in module.parameters():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
