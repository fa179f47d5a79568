"""Specs and run directories of strangers: taken, or refused in one clear line; nothing of them is
run, followed or believed.

NETSENSE_FUZZ: how many examples of each, instead of some hundreds.
"""

import contextlib
import copy
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from synthetic_run import write_run
from test_spec import EVERYTHING, places
from typer.testing import CliRunner

from testbed.cli import app
from testbed.plan import describe, make_plan
from testbed.report.html import render
from testbed.results.load import NotARun, load_run
from testbed.results.records import finish_cell
from testbed.results.summary import summarize
from testbed.spec.errors import SpecError
from testbed.spec.load import load_spec


def examples(usual: int) -> settings:
    """The same examples each time, unless many are asked for."""
    asked = os.environ.get("NETSENSE_FUZZ")
    return settings(
        max_examples=int(asked or usual),
        derandomize=asked is None,
        suppress_health_check=list(HealthCheck),
    )


ODD: list[Any] = [
    *[
        None,
        True,
        False,
        0,
        -1,
        1,
        3.5,
        -0.0,
        1e308,
        -1e308,
        float("inf"),
        float("nan"),
        2**31,
        2**63,
        10**400,
    ],
    *[
        "",
        " ",
        "0",
        "-5s",
        "1e400s",
        "NaN",
        "inf",
        "5mbit",
        "999999999999gbit",
        "1e-30ms",
        "50%",
        "-3%",
        "w0",
        "w99",
        "all",
    ],
    *[
        "../../etc/passwd",
        "/dev/zero",
        "os:system",
        "os.path:join",
        "<script>alert(1)</script>",
        "ü" * 300,
        "x" * 5000,
    ],
    *["a\nb", "\x1b[2J", "\x00", "\ud800"],
    *[
        [],
        [[]],
        [None],
        ["w0", "w0"],
        list(range(50)),
        {},
        {"": ""},
        {"rate": {}},
        {"name": "mlp"},
        {"random": [1, 2]},
    ],
    {"share": "1%", "burst": 1e9},
]
WHOLE = yaml.safe_load(EVERYTHING.replace(" on:", " 'on':").replace(" off:", " 'off':"))
PLACES = list(places(WHOLE))
changes = st.lists(
    st.tuples(
        st.sampled_from(PLACES),
        st.sampled_from(ODD) | st.sampled_from(["remove", "rename", "swap"]),
    ),
    min_size=1,
    max_size=3,
)


def changed(raw: Any, path: tuple[Any, ...], value: Any) -> None:
    *parents, last = path
    # an earlier change may have taken its place away
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        for part in parents:
            raw = raw[part]
        if value == "remove":
            del raw[last]
        elif value == "rename":
            raw[f"{last}x"] = raw.pop(last)
        elif value == "swap":
            raw[last] = copy.deepcopy(WHOLE["network"])
        else:
            raw[last] = copy.deepcopy(value)


@examples(200)
@given(changes)
def test_any_spec_is_taken_or_refused_in_lines_that_name_the_place(
    tmp_path_factory: Any, made: list[tuple[Any, Any]]
) -> None:
    raw = copy.deepcopy(WHOLE)
    for path, value in made:
        changed(raw, path, value)
    directory = tmp_path_factory.getbasetemp()
    (directory / "a.csv").write_text("t_s,rate\n0,5mbit\n1,2mbit\n")
    spec = directory / "odd.yaml"
    spec.write_text(yaml.dump(raw, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    try:
        loaded = load_spec(spec)
        if len(loaded.schedule) < 20:
            "\n".join(describe(make_plan(loaded, directory)))
    except SpecError as error:
        lines = str(error).split("\n")
        assert 1 <= len(lines) <= 6
        assert all(line.isprintable() for line in lines), lines


def odd_json(draw: random.Random) -> Any:
    return draw.choice(ODD)


def damaged_text(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 3, 30])):
        if data:
            data[draw.randrange(len(data))] = draw.randrange(256)
    file.write_bytes(data[: draw.randrange(len(data) + 1)] if draw.random() < 0.5 else data)


def damaged_json(file: Path, draw: random.Random) -> None:
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        content[draw.choice([*content, "more"])] = odd_json(draw)
        file.write_text(json.dumps(content))
    elif file.suffix == ".jsonl":
        lines = file.read_text().splitlines() or ["{}"]
        for _ in range(draw.choice([1, 5])):
            place = draw.randrange(len(lines))
            row = json.loads(lines[place])
            if isinstance(row, dict) and draw.random() < 0.8:
                row[draw.choice([*row, "more"])] = odd_json(draw)
            else:
                row = odd_json(draw)
            lines[place] = json.dumps(row)
        file.write_text("\n".join(lines) + "\n")
    elif file.suffix == ".yaml":
        content = yaml.safe_load(file.read_text())
        content[draw.choice([*content, "methods"])] = odd_json(draw)
        file.write_text(yaml.dump(content), errors="surrogatepass")
    else:
        damaged_parquet(file, draw)


def damaged_parquet(file: Path, draw: random.Random) -> None:
    table = pd.read_parquet(file)
    column = draw.choice(list(table.columns))
    match draw.randrange(4):
        case 0:
            table = table.drop(columns=column)
        case 1:
            table[column] = draw.choice(["<b>", 1e300, float("nan"), -1, True, 2**62])
        case 2:
            table[column] = [[1, 2]] * len(table)
        case _:
            table = table.sample(frac=draw.choice([0.0, 0.5, 1.0]), random_state=1)
    table.to_parquet(file, index=False)


REPLACEMENTS = 7


def replaced(file: Path, draw: random.Random) -> None:
    replace(file, draw.randrange(REPLACEMENTS))


def replace(file: Path, kind: int) -> None:
    file.unlink()
    match kind:
        case 0:
            file.symlink_to("/dev/zero")
        case 1:
            file.symlink_to("/etc/passwd")
        case 2:
            os.mkfifo(file)
        case 3:
            file.mkdir()
        case 4:
            file.write_text("[" * 200_000)
        case 5:
            file.write_bytes(random.Random(1).randbytes(5000))
        case _:
            pass  # it is gone


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    damaged_text,
    damaged_json,
    damaged_json,
    replaced,
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The same run, while it goes on and after its end."""
    base = tmp_path_factory.mktemp("originals")
    for name in ("going", "ended"):
        write_run(base / name, methods=("allreduce", "netsense"), t_end_s=2.0)
    for cell in (base / "ended" / "cells").iterdir():
        finish_cell(cell)
    yield [base / "going", base / "ended"]


@examples(30)
@pytest.mark.filterwarnings("error::RuntimeWarning")
@example(seed=40)  # links without names ended the report
@example(seed=42)  # a seed that no column can hold
@given(seed=st.integers(0, 2**32))
def test_any_damaged_run_is_read_or_refused_in_one_line(
    tmp_path_factory: Any, originals: list[Path], seed: int
) -> None:
    draw = random.Random(seed)
    directory = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(draw.choice(originals), directory)
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for file in draw.sample(files, draw.choice([1, 1, 2, 4])):
        draw.choice(DAMAGES)(file, draw)
    try:
        run = load_run(directory)
    except (NotARun, ValueError) as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return
    summary = summarize(run)
    json.dumps(summary, allow_nan=False)
    if draw.random() < 0.3:
        assert "<script>alert(1)</script>" not in render(run, summary)


def test_what_pandas_noted_in_a_table_is_not_needed(tmp_path: Path, originals: list[Path]) -> None:
    """A changed byte in it ended in a TypeError of numpy's."""
    directory = tmp_path / "ended"
    shutil.copytree(originals[1], directory)
    whole = load_run(directory).steps
    for file in directory.glob("cells/*/steps.parquet"):
        table = pq.read_table(file)
        noted = table.schema.metadata[b"pandas"].replace(b"float64", b"floa`64")
        pq.write_table(table.replace_schema_metadata({b"pandas": noted}), file)
    pd.testing.assert_frame_equal(load_run(directory).steps, whole)


@pytest.mark.parametrize("place", ["spec.yaml", "result.json", "directory"])
def test_half_a_character_spoils_no_report(tmp_path: Path, place: str) -> None:
    """UTF-8 has no bytes for it."""
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=2.0)
    cell = run / "cells" / "allreduce-s0"
    match place:
        case "spec.yaml":
            spec = (run / place).read_text()
            (run / place).write_text(spec.replace("name: drop", r'name: "a\uD800b"'))
        case "result.json":
            result = json.loads((cell / place).read_text())
            (cell / place).write_text(json.dumps({**result, "status": "\ud800"}))
        case _:
            cell.rename(os.fsdecode(bytes(cell.parent) + b"/a\x80\xc2\xb2"))  # \xc2\xb2 is ²
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == (1 if place == "result.json" else 0), done.output
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("links", "link", None),
        ("links", "direction", None),
        ("links", "t_s", math.nan),
        ("steps", "samples", -1.0),
        ("steps", "t_s", -1.0),
    ],
)
def test_rows_that_nobody_writes_spoil_no_report(
    tmp_path: Path, originals: list[Path], table: str, column: str, value: float | None
) -> None:
    directory = tmp_path / "ended"
    shutil.copytree(originals[1], directory)
    file = directory / "cells" / "allreduce-s0" / f"{table}.parquet"
    pd.read_parquet(file).assign(**{column: value}).to_parquet(file, index=False)
    run = load_run(directory)
    summary = summarize(run)
    json.dumps(summary, allow_nan=False)
    assert "netsense" in render(run, summary)
    cells = {cell["cell"]: cell["valid"] for cell in summary["cells"]}
    assert cells == {"allreduce-s0": False, "netsense-s0": True}


@pytest.mark.parametrize("kind", range(REPLACEMENTS))
@pytest.mark.parametrize(
    "name", ["spec.yaml", "environment.json", "cell.json", "result.json", "steps", "links"]
)
def test_no_file_of_a_run_need_be_one(
    tmp_path: Path, originals: list[Path], name: str, kind: int
) -> None:
    original = originals[kind % 2]  # while it goes on, or after its end
    directory = tmp_path / original.name
    shutil.copytree(original, directory)
    for file in [path for path in directory.rglob(f"{name}*") if path.is_file()][:2]:
        replace(file, kind)
    with contextlib.suppress(ValueError):
        summary = summarize(load_run(directory))
        assert len(summary["cells"]) == 2


@pytest.mark.parametrize(
    "name", ["report.html", "summary.json", "summary.csv", "report.html.tmp", "summary.json.tmp"]
)
def test_a_report_follows_no_link_that_lies_in_a_run(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=2.0)
    (tmp_path / "home").write_text("mine")
    (run / name).symlink_to(tmp_path / "home")
    CliRunner().invoke(app, ["report", str(run)])
    assert (tmp_path / "home").read_text() == "mine"
    assert (run / "report.html").exists()


def test_a_report_of_a_strangers_run_runs_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=2.0)
    (tmp_path / "run" / "trap.py").write_text(
        f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Method: pass\n"
    )
    spec = yaml.safe_load((run / "spec.yaml").read_text())
    spec["methods"] = [{"name": "trap:Method"}]
    spec["workload"] = {**spec["workload"], "model": "trap:build", "data": "trap:data"}
    (run / "spec.yaml").write_text(yaml.safe_dump(spec))
    cell = run / "cells" / "allreduce-s0" / "cell.json"
    cell.write_text(
        json.dumps(
            {**json.loads(cell.read_text()), "method": {"name": "trap:Method", "options": {}}}
        )
    )
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(run))
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code in (0, 3), done.output
    CliRunner().invoke(app, ["validate", str(run / "spec.yaml")])
    CliRunner().invoke(app, ["run", str(run / "spec.yaml"), "--dry-run"])
    assert not (tmp_path / "sprung").exists()
