"""``testbed runs`` and ``testbed show``: runs that ended, go on, were killed or damaged, and what
strangers left by them."""

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import write_cell, write_run
from typer.testing import CliRunner

import testbed
from testbed.cli import app
from testbed.results.load import load_run
from testbed.results.summary import summarize, write_summary
from testbed.run.directory import run_lock

SMOKE = Path(__file__).parents[2] / "experiments" / "smoke.yaml"
NAMES = {
    "ended": "drop-20260105T000000Z",
    "later": "drop-20260105T000000Z-2",
    "going": "drop-20260104T120000Z",
    "killed": "drop-20260103T000000Z",
    "cut": "drop-20260102T000000Z",
    "odd": "drop-20260101T000000Z",
}


def cli(*arguments, code=0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    run = write_run(
        tmp_path_factory.mktemp("original") / "run", methods=("allreduce", "netsense"), t_end_s=3.0
    )
    write_summary(summarize(load_run(run)), run)
    return run


@pytest.fixture
def folder(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES.values():
        shutil.copytree(original, tmp_path / "runs" / name)
    return tmp_path / "runs"


def listed(*arguments):
    return {run["directory"]: run for run in json.loads(cli("runs", *arguments, "--json"))}


def test_runs_are_listed_newest_first_with_verdict_and_headline(folder, original):
    for name in ("going", "killed"):
        (folder / NAMES[name] / "summary.json").unlink()
    (folder / NAMES["killed"] / "cells" / "netsense-s0" / "result.json").unlink()
    (folder / NAMES["cut"] / "summary.json").write_text('{"valid": tr')
    (folder / NAMES["odd"] / "summary.json").write_text(
        '{"valid": true, "comparisons": 7, "cells": [3]}'
    )
    with run_lock(folder / NAMES["going"]):
        found = listed()
    order = ("later", "ended", "going", "killed", "cut", "odd")
    assert list(found) == [f"runs/{NAMES[name]}" for name in order]
    verdicts = {name: found[f"runs/{NAMES[name]}"]["verdict"] for name in order}
    valid = "valid" if json.loads((original / "summary.json").read_text())["valid"] else "invalid"
    assert verdicts == {
        "later": valid,
        "ended": valid,
        "going": "running",
        "killed": "unfinished",
        "cut": "damaged",
        "odd": "damaged",
    }
    assert "netsense trained" in found[f"runs/{NAMES['ended']}"]["headline"]
    killed = found[f"runs/{NAMES['killed']}"]
    assert killed["began"] == "2026-01-03T00:00:00+00:00"
    assert (
        killed["headline"]
        == f"1 of 2 cells are done; go on with: testbed run --resume runs/{NAMES['killed']}"
    )
    assert listed()[f"runs/{NAMES['going']}"]["verdict"] == "unfinished", "the lock is gone"
    table = cli("runs")
    assert len(table.splitlines()) == len(order) + 1, "in a pipe a run is a line"
    assert (
        table.index("2026-01-05 00:00") < table.index("2026-01-04 12:00") < table.index("damaged")
    )


def test_what_strangers_leave_is_listed_or_left_out_and_never_raises(folder, tmp_path):
    runs = [folder / name for name in NAMES.values()]
    for path, kind in zip(
        runs, ["fifo", "link", "directory", "number", "deep", "inf"], strict=True
    ):
        summary = path / "summary.json"
        whole = json.loads(summary.read_text())
        summary.unlink()
        match kind:
            case "fifo":
                os.mkfifo(summary)
            case "link":
                summary.symlink_to("/dev/zero")
            case "directory":
                summary.mkdir()
            case "number":
                summary.write_text("7")
            case "deep":
                summary.write_text("[" * 200_000)
            case "inf":
                for cell in whole["comparisons"]:
                    cell["throughput_ratio"] = 1e999
                summary.write_text(json.dumps(whole))
    (folder / "notes.txt").write_text("mine")
    (folder / "project").mkdir()
    (folder / "a link").symlink_to(runs[0])
    hostile = folder / "\x1b[2Jbad-20269999T999999Z"
    shutil.copytree(runs[0], hostile, ignore=shutil.ignore_patterns("summary.json"))
    (hostile / ".lock").unlink(missing_ok=True)
    os.mkfifo(hostile / ".lock")
    found = listed()
    assert len(found) == len(NAMES) + 1
    assert {found[f"runs/{path.name}"]["verdict"] for path in runs[:5]} == {"damaged"}
    assert "\x1b" not in cli("runs")
    assert [run["verdict"] for run in found.values() if "bad-" in run["directory"]] == [
        "unfinished"
    ]


def test_a_folder_without_runs_or_that_is_one_or_is_none(folder, tmp_path, monkeypatch):
    assert "is one run directory; show it with: testbed show" in cli(
        "runs", f"runs/{NAMES['ended']}", code=2
    )
    assert "nowhere" in cli("runs", "nowhere", code=2)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert listed() == {} and cli("runs") == ""


def test_a_run_is_shown_without_writing_to_it(folder):
    run = folder / NAMES["ended"]
    (run / "summary.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    text = cli("show", str(run))
    assert "netsense trained" in text and "samples/s" in text
    summary = json.loads(cli("show", str(run), "--json"))
    assert summary["directory"] == str(run) and [cell["method"] for cell in summary["cells"]] == [
        "allreduce",
        "netsense",
    ]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    line = cli("show", str(folder), code=2)
    assert "not a run directory" in line and line.count("\n") == 1


def test_a_comparison_is_there_for_programs_too(folder):
    paths = [str(folder / NAMES[name]) for name in ("ended", "later")]
    found = json.loads(cli("compare", *paths, "--json"))
    assert {one["method"]: one["verdict"] for one in found}.keys() == {"allreduce", "netsense"}


@pytest.fixture
def without_a_lab(monkeypatch, tmp_path):
    """In a lab's place, records are written as its workers would have."""

    def in_sandbox(plan, directory, lock, only, progress, groups):
        subprocess.run(["echo", "a line of progress"], stdout=progress, check=True)
        for method in ("allreduce", "topk", "netsense"):
            write_cell(directory / "cells" / f"{method}-s0", method, t_end_s=2.0)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("testbed.run.start.check_machine", lambda plan: "netem")
    monkeypatch.setattr("testbed.run.start.execute_in_sandbox", in_sandbox)
    monkeypatch.setattr("testbed.report.html.write_report", lambda *_: None)


@pytest.mark.usefixtures("without_a_lab")
def test_a_console_takes_progress_and_table_wherever_it_writes(tmp_path, capfd):
    text = io.StringIO()
    testbed.run_experiment(SMOKE, console=Console(file=text))
    with open(tmp_path / "said", "w") as file:
        testbed.run_experiment(SMOKE, console=Console(file=file))
    for said in (text.getvalue(), (tmp_path / "said").read_text()):
        assert said.index("a line of progress") < said.index("samples/s") < said.index("report: ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("option", ["", "--quiet", "--json"])
@pytest.mark.usefixtures("without_a_lab")
def test_a_run_is_told_with_progress_without_it_or_as_json(tmp_path, capfd, option):
    with pytest.raises(SystemExit) as ended:
        app(["run", str(SMOKE), *filter(None, [option])], prog_name="testbed")
    assert ended.value.code in (0, 3)
    out, err = capfd.readouterr()
    assert ("a line of progress" in out, "a line of progress" in err) == (
        option == "",
        option == "--json",
    )
    if option == "--json":
        summary = json.loads(out)
        assert (
            len(summary["cells"]) == 3
            and (tmp_path / summary["directory"] / "summary.json").exists()
        )
        assert "report: " in err
    else:
        assert "report: " in out and err == ""
