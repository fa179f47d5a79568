"""For benchmarks that make links: the private namespaces that ``testbed run`` makes them in."""

import os
import sys

from testbed.labs.netns import sandbox_command

_INSIDE = "BENCH_INSIDE"


def enter_sandbox() -> None:
    """Start this program again inside; returns only there."""
    if _INSIDE not in os.environ:
        command = [*sandbox_command(), sys.executable, *sys.argv]
        os.execvpe(command[0], command, {**os.environ, _INSIDE: "1"})
