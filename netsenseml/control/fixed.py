"""Decisions made before the run: one plan for ever, or the log of another run."""

from collections.abc import Mapping, Sequence
from typing import Any

from netsenseml.control.policy import split_timing, with_timing
from netsenseml.exchange.communicators import parse


class FixedPolicy:
    """Plans by name, one a step (``scheme`` of the records); the last one goes on. Every rank knows
    them, so none is told."""

    sample_every = 0

    def __init__(self, names: Sequence[str]) -> None:
        """Raises ValueError, one line, for a name that does not exist."""
        self._names = [
            with_timing(parse(plan).name, *when) for plan, *when in map(split_timing, names)
        ]

    def plan_at(self, step: int) -> str:
        """Name of the plan of a step, from 0."""
        return self._names[min(step, len(self._names) - 1)]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the number of the step is all that there is to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint."""
