"""What the streams of an accelerator need: events, memory that outlasts its stream, copies that
nobody waits for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def record_event(device: torch.device, stream: Any = None) -> Any:
    """An event in a stream of a device, the current one if none is given; whoever waits for it
    sleeps, if that is possible."""
    event: Any
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True, blocking=True)
    else:
        event = torch.Event(device, enable_timing=True)
    event.record(
        torch.get_device_module(device).current_stream(device) if stream is None else stream
    )
    return event


def use_here(tensor: torch.Tensor) -> None:
    """Keep the memory of a tensor, which may belong to another stream, until the current one is
    done with it."""
    if tensor.device.type != "cpu":
        tensor.record_stream(torch.get_device_module(tensor.device).current_stream(tensor.device))


def start_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in pinned memory of the host, once the current stream has come so far; on a CPU
    the tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@contextlib.contextmanager
def in_default_stream(device: torch.device) -> Iterator[None]:
    """Work in the default stream of an accelerator, in order with the current one: callbacks of
    Gloo work there."""
    if device.type == "cpu":
        yield
        return
    accelerator = torch.get_device_module(device)
    current, default = accelerator.current_stream(device), accelerator.default_stream(device)
    default.wait_stream(current)
    with accelerator.stream(default):
        yield
    current.wait_stream(default)
