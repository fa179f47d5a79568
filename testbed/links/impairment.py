"""What becomes of each frame of one direction: lost, doubled, spoilt, overtaking, and how long it
is held. Pure.

The meaning of every number and the statistics are those of netem (netem(8), net/sched/sch_netem.c
in Linux 6.x), so that a link behaves the same whether the kernel or a program delays it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from testbed.links.state import Loss
from testbed.links.tap import NEEDS_CHECKSUM, VNET_HEADER_BYTES

TABLE_UNIT = 8192
"""Entries of a table of delays are in units of 1/8192 standard deviation, as netem keeps them."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a direction does to its frames. The fields are those of ``qdiscs.Netem``, which needs
    more than a program loads."""

    delay_ns: int = 0
    jitter_ns: int = 0
    distribution: str = "normal"
    loss: Loss = field(default_factory=Loss)
    duplicate: float = 0.0
    corrupt: float = 0.0
    reorder: float = 0.0
    limit_packets: int = 1000
    seed: int = 0
    in_order: bool = False

    @property
    def per_frame(self) -> bool:
        """True if single frames meet a fate of their own, so that GSO packets must be cut."""
        return bool(self.loss.share or self.duplicate or self.corrupt or self.reorder)

    @property
    def constant(self) -> bool:
        """True if every frame is only held for the same time."""
        return not (self.per_frame or self.jitter_ns or self.in_order)


class Impairment:
    """The random process of one direction, and how many frames met which fate.

    duplicated: copies made. lost: frames and copies lost. overflowed: frames and copies beyond
    ``limit_packets``. What went in plus duplicated, less lost and overflowed, came out or is still
    held.
    """

    __slots__ = (
        "_bad",
        "_last_due_ns",
        "_last_value",
        "_random",
        "_table",
        "conditions",
        "corrupted",
        "duplicated",
        "lost",
        "overflowed",
        "reordered",
    )

    def __init__(self, conditions: Conditions, table: Sequence[int] = ()) -> None:
        self.lost = self.duplicated = self.corrupted = self.reordered = self.overflowed = 0
        self._random = random.Random(conditions.seed).random
        self._bad = False
        self._last_value = 0.5
        self._last_due_ns = 0
        self.conditions = conditions
        self._table = table

    def change(self, conditions: Conditions, table: Sequence[int] = ()) -> None:
        """Put other conditions in force. A burst of losses goes on; the random numbers begin anew
        only with another seed.

        table: quantiles of the jitter's distribution (``qdiscs.distribution_table``), in units of
        ``TABLE_UNIT``.
        """
        if conditions.seed != self.conditions.seed:
            self._random = random.Random(conditions.seed).random
        self.conditions = conditions
        self._table = table

    def admit(self, frame: bytes, now_ns: int, held: int) -> list[tuple[int, bytes]]:
        """(due time, frame) for each copy that will leave. ``held``: how many frames of this
        direction are under way."""
        leaving: list[tuple[int, bytes]] = []
        self._admit(frame, now_ns, held, self.conditions.duplicate, leaving)
        return leaving

    def _admit(
        self,
        frame: bytes,
        now_ns: int,
        held: int,
        duplicate: float,
        leaving: list[tuple[int, bytes]],
    ) -> None:
        # The order of the questions is netem's, and with it what happens to a frame that meets two
        # fates.
        conditions, draw = self.conditions, self._random
        twice = bool(duplicate) and draw() < duplicate
        self.duplicated += twice
        if self._is_lost():
            self.lost += 1
            if not twice:
                return
            twice = False  # one of the two passes
        passing = frame
        if conditions.corrupt and draw() < conditions.corrupt:
            passing = self._flip_a_bit(frame)
        if held >= conditions.limit_packets:
            self.overflowed += 1 + twice
            return
        if twice:  # the copy goes first, and through everything but another doubling
            self._admit(frame, now_ns, held, 0.0, leaving)
        if conditions.reorder and draw() < conditions.reorder:
            self.reordered += 1
            leaving.append((now_ns, passing))
            return
        delay_ns = conditions.delay_ns
        if conditions.jitter_ns:
            quantile = self._table[int(draw() * len(self._table))]
            delay_ns = max(
                0, delay_ns + (conditions.jitter_ns * quantile + TABLE_UNIT // 2) // TABLE_UNIT
            )
        due_ns = now_ns + delay_ns
        if conditions.in_order:
            due_ns = self._last_due_ns = max(due_ns, self._last_due_ns)
        leaving.append((due_ns, passing))

    def _is_lost(self) -> bool:
        loss, draw = self.conditions.loss, self._random
        if loss.burst is not None:
            # The state changes for the next frame; this one is lost by the state that it found.
            bad = self._bad
            good_to_bad, bad_to_good = loss.transitions
            if draw() < (bad_to_good if bad else good_to_bad):
                self._bad = not bad
            return draw() < (loss.bad_loss if bad else loss.good_loss)
        if not loss.share:
            return False
        value = draw()
        if loss.correlation:
            value = self._last_value = (
                1 - loss.correlation
            ) * value + loss.correlation * self._last_value
        return value < loss.share

    def _flip_a_bit(self, frame: bytes) -> bytes:
        # A frame whose checksum is yet to be filled in would carry its error under a right one, and
        # no receiver would find it. Only those that were cut for nobody, because they were under
        # way when corruption began, are such.
        if frame[0] & NEEDS_CHECKSUM:
            return frame
        self.corrupted += 1
        spoilt = bytearray(frame)
        spoilt[0] = 0  # nor may the receiver be told that the checksum has been looked at
        bit = int(self._random() * 8 * (len(frame) - VNET_HEADER_BYTES))
        spoilt[VNET_HEADER_BYTES + bit // 8] ^= 1 << bit % 8
        return bytes(spoilt)
