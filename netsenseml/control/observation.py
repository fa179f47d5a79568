"""What a policy knows of the last step; the same numbers on all ranks, so that all decide the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from netsenseml.exchange.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Observation:
    """One step, as the slowest rank saw it.

    elements: gradient elements of every bucket. lead_s: how long before the last gradient each bucket was ready.
    compute_s: from the end of the exchange before to the last gradient. exposed_s: from there to the end of the exchange.
    payload_bytes: what a rank sent. flight_s: time in which something was under way. encode_s: spent on coding.
    """

    elements: tuple[int, ...]
    lead_s: tuple[float, ...]
    compute_s: float
    exposed_s: float
    payload_bytes: int
    flight_s: float
    encode_s: float


class Policy(Protocol):
    """Decides by which scheme the next step is exchanged. A deterministic function of all that it was told."""

    @property
    def scheme(self) -> Scheme:
        """The decision in force."""

    @property
    def at_ease(self) -> bool:
        """Whether it would not matter if some of the next steps were not told."""

    def decide(self, seen: Observation) -> None:
        """Take a step into account and decide on the next."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint of the same policy."""
