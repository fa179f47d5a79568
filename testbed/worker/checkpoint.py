"""Checkpoints of the built-in worker: what a rank leaves in its directory, to go on from when it is started again."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from testbed import protocol


class Checkpoints:
    """Those of one rank. All ranks make them after the same steps, so the newest that all have is a state of the whole job."""

    KEPT = 2
    """Ranks are at most one step apart, and so one checkpoint."""

    def __init__(self, directory: Path, every: int | None) -> None:
        """every: steps; None: none is ever due."""
        self._directory = directory
        self._every = every

    def due(self, steps: int) -> bool:
        """Whether one is to be made after so many steps in all."""
        return self._every is not None and steps % self._every == 0

    def save(self, steps: int, state: dict[str, Any]) -> None:
        """Write the state after so many steps, in one piece or not at all."""
        half = self._directory / "checkpoint.tmp"
        torch.save(state, half)
        half.replace(self._path(steps))
        for old in self._steps()[: -self.KEPT]:
            self._path(old).unlink()

    def newest_of_all(self) -> tuple[int, dict[str, Any]] | None:
        """(steps, state) of the newest that all ranks of the default group have; every rank has to ask. None: there is none."""
        found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, self._steps())
        common = set(found[0]).intersection(*found)
        if not common:
            return None
        return max(common), torch.load(self._path(max(common)), weights_only=True)

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
