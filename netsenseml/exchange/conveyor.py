"""One thread that encodes, launches and decodes, while backward goes on."""

import queue
import threading
from collections import deque
from collections.abc import Generator

import torch
from torch.futures import Future

Exchange = Generator[Future[torch.Tensor], torch.Tensor, torch.Tensor]
"""The exchange of one bucket: yields the collectives that it launched, one after another, and returns the result."""


class Conveyor:
    """Runs exchanges so that every rank launches its collectives in the same order.

    Collectives of one process group match by their order. Buckets arrive in the same order everywhere, but when a
    collective lands is different on every rank. So each stage of an exchange has a process group of its own, and the
    exchanges pass every stage in the order of their buckets, whichever landed first.

    Nothing here ever waits for a collective: a thread of Gloo that waited in a callback could be the one that is needed.
    The thread is started by the first exchange.
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[_Parcel | None] = queue.SimpleQueue()
        self._stages: list[deque[_Parcel]] = []
        self._thread: threading.Thread | None = None

    def submit(self, exchange: Exchange) -> Future[torch.Tensor]:
        """Run an exchange; the future has its result, or what it raised."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="netsense-exchange", daemon=True)
            self._thread.start()
        parcel = _Parcel(exchange)
        self._events.put(parcel)
        return parcel.done

    def close(self) -> None:
        """End the thread, after all that was submitted."""
        if self._thread is not None:
            self._events.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (parcel := self._events.get()) is not None:
            if parcel.stage < 0:
                self._advance(parcel)
                continue
            waiting = self._stages[parcel.stage]
            while waiting and waiting[0].landed:
                self._advance(waiting.popleft())

    def _advance(self, parcel: "_Parcel") -> None:
        try:
            value = parcel.collective.value() if parcel.collective is not None else None
            parcel.collective = collective = parcel.exchange.send(value)  # type: ignore[arg-type]  # None begins a generator
        except StopIteration as end:
            parcel.done.set_result(end.value)
            return
        except BaseException as error:  # backward raises it
            parcel.done.set_exception(error)  # type: ignore[arg-type]
            return
        parcel.stage += 1
        parcel.landed = False
        if parcel.stage == len(self._stages):
            self._stages.append(deque())
        self._stages[parcel.stage].append(parcel)
        collective.add_done_callback(lambda _: self._land(parcel))

    def _land(self, parcel: "_Parcel") -> None:
        parcel.landed = True
        self._events.put(parcel)


class _Parcel:
    """A bucket on its way. stage: number of the collective that it waits for, -1 before the first."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.done: Future[torch.Tensor] = Future()
        self.stage = -1
        self.landed = False
        self.collective: Future[torch.Tensor] | None = None
