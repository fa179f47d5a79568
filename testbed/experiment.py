"""An experiment from Python, as ``testbed run`` does it."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from testbed.plan import load_plan
from testbed.results.load import Run, load_run
from testbed.run.start import start_run
from testbed.signals import EXIT_INTERRUPTED
from testbed.spec.load import dump_yaml


def run_experiment(
    spec: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    out: str | Path = "runs",
    console: Console | None = None,
) -> Run:
    """Run every cell of a spec, and load what was recorded.

        run = testbed.run_experiment("drop.yaml", overrides=["workers=8"])
        run.summary["valid"], run.steps.groupby("method")["step_s"].median()

    spec: a YAML file, or its content, in which no ``script`` can be named. overrides: as after
    ``--set``. out: where the run directory is made. console: takes progress and table; standard
    output if left out.

    A cell that failed, or is not valid, is a result: see ``run.cells`` and ``run.summary``. Raises
    SpecError (a ValueError), a line for each fault, before anything is touched; NoPlace (an
    OSError) where ``out`` can be no directory; LabError where this machine cannot do it;
    KeyboardInterrupt after an interrupt or SIGTERM, with all records kept. Call it on the main
    thread.
    """
    if isinstance(spec, Mapping):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "spec.yaml"
            path.write_text(dump_yaml(spec), encoding="utf-8")
            return run_experiment(path, overrides=overrides, out=out, console=console)
    path = Path(spec)
    loaded, plan = load_plan(path, overrides)
    code, made = start_run(loaded, plan, Path(out), path.parent.resolve(), console or Console())
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt(f"the records so far are in {made}")
    return load_run(made)
