"""Decisions made before the run: one plan for ever, or the log of another run."""

from collections.abc import Mapping, Sequence
from typing import Any

from netsenseml.control.policy import Observation
from netsenseml.exchange.communicators import parse


class FixedPolicy:
    """Plans by name, one a step (``scheme`` of the records); the last one goes on."""

    at_ease = False
    bandwidth_bps = None

    def __init__(self, names: Sequence[str]) -> None:
        """Raises ValueError, one line, for a name that does not exist."""
        self._names = [parse(name).name for name in names]
        self._step = 0
        self.plan = self._names[0]

    def decide(self, seen: Observation) -> None:
        self._step += 1
        self.plan = self._names[min(self._step, len(self._names) - 1)]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        self.plan = self._names[min(self._step, len(self._names) - 1)]
