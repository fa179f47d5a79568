"""Commands that ask the cell that runs, where it is another user's, ends meanwhile, or its answer
may not be written."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from testbed.cli import app
from testbed.protocol import listen_unix
from testbed.recording.link_server import SOCKET_FILE
from testbed.run.directory import run_lock

pytestmark = pytest.mark.fast


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run whose cell hangs up on everybody."""
    cell = tmp_path / "run" / "cells" / "c"
    cell.mkdir(parents=True)
    with listen_unix(cell / SOCKET_FILE) as server:

        def hang_up() -> None:
            for _ in range(8):
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=hang_up)
        thread.start()
        yield tmp_path / "run"
        server.shutdown(2)
        thread.join()


@pytest.mark.parametrize("command", [["link"], ["exec", "w0", "true"], ["capture", "w0"]])
def test_a_cell_that_ends_meanwhile_is_told_of_in_a_line(run: Path, command: list[str]) -> None:
    done = CliRunner().invoke(app, [command[0], "--run", str(run), *command[1:]])
    assert done.exit_code == 1
    assert (
        done.output
        == f"testbed: {run}/cells/c: the cell does not answer any more; it may have ended just"
        " now\n"
    )


def test_a_cell_of_another_user_is_not_said_not_to_run(run: Path) -> None:
    (run / "cells" / "c" / SOCKET_FILE).chmod(0)
    without_rights = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
    command = [*without_rights, sys.executable, "-m", "testbed.cli", "link", "--run", str(run)]
    with run_lock(run):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        4,
        f"testbed: {run}/cells/c: belongs to another user; use sudo\n",
    )
    # by a run that is dead
    left = subprocess.run(command, capture_output=True, text=True, check=False)
    assert left.returncode == 2 and left.stderr.startswith(f"no cell is running in {run}; ")


def test_a_run_that_vanishes_is_looked_into_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/latest").symlink_to("gone")
    done = CliRunner().invoke(app, ["link"])
    assert (done.exit_code, done.output) == (
        2,
        "no cell is running in runs; start one with: testbed run SPEC\n",
    )


def test_a_capture_writes_over_nothing(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "w0.pcap"
    kept.write_text("mine")
    done = CliRunner().invoke(app, ["capture", "w0", "--run", str(run), "--out", str(kept)])
    assert (done.exit_code, done.output) == (
        2,
        f"{kept} exists already, and is left as it is; name another one by --out\n",
    )
    command = [sys.executable, "-m", "testbed.links.capture", "none0", str(kept)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    assert kept.read_text() == "mine"
