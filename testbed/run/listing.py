"""What lies in a directory of runs, at a glance: from names and summaries alone, so that hundreds
of runs take no time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from testbed.files import is_directory, is_regular, read_json
from testbed.protocol import RESULT_FILE, one_line
from testbed.report import text
from testbed.results.load import SUMMARY_FILE, NotARun
from testbed.run.directory import SPEC_FILE, is_being_run

_STAMP = re.compile(r"-(\d{8}T\d{6}Z)(?:-\d+)?$")


@dataclass(frozen=True, slots=True)
class Listed:
    """One run directory.

    began: UTC, as its name has it, else when it was made. verdict: "valid", "invalid", "running";
    "unfinished": it has no summary (yet); "damaged": it has one that cannot be read.
    """

    directory: str
    began: datetime
    verdict: str
    headline: str


def list_runs(folder: Path) -> list[Listed]:
    """The run directories in a folder, newest first; what else lies there is left out. Raises
    NotARun if there is no folder."""
    try:
        paths = [path for path in folder.iterdir() if not path.is_symlink() and is_directory(path)]
    except OSError as error:
        raise NotARun(f"{folder}: {error.strerror}") from None
    found = [_listed(path) for path in paths if is_run(path)]
    return sorted(found, key=lambda run: (run.began, run.directory), reverse=True)


def is_run(path: Path) -> bool:
    """Whether a directory has what every run has from its beginning."""
    try:
        return is_regular(path / SPEC_FILE) and (path / "cells").is_dir()
    except OSError:
        return False


def _listed(path: Path) -> Listed:
    verdict, headline = _verdict(path)
    return Listed(one_line(str(path), 1000), _began(path), verdict, one_line(headline, 300))


def _began(path: Path) -> datetime:
    if stamp := _STAMP.search(path.name):
        try:
            return datetime.strptime(stamp[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        except ValueError:  # the 99th of a month
            pass
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except (OSError, ValueError, OverflowError):
        return datetime.fromtimestamp(0, UTC)


def _verdict(path: Path) -> tuple[str, str]:
    """The verdict, and what is to be said with it."""
    try:
        done, cells = _count(path)
        if is_being_run(path):
            return "running", f"{done} {'cell' if done == 1 else 'cells'} done"
        if not (path / SUMMARY_FILE).exists():
            return (
                "unfinished",
                f"{done} of {cells} cells are done; go on with: testbed run --resume {path}",
            )
    except OSError as error:
        return "damaged", f"cannot be read: {error.strerror}"
    try:
        summary = read_json(path / SUMMARY_FILE) or {}
        return ("valid" if summary["valid"] is True else "invalid"), text.headline(summary)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return "damaged", f"its summary cannot be read; make a new one with: testbed report {path}"


def _count(path: Path) -> tuple[int, int]:
    """(cells that are done, all cells)."""
    cells = [cell for cell in (path / "cells").iterdir() if is_directory(cell)]
    results = [
        read_json(cell / RESULT_FILE) or {} for cell in cells if is_regular(cell / RESULT_FILE)
    ]
    return sum(result.get("status") == "done" for result in results), len(cells)


def runs_table(runs: Sequence[Listed]) -> RenderableType:
    """What ``testbed runs`` found: one row a run directory."""
    table = Table(box=None, pad_edge=False)
    table.add_column("began, UTC", no_wrap=True)
    table.add_column("run", overflow="fold")
    table.add_column("")
    table.add_column("headline", overflow="fold")
    styles = {"valid": "green", "running": "bold", "unfinished": "yellow"}
    for run in runs:
        verdict = Text(run.verdict, style=styles.get(run.verdict, "red"))
        table.add_row(
            f"{run.began:%Y-%m-%d %H:%M}", Text(run.directory), verdict, Text(run.headline)
        )
    return table
