"""The server for the links and hosts of a running cell: ``testbed link``, ``exec`` and ``capture``
ask it, over a Unix socket in the cell's directory.

One request a connection, one JSON object each way:

    {"links": ["w0"], "set": {"rate": "5mbit"}}  →  {"links": {…}} with the states after the change
    {"links": []}            →  {"links": {name: {"state": …, "up": {…}, "down": {…}}}} of all
    {"host": "w0"}           →  {"host": {"interface": …, "addresses": {…}, "namespace": 17}}, or
                                "container" in place of "namespace"
    anything that is wrong   →  {"error": "one line"}
"""

import contextlib
import errno
import os
import queue
import socket
import stat
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testbed import protocol
from testbed.spec.errors import did_you_mean

SOCKET_FILE = "links.sock"
_CREDENTIALS = struct.Struct("=iII")  # struct ucred
TIMEOUT_S = 5.0


@dataclass
class Request:
    """What waits for the thread that owns the links; ``answer`` takes one reply."""

    body: Mapping[str, Any]
    answer: "queue.Queue[Mapping[str, Any]]" = field(default_factory=lambda: queue.Queue(1))

    def fulfil(
        self,
        of_host: Callable[[str], Mapping[str, Any]],
        of_links: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        """Answer it by what these say; what they cannot do is told in one line."""
        try:
            if (host := self.body.get("host")) is not None:
                self.answer.put({"host": of_host(str(host))})
            else:
                self.answer.put({"links": of_links(self.body)})
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            self.answer.put({"error": str(error)})


def check_name(kind: str, name: object, known: Collection[str]) -> None:
    """Raise ValueError, one line, if there is no link, or host, of that name."""
    if name not in known:
        raise ValueError(f"there is no {kind} {name!r}; {did_you_mean(str(name), known)}")


Requests = queue.Queue[Request]


class LinkServer:
    """Listens from entering to leaving and puts every request into ``requests``."""

    def __init__(self, directory: Path) -> None:
        self.requests: Requests = queue.Queue()
        self._path = directory / SOCKET_FILE
        self._thread = threading.Thread(target=self._serve, name="link requests", daemon=True)
        self._closing = False

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        self._server = protocol.listen_unix(self._path)
        self._path.chmod(0o600)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing = True
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=TIMEOUT_S)
        self._server.close()

    def _serve(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError, ValueError, queue.Empty):
                if _is_confined(connection):
                    continue
                connection.settimeout(TIMEOUT_S)
                request = Request(_receive(connection))
                self.requests.put(request)
                connection.sendall(protocol.encode_message(request.answer.get(timeout=TIMEOUT_S)))


def _peer(connection: socket.socket) -> tuple[int, int]:
    """The other end's process, 0 if it is outside of this process's PID namespace, and user."""
    pid, user, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return pid, user


def _is_confined(connection: socket.socket) -> bool:
    """Whether the other end is a program on a host, which has a PID namespace of its own below
    ours: links are not for it."""
    pid, _ = _peer(connection)
    own, theirs = (Path(f"/proc/{one}/ns/pid") for one in ("self", pid))
    # 0: outside of ours, as the caller is
    return pid > 0 and own.stat().st_ino != theirs.stat().st_ino


def send_request(directory: Path, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put a request to the cell that runs in ``directory``; raises OSError, one line, if none
    does."""
    with _connected(directory) as connection:
        connection.settimeout(2 * TIMEOUT_S)
        connection.sendall(protocol.encode_message(request))
        return _receive(connection)


def ask(directory: Path, request: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """A part of the answer of the cell that runs in ``directory``.

    Raises ValueError with what it says against the request, ``stranger`` if that is no cell's, and
    OSError as ``send_request`` does; all of them one line.
    """
    try:
        answer = send_request(directory, request)
    except ValueError:
        raise stranger(directory) from None
    if "error" in answer:
        raise ValueError(protocol.one_line(str(answer["error"]), 1000))
    found = answer.get(part)
    if not isinstance(found, dict):
        raise stranger(directory)
    return found


def stranger(directory: Path) -> ConnectionError:
    """What is raised where another program than a cell's seems to answer."""
    return ConnectionError(f"{directory}: what answers at its {SOCKET_FILE} is no cell of testbed")


def listening_pid(directory: Path) -> int:
    """The process that answers, as this PID namespace counts them (SO_PEERCRED, socket(7)); raises
    OSError if none does."""
    with _connected(directory) as connection:
        return _peer(connection)[0]


@contextlib.contextmanager
def _connected(directory: Path) -> Iterator[socket.socket]:
    try:
        with _connect(directory / SOCKET_FILE) as connection:
            yield connection
    except (FileNotFoundError, ConnectionError):
        raise ConnectionError(
            f"{directory}: the cell does not answer any more; it may have ended just now"
        ) from None


def _connect(path: Path) -> socket.socket:
    """Connect to a cell's socket. Others may have made the run directory: raises OSError where it
    is a link, and PermissionError with EPERM where a program of another user listens."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise OSError(errno.ENOTSOCK, "is no socket", str(path))
    connection = protocol.connect_unix(path)
    _, user = _peer(connection)
    if user not in (os.geteuid(), 0):
        connection.close()
        raise PermissionError(
            errno.EPERM, f"a program of user {user} answers; use testbed as that user", str(path)
        )
    return connection


def live_cell(run: Path) -> Path | None:
    """Directory of the cell of a run that is running now. Raises PermissionError if it may be one
    of another user's; with EPERM if it is."""
    refused = None
    for found in (cell / SOCKET_FILE for cell in protocol.cell_directories(run)):
        try:
            with _connect(found):
                return found.parent
        except PermissionError as error:
            refused = error
            if error.errno == errno.EACCES:
                mend = "use testbed as that user" if found.lstat().st_uid else "use sudo"
                text = f"belongs to another user; {mend}"
                refused = PermissionError(errno.EACCES, text, str(found.parent))
        except OSError:
            pass  # none listens: it was killed
    if refused:
        raise refused
    return None


def _receive(connection: socket.socket) -> Mapping[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionResetError("the other end has hung up")
        if len(data) > protocol.MessageBuffer.LIMIT:
            raise ValueError("no message")
        data += piece
    return protocol.decode_message(data)
