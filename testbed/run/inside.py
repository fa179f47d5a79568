"""The first process of a netns lab: ``python -m testbed.run.inside RUN_DIRECTORY LOCK``.

Not for people: ``testbed run`` starts it inside private namespaces, with a pipe as standard input whose end means stop.
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from testbed.labs.base import LabError
from testbed.run.directory import NoRoom, no_room
from testbed.run.sweep import EXIT_CANNOT, EXIT_FAILED, EXIT_INTERRUPTED, execute, full, interrupt_main_thread_once


def main() -> int:
    """Run the cells; exit code 0, 1 (the disk is full), 4 (this machine cannot) or 130 (interrupted)."""
    os.set_inheritable(int(sys.argv[2]), False)  # the lock of the run is held until this process ends, but by no worker
    stop = interrupt_main_thread_once()
    threading.Thread(target=_watch_lifeline, args=(stop,), daemon=True).start()
    try:
        execute(Path(sys.argv[1]), Console())
    except LabError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return EXIT_CANNOT
    except (NoRoom, OSError) as error:
        if isinstance(error, OSError) and not no_room(error):
            raise
        print(f"testbed: {full(Path(sys.argv[1])) if isinstance(error, OSError) else error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _watch_lifeline(stop: Callable[[], None]) -> None:
    while os.read(0, 1):
        pass
    stop()


if __name__ == "__main__":
    sys.exit(main())
