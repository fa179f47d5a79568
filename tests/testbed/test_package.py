"""The distribution: a library that needs little, and a testbed that says what it needs on top."""

import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

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
@pytest.mark.parametrize(("module", "arguments"), [("typer", ["--help"]), ("docker", ["clean", "--dry-run"])])
def test_without_the_extra_the_console_script_names_it_in_one_line(module: str, arguments: list[str]) -> None:
    done = run_without(module, *arguments)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"testbed: the package {module} is missing")
    assert "pip install 'netsenseml[testbed]'" in done.stderr and done.stderr.count("\n") == 1


def test_any_other_module_that_is_missing_is_a_fault_and_shows_where() -> None:
    done = run_without("testbed.spec.load", "--help")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "pip install" not in done.stderr
