"""Python code in fresh private namespaces, as the first process of a netns lab."""

import os
import subprocess
import sys
from pathlib import Path

from testbed.labs.netns import sandbox_command

ROOT = Path(__file__).parents[1]


def run_in_sandbox(code: str, directory: Path, *arguments: str, timeout_s: float = 120) -> str:
    """Run it in a directory, as a file there; returns what it prints. Raises AssertionError with
    its errors and all logs."""
    script = directory / "sandboxed.py"
    script.write_text(code)
    done = subprocess.run(
        [*sandbox_command(), sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=timeout_s,
        check=False,
    )
    logs = [path.read_text() for path in directory.glob("*.log")] if done.returncode else []
    assert done.returncode == 0, "\n".join([done.stderr, *logs])
    return done.stdout
