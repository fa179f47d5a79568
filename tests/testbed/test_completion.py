"""Completion in shells, through the scripts that the command gives them; quick, since it is asked
at each press of a key."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from testbed.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "experiments" / "below").mkdir(parents=True)
    for name in (
        "drop.yaml",
        "experiments/a.yaml",
        "experiments/notes.txt",
        "experiments/below/b.yml",
        ".hidden.yaml",
    ):
        (tmp_path / name).write_text("")
    for name in ("drop-20260101T000000Z", "walk-20260102T000000Z"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "testbed"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m testbed "$@"\n')
    command.chmod(0o755)
    return tmp_path


def environment(folder, **more):
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": path,
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
        **more,
    }


def asked(monkeypatch, folder, shell, *words):
    """What the command answers to a shell that wants the last of the words completed."""
    line = " ".join(words)
    of_bash = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    of_others = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    given = {
        "_TESTBED_COMPLETE": f"complete_{shell}",
        **(of_bash if shell == "bash" else of_others),
    }
    monkeypatch.chdir(folder)
    return CliRunner().invoke(app, [], prog_name="testbed", env=given).stdout


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        (("ru",), ["run", "runs"]),
        (("run", "d"), ["drop.yaml"]),
        (("run", "e"), ["experiments/a.yaml", "experiments/below/"]),
        (("run", "experiments/b"), ["experiments/below/b.yml"]),
        (("run", "drop.yaml", "--lab", "d"), ["docker"]),
        (("show", "''"), ["runs/drop-20260101T000000Z/", "runs/walk-20260102T000000Z/"]),
        (("run", "--resume", "runs/w"), ["runs/walk-20260102T000000Z/"]),
        (("examples", "schedules/w"), ["schedules/walk", "schedules/wifi"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_names_paths_and_choices_are_completed(monkeypatch, folder, words, choices):
    assert asked(monkeypatch, folder, "bash", "testbed", *words).split() == choices


def test_completion_imports_nothing_that_takes_long(folder):
    given = {
        "_TESTBED_COMPLETE": "complete_bash",
        "COMP_WORDS": "testbed run dr",
        "COMP_CWORD": "2",
    }
    command = [sys.executable, "-X", "importtime", "-m", "testbed"]
    done = subprocess.run(
        command,
        env=environment(folder, **given),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["drop.yaml"]
    loaded = {
        line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.count("|") == 2
    }
    assert "testbed.cli" in loaded
    assert (
        loaded & {"torch", "numpy", "pandas", "pyroute2", "docker", "yaml", "testbed.spec.models"}
        == set()
    )


def test_bash_completes_by_the_script_that_it_is_given(folder):
    script = (
        "source <(testbed --show-completion bash); COMP_WORDS=(testbed run dr); COMP_CWORD=2;"
        " _testbed_completion testbed"
    )
    done = subprocess.run(
        ["bash", "-c", f'{script}; echo "${{COMPREPLY[@]}}"; complete -p testbed'],
        env=environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        done.stdout.split("\n")[0] == "drop.yaml"
        and "-F _testbed_completion testbed" in done.stdout
    )


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_and_what_it_asks_for(monkeypatch, folder, shell):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = CliRunner().invoke(app, ["--show-completion", shell], prog_name="testbed").stdout
    assert f"_TESTBED_COMPLETE=complete_{shell}" in script
    answer = asked(monkeypatch, folder, shell, "testbed", "run", "dr")
    assert "drop.yaml" in answer and "notes.txt" not in answer
    if program := shutil.which(shell):
        subprocess.run([program, "-n", "/dev/stdin"], input=script, text=True, check=True)
