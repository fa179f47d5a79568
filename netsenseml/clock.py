"""When work was reached: at once on a CPU, and on an accelerator, which is behind, once it gets
there."""

import time
from typing import Any

import torch

from netsenseml.records import monotonic_s
from netsenseml.streams import record_event

Mark = Any
"""A moment: CLOCK_MONOTONIC seconds as float, or an event in the stream of a device."""

_ANCHOR_S = 1.0
_POLL_S = 1e-3


class Clock:
    """Marks moments of the work on a device, and tells afterwards when they were.

        mark = clock.mark()  # in the current stream of the device, without waiting for it
        ...
        when_s = clock.seconds(mark)

    A CPU does what it is told at once. A device does it later; its events are read when they have
    passed, best a step later, so that neither it nor the CPU ever waits for a time. They are
    compared with an event of which the moment is known, in a stream without work; as the two clocks
    drift, and differences have 24 bits, there is a new one every second.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.immediate = device.type == "cpu"
        """Whether a mark is reached as soon as it is made."""
        if not self.immediate:
            self._idle = torch.get_device_module(device).Stream(device)
            self._anchor_s = 0.0

    def mark(self) -> Mark:
        """Now, or when the current stream of the device comes to this place."""
        return monotonic_s() if self.immediate else record_event(self.device)

    def seconds(self, mark: Mark) -> float:
        """CLOCK_MONOTONIC seconds of a mark; waits until it is reached."""
        if isinstance(mark, float):
            return mark
        mark.synchronize()
        if monotonic_s() > self._anchor_s + _ANCHOR_S:
            before_s = monotonic_s()
            self._anchor = record_event(self.device, self._idle)
            while not self._anchor.query():  # some 10 us
                pass
            self._anchor_s = (before_s + monotonic_s()) / 2
        return self._anchor_s + 1e-3 * float(self._anchor.elapsed_time(mark))

    def reached(self, mark: Mark, within_s: float) -> bool:
        """Whether a mark is reached so soon; waits for it."""
        given_up_s = monotonic_s() + within_s
        while not isinstance(mark, float) and not mark.query():
            if monotonic_s() > given_up_s:
                return False
            time.sleep(_POLL_S)
        return True
