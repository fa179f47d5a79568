"""``testbed compare``: what became slower or faster."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from testbed.cli import app
from testbed.results.load import load_run
from testbed.results.run_comparison import compare_runs
from tests.testbed.synthetic_run import write_run


def slowed(run: Path, target: Path, method: str, factor: float) -> Path:
    """A copy of a run in which every step of a method takes longer."""
    shutil.copytree(run, target)
    for file in target.glob(f"cells/{method}-s*/hosts/*/steps.jsonl"):
        rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["step_s"] *= factor
            row["t_s"] *= factor
            row["payload_bytes"] *= factor  # the links carried as much in a second as before
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_planted_slow_down_is_named(tmp_path: Path, seeds: int) -> None:
    run = write_run(tmp_path / "before", seeds=seeds)
    found = compare(run, slowed(run, tmp_path / "after", "topk", 1.1))
    assert found.exit_code == 1
    assert "Slower or missing: topk." in found.output
    assert [
        d.verdict for d in compare_runs(load_run(run), load_run(tmp_path / "after"), 0.05)
    ].count("slower") == 1


def test_equal_runs_are_equal(tmp_path: Path) -> None:
    run = write_run(tmp_path / "before")
    found = compare(run, slowed(run, tmp_path / "after", "topk", 1.0))
    assert found.exit_code == 0
    assert "Nothing became slower." in found.output


def test_what_became_faster_is_no_failure_and_what_is_within_the_tolerance_is_the_same(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "before", t_end_s=12.0)  # its steps end where its cell does
    after = slowed(
        slowed(run, tmp_path / "middle", "topk", 0.8), tmp_path / "after", "netsense", 1.04
    )
    verdicts = {d.method: d.verdict for d in compare_runs(load_run(run), load_run(after), 0.05)}
    assert verdicts == {"allreduce": "same", "netsense": "same", "topk": "faster"}
    assert compare(run, after).exit_code == 0
    assert compare(run, after, "--tolerance", "2%").exit_code == 1


def test_a_cell_that_is_gone_is_a_failure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "before")
    after = slowed(run, tmp_path / "after", "topk", 1.0)
    shutil.rmtree(after / "cells" / "topk-s0")
    found = compare(run, after)
    assert found.exit_code == 1
    assert "missing" in found.output


def test_a_run_that_is_not_valid_proves_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "before")
    assert compare(run, write_run(tmp_path / "after", late_s=1.0)).exit_code == 3


@pytest.mark.parametrize("arguments", [("nowhere",), (".", "--tolerance", "much")])
def test_bad_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    found = compare(write_run(tmp_path / "before"), *arguments)
    assert found.exit_code == 2
    assert len(found.output.strip().splitlines()) == 1


def test_a_report_of_what_is_no_run_is_bad_input(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert found.exit_code == 2
    assert "not a run directory" in found.output
