"""The paper's evaluation, in short: eight workers with ResNet-18's gradients, emulated compute and
dilation."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import testbed
from testbed.cli import app

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "experiments/paper"
PARAMETERS = 11_227_812  # with 100 classes
SHORT = {
    Path(spec).name: [spec, *arguments]
    for _, _, spec, *arguments in map(
        shlex.split, re.findall("^    testbed run .*", (PAPER / "README.md").read_text(), re.M)
    )
}
"""Arguments of the short version of every spec, as the README has them."""


def test_every_spec_has_a_short_version_that_is_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert set(SHORT) == {path.name for path in PAPER.glob("*.yaml")}
    for arguments in SHORT.values():
        done = CliRunner().invoke(app, ["run", *arguments, "--dry-run"])
        assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """static.yaml in short."""
    out = tmp_path_factory.mktemp("paper")
    command = [sys.executable, "-m", "testbed.cli", "run", *SHORT["static.yaml"], "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (directory,) = out.iterdir()
    return testbed.load_run(directory)


@pytest.mark.netns
def test_eight_workers_exchange_the_real_bytes_and_agree(short):
    cells = {cell["method"]: cell for cell in short.summary["cells"]}
    assert all(cell["replicas_identical"] and cell["workers"] == 8 for cell in cells.values())
    assert cells["allreduce"]["payload_bytes_per_step"] == pytest.approx(
        2 * 7 / 8 * 4 * PARAMETERS, rel=1e-3
    )


@pytest.mark.netns
def test_compute_is_that_of_the_spec_and_the_exchange_takes_what_the_links_allow(short):
    cells = {cell["method"]: cell for cell in short.summary["cells"]}
    steps = short.steps[short.steps["method"] == "allreduce"]
    assert steps["compute_s"].median() == pytest.approx(0.1, rel=0.1)
    exchange_s = 8 * cells["allreduce"]["payload_bytes_per_step"] / (800e6 * 1448 / 1514)
    # a part is hidden behind backward
    assert exchange_s < cells["allreduce"]["step_s_median"] < exchange_s + 0.1
    assert (short.links["rate_bps"].dropna() - 800e6).abs().max() < 10


@pytest.mark.netns
def test_netsense_wins(short):
    [comparison] = short.summary["comparisons"]
    assert comparison["throughput_ratio"] > 2
