"""What one begins with: ``testbed init`` and ``testbed examples``, in a folder where there is
nothing."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from testbed.cli import app
from testbed.examples import SCHEMA_NAME
from testbed.plan import load_plan
from testbed.spec.load import load_spec, read_yaml

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def cli(*arguments, code=0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def is_checked_by_the_schema_that_it_names(path):
    line = path.read_text().splitlines()[0]
    schema = path.parent / line.removeprefix("# yaml-language-server: $schema=")
    assert schema.name == SCHEMA_NAME
    validator = jsonschema.Draft7Validator(json.loads(schema.read_text()))
    validator.check_schema(validator.schema)
    raw = read_yaml(path)
    return validator.is_valid(raw) and not validator.is_valid({**raw, "wokers": 4})


def test_what_init_writes_runs_as_it_is_in_under_a_minute():
    assert "next: testbed run\n" in cli("init")
    assert cli("validate") == "experiment.yaml: good; 3 cells, 2 workers, lab netns\n"
    assert "t=5s [w0] tc class replace" in cli("run", "--dry-run")
    path = Path("experiment.yaml")
    assert is_checked_by_the_schema_that_it_names(path)
    spec, plan = load_plan(path)
    assert len(plan.cells) * (spec.stop.seconds + 5) < 60, "a cell takes about 5 s to start"
    assert spec.name == "experiment"


def test_the_commented_parts_of_what_init_writes_are_good_as_well():
    cli("init")
    text = Path("experiment.yaml").read_text()
    commented = [
        line
        for line in text.splitlines()
        if line.startswith(("# traffic:", "#   - {", "# matrix:"))
    ]
    assert len(commented) == 3
    for line in commented:
        text = text.replace(line, line.removeprefix("# "))
    Path("experiment.yaml").write_text(text)
    assert "6 cells" in cli("validate")
    assert len(load_spec(Path("experiment.yaml")).traffic) == 1
    assert is_checked_by_the_schema_that_it_names(Path("experiment.yaml"))


def test_another_name_is_the_name_of_file_and_experiment():
    assert cli("init", "below/drop.yaml").endswith("next: testbed run below/drop.yaml\n")
    path = Path("below/drop.yaml")
    assert load_spec(path).name == "drop"
    assert is_checked_by_the_schema_that_it_names(path)
    assert "testbed run below/drop.yaml --dry-run" in path.read_text()
    for name in ("123", "on", "2026-11-27", "1e3", "null", "a folder/x"):
        next_line = cli("init", name).splitlines()[-1]
        assert load_spec(Path(f"{name}.yaml")).name == Path(name).name
        assert shlex.split(next_line)[-1] == f"{name}.yaml"
    for name in ("a b", "a\n", "below/.hidden", ""):
        assert "cannot be the name of an experiment" in cli("init", name, code=2)


def test_init_writes_nothing_over():
    Path("experiment.yaml").write_text("mine")
    line = cli("init", code=2)
    assert (
        line
        == "experiment.yaml exists already, and is left as it is; name another one: testbed init"
        " experiment-2\n"
    )
    assert Path("experiment.yaml").read_text() == "mine"
    Path("link.yaml").symlink_to("elsewhere.yaml")
    assert "exists already" in cli("init", "link", code=2) and not Path("elsewhere.yaml").exists()
    Path(SCHEMA_NAME).write_text("{}")
    assert "is not the schema" in cli("init", "other", code=2)
    assert not Path("other.yaml").exists() and Path(SCHEMA_NAME).read_text() == "{}"
    Path(SCHEMA_NAME).write_text(
        '{"$comment": "Made by: testbed schema", "of": "an earlier version"}'
    )
    cli("init", "other")
    assert is_checked_by_the_schema_that_it_names(Path("other.yaml"))
    cli("init", "other", code=2)


def test_a_folder_that_cannot_be_written_to_is_told_in_one_line():
    Path("file").write_text("")
    line = cli("init", "file/drop", code=1)
    assert line.count("\n") == 1 and "file" in line


def test_examples_are_listed_with_a_line_each_and_copied_with_what_they_need():
    lines = cli("examples").splitlines()
    found = {one["name"]: one["about"] for one in json.loads(cli("examples", "--json"))}
    assert [line.split()[0] for line in lines] == list(found) and max(map(len, lines)) <= 120
    assert (
        found["smoke"]
        == "Who trains faster when the links drop from 50 to 10 Mbit/s and come back?"
    )
    assert {"own_script", "paper/static", "schedules/cellular", "wan/leo"} <= found.keys()
    assert not any(name.startswith("bench/") for name in found)
    cli("examples", "schedules/cellular")
    copied = {str(path) for path in Path("experiments").rglob("*") if path.is_file()}
    traces = {"experiments/traces/cellular.csv", "experiments/traces/weak_cell.packets"}
    assert copied == {"experiments/schedules/cellular.yaml", f"experiments/{SCHEMA_NAME}"} | traces
    cli("examples", "schedules/cellular")
    paths = json.loads(cli("examples", "all", "elsewhere", "--json"))
    assert [path.removeprefix("elsewhere/").removesuffix(".yaml") for path in paths] == list(found)
    for name in ("own_script", "wan/leo"):
        path = Path("elsewhere", f"{name}.yaml")
        assert is_checked_by_the_schema_that_it_names(path)
        (_, original), (_, copied) = (
            load_plan(ROOT / "experiments" / f"{name}.yaml"),
            load_plan(path),
        )
        assert [cell.timeline for cell in copied.cells] == [
            cell.timeline for cell in original.cells
        ]
    assert Path("elsewhere/own_method.py").is_file()


def test_the_command_that_runs_a_copy_finds_the_modules_beside_it():
    assert cli("examples", "own_method").endswith(
        "next: PYTHONPATH=experiments testbed run experiments/own_method.yaml\n"
    )
    assert cli("examples", "own_script", ".").endswith("next: testbed run own_script.yaml\n")


def test_a_copy_writes_nothing_over_and_an_unknown_name_has_its_nearest():
    Path("experiments").mkdir()
    Path("experiments/smoke.yaml").write_text("mine")
    line = cli("examples", "all", code=2)
    assert line.startswith("experiments/smoke.yaml exists already, and is left as it is")
    assert [path.name for path in Path("experiments").rglob("*")] == ["smoke.yaml"]
    assert "did you mean 'smoke'?" in cli("examples", "smokee", code=2)


def test_without_a_spec_there_is_one_line_that_says_how_to_have_one():
    for command in ("run", "validate"):
        assert "experiment.yaml if left out" in " ".join(
            re.findall(r"[\w.,;]+", cli(command, "--help"))
        )
        line = cli(command, code=2)
        assert (
            line.startswith("SPEC is missing") and "testbed init" in line and line.count("\n") == 1
        )


def test_faults_are_there_for_programs_too():
    cli("init")
    good = json.loads(cli("validate", "--json"))
    assert (good["name"], len(good["cells"]), good["errors"]) == ("experiment", 3, [])
    result = CliRunner().invoke(
        app, ["validate", "--json", "--set", "wokers=3", "--set", "workers=0"]
    )
    assert result.exit_code == 2
    assert {fault["place"] for fault in json.loads(result.stdout)["errors"]} >= {"wokers"}
