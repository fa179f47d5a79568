"""TensorBoard event files of a run, one directory a cell."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from testbed.results.load import Run

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

_STEPS = (
    "loss",
    "step_s",
    "compute_s",
    "comm_s",
    "encode_s",
    "payload_bytes",
    "ratio",
    "lost_energy",
    "bandwidth_bps",
    "rtt_s",
)
_EVALS = ("accuracy", "loss")


def write_events(run: Run, directory: Path) -> None:
    """Write ``directory/<cell>/events.out.tfevents…``: scalars by step, means over ranks, with the
    time since t = 0.

    Event files that are there already are replaced. Raises ValueError, one line, if a cell's
    directory is a link: what it leads to may be another's.
    """
    from tensorboardX import SummaryWriter  # it imports torch

    for cell in run.cells["cell"]:
        if (directory / cell).is_symlink():
            raise ValueError(
                f"--tensorboard: {directory / cell}: is a link, and not followed; remove it, or"
                " name another directory"
            )
    for cell in run.cells["cell"]:
        steps, evals = (table[table["cell"] == cell] for table in (run.steps, run.evals))
        means = steps.groupby("step")[["t_s", *_STEPS]].mean()
        means["samples_per_s"] = steps.groupby("step")["samples"].sum(min_count=1) / means["step_s"]
        for old in (directory / cell).glob("events.out.tfevents*"):
            old.unlink()
        writer = SummaryWriter(str(directory / cell), flush_secs=3600)
        _write(writer, "step", means)
        _write(writer, "test", evals.set_index("step")[["t_s", *_EVALS]])
        writer.close()


def _write(writer: "SummaryWriter", group: str, table: pd.DataFrame) -> None:
    for name in table.columns.drop("t_s"):
        for step, t_s, value in table[["t_s", name]].dropna().itertuples():
            writer.add_scalar(f"{group}/{name}", value, step, walltime=t_s)
