"""The first process of a netns lab:
``python -m testbed.run.sandbox_main RUN_DIRECTORY LOCK WORK``.

Not for people: ``testbed run`` starts it inside private namespaces, with a pipe as standard input
whose end means stop.
"""

import os
import pickle
import sys
import threading
from pathlib import Path

from rich.console import Console

from testbed.files import explained, no_room
from testbed.labs.base import LabError
from testbed.run.directory import NoRoom
from testbed.run.sweep import EXIT_CANNOT, EXIT_FAILED, execute, no_room_left
from testbed.signals import (
    EXIT_INTERRUPTED,
    interrupt_main_thread_once,
    unblock_interrupts,
    watch_parent_pipe,
)


def main() -> int:
    """Run the cells; exit code 0, 1 (the disk is full), 4 (this machine cannot) or 130
    (interrupted)."""
    directory, lock, work = Path(sys.argv[1]), *map(int, sys.argv[2:])
    os.set_inheritable(lock, False)  # held until this process ends, but by no worker
    with interrupt_main_thread_once() as (stop, interrupted):
        try:
            unblock_interrupts()
            # It may say so at once: whoever started us can have ended while this was loading.
            threading.Thread(target=watch_parent_pipe, args=(stop,), daemon=True).start()
            with open(work, "rb") as handed:
                plan, only = pickle.load(handed)  # noqa: S301 - from whoever started us
            execute(plan, directory, Console(), only)
        except (Exception, KeyboardInterrupt) as error:
            if interrupted.is_set():
                return EXIT_INTERRUPTED
            if isinstance(error, LabError):
                print(f"testbed: {error}", file=sys.stderr)
                return EXIT_CANNOT
            # or the run directory has gone, or may not be written to
            if isinstance(error, NoRoom | OSError):
                print(f"testbed: {_one_line(error)}", file=sys.stderr)
                return EXIT_FAILED
            raise
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and no_room(error):
        return no_room_left(Path(sys.argv[1]))
    return explained(error) if isinstance(error, OSError) else str(error)


if __name__ == "__main__":
    sys.exit(main())
