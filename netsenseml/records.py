"""Records of steps: their columns, and files of JSON lines that survive a crash. Imports no
torch."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

STEP_COLUMNS: Mapping[str, str] = {
    "rank": "rank of the worker that wrote the row",
    "step": (
        "number of the optimizer step, from 0; what local updates exchange after the last one has a"
        " row without samples"
    ),
    "t_s": "end of the step, seconds after t = 0 (CLOCK_MONOTONIC)",
    "loss": "training loss of this rank's batch; null if the script does not report it",
    "samples": "samples of this rank's batch; null if the script does not report them",
    "step_s": "wall time of the step",
    "compute_s": (
        "step_s less comm_s; with gradients on an accelerator, the latter is the device's time"
    ),
    "comm_s": (
        "exposed communication: from the last gradient being ready to the last bucket being"
        " exchanged, and before that the time that backward waited in the hook, and behind the"
        " optimizer that of an exchange of parameters"
    ),
    "encode_s": "time spent in encoding and decoding",
    "payload_bytes": (
        "bytes this rank sent for the exchange by the collective's cost formula, without TCP/IP"
        " headers"
    ),
    "dense_bytes": (
        "bytes a ring all-reduce of the same float32 gradients would have sent from this rank"
    ),
    "scheme": (
        "how the gradients were encoded, for example 'allreduce', 'int8', 'sparse-bf16@1%'; with"
        " local updates 'local' where no exchange ended, else such as 'diloco/bf16', or"
        " 'diloco/bf16, 5 late' if it began so many steps before; with netsense 'int8/8' in all of"
        " 8 steps, the last of which sends; with +1 behind it what was sent is in the row of the"
        " step in which it was applied"
    ),
    "ratio": "share of the gradient elements that were sent, 1 = all",
    "lost_energy": (
        "share of the energy (sum of squares) of gradient + residual that was not sent; null if not"
        " known; with local updates 1 where no exchange ended"
    ),
    "residual_ratio": (
        "largest norm of what is kept of a bucket over that of its gradient; null if nothing is"
        " kept"
    ),
    "bandwidth_bps": (
        "bandwidth estimate in use for this step, bits/s; null if the method does not sense"
    ),
    "rtt_s": "smoothed RTT estimate; null if the method does not sense",
    "min_rtt_s": "smallest RTT in the window; null if the method does not sense",
    "retransmits": (
        "TCP segments retransmitted by this rank since the group was formed; null if unknown"
    ),
}
"""Columns of one row of steps, with their meaning. The testbed adds cell, method and seed on
loading."""


class RecordFile:
    """Append-only JSON lines that survive SIGKILL: every row is one ``write`` of a whole line.

    Only the row being written at the moment of a power failure can be torn; ``read_records`` leaves
    it out.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        """new: it must not be there yet, lest others have put something, or a link to something, in
        its place."""
        flags = (
            os.O_WRONLY
            | os.O_CREAT
            | os.O_APPEND
            | os.O_CLOEXEC
            | (os.O_EXCL | os.O_NOFOLLOW if new else 0)
        )
        self._fd = os.open(path, flags, 0o644)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows of what JSON can hold, all or none; a value that is NaN is written as null.
        Raises OSError."""
        text = "".join(
            json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n" for row in rows
        )
        data, written = text.encode(), 0
        try:
            while written < len(data):  # a disk that fills takes a part first
                written += os.write(self._fd, data[written:])
        except OSError:
            if written:  # the next row must not follow half of this one
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise

    def close(self) -> None:
        os.close(self._fd)


_LONGEST = 1 << 20


def read_records(
    path: Path, parse: Callable[[bytes], Any] = json.loads
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record file, skipping a torn last line, and any that is longer than rows
    are, or no JSON.

    parse: reads one line; raises ValueError where it cannot.
    """
    with open(path, "rb") as file:
        whole = True
        while line := file.readline(_LONGEST):
            whole, begun = line.endswith(b"\n"), whole
            if whole and begun:
                try:
                    yield parse(line)
                except (ValueError, RecursionError):  # nobody who wrote rows nests them so deeply
                    continue


def monotonic_s() -> float:
    """Seconds on CLOCK_MONOTONIC, the one clock of all records."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)
