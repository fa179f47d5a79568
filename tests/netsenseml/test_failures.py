"""A rank of three fails in the middle of training: what the others see, how soon, and how they
exit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.alone
TIMEOUT_S = 2.0
METHODS = ("allreduce", "topk", "powersgd", "diloco:often", "netsense:late")
"""In the group of DDP, in groups of our own, by torch's hook, behind the optimizer, and with
exchanges that outlast a step."""


@pytest.fixture(scope="module", params=["file", "tcp"])
def rows(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Of every rank of every case. All at once, as they mostly wait."""
    victim = "2" if request.param == "file" else "0"  # with rank 0 its store ends, too
    methods, failures = (
        (METHODS, "kill,stop,raise") if request.param == "file" else (("topk",), "kill,stop,stay")
    )
    command = [
        sys.executable,
        str(ROOT / "experiments/bench/peer_failure.py"),
        "--json",
        "--at-once",
        "15",
        "--victim",
        victim,
    ]
    command += [
        "--methods",
        ",".join(methods),
        "--failures",
        failures,
        "--timeout",
        str(TIMEOUT_S),
        "--meet",
        request.param,
    ]
    command += ["--keep", str(tmp_path_factory.mktemp("ranks"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3 * len(methods) * 3
    return found


@pytest.fixture
def others(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if not row["victim"]]


def test_backward_raises_one_error_that_names_the_rank(
    others: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> None:
    victim = next(row["rank"] for row in rows if row["victim"])
    for row in others:
        assert row["type"] in ("RuntimeError", "PeerFailed"), row
        assert f"rank {victim} " in row["text"] and "ranks" not in row["text"], row
        # without the store of rank 0 nobody learns what others saw
        if row["failure"] in ("stop", "stay") and victim:
            assert f"did not answer within {TIMEOUT_S:g} s" in row["text"], row


def test_the_error_comes_soon_after_the_time_out(others: list[dict[str, Any]]) -> None:
    assert all(row["after_s"] < TIMEOUT_S + 12 for row in others), others


def test_a_rank_that_raises_tells_the_others_why(others: list[dict[str, Any]]) -> None:
    """Where the method has groups of its own; those of DDP have broken by then."""
    assert all(
        "division by zero" in row["text"]
        for row in others
        if row["failure"] == "raise" and row["method"] == "topk"
    )


def test_closing_takes_a_moment_and_the_exit_is_that_of_a_traceback(
    others: list[dict[str, Any]],
) -> None:
    for row in others:
        assert row["closing_s"] is not None and row["closing_s"] < 20, row
        assert row["code"] == 1 and row["tracebacks"] == 1, row
