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
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from synthetic_run import write_run
from test_spec import EVERYTHING, places
from typer.testing import CliRunner

from netsenseml.records import read_records
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


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [
        ("spec.yaml", 2, "invalid Unicode character escape code"),
        ("result.json", 1, "allreduce-s0: the cell ?"),
        ("directory", 3, r"a\udc80²: cell.json is that of allreduce-s0"),
    ],
)
def test_half_a_character_is_told_or_replaced(
    tmp_path: Path, place: str, code: int, said: str
) -> None:
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
    assert done.exit_code == code and said in done.output, done.output
    assert code == 2 or (run / "report.html").exists()


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("links", "link", None),
        ("links", "direction", None),
        ("links", "t_s", math.nan),
        ("links", "bytes", math.nan),
        ("events", "kind", "other"),
        ("host", "cpu_foreign_share", math.nan),
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


@pytest.mark.parametrize("place", ["cells", "cells/allreduce-s0", "hosts", "hosts/w0"])
def test_a_report_removes_nothing_to_which_a_link_leads(tmp_path: Path, place: str) -> None:
    """The records of an ended cell, checkpoints, and directories that are empty then, are
    removed."""
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=2.0)
    theirs = write_run(tmp_path / "theirs", methods=("allreduce",), t_end_s=2.0)
    cell = "" if place.startswith("cells") else "cells/allreduce-s0"
    (theirs / "cells/allreduce-s0/hosts/w0/checkpoint-100.pt").write_text("mine")
    (theirs / "cells/allreduce-s0/hosts/empty").mkdir()
    before = sorted(theirs.rglob("*"))
    shutil.rmtree(run / cell / place)
    (run / cell / place).symlink_to(theirs / cell / place)
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code in (1, 2, 3), done.output
    assert sorted(theirs.rglob("*")) == before


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda steps: steps[steps["rank"] != 1], "steps of ranks 0 to 1 should be recorded"),
        (lambda steps: steps.assign(rank=2 * steps["rank"]), "steps of ranks 0 to 1 should be"),
        (lambda steps: pd.concat([steps, steps]), "of rank 0 should be recorded once each"),
        (lambda steps: steps[steps["step"] % 5 > 0], "of rank 0 should be recorded once each"),
        (lambda steps: steps[(steps["step"] < 8) | (steps["rank"] != 1)], "of rank 1 should be"),
        (lambda steps: steps[steps["step"] < 8], "of rank 0 should be recorded once each"),
        (lambda steps: steps.assign(t_s=steps["t_s"].where(steps["step"] % 2 > 0)), "at no time"),
        (lambda steps: steps.assign(t_s=1000 * steps["t_s"]), "after the end"),
    ],
)
def test_steps_that_are_missing_or_twice_there_are_told(
    tmp_path: Path,
    originals: list[Path],
    spoil: Callable[[pd.DataFrame], pd.DataFrame],
    problem: str,
) -> None:
    directory = tmp_path / "ended"
    shutil.copytree(originals[1], directory)
    file = directory / "cells" / "allreduce-s0" / "steps.parquet"
    spoil(pd.read_parquet(file)).to_parquet(file, index=False)
    cell = next(iter(summarize(load_run(directory))["cells"]))
    assert any(problem in line for line in cell["problems"]), cell["problems"]


@pytest.mark.parametrize(
    ("file", "key", "value", "problem"),
    [
        ("cell.json", "seed", None, "names no method, or no seed"),
        ("cell.json", "seed", 10**400, "names no method, or no seed"),
        ("cell.json", "cell", "other", "cell.json is that of other"),
        ("cell.json", "overrides", {"a": json.loads("[" * 500 + "]" * 500)}, "damaged: overrides"),
        ("cell.json", "workers", math.nan, "damaged: workers"),
        ("result.json", "notes", ["\x1b[2J"], ""),
    ],
)
def test_what_a_cell_says_of_itself_is_checked(
    tmp_path: Path, originals: list[Path], file: str, key: str, value: object, problem: str
) -> None:
    directory = tmp_path / "ended"
    shutil.copytree(originals[1], directory)
    path = directory / "cells" / "allreduce-s0" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    done = CliRunner().invoke(app, ["report", str(directory)])
    assert done.exit_code == (3 if problem else 0), done.output
    assert problem in " ".join(done.output.split()) and "\x1b[2J" not in done.output


@pytest.mark.parametrize(
    "text",
    [
        "workload: {target: .inf}",
        "workload: {target: 1" + 400 * "0" + "}",
        "a0: &a0 [0,0,0,0,0,0,0,0,0]\n"
        + "".join(f"a{n}: &a{n} [{9 * f'*a{n - 1},'}]\n" for n in range(1, 10)),
        "name: &name [*name, *name]",
        "name: " + 100_000 * "[",
        100_000 * "- ",
        "name: " + 100_000 * "{a: ",
    ],
)
def test_the_spec_of_a_strangers_run_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=2.0)
    (run / "spec.yaml").write_text(text)
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1, done.output


STEP = "workload: {stop: {steps: 1}}\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("workload: &a [*a, *a]", "workload[1][1]: is nested more than 100 levels deep"),
        ("name: " + 100_000 * "[", "line 2, column 106: is nested more than 100 levels deep"),
        ("name:\n  " + 100_000 * "- ", "line 3, column 201: is nested more than 100 levels deep"),
        (f"{STEP}matrix: {{network.link.rate: {[*range(90_000)]}}}", "makes 90,000 combinations"),
        (
            f"{STEP}matrix:\n" + "".join(f"  network.a{n}: [1]\n" for n in range(40_000)),
            "matrix: has 40,000 keys; 100 are possible",
        ),
        (
            f"{STEP}matrix:\n"
            + "".join(f"  network.a{n}: [0, 1, 2, 3, 4, 5, 6, 7]\n" for n in range(4400)),
            "matrix: has 4,400 keys; 100 are possible",
        ),
        (
            f"{STEP}matrix:\n"
            + "".join(f"  ? network{3000 * '.a'}.{last}\n  : [1]\n" for last in "bc"),
            "has more than 20 parts",
        ),
        (
            f"{STEP}schedule:\n"
            + "".join(f"  - {{at: {n}s, links: all, set: {{rate: 5mbit}}}}\n" for n in range(2000))
            + f"matrix: {{network.link.rate: {[f'{rate}mbit' for rate in range(1, 301)]}}}",
            "makes 300 combinations of a spec of 10,007 values",
        ),
        ("seeds: [&a '" + 100_000 * "x" + "'" + 1000 * ", *a" + "]", "more than 8,388,608 letters"),
        ("seeds: [1" + 150_000 * ":0" + "]", "is a number of more than 64 characters"),
        ("seeds: [1" + 250 * ":0" + ":0.5]", "is a number of more than 64 characters"),
        (f"name: {{? {5 * (2**61 - 1)}}}", "has a key that is too large a number"),
        ("lab: &a !!pairs [x: 1]", "has the tag tag:yaml.org,2002:pairs; a spec has none"),
        ("seeds: !!int ''", "has the tag tag:yaml.org,2002:int; a spec has none"),
        ("calibrate: !!bool x", "has the tag tag:yaml.org,2002:bool; a spec has none"),
        ("seeds: !!python/object/apply:os.system [true]", "has the tag"),
    ],
)
def test_a_spec_that_would_take_for_ever_is_refused_in_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    spec = tmp_path / "odd.yaml"
    spec.write_text(f"methods: [allreduce]\n{text}\n")
    done = CliRunner().invoke(app, ["validate", str(spec)])
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1, done.output[:500]
    assert said in done.stderr


@pytest.mark.parametrize("value", [60_000 * "[", "!!int ''", "1" + 250 * ":0" + ":0.5", "&a [*a]"])
def test_an_odd_value_behind_set_is_refused_in_one_line(tmp_path: Path, value: str) -> None:
    spec = tmp_path / "good.yaml"
    spec.write_text(f"methods: [allreduce]\n{STEP}")
    command = [sys.executable, "-m", "testbed.cli", "validate", spec, "--set", f"seeds={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("--set: ")


def test_the_matrix_of_a_strangers_run_may_be_of_any_size(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", methods=("allreduce",), t_end_s=2.0)
    matrix = {f"network.a{number}": [*range(10)] for number in range(4400)}
    spec = {**yaml.safe_load((run / "spec.yaml").read_text()), "methods": [1], "seeds": [0]}
    (run / "spec.yaml").write_text(yaml.safe_dump({**spec, "matrix": matrix}))
    assert summarize(load_run(run))["problems"] == ["its spec makes more than 100,000 cells"]


def test_a_line_that_is_no_row_is_no_burden(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text('{"step": 0}\n' + 3 * 2**20 * " " + '{"step": 1}\n{"step": 2}\n{"step": 3')
    assert list(read_records(file)) == [{"step": 0}, {"step": 2}]


def test_texts_that_are_not_utf8_and_flows_without_ends_are_refused(
    tmp_path: Path, originals: list[Path]
) -> None:
    directory = tmp_path / "ended"
    shutil.copytree(originals[1], directory)
    file = directory / "cells" / "allreduce-s0" / "links.parquet"
    table = pq.read_table(file)
    wrong = pa.array([b"\xff\xfe"] * len(table)).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("link"), "link", wrong), file)
    cell = next(iter(summarize(load_run(directory))["cells"]))
    assert any("cannot be read" in line for line in cell["problems"])
    going = tmp_path / "going"
    shutil.copytree(originals[0], going)
    cell_file = going / "cells" / "allreduce-s0" / "cell.json"
    cell_file.write_text(json.dumps({**json.loads(cell_file.read_text()), "flows": {"bg": []}}))
    events = going / "cells" / "allreduce-s0" / "hosts" / "bg0" / "events-x.jsonl"
    events.parent.mkdir()
    events.write_text('{"kind": "traffic", "link": "bg"}\n')
    load_run(going)


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
