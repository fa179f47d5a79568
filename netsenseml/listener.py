"""Who else wants to know of the steps of a session: the testbed, a logger. Imports no torch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from netsenseml.catalog import load
from netsenseml.records import RecordFile

ENV_LISTENER = "NETSENSEML_LISTENER"
"""Environment variable with the ``package.module:Class`` of a listener that ``attach`` makes and
tells."""


class Attached(Protocol):
    """What a listener may know of a session."""

    rank: int
    module: Any
    """The model, as a torch.nn.Module."""
    steps: int
    """That are done."""

    @property
    def failure(self) -> str | None:
        """What has ended the exchange, in one line; None while all is well."""


class Listener(Protocol):
    """Told by a session of what happens, on the thread that trains."""

    def method(self) -> tuple[str, dict[str, Any]] | None:
        """Name and options of the method that it wants to see; None leaves it to the script."""

    def attached(self, session: Attached) -> float | None:
        """The session is ready; may wait. Returns CLOCK_MONOTONIC seconds of t = 0 if it decides on
        that."""

    def record(self, row: Mapping[str, Any]) -> None:
        """The row of a step for the records (``records.STEP_COLUMNS``)."""

    def step(self, steps: int) -> bool:
        """The script says that so many steps are done; may wait. Returns False if that was the last
        one."""

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """An evaluation of the model: step, t_s, accuracy, loss."""

    def failed(self, error: BaseException) -> None:
        """This rank cannot go on."""

    def closed(self, accuracy: float | None, loss: float | None) -> None:
        """The run is over after its last step, with the final evaluation if this rank made one."""


def from_environment() -> Listener | None:
    """The listener that the environment names; raises ValueError, one line, if it cannot be
    loaded."""
    path = os.environ.get(ENV_LISTENER)
    if not path:
        return None
    try:
        listener = load(path)
    except ValueError as error:
        raise ValueError(f"{ENV_LISTENER}: {error}") from error
    made: Listener = listener()
    return made


class Recorder:
    """Writes one JSON line a step."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = RecordFile(Path(path))

    def method(self) -> None:
        return None

    def attached(self, session: Attached) -> None:
        return None

    def record(self, row: Mapping[str, Any]) -> None:
        self._file.append([row])

    def step(self, steps: int) -> bool:
        return True

    def evaluated(self, row: Mapping[str, Any]) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        pass

    def closed(self, accuracy: float | None, loss: float | None) -> None:
        self._file.close()
