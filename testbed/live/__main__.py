"""The server of ``testbed run --live``: ``python -m testbed.live RUN ADDRESS PORT``.

Not for people: ``testbed run`` starts it beside the cells, with a pipe as standard input. A byte
that comes through it means that the run has ended and has a report, its end that this process has
nothing more to do, however that came about.
"""

import os
import sys
import threading
from pathlib import Path

from testbed.live.server import CannotServe, LivePage, serve

NICE = 19
"""The least urgent there is: a page may wait, a cell must not."""


def main() -> int:
    """Print one line, the address of the page or why there is none, and serve."""
    os.nice(NICE)
    directory, address, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    ended = threading.Event()
    try:
        page = LivePage(directory, address, port, lambda: not ended.is_set())
    except CannotServe as error:
        print(error)
        return 4
    with page:
        print(page.url, flush=True)
        if serve(page, sys.stdin.fileno()):
            ended.set()
            page.linger()
    return 0


if __name__ == "__main__":
    sys.exit(main())
