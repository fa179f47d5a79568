"""Record files read as they grow: never the same byte twice, and never so long that somebody has to
wait."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from testbed.files import open_regular

_PIECE_BYTES = 1 << 18
_LONGEST_LINE = 1 << 20


class Tail:
    """Rows that were appended to a record file since they were last asked for.

    Programs of others write beside us: what is no file, no row or has no end is left out. A file
    that was replaced, or has become shorter, is read from its beginning.
    """

    def __init__(self, path: Path, wanted: Callable[[bytes], bool] = lambda line: True) -> None:
        """wanted: whether a line is worth parsing."""
        self._path = path
        self._wanted = wanted
        self._inode = self._place = 0
        self._torn = b""

    def rows(self, deadline_s: float) -> Iterator[dict[str, Any]]:
        """The new rows, as far as they can be had by a time of ``time.monotonic``."""
        try:
            file = open_regular(self._path)
        except OSError:  # not there yet, not there any more, or not for us
            return
        with file:
            if not self._is_the_same(file):
                return
            while piece := self._next_piece(file):
                *lines, self._torn = (self._torn + piece).split(b"\n")
                if len(self._torn) > _LONGEST_LINE:
                    self._torn = b""  # nobody who writes rows writes such a line
                for line in lines:
                    if self._wanted(line) and (row := _row(line)) is not None:
                        yield row
                if time.monotonic() > deadline_s:
                    return

    def _is_the_same(self, file: BinaryIO) -> bool:
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or status.st_size < self._place:
            self._inode, self._place, self._torn = status.st_ino, 0, b""
        file.seek(self._place)
        return status.st_size > self._place

    def _next_piece(self, file: BinaryIO) -> bytes:
        piece = file.read(_PIECE_BYTES)
        self._place += len(piece)
        return piece


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
