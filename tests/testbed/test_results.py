"""Records → tables → verdict → summary, on runs whose numbers can be checked by hand."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.protocol import host_directory
from testbed.results.columns import IDENTITY_COLUMNS, TABLES
from testbed.results.load import NotARun, Run, load_run
from testbed.results.phases import phases
from testbed.results.records import finish_cell, method_label, read_table
from testbed.results.summary import (
    bootstrap_ci95,
    compare,
    geometric_mean,
    lost_energy,
    regrets,
    summarize,
    write_summary,
)
from tests.testbed.synthetic_run import append, host_rows, steps_file, write_cell, write_run


def cell_of(run: Run, name: str) -> dict[str, Any]:
    """The summary of one cell."""
    cells: list[dict[str, Any]] = summarize(run)["cells"]
    return next(cell for cell in cells if cell["cell"] == name)


# Loading


def test_a_running_and_a_finished_run_load_alike(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", seeds=2)
    before = load_run(path)
    for cell in (path / "cells").iterdir():
        finish_cell(cell)
    after = load_run(path)
    assert not list(path.rglob("*.jsonl")) and not list(path.rglob("*.tmp"))
    for name, table in TABLES.items():
        pd.testing.assert_frame_equal(getattr(before, name), getattr(after, name))
        assert list(getattr(after, name).columns) == [*IDENTITY_COLUMNS, *table.columns]
    assert summarize(before) == summarize(after)
    assert summarize(after)["valid"]


def test_several_ranks_of_a_worker_have_records_and_a_say_of_their_own(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", methods=("allreduce",), ranks_per_worker=2)
    cell = path / "cells" / "allreduce-s0"
    assert sorted(found.name for found in (cell / "hosts").iterdir()) == [
        "w0-0",
        "w0-1",
        "w1-0",
        "w1-1",
    ]
    # not for it to say
    append(steps_file(cell, 1, 2), [{"rank": 0, "step": 5000, "t_s": 9.0, "step_s": 1e-9}])
    loaded = load_run(path)
    assert sorted(set(loaded.steps["rank"])) == [0, 1, 2, 3] and loaded.steps["step"].max() < 5000
    summary = cell_of(loaded, "allreduce-s0")
    assert summary["valid"] and summary["replicas_identical"] and len(loaded.evals)
    assert (summary["workers"], summary["ranks_per_worker"]) == (2, 2)
    finish_cell(cell)
    assert summarize(load_run(path))["cells"] == [summary]
    result = json.loads((cell / "result.json").read_text())
    (cell / "result.json").write_text(
        json.dumps({**result, "parameters": {"0": "cafe", "1": "cafe"}})
    )
    assert (
        "not every rank reported its final parameters" in summarize(load_run(path))["problems"][0]
    )


def test_state_of_an_event_is_json_text(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    states = run.events["state"]
    assert json.loads(states.iloc[0])["up"]["rate_bps"] == 50_000_000
    for state in states:  # validity cuts numbers out of the text
        assert state == json.dumps(json.loads(state), sort_keys=True)


def test_tables_longer_than_what_is_converted_at_once_are_the_same_before_and_after_the_end(
    tmp_path: Path,
) -> None:
    path = write_run(tmp_path / "run", methods=("allreduce",))
    cell = path / "cells" / "allreduce-s0"
    (link,) = cell.glob("links.jsonl")
    rows = link.read_text()
    # the last, and one in the middle, have what no row before them has
    odd = json.dumps({"t_s": 9.5, "link": "w1", "direction": "up", "lost": 3, "bytes": None})
    with open(link, "a") as file:
        file.write((rows + odd + "\n") * (50_000 // rows.count("\n")) + '{"t_s": 9')
    before = read_table(cell, "links")
    assert len(before) > 50_000 and before["lost"].notna().sum() > 1
    finish_cell(cell)
    assert not link.exists()
    pd.testing.assert_frame_equal(read_table(cell, "links"), before)


def test_a_killed_run_loads_with_its_torn_last_line_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", methods=("allreduce",), killed=True)
    cell = path / "cells" / "allreduce-s0"
    complete = len(read_table(cell, "steps"))
    with open(steps_file(cell, 0), "a") as file:
        file.write('{"rank": 0, "step": 9')
    run = load_run(path)
    assert len(run.steps) == complete
    assert run.summary is None
    assert run.cells["status"].tolist() == ["unfinished"]
    assert "did not finish" in summarize(run)["problems"][0]


def test_cells_of_which_little_was_written_load(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", methods=("allreduce",))
    (path / "cells" / "empty").mkdir()
    torn = path / "cells" / "torn"
    torn.mkdir()
    (torn / "cell.json").write_text('{"cell": "to')
    append(steps_file(torn, 0), [{"rank": 0, "step": 0, "t_s": 1.0}])
    run = load_run(path)
    assert run.cells["cell"].tolist() == ["allreduce-s0", "empty", "torn"]
    assert run.cells["method"].tolist() == ["allreduce", "unknown", "unknown"]
    summary = summarize(run)
    assert [cell["valid"] for cell in summary["cells"]] == [True, False, False]
    assert "torn: cell.json is missing or damaged" in summary["problems"]


def test_a_run_without_cells_is_not_valid_and_keeps_its_columns(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("name: empty\n")
    run = load_run(tmp_path)
    problems = ["no cell was run"]
    assert summarize(run) == {
        "name": "empty",
        "valid": False,
        "problems": problems,
        "notes": [],
        "cells": [],
        "comparisons": [],
        "regrets": [],
        "target_accuracy": None,
    }
    assert run.steps["loss"].dtype == "float64" and run.events["verified"].dtype == "bool"


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")]
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "x")
    with pytest.raises(NotARun) as error:
        load_run(tmp_path / "x")
    assert "x" in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_spec_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("a: [1\nb: {")
    with pytest.raises(ValueError, match=r"spec\.yaml") as error:
        load_run(tmp_path)
    assert "\n" not in str(error.value)


# Parquet


def test_finishing_twice_changes_nothing(tmp_path: Path) -> None:
    cell = write_cell(tmp_path / "cell", evaluated=False)
    finish_cell(cell)
    before = {path.name: path.read_bytes() for path in cell.iterdir()}
    finish_cell(cell)
    assert {path.name: path.read_bytes() for path in cell.iterdir()} == before
    evals = read_table(cell, "evals")
    assert evals.empty and evals["accuracy"].dtype == "float64" and evals["method"].dtype == "str"


def test_a_run_of_an_older_version_loads_with_newer_columns_unknown(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", methods=("allreduce",))
    cell = path / "cells" / "allreduce-s0"
    finish_cell(cell)
    (cell / "delayline.parquet").unlink()
    newer = ["burst_bytes", "queue_bytes", "lost", "reading_s"]
    pd.read_parquet(cell / "links.parquet").drop(columns=newer).to_parquet(
        cell / "links.parquet", index=False
    )
    run = load_run(path)
    assert run.links[newer].isna().all(axis=None) and (run.links[newer].dtypes == "float64").all()
    assert run.delayline.empty and summarize(run)["valid"]


def test_a_cell_that_has_not_ended_keeps_its_records(tmp_path: Path) -> None:
    cell = write_cell(tmp_path / "cell", killed=True)
    finish_cell(cell)
    append(steps_file(cell, 0), [{"rank": 0, "step": 999, "t_s": 31.0}])
    assert read_table(cell, "steps")["step"].max() == 999


@pytest.mark.parametrize("survives", range(15))
def test_nothing_is_lost_when_finishing_is_killed_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    """Die at the n-th replacement or removal of a file, then look, then finish."""
    cell = write_cell(tmp_path / "cell", t_end_s=3)
    whole = {name: read_table(cell, name) for name in TABLES}
    left = survives

    def dying(act: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return act(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        finish_cell(cell)
    for name in TABLES:
        pd.testing.assert_frame_equal(read_table(cell, name), whole[name])
    finish_cell(cell)
    for name in TABLES:
        pd.testing.assert_frame_equal(read_table(cell, name), whole[name])
    assert not list(cell.glob("*.jsonl"))


# Numbers


def step(rank: int, number: int, t_s: float, **columns: Any) -> dict[str, Any]:
    return {
        "rank": rank,
        "step": number,
        "t_s": t_s,
        "samples": 10,
        "step_s": 1.0,
        "payload_bytes": 100.0,
        **columns,
    }


def test_metrics_by_hand(tmp_path: Path) -> None:
    cell = write_cell(
        tmp_path / "cells" / "c", overrides={"network.link.rate": "1mbit"}, evaluated=False
    )
    (tmp_path / "spec.yaml").write_text("name: hand\nworkload: {stop: {accuracy: 0.8}}\n")
    for records_file in cell.glob("hosts/*/steps.jsonl"):
        records_file.unlink()
    # Two ranks, two steps, 10 samples each, the last one ends at 4 s: 40 samples in 4 s.
    append(steps_file(cell, 0), [step(0, 0, 1.0), step(0, 1, 3.0, step_s=2.0, payload_bytes=300)])
    append(steps_file(cell, 1), [step(1, 0, 1.0), step(1, 1, 4.0, step_s=3.0, payload_bytes=300)])
    evals = [(1.0, 0.5), (2.0, 0.8), (3.0, 0.96), (4.0, 0.95)]
    append(
        host_directory(cell, "w0") / "evals.jsonl",
        [{"step": 1, "t_s": t, "accuracy": a, "loss": 1 - a} for t, a in evals],
    )
    found = cell_of(load_run(tmp_path), "c")
    assert found["throughput_samples_per_s"] == 10.0
    assert found["step_s_median"] == 1.5
    assert found["payload_bytes_per_step"] == 200.0
    assert (found["final_accuracy"], found["best_accuracy"], found["final_loss"]) == (
        0.95,
        0.96,
        0.2,
    )
    assert found["time_to_target_s"] == 2.0
    assert found["replicas_identical"] is True
    assert found["overrides"] == {"network.link.rate": "1mbit"}


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    cell = write_cell(
        tmp_path / "cells" / "c",
        evaluated=False,
        result={"final_accuracy": None, "final_loss": None},
    )
    append(steps_file(cell, 0), [])
    for records_file in cell.glob("hosts/*/steps.jsonl"):
        records_file.unlink()
    append(steps_file(cell, 0), [step(0, 0, 1.0, samples=None)])
    found = cell_of(load_run(tmp_path), "c")
    unknown = (
        "throughput_samples_per_s",
        "final_loss",
        "final_accuracy",
        "best_accuracy",
        "time_to_target_s",
    )
    assert all(found[key] is None for key in unknown)


def summary_cell(method: str, seed: int, throughput: float, **columns: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "throughput_samples_per_s": throughput,
        "time_to_target_s": None,
        "overrides": {},
        "phases": [],
        "valid": True,
    }
    return {"method": method, "seed": seed, **known, **columns}


def test_comparison_is_paired_over_seeds() -> None:
    cells = [
        summary_cell("netsense", seed, rate) for seed, rate in ((0, 20.0), (1, 80.0), (7, 1e9))
    ]
    cells += [summary_cell("allreduce", seed, 10.0, time_to_target_s=8.0) for seed in (0, 1)]
    cells[0]["time_to_target_s"] = 2.0
    [comparison] = compare(cells)
    assert (comparison["baseline"], comparison["method"]) == ("allreduce", "netsense")
    assert comparison["throughput_ratio"] == pytest.approx(4.0)  # of 2 and 8; seed 7 has no partner
    assert comparison["ci95"] == [None, None]
    assert comparison["time_to_target_ratio"] == 0.25
    assert comparison["seeds"] == 2 and comparison["valid"]


def test_comparison_with_an_invalid_cell_is_not_valid() -> None:
    [comparison] = compare(
        [summary_cell("allreduce", 0, 1.0, valid=False), summary_cell("topk", 0, 2.0)]
    )
    assert not comparison["valid"]


def test_comparison_stays_within_equal_overrides_and_without_allreduce_takes_the_first() -> None:
    cells = [
        summary_cell(method, 0, rate, overrides={"network.link.rate": link})
        for link, rates in (("1mbit", (1.0, 3.0)), ("2mbit", (2.0, 4.0)))
        for method, rate in zip(("bf16", "topk"), rates, strict=True)
    ]
    found = [
        (c["baseline"], c["method"], c["overrides"]["network.link.rate"], c["throughput_ratio"])
        for c in compare(cells)
    ]
    assert found == [
        ("bf16", "topk", "1mbit", pytest.approx(3.0)),
        ("bf16", "topk", "2mbit", pytest.approx(2.0)),
    ]


ratios = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


@given(ratios)
def test_geometric_mean_takes_both_directions_alike(values: list[float]) -> None:
    mean, opposite = geometric_mean(values), geometric_mean([1 / value for value in values])
    assert mean is not None and opposite is not None
    assert mean * opposite == pytest.approx(1)
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9)


@given(ratios)
def test_bootstrap_interval(values: list[float]) -> None:
    low, high = bootstrap_ci95(values)
    assert (low is None) == (high is None) == (len(values) < 3)
    if low is not None and high is not None:
        assert min(values) * (1 - 1e-9) <= low <= high <= max(values) * (1 + 1e-9)
        assert [low, high] == bootstrap_ci95(values)


def test_bootstrap_interval_covers_the_truth() -> None:
    """Of 200 experiments of 20 seeds with true ratio 2, the interval holds it in roughly 95 %."""
    drawn = np.exp(np.random.default_rng(1).normal(np.log(2), 0.2, (200, 20)))
    intervals = np.array([bootstrap_ci95(list(sample)) for sample in drawn], dtype=float)
    assert 0.87 <= np.mean((intervals[:, 0] <= 2) & (intervals[:, 1] >= 2)) <= 0.99


def test_method_label_tells_options_apart() -> None:
    assert method_label({"name": "topk", "options": {"ratio": 0.1}}) == "topk-0.1"
    assert method_label({"name": "allreduce", "options": {}}) == "allreduce"


def test_summary_files(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", overrides={"network.link.rate": "50mbit"})
    write_summary(summarize(load_run(path)), path)
    assert load_run(path).summary == summarize(load_run(path))
    with open(path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["allreduce", "netsense", "topk"]
    assert rows[0]["network.link.rate"] == "50mbit" and rows[0]["valid"] == "True"


# Comparisons


def test_the_columns_can_be_had_without_pandas() -> None:
    code = (
        "import sys, testbed.results.columns; sys.exit('pandas' in sys.modules or 'torch' in"
        " sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_regret_counts_only_what_loses_no_more() -> None:
    cells = [
        summary_cell("netsense", 0, 100.0, lost_energy=0.5),
        summary_cell("allreduce", 0, 40.0, lost_energy=0.0),
        summary_cell("topk", 0, 104.0, lost_energy=0.4),
        summary_cell("harder", 0, 500.0, lost_energy=0.9),
        summary_cell("unknown", 0, 900.0, lost_energy=None),
    ]
    [found] = regrets(cells)
    assert (found["method"], found["best"], found["valid"]) == ("netsense", "topk", True)
    assert found["regret"] == pytest.approx(1.04)
    assert regrets([cell for cell in cells if cell["method"] != "netsense"]) == []


def test_a_step_counts_in_every_phase_in_which_it_took_time() -> None:
    steps = pd.DataFrame(
        {"t_s": [4.0, 12.0, 14.0], "step_s": [4.0, 8.0, 2.0], "samples": [8, 8, 8]}
    )
    events = pd.DataFrame(
        {"kind": ["initial", "schedule", "schedule", "manual"], "planned_s": [0.0, 10.0, 10.0, 5.0]}
    )
    first, second = phases(steps, pd.Series([0.2, 0.6, np.nan]), events)
    assert (first["from_s"], first["to_s"], second["to_s"]) == (0, 10, 14)
    assert first["samples_per_s"] == pytest.approx((8 + 8 * 6 / 8) / 10)
    assert second["samples_per_s"] == pytest.approx((8 * 2 / 8 + 8) / 4)
    assert first["lost_energy"] == pytest.approx((0.2 + 0.6 * 0.75) / 1.75)
    assert second["lost_energy"] == pytest.approx(0.6)
    assert phases(steps, steps["t_s"], events[events["kind"] != "schedule"]) == []
    assert phases(steps.assign(samples=np.nan), steps["t_s"], events)[0]["samples_per_s"] is None


def test_the_oracle_takes_in_every_phase_the_best_of_those_that_lose_no_more() -> None:
    def cell(method: str, *phases: tuple[float, float]) -> dict[str, Any]:
        spans = [
            {"from_s": 10.0 * n, "to_s": 10.0 * (n + 1), "samples_per_s": rate, "lost_energy": lost}
            for n, (rate, lost) in enumerate(phases)
        ]
        return {
            **summary_cell(method, 0, 50.0, lost_energy=np.mean([lost for _, lost in phases])),
            "phases": spans,
        }

    cells = [
        cell("netsense", (90, 0.0), (60, 0.9)),
        cell("allreduce", (99, 0.0), (5, 0.0)),
        cell("topk", (70, 0.4), (66, 0.4)),
        cell("harder", (500, 0.9), (500, 0.9)),
    ]
    [found] = regrets(cells)
    assert (found["oracle"], found["valid"]) == (pytest.approx((99 + 66) / 150), True)
    [found] = regrets([cells[0], {**cells[1], "valid": False}, *cells[2:]])
    assert not found["valid"]


def test_bytes_to_the_target_are_those_of_all_ranks(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", methods=("netsense",)))
    cell = cell_of(run, "netsense-s0")
    reached = run.evals[run.evals["accuracy"] >= 0.9].iloc[0]
    assert cell["time_to_target_s"] == reached["t_s"]
    first_rank = run.steps[run.steps["rank"] == 0].set_index("step")["payload_bytes"]
    assert cell["bytes_to_target"] == 2 * first_rank.loc[: reached["step"] - 1].sum()


def test_energy_that_rounding_alone_loses_is_its_bound() -> None:
    def lost(*schemes: str, recorded: float | None = None) -> float | None:
        return lost_energy(
            pd.DataFrame(
                {"scheme": list(schemes), "lost_energy": [recorded] * len(schemes)}, dtype=object
            )
        )

    assert lost("allreduce") == 0
    assert lost("allreduce", "allreduce+1", "allreduce/8+1") == 0
    assert lost("bfloat16", "bfloat16") == 2.0**-16
    assert lost("of my own") is None
    assert lost("of my own", recorded=0.25) == 0.25


def test_the_warm_up_does_not_count(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", methods=())
    (path / "spec.yaml").write_text("name: drop\nworkload: {warmup: 2}\n")
    cell = write_cell(path / "cells" / "c", workers=1)
    for file in cell.glob("hosts/*/steps.jsonl"):
        file.unlink()
    times = [(0, 10.0), (1, 20.0), (2, 21.0), (3, 22.0)]
    append(
        steps_file(cell, 0),
        [step(0, n, t_s, step_s=t_s, samples=8, payload_bytes=100 - n) for n, t_s in times],
    )
    found = cell_of(load_run(path), "c")
    assert found["throughput_samples_per_s"] == pytest.approx(16 / 2)
    assert found["step_s_median"] == pytest.approx(21.5)
    assert found["payload_bytes_per_step"] == pytest.approx(97.5)


def test_steps_of_plain_all_reduce_lose_nothing_and_count() -> None:
    steps = pd.DataFrame(
        {"scheme": ["sparse-int4@1%", *["allreduce"] * 9], "lost_energy": [0.5, *[None] * 9]}
    )
    assert lost_energy(steps) == pytest.approx(0.05)


def test_a_cell_of_paced_compute_that_kept_the_processors_busy_is_noted(tmp_path: Path) -> None:
    for name, compute in (("paced", {"pace_s": 0.1}), ("real", "real")):
        cell = write_cell(tmp_path / "cells" / name, t_end_s=10.0)
        config = json.loads((cell / "cell.json").read_text())
        (cell / "cell.json").write_text(json.dumps({**config, "workload": {"compute": compute}}))
        append(cell / "host.jsonl", host_rows(10.0, busy=0.99))
    (note,) = summarize(load_run(tmp_path))["notes"]
    assert "in paced:" in note and "real" not in note
