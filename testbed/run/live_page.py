"""The live page of a run that this process is about to make: served by a child that ends with
it."""

import contextlib
import os
import select
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from testbed.children import module_command

_STARTED_S = 15.0
LINGER_S = 10.0
"""How long the pages that are open at the end of a run have to fetch its report."""


@contextlib.contextmanager
def live_page(directory: Path, console: Console) -> Iterator[Callable[[], None]]:
    """Serve the page of a run directory during the block; yields what says that the run has ended,
    and has a report.

    The child's standard input is a pipe that only we hold open, so it ends when we do, in whatever
    way. It is a process of its own and in no hurry, lest it disturb the cells; and whatever befalls
    it, the run goes on without a page.
    """
    read_end, parent_pipe = os.pipe2(os.O_CLOEXEC)
    command = module_command("testbed.live", str(directory.resolve()), "127.0.0.1", "0")
    # A process group of its own: Ctrl-C is for us, and then the pipe tells it. What goes wrong
    # there is nothing for a terminal.
    child = subprocess.Popen(
        command,
        stdin=read_end,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    os.close(read_end)
    try:
        console.print(
            f"live page: {_first_line(child)}", markup=False, highlight=False, soft_wrap=True
        )
        yield lambda: _say_ended(parent_pipe)
    finally:
        os.close(parent_pipe)
        _wait(child)


def _first_line(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None
    ready, _, _ = select.select([child.stdout], [], [], _STARTED_S)
    line = child.stdout.readline().strip() if ready else ""
    child.stdout.close()
    return line or "none, as its server did not start; the run goes on without"


def _say_ended(parent_pipe: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has gone
        os.write(parent_pipe, b"\n")


def _wait(child: "subprocess.Popen[str]") -> None:
    try:
        child.wait(LINGER_S + 2.0)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        child.kill()
        child.wait()
