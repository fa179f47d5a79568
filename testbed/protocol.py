"""What the testbed and a worker agree on: environment, files and messages.

This module imports no torch, so that the orchestrator stays light.

A *cell* is one training run: one method, one seed, one set of link conditions. Its directory holds

    cell.json         what to run (``CellConfig``), written before any worker starts
    control.sock      Unix stream socket of the orchestrator, one JSON object a line in both directions
    steps-r<R>.jsonl  one line a step, written by rank R (columns: ``netsenseml.records.STEP_COLUMNS``)
    evals.jsonl       one line an evaluation, written by rank 0 (columns: ``EVAL_COLUMNS``)

Messages of a worker (every one carries ``"rank"``):

    {"type": "ready", "pid": int, "parameters": str}   model built, group formed; ``parameters`` is their hash
    {"type": "heartbeat", "step": int}                 once a second; ``step`` is the step now in work
    {"type": "holding", "step": int}                   the answer to ``hold``: the step now in work
    {"type": "eval", "step": int, "t_s": float, "accuracy": float, "loss": float}
    {"type": "done", "steps": int, "parameters": str, "accuracy": float | None, "loss": float | None}
    {"type": "failed", "error": str}

Message of a program of competing traffic, which then waits for ``start``:

    {"type": "ready", "flow": str, "end": str}         ``end`` is "send" or "receive"

Messages of the orchestrator:

    {"type": "start", "t0": float}    CLOCK_MONOTONIC seconds of t = 0: every worker was ready
    {"type": "hold"}                  begin no further step until ``stop`` says which one is the last
    {"type": "stop", "steps": int}    end after ``steps`` steps in all
    {"type": "heartbeat"}             once a second; silence for ``SILENCE_S`` ends the worker

Stopping at a time needs one decision for all ranks, or the ranks that stop early leave the others hanging in a
collective. Synchronous ranks are at most one step apart, so the orchestrator asks every rank to hold, takes
S = max(step now in work) + 1 and tells all of them to end after S steps. No control byte crosses a shaped link.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

ENV_CELL_DIR = "NETSENSE_CELL_DIR"
"""Directory of the cell as the worker sees it; unset outside the testbed."""

ENV_RENDEZVOUS = "NETSENSE_RENDEZVOUS"
"""Where the ranks of the built-in worker meet: init_method of their process group, env:// if unset."""

LISTENER = "testbed.worker.listener:CellListener"
"""What a worker's session tells of its steps; the value of ``netsenseml.listener.ENV_LISTENER`` there."""

CELL_FILE = "cell.json"
SOCKET_FILE = "control.sock"
EVALS_FILE = "evals.jsonl"
HEARTBEAT_S = 1.0
SILENCE_S = 10.0

EVAL_COLUMNS: Mapping[str, str] = {
    "step": "optimizer steps done before the evaluation",
    "t_s": "seconds after t = 0",
    "accuracy": "share of the test set that is classified correctly, 0 to 1",
    "loss": "mean loss over the test set",
}


class MethodConfig(TypedDict):
    """A method and its options, for example ``{"name": "topk", "options": {"ratio": 0.1}}``."""

    name: str
    options: dict[str, Any]


class StopConfig(TypedDict, total=False):
    """When a cell ends: whichever of the given limits is reached first."""

    steps: int
    epochs: float
    seconds: float
    accuracy: float


class WorkloadConfig(TypedDict):
    """What a built-in worker trains.

    ``compute`` is "real", ``{"pace_s": seconds, "factors": …}`` or ``{"emulate_s": seconds, "jitter": share, "factors": …}``;
    factors: by how much longer each rank computes, a list in order of rank.
    """

    model: str
    model_options: dict[str, Any]
    data: str
    data_options: dict[str, Any]
    batch: int
    stop: StopConfig
    optimizer: dict[str, Any]
    compute: Any
    evaluate_every_s: float


class CellConfig(TypedDict):
    """What a worker needs of ``cell.json``. ``workload`` is null where the user's own script runs."""

    cell: str
    method: MethodConfig
    seed: int
    workers: int
    workload: WorkloadConfig | None


def read_cell(directory: Path) -> CellConfig:
    """Read ``cell.json``; raises OSError or ValueError if it is missing or damaged."""
    config: CellConfig = json.loads((directory / CELL_FILE).read_text())
    return config


def steps_file(directory: Path, rank: int) -> Path:
    """Path of the step records of one rank."""
    return directory / f"steps-r{rank}.jsonl"


def listen_unix(path: Path, backlog: int = 128) -> socket.socket:
    """A listening Unix stream socket at ``path``, however long the path is."""
    server = _unix_socket(path, socket.socket.bind)
    server.listen(backlog)
    return server


def connect_unix(path: Path) -> socket.socket:
    """Connect to a Unix stream socket at ``path``, however long the path is."""
    return _unix_socket(path, socket.socket.connect)


def _unix_socket(path: Path, begin: Callable[[socket.socket, str], None]) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        # AF_UNIX paths end at 107 bytes; run directories are often deeper. /proc gives any directory a short name.
        begin(made, f"/proc/self/fd/{directory}/{path.name}")
    except BaseException:
        made.close()
        raise
    finally:
        os.close(directory)
    return made


def encode_message(message: Mapping[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message).encode() + b"\n"


class MessageBuffer:
    """Splits a byte stream into messages."""

    LIMIT = 1 << 20

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Messages completed by ``data``; raises ValueError on anything that is not a JSON object a line."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > self.LIMIT:
            raise ValueError(f"a message is longer than {self.LIMIT} bytes")
        messages = [json.loads(line) for line in lines if line.strip()]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("a message is not a JSON object")
        return messages
