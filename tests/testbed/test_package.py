"""The distribution: a library that needs little, and a testbed that says what it needs on top."""

import os
import subprocess
import sys
import venv
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
    done = run_without("testbed.spec.load", "validate", "experiments/smoke.yaml")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "pip install" not in done.stderr


def test_the_wheel_is_all_that_one_needs_where_there_is_no_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    place = tmp_path / "environment"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    # The packages that it needs are those of this environment, to install torch again takes minutes. A path file within a
    # directory that a path file names is not read, so that an editable install of the checkout does not come along.
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own,) = place.glob("lib/*/site-packages")
    (own / "packages.pth").write_text("\n".join(packages))
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", *options], check=True)
    bare = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def says(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=bare, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = says(
        str(python), "-c", "import sys, testbed, netsenseml as n; print(testbed.__file__, n.__file__, *sys.path, sep='\\n')"
    )
    assert where.count(f"{own}/") == 2 and str(ROOT) not in where.splitlines()
    command = str(place / "bin" / "testbed")
    says(command, "init")
    assert says(command, "validate") == "experiment.yaml: good; 3 cells, 2 workers, lab netns\n"
    says(command, "examples", "schedules/cellular")
    assert (folder / "experiments" / "traces" / "cellular.csv").is_file()
    assert {path.name for path in own.glob("*/py.typed") if path.parent.name in ("testbed", "netsenseml")} == {"py.typed"}
