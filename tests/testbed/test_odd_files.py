"""Names and files that nobody expects, one clear line each: too long, leading nowhere, no files at
all, in no encoding."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from testbed.cli import app
from testbed.labs.forkserver import ForkServer

pytestmark = pytest.mark.fast

SMOKE = Path(__file__).parents[2] / "experiments" / "smoke.yaml"
LONG = "a" * 300
"""Longer than a file system takes; as with a closed folder on the way, looking at it is an error,
for root, too."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("testbed.run.start.check_machine", lambda plan: "auto")
    monkeypatch.setattr("testbed.run.start._run", lambda *_: 0)
    shutil.copy(SMOKE, "smoke.yaml")


def refused(*arguments, code=2):
    """The one line by which a command is refused."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    (line,) = result.stderr.splitlines()
    assert "Traceback" not in line
    return line


def spec(**changes):
    Path("odd.yaml").write_text(yaml.safe_dump({**yaml.safe_load(SMOKE.read_text()), **changes}))
    return "odd.yaml"


def script_spec(**script):
    raw = yaml.safe_load(SMOKE.read_text())
    del raw["workload"]
    Path("odd.yaml").write_text(yaml.safe_dump({**raw, "script": {"file": "train.py", **script}}))
    return "odd.yaml"


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", f"{LONG}.yaml"],
        ["run", "--resume", LONG],
        ["runs", LONG],
        ["show", LONG],
        ["report", LONG],
        ["compare", LONG, LONG],
        ["watch", LONG],
        ["link", "--run", LONG],
    ],
)
def test_a_name_that_is_too_long_is_bad_input(arguments):
    assert "aaa" in refused(*arguments)


def test_so_is_that_of_a_script_and_of_a_file_that_it_needs():
    Path("train.py").touch()
    for script, words in (
        ({"file": f"{LONG}.py"}, "there is no file"),
        ({"files": [LONG]}, "beside the script"),
    ):
        for command in ("validate", "run"):
            assert words in refused(command, script_spec(**script))


def test_a_link_that_cannot_be_followed_hides_no_run():
    Path("runs/one/cells").mkdir(parents=True)
    shutil.copy(SMOKE, "runs/one/spec.yaml")
    Path("runs/latest").symlink_to(LONG)
    assert "no cell is running" in refused("link")
    Path("runs/one/cells/latest").symlink_to(LONG)
    result = CliRunner().invoke(app, ["runs"])
    assert result.exit_code == 0, result.output
    assert (
        "one" in result.stdout and "unfinished" in result.stdout and "damaged" not in result.stdout
    )
    assert CliRunner().invoke(app, ["show", "runs/one"]).exit_code == 0
    asked = {
        "_TESTBED_COMPLETE": "complete_bash",
        "COMP_WORDS": "testbed show runs/",
        "COMP_CWORD": "2",
    }
    assert CliRunner().invoke(app, [], prog_name="testbed", env=asked).stdout.split() == [
        "runs/one/cells/"
    ]


def test_nor_the_valid_names_of_a_trace():
    Path("rates.csv").touch()
    Path("latest.csv").symlink_to(LONG)
    os.mkfifo("pipe.csv")
    assert "did you mean 'rates.csv'" in refused(
        "validate", spec(schedule=[{"at": "0s", "links": "w0", "trace": "rate.csv"}])
    )
    assert "is no file" in refused(
        "validate", spec(schedule=[{"at": "0s", "links": "w0", "trace": "pipe.csv"}])
    )


def test_a_package_is_copied_without_what_is_no_file():
    Path("train.py").write_text("import pkg\n")
    Path("pkg/inner").mkdir(parents=True)
    for module in ("pkg/m.py", "pkg/inner/__init__.py"):
        Path(module).write_text("")
    Path("pkg/.#m.py").symlink_to("user@host.1:2")  # as Emacs locks a file
    Path("pkg/same.py").symlink_to("m.py")
    os.mkfifo("pkg/pipe.py")
    result = CliRunner().invoke(app, ["run", script_spec()])
    assert result.exit_code == 0, (result.output, result.exception)
    (copied,) = Path("runs").glob("*/script/pkg")
    assert {path.name for path in copied.iterdir()} == {"m.py", "inner", "same.py"}
    assert "neither a file nor a folder" in refused("run", script_spec(files=["pkg/pipe.py"]))


@pytest.mark.parametrize(
    ("fault", "code"),
    [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device", "x"), 1)],
)
def test_a_run_directory_is_made_whole_or_not_at_all(monkeypatch, fault, code):
    def fails():
        raise fault

    monkeypatch.setattr("testbed.run.directory.environment", fails)
    assert CliRunner().invoke(app, ["run", "smoke.yaml"]).exit_code == code
    assert not list(Path("runs").iterdir())


def test_what_cannot_be_copied_is_named_in_one_line():
    Path("train.py").write_text("import pkg\n")
    Path("pkg").mkdir()
    Path("pkg/m.py").touch()
    # a file that not even root can read from its beginning
    Path("pkg/memory").symlink_to("/proc/self/mem")
    line = refused("run", script_spec(), code=1)
    assert "Input/output error" in line and "[(" not in line
    assert not list(Path("runs").iterdir())


def test_a_place_for_runs_that_is_no_directory_is_bad_input():
    Path("file").touch()
    Path("dangling").symlink_to("nowhere")
    Path("runs").symlink_to("nowhere")
    assert "is no directory" in refused("run", "smoke.yaml", "--out", "file")
    assert "is no directory" in refused("run", "smoke.yaml", "--out", "file/below")
    assert "leads nowhere" in refused("run", "smoke.yaml", "--out", "dangling")
    assert refused("run", "smoke.yaml").startswith(
        "runs: is a link that leads nowhere; name another place with --out"
    )


def test_a_key_that_is_a_huge_number_is_bad_input():
    Path("odd.yaml").write_text(f"a:\n  ? 0x{'f' * 5000}\n  : 1\n")
    assert refused("validate", "odd.yaml") == (
        "odd.yaml: line 2, column 5: is a number of more than 64 characters"
    )


def test_more_cells_than_anybody_runs_are_refused_before_they_are_made():
    seeds, rates = list(range(1000)), [f"{number}mbit" for number in range(1, 102)]
    line = refused(
        "validate", spec(methods=["allreduce"], seeds=seeds, matrix={"network.link.rate": rates})
    )
    assert line.startswith("odd.yaml: seeds: ") and "101,000 cells" in line


def test_a_scheduler_with_tls_is_refused_where_dask_has_no_certificates():
    pytest.importorskip("distributed")
    assert "use tcp://" in refused("run", "smoke.yaml", "--on", "tls://127.0.0.1:1", code=4)


def test_a_module_of_the_user_s_is_not_taken_for_python_s_where_workers_are_started():
    Path("random.py").write_text('open("ran", "w")')
    with ForkServer():
        pass
    assert not Path("ran").exists()


def test_a_name_in_no_encoding_is_printed():
    shutil.copy(SMOKE, b"caf\xe9.yaml")
    command = [sys.executable, "-m", "testbed", "validate", b"caf\xe9.yaml"]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("caf\\udce9.yaml: good")
