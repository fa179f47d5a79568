"""The page that tells how to put NetSenseML into a training: all its blocks run, with the packages
that they are about."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from snippets import blocks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By stack, of one run of torchrun for all, in a directory of its own, as Lightning writes logs
    and checkpoints."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    here = tmp_path_factory.mktemp("training")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command.append(str(HERE / "snippets.py"))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=env, cwd=here, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stack"')]
    return {row["stack"]: row for row in rows}


COLLECTIVE = "Without DistributedDataParallel"


@pytest.mark.parametrize(
    "stack", [heading for heading, found in blocks().items() if found and heading != COLLECTIVE]
)
def test_the_blocks_of_the_page_train(stack: str, told: dict[str, dict[str, Any]]) -> None:
    row = told[stack]
    # which share the data out to the ranks
    steps = 4 if stack in ("Accelerate", "Lightning") else 8
    assert (row["steps"], row["replicas"], row["trained"], row["lr"]) == (steps, 1, True, 0.05)
    assert row["payload"] > 0


def test_the_block_without_ddp_forms_the_mean(told: dict[str, dict[str, Any]]) -> None:
    assert told[COLLECTIVE]["mean"] == pytest.approx(1.5, rel=0.01)  # of 1 and 2, in 4 bits
