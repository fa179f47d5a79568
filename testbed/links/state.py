"""What a link is at one moment: a frozen value in SI units, free of any kernel notion."""

from dataclasses import dataclass, fields, replace
from typing import Any

DIRECTIONS = ("up", "down")


@dataclass(frozen=True, slots=True)
class Shape:
    """Conditions in one direction of a link.

    rate_bps: bits/s on the wire, Ethernet header included; None = not limited.
    queue_s, queue_bytes: how much may wait for the rate limiter; time is used unless bytes are given.
    delay_s, jitter_s: one-way propagation delay and its standard deviation.
    loss: share of packets dropped at random, 0 to 1.
    """

    rate_bps: int | None = None
    queue_s: float = 0.05
    queue_bytes: int | None = None
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0

    @property
    def needs_netem(self) -> bool:
        """True if tbf alone cannot make this shape."""
        return bool(self.delay_s or self.jitter_s or self.loss)

    def with_changes(self, changes: dict[str, Any]) -> "Shape":
        """A copy with some properties replaced; all others stay as they are."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class LinkState:
    """Both directions of one access link.

    up is the egress of the worker's own interface, down the egress of the switch port that faces it.
    Delay, jitter and loss exist on down only, so a one-way delay of 10 ms gives an RTT of 20 ms between workers.
    """

    up: Shape = Shape()
    down: Shape = Shape()

    @property
    def needs_netem(self) -> bool:
        """True if the kernel must offer netem for this link."""
        return self.up.needs_netem or self.down.needs_netem

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Plain data, for records."""
        return {side: {f.name: getattr(getattr(self, side), f.name) for f in fields(Shape)} for side in DIRECTIONS}
