"""``testbed watch``: the page of a run that somebody else makes, or has made."""

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from testbed.files import is_directory, is_file
from testbed.live.server import LivePage, serve
from testbed.recording.link_server import live_cell
from testbed.run.directory import LOCK_FILE, SPEC_FILE


def under_way(directory: Path) -> bool:
    """Whether a process runs the cells of a run directory: it holds the lock, or a cell of it
    answers."""
    try:
        lock = os.open(
            directory / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except OSError:
        return _answers(directory)
    try:
        # for no more than a moment, or we would be who runs it
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # a file system without locks
    finally:
        os.close(lock)
    return _answers(directory)


def _answers(directory: Path) -> bool:
    with contextlib.suppress(OSError):  # what is another user's cannot be asked
        return live_cell(directory) is not None
    return False


def watch(directory: Path, address: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the page of a run until interrupted; its report, while nothing is under way. port: 0 =
    any that is free.

    Raises ValueError, one line, if there is no run directory, and CannotServe.
    """
    if not is_file(directory / SPEC_FILE) and not is_directory(directory / "cells"):
        raise ValueError(
            f"{directory}: is no run directory; run directories lie in runs, unless --out said"
            " otherwise"
        )
    with LivePage(directory.resolve(), address, port, lambda: under_way(directory)) as page:
        say(f"{'live page' if under_way(directory) else 'report'}: {page.url}  (Ctrl-C ends it)")
        if not page.loopback:
            say(
                "others can reach it: what they send and get is not encrypted, and the address is"
                " all that keeps them out"
            )
        serve(page)
