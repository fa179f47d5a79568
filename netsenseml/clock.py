"""When work was reached: at once on a CPU, and on an accelerator, which is behind, once it gets there."""

from typing import Any

import torch

from netsenseml.records import monotonic_s

Mark = Any
"""A moment: CLOCK_MONOTONIC seconds as float, or an event in the stream of a device."""


class Clock:
    """Marks moments of the work on a device, and tells afterwards when they were.

        mark = clock.mark()  # in the current stream of the device, without waiting for it
        ...
        when_s = clock.seconds(mark)

    A CPU does what it is told at once. A device does it later; its events are read when they have passed, best a step later, so
    that neither it nor the CPU ever waits for a time. They are compared with an event of which the moment is known, in a stream
    without work; as the two clocks drift, and differences have 24 bits, ``anchor`` now and then.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.immediate = device.type == "cpu"
        """Whether a mark is reached as soon as it is made."""
        if not self.immediate:
            self._idle = torch.get_device_module(device).Stream(device)
            self.anchor()

    def mark(self) -> Mark:
        """Now, or when the current stream of the device comes to this place."""
        return monotonic_s() if self.immediate else record_event(self.device)

    def seconds(self, mark: Mark) -> float:
        """CLOCK_MONOTONIC seconds of a mark; waits until it is reached."""
        if isinstance(mark, float):
            return mark
        mark.synchronize()
        return self._anchor_s + 1e-3 * float(self._anchor.elapsed_time(mark))

    def anchor(self) -> None:
        """Compare the clocks anew; takes some 10 us."""
        if not self.immediate:
            self._anchor = new_event(self.device)
            self._anchor.record(self._idle)
            self._anchor.synchronize()
            self._anchor_s = monotonic_s()


def record_event(device: torch.device) -> Any:
    """An event in the current stream of a device."""
    made = new_event(device)
    made.record(torch.get_device_module(device).current_stream(device))
    return made


def new_event(device: torch.device) -> Any:
    """Whoever waits for it sleeps, where the device can do that."""
    if device.type == "cuda":
        return torch.cuda.Event(enable_timing=True, blocking=True)
    return torch.Event(device, enable_timing=True)


def use_here(tensor: torch.Tensor) -> None:
    """Keep the memory of a tensor, which may belong to another stream, until the current one is done with it."""
    if tensor.device.type != "cpu":
        tensor.record_stream(torch.get_device_module(tensor.device).current_stream(tensor.device))
