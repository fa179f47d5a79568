"""The distribution: a library that needs little, and a testbed that says what it needs on top."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

import pytest
from installed import Installation

from testbed.__main__ import modules_of_the_extra

ROOT = Path(__file__).parents[2]


def run_without(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The console script where a module cannot be imported."""
    code = f"import sys; sys.modules[{module!r}] = None; from testbed.__main__ import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_library_needs_no_more_than_torch_numpy_and_numba() -> None:
    base = [text for text in metadata.requires("netsenseml") or [] if ";" not in text]
    assert {text.partition(">=")[0] for text in base} == {"torch", "numpy", "numba"}


def test_every_package_of_the_extra_is_known_by_the_name_of_its_module() -> None:
    modules = modules_of_the_extra()
    assert modules >= {"docker", "pydantic", "sklearn", "typer", "yaml"}
    assert [module for module in modules if util.find_spec(module) is None] == []
    assert not modules & {"torch", "numpy", "numba", "pytest"}


# The command line itself needs the first; only the lab of Docker needs the second.
@pytest.mark.parametrize(
    ("module", "arguments"), [("typer", ["--help"]), ("docker", ["clean", "--dry-run"])]
)
def test_without_the_extra_the_console_script_names_it_in_one_line(
    module: str, arguments: list[str]
) -> None:
    done = run_without(module, *arguments)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"testbed: the package {module} is missing")
    assert "pip install 'netsenseml[testbed]'" in done.stderr and done.stderr.count("\n") == 1


def test_any_other_module_that_is_missing_is_a_fault_and_shows_where() -> None:
    done = run_without("testbed.spec.load", "validate", "experiments/smoke.yaml")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "pip install" not in done.stderr


@pytest.fixture
def says(installation: Installation, tmp_path: Path) -> Callable[..., str]:
    """What a program of the installed wheel prints, in an empty folder."""

    def says(*command: str) -> str:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=installation.environment,
            check=False,
            timeout=150,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return says


@pytest.mark.alone  # beside the pages' commands, which need the installation, too
def test_the_wheel_is_all_that_one_needs_where_there_is_no_checkout(
    installation: Installation, says: Callable[..., str], tmp_path: Path
) -> None:
    code = (
        "import sys, testbed, netsenseml as n; print(testbed.__file__, n.__file__, *sys.path,"
        " sep='\\n')"
    )
    where = says(str(installation.python), "-c", code)
    assert where.count(f"{installation.packages}/") == 2 and str(ROOT) not in where.splitlines()
    says("testbed", "init")
    assert says("testbed", "validate") == "experiment.yaml: good; 3 cells, 2 workers, lab netns\n"
    says("testbed", "examples", "schedules/cellular")
    assert (tmp_path / "experiments" / "traces" / "cellular.csv").is_file()
    typed = {
        path.name
        for path in installation.packages.glob("*/py.typed")
        if path.parent.name in ("testbed", "netsenseml")
    }
    assert typed == {"py.typed"}


@pytest.mark.netns
def test_the_wheel_runs_the_smoke_spec_where_there_is_no_checkout(
    says: Callable[..., str], tmp_path: Path
) -> None:
    assert says("testbed", "examples", "smoke").endswith(
        "next: testbed run experiments/smoke.yaml\n"
    )
    short = [
        "workers=2",
        "methods=[allreduce, netsense]",
        "schedule=[]",
        "workload.stop={steps: 3}",
    ]
    options = [word for text in short for word in ("--set", text)]
    summary = json.loads(says("testbed", "run", "experiments/smoke.yaml", *options, "--json"))
    assert summary["valid"] and {cell["method"] for cell in summary["cells"]} == {
        "allreduce",
        "netsense",
    }
    directory = tmp_path / summary["directory"]
    assert (directory / "report.html").is_file()
    assert str(ROOT) not in (directory / "environment.json").read_text()
