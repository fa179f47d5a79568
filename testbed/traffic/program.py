"""One end of a competing flow: ``python -m testbed.traffic.program send|receive FLOW ADDRESS``.

FLOW: ``Flow.to_json``. ADDRESS: IPv4 address of the receiving host. The environment names the
directories of cell and host (``protocol``).

Both ends get ready, say so over the control socket, wait there for t = 0, and end when the
orchestrator hangs up. The receiving end counts the payload that arrives (traffic-<flow>.jsonl, ten
rows a second); the sending end notes when the flow really began and stopped (events-<flow>.jsonl).

An engine is a module with a ``Sender`` and a ``Receiver``, and one line in ``ENGINES``. Imports the
standard library only, so that it starts fast, and on any host.
"""

import importlib
import os
import selectors
import sys
from pathlib import Path
from typing import Any, Protocol

from netsenseml.records import RecordFile, monotonic_s
from testbed import protocol
from testbed.traffic.flows import Flow, Phase, phases

SAMPLE_S = 0.1
ENGINES = {
    ("tcp", "builtin"): "testbed.traffic.tcp",
    ("udp", "builtin"): "testbed.traffic.udp",
    ("tcp", "iperf3"): "testbed.traffic.iperf3",
    ("udp", "iperf3"): "testbed.traffic.iperf3",
}

Selector = selectors.SelectSelector
"""Sleeps to the microsecond, where epoll rounds up to the next millisecond; and a flow has few
sockets. What is registered as data is called when the socket is ready."""


class Sender(Protocol):
    """The sending end. ``due_s``: when it wants ``tick`` next (CLOCK_MONOTONIC); infinite: its
    sockets say when."""

    due_s: float

    def __init__(self, flow: Flow, address: str, selector: selectors.BaseSelector) -> None: ...

    def begin(self, phase: Phase) -> None:
        """Begin to send."""

    def tick(self) -> None:
        """Do what is due now; raises OSError when the flow cannot go on."""

    def end(self) -> None:
        """Send no more."""


class Receiver(Protocol):
    """The receiving end: payload bytes since the start; of TCP the streams open now, of UDP the
    packets and the lost ones."""

    @property
    def bytes(self) -> int: ...
    @property
    def streams(self) -> int | None: ...
    @property
    def packets(self) -> int | None: ...
    @property
    def lost(self) -> int | None: ...

    def __init__(self, flow: Flow, address: str, selector: selectors.BaseSelector) -> None: ...

    def collect(self) -> None:
        """Count what has arrived by now; raises OSError when it cannot go on."""


class Orchestrator:
    """The line to the orchestrator. Silence for ``protocol.SILENCE_S`` is an error: nobody else
    would ever end the flow."""

    def __init__(self) -> None:
        self.closed = False
        self._socket = protocol.connect_unix(
            Path(os.environ[protocol.ENV_CELL_DIR]) / protocol.SOCKET_FILE
        )
        self._incoming = protocol.MessageBuffer()
        self._heard_s = monotonic_s()

    def fileno(self) -> int:
        return self._socket.fileno()

    def wait_for_start(self) -> float:
        """Say that this end is ready; returns t0, CLOCK_MONOTONIC seconds of t = 0. Infinite if
        there will be none."""
        self._socket.settimeout(protocol.SILENCE_S)
        for message in (
            {"type": "hello", "token": os.environ.get(protocol.ENV_TOKEN, "")},
            {"type": "ready"},
        ):
            self._socket.sendall(protocol.encode_message(message))
        while not self.closed:
            for message in self.read():
                if message["type"] == "start":
                    return float(message["t0"])
        return float("inf")

    def read(self) -> list[dict[str, Any]]:
        """Take what has come; notes when the orchestrator hangs up."""
        data = self._socket.recv(65536)
        self.closed = not data
        self._heard_s = monotonic_s()
        return list(self._incoming.feed(data))

    def expect_alive(self) -> None:
        if monotonic_s() - self._heard_s > protocol.SILENCE_S:
            raise TimeoutError(f"no word from the orchestrator for {protocol.SILENCE_S:g} s")


def send(flow: Flow, address: str, output: Path) -> None:
    """Be the sending end of a flow until the orchestrator hangs up."""
    with Selector() as selector:
        sender: Sender = _engine(flow).Sender(flow, address, selector)
        events = RecordFile(output / f"events-{flow.name}.jsonl")
        orchestrator = Orchestrator()
        t0_s = orchestrator.wait_for_start()
        selector.register(orchestrator, selectors.EVENT_READ, orchestrator.read)

        def note(planned_s: float, streams: int) -> None:
            state = (
                {"streams": streams}
                if flow.kind == "tcp"
                else {"rate_bps": flow.rate_bps if streams else 0}
            )
            event = {
                "planned_s": planned_s,
                "applied_s": round(monotonic_s() - t0_s, 6),
                "link": flow.name,
                "state": state,
            }
            events.append([{**event, "kind": "traffic", "verified": True}])

        for phase in phases(flow):
            _run(selector, orchestrator, t0_s + phase.at_s)
            if orchestrator.closed:
                break
            sender.begin(phase)
            note(phase.at_s, phase.streams)
            _run(selector, orchestrator, t0_s + phase.end_s, sender)
            sender.end()
            if not orchestrator.closed:
                note(phase.end_s, 0)
        _run(selector, orchestrator, float("inf"))


def _run(
    selector: Selector, orchestrator: Orchestrator, until_s: float, sender: Sender | None = None
) -> None:
    """Wait for sockets, and let the sender do what is due, until a time or until the orchestrator
    hangs up."""
    while not orchestrator.closed and (now := monotonic_s()) < until_s:
        due_s = min(until_s, sender.due_s if sender else until_s, now + 1.0)
        _dispatch(selector, due_s)
        if sender:
            sender.tick()
        orchestrator.expect_alive()


def receive(flow: Flow, address: str, output: Path) -> None:
    """Be the receiving end of a flow until the orchestrator hangs up."""
    with Selector() as selector:
        receiver: Receiver = _engine(flow).Receiver(flow, address, selector)
        records = RecordFile(output / f"traffic-{flow.name}.jsonl")
        orchestrator = Orchestrator()
        t0_s = orchestrator.wait_for_start()
        selector.register(orchestrator, selectors.EVENT_READ, orchestrator.read)
        sample_s = t0_s
        while not orchestrator.closed:
            _dispatch(selector, sample_s)
            orchestrator.expect_alive()
            now = monotonic_s()
            if now < sample_s and not orchestrator.closed:
                continue
            receiver.collect()
            row = {
                "t_s": round(now - t0_s, 6),
                "flow": flow.name,
                "from": flow.source,
                "to": flow.target,
                "kind": flow.kind,
            }
            counted = {
                name: getattr(receiver, name) for name in ("streams", "bytes", "packets", "lost")
            }
            records.append([{**row, **counted}])
            sample_s = max(sample_s + SAMPLE_S, now)


def _dispatch(selector: Selector, until_s: float) -> None:
    for key, _ in selector.select(max(0.0, until_s - monotonic_s())):
        key.data()


def _engine(flow: Flow) -> Any:
    return importlib.import_module(ENGINES[flow.kind, flow.engine])


def main(arguments: list[str]) -> int:
    """Run one end; returns the exit status: 0, or 1 after a failure that the last line of stderr
    explains."""
    end, flow, address = arguments
    try:
        {"send": send, "receive": receive}[end](
            Flow.from_json(flow), address, Path(os.environ[protocol.ENV_OUTPUT_DIR])
        )
    except OSError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
