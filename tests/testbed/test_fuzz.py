"""The short form of tests/chaos/fuzz.py."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")  # it has wheels for x86-64 alone

PROGRAM = Path(__file__).parents[1] / "chaos" / "fuzz.py"


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("spec", 300),
        ("trace", 3000),
        ("worker", 3000),
        ("agent", 3000),
        ("link", 3000),
        ("buffer", 3000),
        ("run", 60),
    ],
)
def test_what_guided_fuzzing_finds_is_taken_or_refused_in_clear_lines(
    tmp_path: Path, target: str, runs: int
) -> None:
    command = [sys.executable, str(PROGRAM), target, "--runs", str(runs), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{runs} inputs" in done.stdout


def test_an_input_is_tried_again_and_a_target_that_there_is_not_is_refused(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b'{"type": "holding"}\n')
    again = ["worker", "--again", str(tmp_path / "input"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *again], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Executed" in done.stderr
    wrong = subprocess.run(
        [sys.executable, str(PROGRAM), "nothing"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2 and "there is no target 'nothing'" in wrong.stderr
