"""The paper's evaluation, in short: eight workers with ResNet-18's gradients, emulated compute and dilation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import testbed

ROOT = Path(__file__).parents[2]
PARAMETERS = 11_227_812  # with 100 classes
pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """static.yaml, as ``--set`` makes it short."""
    out = tmp_path_factory.mktemp("paper")
    settings = ("methods=[allreduce, netsense]", "workload.stop={steps: 8}", "matrix={network.link.rate: [800mbit]}")
    command = [sys.executable, "-m", "testbed.cli", "run", str(ROOT / "experiments/paper/static.yaml"), "--out", str(out)]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (directory,) = out.iterdir()
    return testbed.load_run(directory)


def test_eight_workers_exchange_the_real_bytes_and_agree(short):
    cells = {cell["method"]: cell for cell in short.summary["cells"]}
    assert all(cell["replicas_identical"] and cell["workers"] == 8 for cell in cells.values())
    assert cells["allreduce"]["payload_bytes_per_step"] == pytest.approx(2 * 7 / 8 * 4 * PARAMETERS, rel=1e-3)


def test_compute_is_that_of_the_spec_and_the_exchange_takes_what_the_links_allow(short):
    cells = {cell["method"]: cell for cell in short.summary["cells"]}
    steps = short.steps[short.steps["method"] == "allreduce"]
    assert steps["compute_s"].median() == pytest.approx(0.1, rel=0.1)
    exchange_s = 8 * cells["allreduce"]["payload_bytes_per_step"] / (800e6 * 1448 / 1514)
    assert exchange_s < cells["allreduce"]["step_s_median"] < exchange_s + 0.1  # a part is hidden behind backward
    assert (short.links["rate_bps"].dropna() - 800e6).abs().max() < 10


def test_netsense_wins(short):
    [comparison] = short.summary["comparisons"]
    assert comparison["throughput_ratio"] > 2
