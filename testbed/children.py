"""Programs of our own that we run as child processes."""

import sys
from pathlib import Path


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of the testbed with this Python, without looking for modules
    in the working directory.

    That is the user's: their random.py would be taken for Python's. It is searched only where the
    testbed itself lies in it, as in a checkout that is not installed. What these programs start in
    turn does not inherit this.
    """
    try:
        at_home = Path(__file__).parents[1].samefile(".")
    except OSError:  # the working directory is gone
        at_home = False
    return [sys.executable, *([] if at_home else ["-P"]), "-m", module, *arguments]
