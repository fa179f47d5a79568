"""A route-netlink socket bound to one network namespace: batches of requests, and dumps.

pyroute2 encodes and decodes the messages. Its own sockets start an event loop each and send one
request at a time; a lab holds one socket per namespace and sends a whole change as one batch, so
the socket itself is ours.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Self, TypeVar

from pyroute2.netlink import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    nlmsg,
)

CLONE_NEWNET = 0x40000000
NETLINK_ROUTE = 0
_SOL_NETLINK = 270
_NETLINK_EXT_ACK = 11
_NETLINK_CAP_ACK = 10
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port: struct nlmsghdr
_ACK_TLVS = 0x200  # NLM_F_ACK_TLVS
_ACK_CAPPED = 0x100  # NLM_F_CAPPED
_BUFFER_BYTES = 4 << 20
_SIOCGSKNS = 0x894C
"""The namespace of a socket, <linux/sockios.h>."""
_SIOCETHTOOL, _ETHTOOL_GLINK = 0x8946, 0x0A
"""Whether an interface has a carrier, <linux/ethtool.h>."""
_LONGEST_ANSWER_BYTES = 64 << 10
"""In one read; into one answer to a dump the kernel puts at most 32 KiB, netlink_dump() in
net/netlink/af_netlink.c."""
BATCH = 64
"""Requests in one write; the answers to more would overflow the socket."""

M = TypeVar("M", bound=nlmsg)

_libc = ctypes.CDLL(None, use_errno=True)


class NetlinkError(OSError):
    """The kernel refused a request. ``str()`` has what was asked and the kernel's own words, where
    it gave some."""


@dataclass(frozen=True, slots=True)
class Request:
    """One encoded message; ``what`` names it in errors."""

    data: bytes
    what: str

    def with_flags(self, extra: int) -> "Request":
        """The same request with more flags set in its header."""
        patched = bytearray(self.data)
        (flags,) = struct.unpack_from("=H", patched, 6)
        struct.pack_into("=H", patched, 6, flags | extra)
        return Request(bytes(patched), self.what)


@dataclass(frozen=True, slots=True)
class Packed:
    """Requests of one socket, ready to be sent: each write with its requests and the sequence
    number of the first."""

    writes: Sequence[tuple[bytes, Sequence[Request], int]]


def encode(message: nlmsg, kind: int, flags: int, what: str) -> Request:
    """Encode a pyroute2 message; ``kind`` is the RTM_* type, NLM_F_REQUEST is added."""
    message["header"]["type"] = kind
    message["header"]["flags"] = flags | NLM_F_REQUEST
    message.encode()
    return Request(bytes(message.data), what)


def setns(fd: int) -> None:
    """Move the calling thread into the network namespace that ``fd`` refers to."""
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


def unshare_network() -> None:
    """Move the calling thread into a new network namespace."""
    if _libc.unshare(CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"unshare(CLONE_NEWNET): {os.strerror(code)}")


@contextmanager
def back_to_own_namespace() -> Iterator[None]:
    """Return the thread to the network namespace that it is in now, whatever the body does."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        try:
            setns(home)
        finally:
            os.close(home)


_WAKEUP_FRAME = bytes.fromhex("0180c200000e 020000000001 88b5") + bytes(46)
"""The shortest frame, of a type that IEEE 802 keeps for experiments, to an address that no bridge
forwards."""


class NetlinkSocket:
    """A NETLINK_ROUTE socket of the namespace in which it is created; it stays there for life."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE
        )
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            self._socket.settimeout(10)
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0
        self._buffer = bytearray(_LONGEST_ANSWER_BYTES)
        self._frames: socket.socket | None = None

    @classmethod
    def in_namespace(cls, namespace: str | int) -> Self:
        """A socket in another namespace, given as a path such as /proc/<pid>/ns/net or as an open
        descriptor."""
        fd = (
            os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            if isinstance(namespace, str)
            else namespace
        )
        try:
            with back_to_own_namespace():
                setns(fd)
                return cls()
        finally:
            if isinstance(namespace, str):
                os.close(fd)

    def close(self) -> None:
        self._socket.close()
        if self._frames is not None:
            self._frames.close()

    def send_wakeup_frame(self, interface: str) -> None:
        """Send one short frame out of an interface, so that its qdisc looks after its queue. Needs
        CAP_NET_RAW."""
        try:
            if self._frames is None:  # made late, as the kernel waits 16 ms when one is closed
                namespace = fcntl.ioctl(self._socket, _SIOCGSKNS)
                try:
                    with back_to_own_namespace():
                        setns(namespace)
                        self._frames = socket.socket(
                            socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0
                        )
                finally:
                    os.close(namespace)
            self._frames.sendto(_WAKEUP_FRAME, (interface, 0))
        except OSError:
            # a full queue has been looked after all the same; an interface that is down has none
            pass

    def flush_carrier(self, interface: str) -> None:
        """Have the kernel pass on what it has seen of an interface's carrier, which it puts off for
        up to a second."""
        value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_GLINK, 0))
        request = struct.pack("16sP", interface.encode(), ctypes.addressof(value)).ljust(40, b"\0")
        with suppress(OSError):  # one that cannot be asked has nothing to tell
            fcntl.ioctl(self._socket, _SIOCETHTOOL, request)

    def batch(self, requests: Iterable[Request]) -> list[list[bytes]]:
        """Send all requests and wait for all answers; ``pack``, ``post`` and ``collect`` in one."""
        packed = self.pack(requests)
        self.post(packed)
        return self.collect(packed)

    def pack(self, requests: Iterable[Request]) -> Packed:
        """Make requests ready to be sent, once, by this socket. More than 64 in a write would
        overflow it with answers."""
        pending = list(requests)
        writes = []
        for begin in range(0, len(pending), BATCH):
            chunk = pending[begin : begin + BATCH]
            first = self._sequence + 1
            out = bytearray()
            for request in chunk:
                self._sequence += 1
                message = bytearray(request.data)
                (asked,) = struct.unpack_from("=H", message, 6)
                struct.pack_into("=HII", message, 6, asked | NLM_F_ACK, self._sequence, 0)
                out += message + b"\0" * (-len(message) % 4)
            writes.append((bytes(out), chunk, first))
        return Packed(writes)

    def post(self, packed: Packed) -> None:
        """Send the first write. The kernel carries it out, request by request, before this
        returns."""
        if packed.writes:
            self._socket.send(packed.writes[0][0])

    def collect(self, packed: Packed) -> list[list[bytes]]:
        """For each posted request, the messages that the kernel sent back for it (the echo of
        NLM_F_ECHO).

        The kernel goes on after a request that fails; the first failure is raised when all are
        done.
        """
        replies: list[list[bytes]] = []
        failure: NetlinkError | None = None
        for number, (data, chunk, first) in enumerate(packed.writes):
            if number:
                self._socket.send(data)
            answers, refused = self._receive_all(chunk, first)
            replies += answers
            failure = failure or refused
        if failure:
            raise failure
        return replies

    def _receive_all(
        self, pending: Sequence[Request], first: int
    ) -> tuple[list[list[bytes]], NetlinkError | None]:
        replies: list[list[bytes]] = [[] for _ in pending]
        failure: NetlinkError | None = None
        missing = len(pending)
        while missing:
            for kind, flags, sequence, answer in self._receive():
                position = sequence - first
                if not 0 <= position < len(pending):
                    continue
                if kind == NLMSG_ERROR:
                    missing -= 1
                    failure = failure or _refusal(answer, flags, pending[position].what)
                else:
                    replies[position].append(answer)
        return replies, failure

    def dump(self, request: Request) -> list[bytes]:
        """All messages that answer a dump request."""
        self._sequence += 1
        question = bytearray(request.with_flags(NLM_F_DUMP).data)
        struct.pack_into("=II", question, 8, self._sequence, 0)
        self._socket.send(question)
        answers: list[bytes] = []
        while True:
            for kind, flags, sequence, answer in self._receive():
                if sequence != self._sequence:
                    continue
                if kind == NLMSG_DONE:
                    return answers
                if kind == NLMSG_ERROR:
                    failure = _refusal(answer, flags, request.what)
                    if failure:
                        raise failure
                    return answers
                answers.append(answer)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        length = self._socket.recv_into(self._buffer, 0, socket.MSG_TRUNC)
        if length > len(self._buffer):
            raise NetlinkError(errno.EMSGSIZE, f"an answer of the kernel has {length} bytes")
        data = bytes(memoryview(self._buffer)[:length])
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            yield kind, flags, sequence, data[offset : offset + length]
            offset += (length + 3) & ~3


def attributes(data: bytes, offset: int) -> Iterator[tuple[int, int, int]]:
    """Walk the attributes of a message from ``offset``: (type, start of the value, end of the
    value)."""
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        yield kind & 0x3FFF, offset + 4, offset + length
        offset += (length + 3) & ~3


def decode(data: bytes, message: Callable[[bytes], M]) -> M:
    """Decode one message with a pyroute2 class."""
    decoded = message(data)
    decoded.decode()
    return decoded


def _refusal(message: bytes, flags: int, what: str) -> NetlinkError | None:
    (code,) = struct.unpack_from("=i", message, _HEADER.size)
    if code == 0:
        return None
    words = errno.errorcode.get(-code, str(-code)) + ", " + os.strerror(-code)
    if flags & _ACK_TLVS and flags & _ACK_CAPPED:
        for kind, start, end in attributes(message, _HEADER.size + 4 + _HEADER.size):
            if kind == 1:  # NLMSGERR_ATTR_MSG
                words += ": " + message[start:end].rstrip(b"\0").decode(errors="replace")
    return NetlinkError(-code, f"{what}: {words}")
