"""TCP as fast as it goes, over some parallel streams."""

import errno
import math
import selectors
import socket
import struct
from functools import partial
from pathlib import Path

from testbed.traffic.flows import MAX_STREAMS, Flow, Phase, family_of

_CHUNK = bytes(1 << 18)
_ABORT = struct.pack("ii", 1, 0)
"""SO_LINGER: close with a reset. What waits in the socket is dropped, where a normal close would go
on sending it."""
_PASSING = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET}
"""What a stream meets when its path is cut for a while; it begins anew then."""
_WAKE_BYTES = 1 << 16
"""Waking up for every packet would cost the machine more than the traffic itself."""


class Sender:
    """Opens streams at the begin of a phase and resets them at its end (``program.Sender``)."""

    due_s = math.inf

    def __init__(self, flow: Flow, address: str, selector: selectors.BaseSelector) -> None:
        self._target = address, flow.port
        self._congestion = flow.congestion
        self._selector = selector
        self._streams: set[socket.socket] = set()
        # a congestion control that this host does not have is found before t = 0
        self._new_socket().close()

    def begin(self, phase: Phase) -> None:
        for _ in range(phase.streams):
            self._connect()

    def tick(self) -> None:
        pass

    def end(self) -> None:
        while self._streams:
            self._abort(next(iter(self._streams)))

    def _new_socket(self) -> socket.socket:
        stream = socket.socket(family_of(self._target[0]), socket.SOCK_STREAM)
        if self._congestion is not None:
            set_congestion_control(stream, self._congestion)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        stream.setblocking(False)
        return stream

    def _connect(self) -> None:
        stream = self._new_socket()
        self._streams.add(stream)
        self._selector.register(stream, selectors.EVENT_WRITE, partial(self._send, stream))
        if (code := stream.connect_ex(self._target)) not in (0, errno.EINPROGRESS):
            raise OSError(code, f"cannot connect to {self._target[0]}: {errno.errorcode[code]}")
        if self._congestion is not None:
            # once more: connecting takes that of the route, if it has one
            set_congestion_control(stream, self._congestion)

    def _send(self, stream: socket.socket) -> None:
        try:
            stream.send(_CHUNK)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            self._abort(stream)
            self._connect()

    def _abort(self, stream: socket.socket) -> None:
        self._selector.unregister(stream)
        self._streams.remove(stream)
        stream.close()


class Receiver:
    """Takes all streams that come (``program.Receiver``)."""

    packets = lost = None

    def __init__(self, flow: Flow, address: str, selector: selectors.BaseSelector) -> None:
        self.bytes = 0
        self._selector = selector
        self._open: set[socket.socket] = set()
        self._scratch = bytearray(1 << 20)
        self._listener = socket.create_server(
            (address, flow.port), family=family_of(address), backlog=2 * MAX_STREAMS
        )
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def streams(self) -> int:
        return len(self._open)

    def collect(self) -> None:
        for stream in list(self._open):
            self._take(stream)

    def _accept(self) -> None:
        stream, _ = self._listener.accept()
        stream.setblocking(False)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _WAKE_BYTES)
        # The reset that ends a stream may be lost; a question then brings another one.
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 127)
        self._open.add(stream)
        self._selector.register(stream, selectors.EVENT_READ, partial(self._take, stream))

    def _take(self, stream: socket.socket) -> None:
        try:
            # The kernel drops the data without copying it (tcp(7)).
            taken = stream.recv_into(self._scratch, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            return
        except OSError:
            taken = 0
        self.bytes += taken
        if not taken:
            self._selector.unregister(stream)
            self._open.remove(stream)
            stream.close()


def set_congestion_control(stream: socket.socket, name: str) -> None:
    """Choose a socket's congestion control; raises OSError with the valid names and the mend."""
    try:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except OSError as error:
        message = congestion_error(name, privileged=not isinstance(error, PermissionError))
        raise OSError(message or f"congestion control {name!r}: {error.strerror}") from None


def congestion_error(name: str, *, privileged: bool) -> str | None:
    """Why programs of this machine cannot use a congestion control, and the mend; None if they can.

    privileged: they have CAP_NET_ADMIN in their network namespace.
    """
    available = _congestion_controls("available")
    if name not in available:
        return (
            f"this kernel has no congestion control {name!r}; valid: {', '.join(available)} "
            f"(net.ipv4.tcp_available_congestion_control); load it with: sudo modprobe tcp_{name}"
        )
    allowed = _congestion_controls("allowed")
    if name not in allowed and not privileged:
        return (
            f"this kernel allows the congestion control {name!r} to privileged programs only;"
            f" valid: {', '.join(allowed)}; allow it with: sudo sysctl -w"
            f" net.ipv4.tcp_allowed_congestion_control='{' '.join([*allowed, name])}'"
        )
    return None


def _congestion_controls(which: str) -> list[str]:
    return Path(f"/proc/sys/net/ipv4/tcp_{which}_congestion_control").read_text().split()
