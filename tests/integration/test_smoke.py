"""experiments/smoke.yaml as users run it, in the netns lab and with Compose: what the README
promises of it.

NETSENSE_SMOKE names the directory of a run in the netns lab that has just been made here; without
it one is made.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import testbed

ROOT = Path(__file__).parents[2]
DROP_S, RISE_S = 8.0, 16.0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    if given := os.environ.get("NETSENSE_SMOKE"):
        return testbed.load_run(given)
    out = tmp_path_factory.mktemp("smoke")
    done = subprocess.run(
        [sys.executable, "-m", "testbed.cli", "run", "experiments/smoke.yaml", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (directory,) = out.iterdir()
    return testbed.load_run(directory)


def cells(run):
    return {cell["method"]: cell for cell in run.summary["cells"]}


def carried_mbit(links, windows):
    """Rate of each link and direction in Mbit/s over those pairs of samples that lie inside one of
    the windows."""
    rates = {}
    for place, samples in links.sort_values("t_s").groupby(["link", "direction"]):
        begin, end = samples["t_s"].shift(), samples["t_s"]
        inside = pd.Series(False, index=samples.index)
        for first, last in windows:
            inside |= (begin >= first) & (end <= last)
        seconds = (end - begin)[inside].sum()
        assert seconds > 1, "hardly any sample lies inside the windows"
        rates[place] = samples["bytes"].diff()[inside].sum() * 8 / seconds / 1e6
    return rates


@pytest.mark.netns
def test_three_methods_are_valid_and_their_replicas_agree(smoke):
    assert smoke.summary["valid"]
    assert set(cells(smoke)) == {"allreduce", "topk-0.1", "netsense"}
    assert all(cell["replicas_identical"] for cell in cells(smoke).values())


@pytest.mark.netns
def test_netsense_trains_twice_as_many_samples_as_allreduce_and_as_well(smoke):
    ratio = {c["method"]: c["throughput_ratio"] for c in smoke.summary["comparisons"]}
    assert ratio["netsense"] >= 2
    accuracy = {method: cell["final_accuracy"] for method, cell in cells(smoke).items()}
    assert accuracy["netsense"] >= accuracy["allreduce"] - 0.01


@pytest.mark.netns
def test_the_kernel_carried_ten_megabits_in_the_thin_phase(smoke):
    for method in cells(smoke):
        links = smoke.links[smoke.links["cell"] == f"{method}-s0"]
        for place, rate in carried_mbit(links, [(DROP_S + 0.3, RISE_S)]).items():
            # one bucket of 12 kB more than the rate may pass in the 7.7 s
            assert rate <= 10.05, (method, place)
    steps = smoke.steps[smoke.steps["cell"] == "allreduce-s0"]
    begin = (steps["t_s"] - steps["comm_s"]).groupby(steps["step"]).max()
    end = steps.groupby("step")["t_s"].min()
    collectives = [
        (b, e) for b, e in zip(begin, end, strict=True) if b >= DROP_S + 0.3 and e <= RISE_S
    ]
    for place, rate in carried_mbit(
        smoke.links[smoke.links["cell"] == "allreduce-s0"], collectives
    ).items():
        assert rate >= 9.0, place


@pytest.mark.netns
def test_netsense_sends_less_in_the_thin_phase_and_comes_back_up(smoke):
    steps = smoke.steps[smoke.steps["cell"] == "netsense-s0"]
    before = steps[steps["t_s"].between(3, DROP_S)]["payload_bytes"].mean()
    thin = steps[steps["t_s"].between(DROP_S + 1, RISE_S)]["payload_bytes"].mean()
    after = steps[steps["t_s"] > RISE_S + 3]["payload_bytes"].mean()
    # A fifth of the bandwidth halves what makes the most progress a second: sending less than that
    # loses more than it gains.
    assert thin < before * 0.7
    assert after > thin * 1.5


BEGINNING_S = 10.0


def compose(*arguments, **environment):
    done = subprocess.run(
        ["docker", "compose", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def samples_of_allreduce(run):
    """So many were trained in the beginning."""
    return run.steps.query("method == 'allreduce' and t_s <= @BEGINNING_S")["samples"].sum()


@pytest.mark.docker
@pytest.mark.compose
@pytest.mark.netns
def test_compose_runs_the_same_experiment(smoke):
    """Its first seconds, in which the links become slow; that it is what Compose runs unless told
    otherwise is looked up."""
    config = json.loads(compose("config", "--format", "json"))
    assert config["services"]["experiment"]["command"][:2] == ["run", "experiments/smoke.yaml"]
    runs = ROOT / "runs"
    before = set(runs.iterdir())
    spec = runs / "beginning.yaml"
    whole = (
        (ROOT / "experiments/smoke.yaml")
        .read_text()
        .replace("seconds: 24", f"seconds: {BEGINNING_S:g}")
    )
    spec.write_text(
        "".join(line for line in whole.splitlines(keepends=True) if "at: 16s" not in line)
    )
    try:
        compose(
            "up", "--exit-code-from", "experiment", "experiment", EXPERIMENT="runs/beginning.yaml"
        )
    finally:
        spec.unlink()
        compose("down")
    (directory,) = set(runs.iterdir()) - before
    found = testbed.load_run(directory)
    assert found.summary["valid"] and set(cells(found)) == set(cells(smoke))
    assert {path.stat().st_uid for path in [directory, *directory.rglob("*")]} == {
        runs.stat().st_uid
    }
    assert samples_of_allreduce(found) == pytest.approx(samples_of_allreduce(smoke), rel=0.15)
    left = subprocess.run(
        ["docker", "ps", "--all", "--quiet", "--filter", "label=netsense.testbed"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert left.stdout == ""
