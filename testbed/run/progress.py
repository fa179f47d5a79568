"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from testbed.plan import Cell

_PLAIN_EVERY_S = 5.0


class RunProgress:
    """Shows which cell runs, how far it is and how long the rest may take.

    cells: how many there are in all. pending: how many of them have not been run before.
    """

    def __init__(self, console: Console, cells: int, pending: int) -> None:
        self._console = console
        self._cells = cells
        self._pending = pending
        self._number = cells - pending
        self._ended = 0
        self._began_s = time.monotonic()
        self._next_line_s = 0.0
        self._task: TaskID | None = None
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def retry(self) -> None:
        """A cell more than was planned is about to be run."""
        self._pending += 1
        self._number -= 1

    def begin(self, cell: Cell) -> None:
        """A cell starts."""
        self._cell = cell
        self._number += 1
        self._next_line_s = time.monotonic() + _PLAIN_EVERY_S
        if self._live:
            self._task = self._bar.add_task(
                self._title() + self._left(), total=1.0, note="starting workers"
            )
        else:
            self._say(f"starting {len(cell.workers)} workers{self._left()}")

    def tick(self, t_s: float, step: int) -> None:
        """The cell is ``t_s`` seconds old and works on ``step``."""
        if self._live and self._task is not None:
            self._bar.update(
                self._task, completed=self._share(t_s, step), note=self._step(t_s, step)
            )
        elif not self._live and time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + _PLAIN_EVERY_S
            self._say(f"{t_s:.0f} s, {self._step(t_s, step)}")

    def _step(self, t_s: float, step: int) -> str:
        over = t_s > self._cell.stop.get("seconds", math.inf)
        return f"step {step}" + ", which is the last: the time is over" * over

    def _left(self) -> str:
        """By what the cells have taken so far."""
        if not self._ended:
            return ""
        left_s = (time.monotonic() - self._began_s) / self._ended * (self._pending - self._ended)
        return (
            f", about {left_s / 60:.0f} min left"
            if left_s >= 90
            else f", about {left_s:.0f} s left"
        )

    def end(self, text: str) -> None:
        """The cell ended; ``text`` says how."""
        self._ended += 1
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        self._say(text)

    def _title(self) -> str:
        return f"[{self._number}/{self._cells}] {self._cell.name}"

    def _say(self, text: str) -> None:
        # In a file or a CI log a line stays one line, however long the cell's name.
        self._console.print(
            f"{self._title()}: {text}", markup=False, highlight=False, soft_wrap=True
        )

    def _share(self, t_s: float, step: int) -> float:
        stop = self._cell.stop
        shares = [t_s / stop["seconds"]] if stop.get("seconds") else []
        shares += [step / stop["steps"]] if stop.get("steps") else []
        return min(1.0, max(shares, default=0.0))
