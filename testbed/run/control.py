"""The orchestrator's end of the control socket: one thread, all workers of a cell and the programs
of its traffic."""

import contextlib
import queue
import secrets
import selectors
import socket
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from netsenseml.records import monotonic_s
from testbed import protocol
from testbed.run.messages import Hello, Message, parse_message

Member = int | tuple[str, str]
"""Who speaks: a rank, or the flow and the end ("send", "receive") of a program of traffic."""

MOST_MESSAGES_PER_S = 2000
"""Of one connection; more is a violation, as nobody who follows the protocol has so much to say."""
_SPARE_CONNECTIONS = 16


@dataclass(frozen=True, slots=True)
class ProtocolViolation:
    """A member sent something that is no message."""

    error: str


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection of a member has ended."""


@dataclass(frozen=True, slots=True)
class Received:
    """What came from a member, and when (CLOCK_MONOTONIC). token: by which it had shown who it
    is."""

    member: Member
    message: Message | ProtocolViolation | Disconnected
    at_s: float
    token: str = ""


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    member: Member | None = None
    token: str = ""
    buffer: protocol.MessageBuffer = field(default_factory=protocol.MessageBuffer)
    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_MESSAGES_PER_S))


class ControlServer:
    """Accepts the members of a cell, sends heartbeats, and puts what they say into ``inbox``.

    ``tokens`` has what each of them must show; connections that show none of these are closed
    without a word, so
    that a stranger can neither speak for a member nor stop the cell.
    """

    def __init__(self, path: Path, members: Iterable[Member]) -> None:
        self.inbox: queue.Queue[Received] = queue.Queue()
        self.tokens = {member: secrets.token_hex(16) for member in members}
        self._members = {token: member for member, token in self.tokens.items()}
        self._path = path
        self._connections: dict[socket.socket, _Connection] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        self._server = protocol.listen_unix(self._path)
        # a worker container runs as another user; the tokens guard the socket
        self._path.chmod(0o666)
        self._server.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join(timeout=2)
        self._server.close()
        self._path.unlink(missing_ok=True)

    def broadcast(self, message: Mapping[str, Any]) -> None:
        """Send one message to all members that are connected."""
        line = protocol.encode_message(message)
        with self._lock:
            for connection in self._connections.values():
                if connection.member is None:
                    continue
                try:
                    sent = connection.socket.send(line)
                except OSError:
                    sent = 0
                if sent < len(line):
                    # It has gone, or has not read for so long that its buffer is full: the reading
                    # side reports the loss.
                    with contextlib.suppress(OSError):
                        connection.socket.shutdown(socket.SHUT_RDWR)

    def renew(self, members: Iterable[Member]) -> None:
        """Give other tokens to members that are to be started again, so that last words of the old
        ones are told apart."""
        with self._lock:
            for member in members:
                self._members.pop(self.tokens[member], None)
                self.tokens[member] = secrets.token_hex(16)
                self._members[self.tokens[member]] = member

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            next_beat = monotonic_s()
            while not self._stopping.is_set():
                now = monotonic_s()
                if now >= next_beat:
                    self.broadcast({"type": "heartbeat"})
                    next_beat = now + protocol.HEARTBEAT_S
                for key, _ in selector.select(
                    timeout=min(0.2, next_beat - now) if next_beat > now else 0
                ):
                    if key.fileobj is self._server:
                        self._accept(selector)
                    elif key.data in self._connections.values():  # or it has just been closed
                        self._read(selector, key.data)
            with self._lock:
                for connection in self._connections.values():
                    connection.socket.close()
                self._connections.clear()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            accepted, _ = self._server.accept()
        except OSError:
            return  # whoever called has hung up
        accepted.setblocking(False)
        strangers = [
            connection for connection in self._connections.values() if connection.member is None
        ]
        if len(strangers) >= len(self.tokens) + _SPARE_CONNECTIONS:
            self._close(selector, strangers[0])
        connection = _Connection(accepted)
        with self._lock:
            self._connections[accepted] = connection
        selector.register(accepted, selectors.EVENT_READ, connection)

    def _read(self, selector: selectors.BaseSelector, connection: _Connection) -> None:
        now_s = monotonic_s()
        try:
            data = connection.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # reset: it ended before it had read everything, as programs that fail do
        try:
            for content in connection.buffer.feed(data):
                self._take(connection, parse_message(content), now_s)
        except ValueError as error:
            if connection.member is not None:
                self.inbox.put(
                    Received(
                        connection.member, ProtocolViolation(str(error)), now_s, connection.token
                    )
                )
            data = b""
        if not data:
            self._close(selector, connection)
            if connection.member is not None:
                self.inbox.put(Received(connection.member, Disconnected(), now_s, connection.token))

    def _take(self, connection: _Connection, message: Message, now_s: float) -> None:
        if connection.member is None:
            member = self._members.get(message.token) if isinstance(message, Hello) else None
            if member is None:
                raise ValueError("no hello with a token of this cell")
            assert isinstance(message, Hello)
            with self._lock:
                connection.member, connection.token = member, message.token
            return
        times_s = connection.times_s
        if len(times_s) == times_s.maxlen and now_s - times_s[0] < 1:
            raise ValueError(f"more than {MOST_MESSAGES_PER_S} messages a second")
        times_s.append(now_s)
        self.inbox.put(Received(connection.member, message, now_s, connection.token))

    def _close(self, selector: selectors.BaseSelector, connection: _Connection) -> None:
        selector.unregister(connection.socket)
        with self._lock:
            del self._connections[connection.socket]
        connection.socket.close()
