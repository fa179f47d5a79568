"""Some cells of a run: ``python -m testbed.run.cluster_job RUN_DIRECTORY CELL …``.

Not for people: ``testbed.run.cluster`` starts it on another machine, with a pipe as standard input
whose end means stop.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from rich.console import Console

from testbed.labs.base import LabError
from testbed.plan import make_plan
from testbed.run import directory as run_directory
from testbed.run.start import check_machine, groups_for, run_cells
from testbed.run.sweep import EXIT_CANNOT
from testbed.signals import watch_parent_pipe
from testbed.spec.load import load_spec


def main() -> int:
    """Run the cells; the exit codes of ``testbed run``, less those of the results."""
    directory, cells = Path(sys.argv[1]), sys.argv[2:]
    threading.Thread(
        target=watch_parent_pipe, args=(lambda: os.kill(os.getpid(), signal.SIGINT),), daemon=True
    ).start()
    plan = make_plan(load_spec(directory / run_directory.SPEC_FILE), directory)
    try:
        plan = plan.with_engine(check_machine(plan))
        with run_directory.run_lock(directory) as lock, groups_for(plan) as groups:
            return run_cells(plan, directory, lock, Console(), groups, cells)
    except LabError as error:
        print(f"testbed: {error}")
        return EXIT_CANNOT


if __name__ == "__main__":
    sys.exit(main())
