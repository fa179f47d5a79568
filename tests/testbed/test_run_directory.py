"""The run directory: one owner, room that is set aside, scripts with what they import."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from netsenseml.records import RecordFile, read_records
from testbed.run.directory import (
    RESERVE_FILE,
    RunIsBusy,
    is_full,
    note_environment,
    release_reserve,
    reserve_room,
    run_lock,
)
from testbed.signals import ending_signals, undisturbed
from testbed.spec.files import script_files

pytestmark = pytest.mark.fast


def test_a_directory_has_one_owner_and_is_free_when_that_has_ended(tmp_path: Path) -> None:
    with (
        run_lock(tmp_path),
        pytest.raises(RunIsBusy, match=f"process {os.getpid()} is running it"),
        run_lock(tmp_path),
    ):
        pass
    with run_lock(tmp_path):
        pass


def test_room_is_reserved_again_and_again(tmp_path: Path) -> None:
    for _ in range(2):
        reserve_room(tmp_path)
        assert not is_full(tmp_path)
    assert (tmp_path / RESERVE_FILE).stat().st_size >= 1 << 18
    release_reserve(tmp_path)
    release_reserve(tmp_path)


def test_an_environment_that_is_a_link_is_neither_read_nor_written(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("{}")
    (tmp_path / "environment.json").symlink_to(tmp_path / "mine")
    assert note_environment(tmp_path)
    assert (tmp_path / "mine").read_text() == "{}"
    assert note_environment(tmp_path) == []


def test_who_ignores_a_hang_up_goes_on() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in ending_signals()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in ending_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_must_not_be_disturbed_comes_to_its_end_before_a_signal_does(
    number: signal.Signals,
) -> None:
    reached = False

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), undisturbed():
            signal.raise_signal(number)
            reached = True
    finally:
        signal.signal(number, before)
    assert reached


@pytest.mark.parametrize("lab", ["swarm", "docker"])
def test_what_is_there_stays_if_a_run_cannot_be_resumed(tmp_path: Path, lab: str) -> None:
    (tmp_path / "spec.yaml").write_text(
        f"name: kept\nlab: {lab}\nworkload: {{stop: {{steps: 5}}}}\nmethods: [allreduce, bf16]\n"
    )
    records = {}
    # and not valid: there is nothing in it
    for cell, status in (("allreduce-s0", "failed"), ("bf16-s0", "done")):
        place = tmp_path / "cells" / cell
        (place / "hosts" / "w0").mkdir(parents=True)
        records[place / "hosts" / "w0" / "steps.jsonl"] = '{"step": 0}\n'
        records[place / "result.json"] = f'{{"status": "{status}"}}'
    for path, text in records.items():
        path.write_text(text)
    command = [sys.executable, "-m", "testbed.cli", "run", "--resume", str(tmp_path), "--again"]
    environment = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert {path: path.read_text() for path in records if path.exists()} == records


def test_a_script_brings_what_it_imports_from_its_folder(tmp_path: Path) -> None:
    files = {
        "train.py": (
            "import os, nets\nfrom utils.shapes import x\ndef f():\n    import late\nimport wandb,"
            " broken\n"
        ),
        "nets.py": "import pack\n",
        "late.py": "",
        "broken.py": "this is no Python (\n",
        "other.py": "",
        "pack/__init__.py": "from .inner import y\n",
        "pack/inner.py": "import deepest\n",
        "deepest.py": "",
        "utils/shapes.py": "",
        "wandb/log.txt": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = script_files(tmp_path / "train.py", ["wandb/log.txt"])
    names = {str(path.relative_to(tmp_path)) for path in found}
    assert names == {
        "train.py",
        "nets.py",
        "late.py",
        "broken.py",
        "pack",
        "deepest.py",
        "utils",
        "wandb/log.txt",
    }
    assert found[0] == tmp_path / "train.py"


def test_a_row_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where a file may not grow beyond a size, the last write takes a part."""
    code = f"""
import resource
from pathlib import Path
from netsenseml.records import RecordFile
file = RecordFile(Path({str(tmp_path / "rows.jsonl")!r}))
file.append([{{"row": 0, "text": "x" * 50}}])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    file.append([{{"row": 1, "text": "x" * 50}}])
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    file.append([{{"row": 2, "text": "x" * 50}}])
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [row["row"] for row in read_records(tmp_path / "rows.jsonl")] == [0, 2]


def test_evidence_is_written_to_files_of_our_own(tmp_path: Path) -> None:
    (tmp_path / "links.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        RecordFile(tmp_path / "links.jsonl", new=True)
    assert not (tmp_path / "elsewhere").exists()
