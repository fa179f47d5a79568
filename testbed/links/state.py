"""What a link is at one moment: a frozen value in SI units, free of any kernel notion."""

from dataclasses import dataclass, replace
from typing import Any

DIRECTIONS = ("up", "down")
DISTRIBUTIONS = ("normal", "uniform", "pareto")
AQMS = ("fifo", "codel", "fq_codel", "cake")


@dataclass(frozen=True, slots=True)
class Loss:
    """Which packets are lost. All zero: none.

    share, correlation: each packet is lost with probability ``share``; the correlation ties a
        packet to the one before (netem(8): the generated values are correlated, so that the share
        itself comes out lower).
    burst: mean length of a burst in packets. None: no bursts. Otherwise a Gilbert model whose
    stationary loss is ``share``. bad_loss, good_loss: loss in the bad and in the good state
    (Gilbert-Elliott); 1 and 0 give the Gilbert model.
    """

    share: float = 0.0
    correlation: float = 0.0
    burst: float | None = None
    bad_loss: float = 1.0
    good_loss: float = 0.0

    @property
    def transitions(self) -> tuple[float, float]:
        """(p, r): probability per packet of going from good to bad and from bad to good.

        With mean sojourn ``burst`` in the bad state, r = 1 / burst; the share of time in the bad
        state is
        b = p / (p + r), and the loss b * bad_loss + (1 - b) * good_loss must come out as ``share``.
        (Elliott 1963)
        """
        assert self.burst is not None
        r = 1 / self.burst
        bad = (self.share - self.good_loss) / (self.bad_loss - self.good_loss)
        return r * bad / (1 - bad), r


@dataclass(frozen=True, slots=True)
class LinkParameters:
    """Conditions in one direction of a link.

    rate_bps: bits/s on the wire, Ethernet header included; None: not limited; 0: an outage, in
    which what comes waits. queue_s, queue_bytes: how much may wait for the rate limiter; time is
    used unless bytes are given.
    delay_s, jitter_s: one-way propagation delay and its standard deviation. distribution: of the
    delay (``DISTRIBUTIONS``). loss: which packets are lost.
    duplicate, corrupt: share of packets sent twice, or with one flipped bit.
    reorder: share of packets that overtake, by being sent without the delay.
    in_order: jitter lets no packet overtake another; one whose turn has not come waits for those
    before it.
    aqm: what manages the queue (``AQMS``); "fifo" drops what does not fit. ecn: it marks packets
        instead of dropping them; cake has no choice in that, and marks those of whoever has agreed
        on it.
    """

    rate_bps: int | None = None
    queue_s: float = 0.05
    queue_bytes: int | None = None
    delay_s: float = 0.0
    jitter_s: float = 0.0
    distribution: str = "normal"
    loss: Loss = Loss()
    duplicate: float = 0.0
    corrupt: float = 0.0
    reorder: float = 0.0
    in_order: bool = False
    aqm: str = "fifo"
    ecn: bool = False

    @property
    def impaired(self) -> bool:
        """True if a shaper alone cannot do this: something must delay, lose or spoil packets."""
        return bool(self.delay_s or self.jitter_s or self.impairs_frames)

    @property
    def impairs_frames(self) -> bool:
        """True if single frames meet a fate of their own, so that no packet may be larger than a
        frame."""
        return bool(self.loss.share or self.duplicate or self.corrupt or self.reorder)

    def slowed(self, factor: float) -> "LinkParameters":
        """So many times as slow; the bytes that the queue holds stay the same."""
        return replace(
            self,
            rate_bps=max(1, round(self.rate_bps / factor)) if self.rate_bps else self.rate_bps,
            queue_s=self.queue_s * factor,
            delay_s=self.delay_s * factor,
            jitter_s=self.jitter_s * factor,
        )

    def with_changes(self, changes: dict[str, Any]) -> "LinkParameters":
        """A copy with some properties replaced; all others stay as they are."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class LinkState:
    """Both directions of one access link.

    up is the egress of the worker's own interface, down the egress of the switch port that faces
    it.
    A spec puts all but rate and queue on down, so a one-way delay of 10 ms gives an RTT of 20 ms
    between workers. connected: False is a partition; nothing passes in either direction, and nobody
    is told.
    """

    up: LinkParameters = LinkParameters()
    down: LinkParameters = LinkParameters()
    connected: bool = True

    def slowed(self, factor: float) -> "LinkState":
        """Both directions so many times as slow, as under dilation."""
        if factor == 1:
            return self
        return replace(self, up=self.up.slowed(factor), down=self.down.slowed(factor))

    def to_json(self) -> dict[str, Any]:
        """Plain data, for records; thousands a second, for which ``dataclasses.asdict`` takes too
        long."""
        up, down = ({**_fields(one), "loss": _fields(one.loss)} for one in (self.up, self.down))
        return {"up": up, "down": down, "connected": self.connected}


def _fields(one: LinkParameters | Loss) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__slots__}
