"""A swarm of three nodes for all tests of this directory; the second has a clock that is a million
seconds ahead."""

import subprocess
import sys
from pathlib import Path

import pytest
from swarm_nodes import Nodes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def swarm():
    with Nodes(3, monotonic_s={2: 1_000_000}) as nodes:
        yield nodes


@pytest.fixture
def testbed_command(swarm):
    """Runs ``testbed`` on the manager; ``wait=False`` returns the process."""

    def run(*arguments, wait=True, **environment):
        command = swarm.manager.inside([sys.executable, "-m", "testbed.cli", *map(str, arguments)])
        env = {
            **swarm.manager.environment,
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
            **environment,
        }
        process = subprocess.Popen(
            command,
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if not wait:
            return process
        printed, _ = process.communicate(timeout=200)
        return process.returncode, printed

    return run
