"""What the testbed and a worker agree on: environment, files and messages.

This module imports no torch, so that the orchestrator stays light.

A *cell* is one training run: one method, one seed, one set of link conditions. Its directory holds

    cell.json           what to run (``CellConfig``), written before any worker starts
    control.sock        Unix stream socket of the orchestrator, one JSON object a line both ways
    shared/             where all workers may write: they find each other there
    hosts/<host>/       where the programs of one host may write, and nobody else; where a host has
                        several ranks, each has a directory of its own, hosts/<host>-<local rank>/
        steps.jsonl     one line a step of the worker (columns: ``netsenseml.records.STEP_COLUMNS``)
        evals.jsonl     one line an evaluation, written by rank 0 (columns: ``EVAL_COLUMNS``)
        checkpoint-*.pt of the built-in worker, where workers may be started again

The rest of the directory, which is the orchestrator's, they do not see.

The first message of every connection says whose it is, by the token that the environment gave to
that program alone:

    {"type": "hello", "token": str}

Messages of a worker:

    {"type": "ready", "pid": int, "parameters": str}
    {"type": "heartbeat", "step": int}
    {"type": "holding", "step": int}
    {"type": "eval", "step": int, "t_s": float, "accuracy": float, "loss": float}
    {"type": "done", "steps": int, "parameters": str, "accuracy": float | None,
     "loss": float | None}
    {"type": "failed", "error": str, "by_peer": bool}
    {"type": "where", "at": str}

It is ready when its model is built and the group is formed; ``parameters`` is their hash. ``step``
in a heartbeat, of which there is one a second, and in the answer to ``hold``, is the step now in
work. It has failed by a peer if that is because another rank failed. ``where`` answers the same
question: what its main thread is doing.

A worker is done when it has said so and its process has ended with exit code 0.

Message of a program of competing traffic, which then waits for ``start``:

    {"type": "ready"}

Messages of the orchestrator:

    {"type": "start", "t0": float}    CLOCK_MONOTONIC seconds of t = 0: every worker was ready
    {"type": "hold"}                  begin no further step until ``stop`` says which is the last
    {"type": "stop", "steps": int}    end after ``steps`` steps in all
    {"type": "where"}                 the cell stands still; asked before it is given up
    {"type": "heartbeat"}             once a second; silence for ``SILENCE_S`` ends the worker

Where workers may be started again after one has died, as the spec's ``on_failure`` and ``restart``
say, all are: with ``TORCHELASTIC_RESTART_COUNT`` one higher and tokens of their own. They write
steps-1.jsonl, evals-1.jsonl and so on, go on from what they have left in their directory, and are
told the ``t0`` of before.

Stopping at a time needs one decision for all ranks, or the ranks that stop early leave the others
hanging in a collective. So the orchestrator asks every rank to hold, takes S = max(step now in
work) + 1 and tells all of them to end after S steps. Ranks that exchange in every step are at most
one step apart; those that update locally are so many as lie between two exchanges, and the last one
makes them up. No control byte crosses a shaped link.
"""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from testbed.files import is_directory, read_text

ENV_CELL_DIR = "NETSENSE_CELL_DIR"
"""Directory of the cell as the worker sees it; unset outside the testbed."""

ENV_OUTPUT_DIR = "NETSENSE_OUTPUT_DIR"
"""Directory of the host as its programs see it: where they write. Beside it there are but
``SHARED`` and temporary files."""

ENV_RENDEZVOUS = "NETSENSE_RENDEZVOUS"
"""Where the ranks of the built-in worker meet: init_method of their process group, env:// if
unset."""

ENV_TOKEN = "NETSENSE_TOKEN"  # noqa: S105  (its name)
"""What a program shows on the control socket, so that none can speak for another."""

ENV_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""How often the workers have been started again; the name that torchrun gives it, for scripts that
know that."""

LISTENER = "testbed.worker.listener:CellListener"
"""What a worker's session tells of its steps; the value of ``netsenseml.listener.ENV_LISTENER``
there."""

CELL_FILE = "cell.json"
RESULT_FILE = "result.json"
SOCKET_FILE = "control.sock"
STEPS_FILE = "steps.jsonl"
EVALS_FILE = "evals.jsonl"
CHECKPOINTS = "checkpoint-*.pt"
SHARED = "shared"
HEARTBEAT_S = 1.0
SILENCE_S = 10.0

EVAL_COLUMNS: Mapping[str, str] = {
    "step": "optimizer steps done before the evaluation",
    "t_s": "seconds after t = 0",
    "accuracy": "share of the test set that is classified correctly, 0 to 1",
    "loss": "mean loss over the test set",
}
"""Columns of one row of evals: one evaluation of the test set by rank 0."""


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

    ``compute`` is "real", ``{"pace_s": seconds, "factors": …}`` or
    ``{"emulate_s": seconds, "jitter": share, "factors": …}``; factors: by how much longer each rank
    computes, a list in order of rank. slow: [rank, from_s, to_s or null, factor] for the times
    after t = 0 in which one takes longer still. ``device`` is "cpu" or "cuda". checkpoint_every:
    steps; null for none.
    """

    model: str
    model_options: dict[str, Any]
    data: str
    data_options: dict[str, Any]
    batch: int
    stop: StopConfig
    optimizer: dict[str, Any]
    compute: Any
    device: str
    evaluate_every_s: float
    checkpoint_every: int | None


class CellConfig(TypedDict):
    """What a worker needs of ``cell.json``. ``workload`` is null where the user's own script
    runs."""

    cell: str
    method: MethodConfig
    seed: int
    workers: int
    ranks_per_worker: int
    workload: WorkloadConfig | None


def read_cell(directory: Path) -> CellConfig:
    """Read ``cell.json``; raises OSError or ValueError if it is missing or damaged."""
    return cast(CellConfig, decode_message(read_text(directory / CELL_FILE).encode()))


def cell_directories(run: Path) -> list[Path]:
    """The directories of a run's cells, "a-s2" before "a-s10". A link is none, and leads to
    none."""
    if (cells := run / "cells").is_symlink():
        return []
    found = (one for one in cells.glob("*") if not one.is_symlink() and is_directory(one))
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [
        (int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", path.name)
    ]


def ranks_per_worker(cell: Mapping[str, Any]) -> int:
    """How many ranks share a host, by the content of cell.json; of an old run one."""
    known = cell.get("ranks_per_worker")
    return known if isinstance(known, int) and known > 0 else 1


def worker_name(number: int) -> str:
    """The host of ranks number x ranks_per_worker and following."""
    return f"w{number}"


def rank_name(rank: int, ranks_per_worker: int = 1) -> str:
    """What a rank, its log and its directory are called: as its host, or, where that has several,
    w3-0, w3-1, …"""
    worker, local_rank = divmod(rank, ranks_per_worker)
    return worker_name(worker) if ranks_per_worker == 1 else f"{worker_name(worker)}-{local_rank}"


def numbered(file: str, restarts: int) -> str:
    """Name of a record file of workers that have been started again so often: steps.jsonl,
    steps-1.jsonl, …"""
    stem, _, suffix = file.partition(".")
    return f"{stem}-{restarts}.{suffix}" if restarts else file


def host_directory(cell: Path, name: str) -> Path:
    """Where the programs of a host, or a rank (``rank_name``), may write."""
    return cell / "hosts" / name


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
        # AF_UNIX paths end at 107 bytes; run directories are often deeper. /proc gives any
        # directory a short name.
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


def one_line(text: str, length: int = 200) -> str:
    """What others have written, as one line that cannot do anything to a terminal."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * length])
    return " ".join(plain.split())[:length]


def number(value: object) -> float | None:
    """A finite number, or None for all that anybody may have written in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    return float(value)


_LARGEST = 1e18
"""No quantity of ours is so large; and products of two such are finite."""


def decode_message(line: bytes) -> dict[str, Any]:
    """The message of a line; raises ValueError if it is no JSON object."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("a message is nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("a message is not a JSON object")
    return message


class MessageBuffer:
    """Splits a byte stream into messages."""

    LIMIT = 1 << 20

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Messages completed by ``data``, to the last; raises ValueError on anything that is not a
        JSON object a line."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        if max(map(len, [*lines, self._pending])) > self.LIMIT:
            raise ValueError(f"a message is longer than {self.LIMIT} bytes")
        for line in lines:
            if line.strip():
                yield decode_message(line)
