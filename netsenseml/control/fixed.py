"""Decisions made before the run: one scheme for ever, or the log of another run."""

from collections.abc import Mapping, Sequence
from typing import Any

from netsenseml.control.observation import Observation
from netsenseml.exchange.schemes import by_name


class FixedPolicy:
    """Schemes by name, one a step (``scheme`` of the records); the last one goes on."""

    at_ease = False

    def __init__(self, schemes: Sequence[str]) -> None:
        """Raises ValueError, one line, for a name that does not exist."""
        self._schemes = [by_name(name) for name in schemes]
        self._step = 0
        self.scheme = self._schemes[0]

    def decide(self, seen: Observation) -> None:
        self._step += 1
        self.scheme = self._schemes[min(self._step, len(self._schemes) - 1)]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        self.scheme = self._schemes[min(self._step, len(self._schemes) - 1)]
