"""Checkpoints of the built-in worker: what a rank leaves in its directory, to go on from when it is
started again."""

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from testbed import protocol


class Checkpoints:
    """Those of one rank. All ranks make them after the same steps, so the newest that all have is a
    state of the whole job."""

    def __init__(self, directory: Path, every: int | None) -> None:
        """every: steps; None: none is ever due."""
        self._directory = directory
        self._every = every
        self.steps_until_exchange = 1
        """So many steps may a rank be ahead of one that has died: as many checkpoints more must be
        kept as are due in these."""

    def due(self, steps: int) -> bool:
        """Whether one is to be made after so many steps in all."""
        return self._every is not None and steps % self._every == 0

    def save(self, steps: int, state: dict[str, Any]) -> None:
        """Write the state after so many steps, in one piece or not at all."""
        half = self._directory / "checkpoint.tmp"
        torch.save(state, half)
        half.replace(self._path(steps))
        kept = 1 + math.ceil(self.steps_until_exchange / (self._every or 1))
        for old in self._steps()[:-kept]:
            self._path(old).unlink()

    def newest_of_all(self) -> tuple[int, dict[str, Any]] | None:
        """(steps, state) of the newest that all ranks of the default group have; every rank has to
        ask. None: there is none.

        Newer ones are removed: the training that made them is not gone on with.
        """
        found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, self._steps())
        newest = max(set(found[0]).intersection(*found), default=None)
        for steps in self._steps():
            if newest is None or steps > newest:
                self._path(steps).unlink()
        if newest is None:
            return None
        return newest, torch.load(self._path(newest), weights_only=True)

    def _path(self, steps: int) -> Path:
        return self._directory / protocol.CHECKPOINTS.replace("*", str(steps))

    def _steps(self) -> list[int]:
        found = []
        for path in self._directory.glob(protocol.CHECKPOINTS):
            with contextlib.suppress(ValueError):
                found.append(int(path.stem.rpartition("-")[2]))
        return sorted(found)


def from_environment(every: int | None) -> Checkpoints:
    """In the directory of the host."""
    return Checkpoints(Path(os.environ.get(protocol.ENV_OUTPUT_DIR, ".")), every)
