"""What goes on in a lab from t = 0 on: its links change when they are due, and all is recorded; as
far as this machine goes."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from testbed.clock import HERE, Clock
from testbed.files import no_room
from testbed.links.shaper import Shaper
from testbed.recording.driver import LinkDriver, Reachable
from testbed.recording.host import HostMonitor
from testbed.recording.link_server import Requests
from testbed.timeline import Change


@dataclass(frozen=True, slots=True)
class Recording:
    """What is to be done and recorded in a cell.

    directory: of the cell, for the records. timeline: changes of links, in order. requests: are
    answered while it goes on. trunks, dilation: see ``LinkDriver``.
    """

    directory: Path
    timeline: Sequence[Change]
    requests: Requests | None = None
    trunks: Sequence[str] = ()
    dilation: float = 1.0


class Recorder(Protocol):
    """Knows its timeline from entering on, and records from ``begin`` to leaving."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def begin(self, t0_s: float) -> None:
        """t = 0 is at ``t0_s``, on this process's CLOCK_MONOTONIC."""

    @property
    def failure(self) -> str:
        """What ended it early, in one line; empty while all is well."""

    def arrived_bytes(self, links: Iterable[str]) -> int:
        """What has come down these links so far, with headers."""


class LocalRecorder:
    """A thread for the links (``LinkDriver``) and one for the load of this machine
    (``HostMonitor``).

    pids, usage_s, node: see ``HostMonitor``; this process is ours, too. clock: this machine's
    against the orchestrator's, by which all times are written.
    """

    def __init__(
        self,
        recording: Recording,
        links: Shaper,
        hosts: Mapping[str, Reachable],
        pids: Iterable[int] = (),
        usage_s: Callable[[], float] = lambda: 0.0,
        node: str = "",
        clock: Callable[[], Clock] = lambda: HERE,
    ) -> None:
        self._recording, self._links, self._hosts = recording, links, hosts
        self._pids, self._usage_s, self._node, self._clock = pids, usage_s, node, clock
        self._running = ExitStack()
        self._driver: LinkDriver | None = None
        self._monitor: HostMonitor | None = None

    def __enter__(self) -> Self:
        return self

    def begin(self, t0_s: float) -> None:
        directory = self._recording.directory
        own = [os.getpid(), *self._pids]
        monitor = HostMonitor(own, self._clock().own(t0_s), directory, self._node, self._usage_s)
        self._monitor = self._running.enter_context(monitor)
        driver = LinkDriver(
            self._links,
            self._recording.timeline,
            t0_s,
            directory,
            self._recording.requests,
            trunks=self._recording.trunks,
            dilation=self._recording.dilation,
            hosts=self._hosts,
            clock=self._clock,
        )
        self._driver = self._running.enter_context(driver)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._running.close()

    @property
    def failure(self) -> str:
        if self._driver is not None and (error := self._driver.failure) is not None:
            full = isinstance(error, OSError) and no_room(error)
            what = "records could not be written" if full else "a link could not be changed or read"
            return f"{what}: {error}"
        if self._monitor is not None and self._monitor.failure is not None:
            return f"the load of this machine could not be recorded: {self._monitor.failure}"
        return ""

    def arrived_bytes(self, links: Iterable[str]) -> int:
        return self._driver.arrived_bytes(links) if self._driver is not None else 0
