"""The orchestrator's end of the control socket: one thread, all workers of a cell and the programs of its traffic."""

import queue
import selectors
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from netsenseml.records import monotonic_s
from testbed import protocol


class ControlServer:
    """Accepts workers and programs of traffic, sends heartbeats, and puts every message into ``inbox`` as a dict.

    Two kinds are made here: {"type": "lost", "rank": int} when a connection ends, and {"type": "fault", "rank": int | None,
    "error": str} when a worker sends something that is no message.
    """

    def __init__(self, path: Path, world_size: int) -> None:
        self.inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        self._path = path
        self._world_size = world_size
        self._ranks: dict[socket.socket, int] = {}
        self._buffers: dict[socket.socket, protocol.MessageBuffer] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        self._server = protocol.listen_unix(self._path)
        self._path.chmod(0o666)  # a worker container runs as another user; the run directory guards the socket
        self._server.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join(timeout=2)
        self._server.close()
        self._path.unlink(missing_ok=True)

    def broadcast(self, message: Mapping[str, Any]) -> None:
        """Send one message to everyone who is connected."""
        line = protocol.encode_message(message)
        with self._lock:
            for connection in list(self._buffers):
                try:
                    connection.sendall(line)
                except OSError:
                    pass  # the reading side reports the loss

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            next_beat = monotonic_s()
            while not self._stopping.is_set():
                now = monotonic_s()
                if now >= next_beat:
                    self.broadcast({"type": "heartbeat"})
                    next_beat = now + protocol.HEARTBEAT_S
                for key, _ in selector.select(timeout=min(0.2, next_beat - now) if next_beat > now else 0):
                    if key.fileobj is self._server:
                        connection, _ = self._server.accept()
                        connection.settimeout(5)
                        with self._lock:
                            self._buffers[connection] = protocol.MessageBuffer()
                        selector.register(connection, selectors.EVENT_READ)
                    else:
                        self._read(selector, key.fileobj)  # type: ignore[arg-type]
            with self._lock:
                for connection in self._buffers:
                    connection.close()
                self._buffers.clear()

    def _read(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
            for message in self._buffers[connection].feed(data):
                rank = message.get("rank")
                if "flow" in message:  # a program of competing traffic, which has no rank
                    self.inbox.put(message)
                    continue
                if not isinstance(rank, int) or not 0 <= rank < self._world_size:
                    raise ValueError(f"there is no rank {rank!r}")
                self._ranks[connection] = rank
                self.inbox.put(message)
        except (OSError, ValueError) as error:
            self.inbox.put({"type": "fault", "rank": self._ranks.get(connection), "error": str(error)})
            data = b""
        if not data:
            selector.unregister(connection)
            with self._lock:
                del self._buffers[connection]
            connection.close()
            if connection in self._ranks:
                self.inbox.put({"type": "lost", "rank": self._ranks.pop(connection)})
