"""What makes a session a worker of a cell: its method, its records, its start and its end come from
the testbed."""

import contextlib
import errno
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from netsenseml.failure import blames_peer
from netsenseml.listener import Attached
from netsenseml.records import RecordFile
from testbed import protocol
from testbed.worker.client import ControlClient

LONGEST_LINE = 1000
"""Characters of an error that are told; its log has all of it."""


class CellListener:
    """Installed by the environment variable that ``netsenseml.listener`` names.

    In a step this waits while the orchestrator asks to hold, so that all ranks end after the same
    step.
    """

    def __init__(self) -> None:
        self._cell = Path(os.environ[protocol.ENV_CELL_DIR])
        self._output = Path(os.environ[protocol.ENV_OUTPUT_DIR])
        self._restarts = int(os.environ.get(protocol.ENV_RESTARTS, "0"))
        self._steps: RecordFile | None = None
        self._evaluations: RecordFile | None = None
        self._control: ControlClient | None = None
        self._session: Attached | None = None

    def method(self) -> tuple[str, dict[str, Any]]:
        """Raises ValueError, one line, if this process has a session in the cell already."""
        if self._records(protocol.STEPS_FILE).exists():
            raise ValueError(
                "this process has joined its cell already; only one model of a worker can be"
                " measured"
            )
        configured = protocol.read_cell(self._cell)["method"]
        return configured["name"], configured["options"]

    def _records(self, file: str) -> Path:
        return self._output / protocol.numbered(file, self._restarts)

    def attached(self, session: Attached) -> float:
        """Report to the orchestrator, and wait for its start."""
        self._session = session
        self._steps = RecordFile(self._records(protocol.STEPS_FILE))
        if session.rank == 0:
            self._evaluations = RecordFile(self._records(protocol.EVALS_FILE))
        self._control = ControlClient(self._cell / protocol.SOCKET_FILE, session.rank)
        sys.excepthook = partial(self._uncaught, sys.excepthook)
        return self._control.ready(parameters_hash(session.module))

    def record(self, row: Mapping[str, Any]) -> None:
        if self._steps is not None:
            self._steps.append([row])
        if self._control is not None:
            self._control.step = row["step"] + 1

    def step(self, steps: int) -> bool:
        return self._control is None or self._control.step_done(steps)

    def evaluated(self, row: Mapping[str, Any]) -> None:
        if self._evaluations is not None:
            self._evaluations.append([row])
        if self._control is not None:
            self._control.send({"type": "eval", **row})

    def failed(self, error: BaseException) -> None:
        if self._control is not None:
            self._control.failed(describe_error(error), by_peer=blames_peer(error))

    def _uncaught(
        self, hook: Callable[..., Any], kind: type[BaseException], error: BaseException, *rest: Any
    ) -> None:
        """Whatever ends the script: it is told at once, before others notice that this rank has
        gone."""
        with contextlib.suppress(OSError):
            self.failed(error)
        hook(kind, error, *rest)

    def closed(self, accuracy: float | None, loss: float | None) -> None:
        if self._control is not None and self._session is not None:
            failed = self._session.failure is not None or sys.exc_info()[1] is not None
            parameters = parameters_hash(self._session.module, gather=not failed)
            done = {"type": "done", "steps": self._session.steps, "parameters": parameters}
            self._control.send({**done, "accuracy": accuracy, "loss": loss})
            self._control.close()
        for file in filter(None, (self._steps, self._evaluations)):
            file.close()
        self._steps = self._evaluations = None


def describe_error(error: BaseException) -> str:
    """Kind and text of an error, as a traceback ends; the first line of it, with the mend for what
    confinement forbids."""
    line = "".join(traceback.format_exception_only(error)).strip().splitlines()[0][:LONGEST_LINE]
    read_only = isinstance(error, OSError) and error.errno == errno.EROFS
    return (
        line + f"; {protocol.ENV_OUTPUT_DIR} names the directory in which it may write" * read_only
    )


def parameters_hash(module: torch.nn.Module, *, gather: bool = True) -> str:
    """SHA-256 over all parameters, in order: equal for replicas that are equal bit by bit.

    Buffers are left out: DDP makes those of all ranks equal only before a forward, so that the
    running statistics of normalisation differ after the last one.

    gather: put shards together, for which all ranks must come here.
    """
    digest = hashlib.sha256()
    for parameter in module.parameters():
        tensor: Any = parameter
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor() if gather else tensor.to_local()
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
