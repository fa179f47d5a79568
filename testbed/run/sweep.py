"""All cells of a run directory, one after the other. A cell that is done is not run again."""

import os
import pickle
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from testbed.children import module_command
from testbed.files import read_json
from testbed.labs import open_labs
from testbed.labs.cgroups import ENV_GROUPS, encode_groups
from testbed.labs.netns import sandbox_command
from testbed.plan import Cell, Plan
from testbed.protocol import CELL_FILE, SOCKET_FILE
from testbed.recording.link_server import SOCKET_FILE as LINK_SOCKET_FILE
from testbed.run.cell import prepare_cell, read_result, run_cell
from testbed.run.directory import NoRoom, is_full, release_reserve, reserve_room
from testbed.run.progress import RunProgress
from testbed.signals import child_of_ours
from testbed.traffic.flows import TRAFFIC_PROGRAM

PROGRAMS = ("testbed.worker.program", TRAFFIC_PROGRAM)
"""What a run starts on hosts; labs may prepare for it."""

EXIT_DONE, EXIT_FAILED, EXIT_CANNOT = 0, 1, 4


def execute(plan: Plan, directory: Path, console: Console, only: Collection[str] = ()) -> None:
    """Run every cell of a plan that is not done yet in its run directory; for netns the caller is
    inside the sandbox.

    only: these instead, done or not, if there are any. What an earlier try of a cell has left is
    kept until its turn comes.
    """
    wanted = [cell for cell in in_turn(plan) if not only or cell.name in only]
    pending = wanted if only else not_done(wanted, directory)
    failed: list[Cell] = []
    with _room_reserved(directory), RunProgress(console, len(wanted), len(pending)) as progress:
        for cell in pending:
            place = directory / "cells" / cell.name
            if not place.is_dir():  # the live page, and the report, are to know of it
                prepare_cell(cell, place)
            # of a try that was killed: the page would say that it runs
            for left in (SOCKET_FILE, LINK_SOCKET_FILE):
                (place / left).unlink(missing_ok=True)

        def run(cell: Cell) -> None:
            progress.begin(cell)
            place = directory / "cells" / cell.name
            earlier = _failures(read_result(place) or {}, place)
            prepare_cell(cell, place, earlier)
            result = run_cell(cell, open_lab, place, progress.tick, earlier)
            text = f"{result.status}, {result.steps} steps in {result.t_end_s:.1f} s"
            progress.end("; ".join([text, *result.problems]))
            if is_full(directory):
                raise NoRoom(no_room_left(directory))
            if result.status == "failed" and cell not in failed and not cell.restarts:
                failed.append(cell)

        with open_labs(plan.lab, directory, PROGRAMS) as open_lab:
            for cell in pending:
                run(cell)
            # what went wrong once may have been an accident, but it is not forgotten
            for cell in list(failed):
                progress.retry()
                run(cell)


def not_done(cells: Iterable[Cell], directory: Path) -> list[Cell]:
    """Those that have not come to their end in a run directory."""
    return [
        cell
        for cell in cells
        if (read_result(directory / "cells" / cell.name) or {}).get("status") != "done"
    ]


@contextmanager
def _room_reserved(directory: Path) -> Iterator[None]:
    reserve_room(directory)
    try:
        yield
    finally:
        release_reserve(directory)


def no_room_left(directory: Path) -> str:
    """What to say when there is no room left for a run."""
    shown = Path(os.path.relpath(directory))
    return (
        f"no space left on the disk of {shown}; its records so far are kept: make room, then:"
        f" testbed run --resume {shown}"
    )


def _failures(result: Mapping[str, Any], directory: Path) -> list[str]:
    """Why a cell failed, in all its tries so far; result: of the last one, {} if that was cut
    short."""
    known = result or read_json(directory / CELL_FILE) or {}
    found = [
        known.get("earlier"),
        result.get("problems") if result.get("status") == "failed" else None,
    ]
    return [
        line
        for lines in found
        if isinstance(lines, list)
        for line in lines
        if isinstance(line, str)
    ]


def in_turn(plan: Plan) -> list[Cell]:
    """The cells in the order in which they run: shuffled, lest a slow hour of this machine meet one
    method alone.

    The same order each time; that of the spec if every method has but one cell.
    """
    cells = list(plan.cells)
    if len(cells) > len({cell.method.label for cell in cells}):
        random.Random(plan.name).shuffle(cells)
    return cells


def execute_in_sandbox(
    plan: Plan,
    directory: Path,
    lock: int,
    only: Collection[str] = (),
    progress: int | None = None,
    groups: Mapping[str, Path] = MappingProxyType({}),
) -> int:
    """Run ``execute`` inside private namespaces as a child process; returns its exit code. lock: of
    ``directory.run_lock``.

    progress: where the child writes it, as ``stdout`` of ``subprocess``. groups: from
    ``groups_of_run``.

    When we end, in whatever way, the child stops in an orderly way (``child_of_ours``); and when
    its first process ends, the kernel removes the rest.
    """
    environment = {**os.environ, ENV_GROUPS: encode_groups(groups)}
    with open(os.memfd_create("plan"), "w+b") as work:
        pickle.dump((plan, tuple(only)), work)
        work.seek(0)
        descriptors = [lock, work.fileno()]
        arguments = [str(directory), *map(str, descriptors)]
        command = [*sandbox_command(), *module_command("testbed.run.sandbox_main", *arguments)]
        with child_of_ours(
            command, stdout=progress, pass_fds=descriptors, env=environment
        ) as child:
            return child.wait()
