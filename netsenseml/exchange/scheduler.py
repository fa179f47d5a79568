"""A thread that encodes, launches and decodes, while backward goes on."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Generator
from itertools import chain
from typing import Any

import torch
from torch.futures import Future

from netsenseml.streams import record_event

Exchange = Generator[Future[torch.Tensor], torch.Tensor, torch.Tensor]
"""The exchange of one tensor: yields the collectives that it launched, one after another, and
returns the result."""

_CPU = torch.device("cpu")


class Scheduler:
    """Runs exchanges so that every rank launches its collectives in the same order.

    Collectives of one process group match by their order. Tensors are submitted in the same order
    everywhere, but when a collective completes is different on every rank. So each stage of an
    exchange has a process group of its own, and the exchanges pass every stage in the order of
    their submission, whichever completed first.

    Nothing here ever waits for a collective: a thread of Gloo that waited in a callback could be
    the one that is needed. The thread is started by the first exchange.

    On an accelerator, an exchange begins once the stream in which its tensor is made has come so
    far; another thread waits for that, as the CPU may submit all tensors of a backward long before.
    It works in a stream of its own, beside backward, and its future makes the streams of those wait
    that wait for it.
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[_InFlight | None] = queue.SimpleQueue()
        self._stages: list[deque[_InFlight]] = []
        self._in_flight = 0  # submitted, and neither done nor failed
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._streams: dict[torch.device, Any] = {}
        self._unready: queue.SimpleQueue[_InFlight | None] = queue.SimpleQueue()
        self._waiter: threading.Thread | None = None

    def submit(self, exchange: Exchange, device: torch.device = _CPU) -> Future[torch.Tensor]:
        """Run an exchange of a tensor on ``device``; the future has its result, or what it
        raised."""
        if self._thread is None:
            self._thread = _start(self._run, "exchange")
        tensor = _InFlight(exchange, device)
        self._count(1)
        if device.type != "cpu":
            tensor.ready = record_event(device)
            if self._waiter is None:
                self._waiter = _start(self._wait, "ready")
        (self._events if self._waiter is None else self._unready).put(tensor)
        return tensor.done

    def close(self) -> None:
        """End the threads, after all that was submitted, as they may hold process groups. What
        fails ends, too."""
        if self._waiter is not None:
            self._unready.put(None)
            self._waiter.join()
            self._waiter = None
        if self._thread is not None:
            self._events.put(None)
            self._thread.join()
            self._thread = None

    @property
    def busy(self) -> bool:
        """True while something is under way."""
        return self._in_flight > 0

    def _count(self, change: int) -> None:
        with self._lock:
            self._in_flight += change

    def _wait(self) -> None:
        while (tensor := self._unready.get()) is not None:
            try:
                if tensor.ready is not None:
                    tensor.ready.synchronize()
            except RuntimeError:  # of the device; whoever works with the tensor raises it again
                pass
            self._events.put(tensor)
            del tensor

    def _run(self) -> None:
        closing = False
        while not closing or self._in_flight:
            tensor = self._events.get()
            if tensor is None:
                closing = True
            elif tensor.stage < 0:
                self._advance(tensor)
            else:
                waiting = self._stages[tensor.stage]
                while waiting and waiting[0].completed:
                    self._advance(waiting.popleft())
            del tensor  # it may hold process groups

    def _advance(self, tensor: "_InFlight") -> None:
        with self._stream(tensor.device):
            try:
                if self._failure is not None:
                    raise RuntimeError(self._failure)
                # It is complete; of NCCL's, which is so on the device only, our stream waits.
                value = tensor.collective.wait() if tensor.collective is not None else None
                tensor.collective = collective = tensor.exchange.send(value)  # type: ignore[arg-type]  # None begins a generator
            except StopIteration as end:
                self._count(-1)
                tensor.done.set_result(end.value)
                return
            except BaseException as error:  # backward raises it
                self._fail(tensor, error)
                return
        tensor.stage += 1
        tensor.completed = False
        if tensor.stage == len(self._stages):
            self._stages.append(deque())
        self._stages[tensor.stage].append(tensor)
        collective.add_done_callback(lambda _: self._complete(tensor))

    def _stream(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if device.type == "cpu":
            return contextlib.nullcontext()
        accelerator = torch.get_device_module(device)
        if device not in self._streams:
            # or going back to another device's stream would take memory there
            accelerator.set_device(device)
            # a little work that others wait for
            self._streams[device] = accelerator.Stream(device, priority=-1)
        return accelerator.stream(self._streams[device])

    def _fail(self, tensor: "_InFlight", error: BaseException) -> None:
        """Neither this nor any other goes on: collectives that follow would not match those of
        other ranks."""
        self._failure = str(error)
        failed = [tensor, *chain.from_iterable(self._stages)]
        self._count(-len(failed))
        for waiting in self._stages:
            waiting.clear()
        for other in failed:
            other.exchange.close()
            other.done.set_exception(error)  # type: ignore[arg-type]

    def _complete(self, tensor: "_InFlight") -> None:
        tensor.completed = True
        self._events.put(tensor)


class _InFlight:
    """A tensor on its way. stage: number of the collective that it waits for, -1 before the first.
    ready: when it is made."""

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        self.exchange, self.device = exchange, device
        self.done: Future[torch.Tensor] = Future(devices=[device] if device.type != "cpu" else None)
        self.ready: Any = None
        self.stage = -1
        self.completed = False
        self.collective: Future[torch.Tensor] | None = None


def _start(work: Any, name: str) -> threading.Thread:
    thread = threading.Thread(target=work, name=f"netsenseml-{name}", daemon=True)
    thread.start()
    return thread
