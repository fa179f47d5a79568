"""What the kernel knows about the TCP connections of this process to the other hosts of its
group."""

import contextlib
import ctypes
import fcntl
import ipaddress
import math
import os
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from netsenseml.records import monotonic_s

# What TcpInfo tells of struct tcp_info in <linux/tcp.h>, whose fields never move: tcpi_rtt,
# tcpi_total_retrans, tcpi_bytes_acked and tcpi_min_rtt.
_LAYOUT = struct.Struct("=68xI28xI16xQ20xI")
_Answer = ctypes.c_char * _LAYOUT.size  # has room for any address, too
_V4_IN_V6 = bytes(10) + b"\xff\xff"
# Python's socket objects would make a descriptor non-blocking where a default time-out is set. The
# GIL is kept (PyDLL): another thread may not give it back for 5 ms, and a call takes a microsecond.
_LIBC = ctypes.PyDLL(None)
# new connections are looked for so often, and so many times rarer than it takes
_SEARCH_S, _SEARCH_FACTOR = 1.0, 1000
_EPOCH_S = 2.0  # the smallest RTT is that of this epoch and the one before: 2 to 4 s


class TcpInfo(NamedTuple):
    """Sender side of one connection since it was opened (Linux ``struct tcp_info``).

    rtt_s: smoothed round-trip time. min_rtt_s: smallest of the kernel's window (300 s by default).
    bytes_acked: payload that the peer has acknowledged. retransmits: segments.
    """

    rtt_s: float
    min_rtt_s: float
    bytes_acked: int
    retransmits: int

    @classmethod
    def parse(cls, raw: bytes) -> "TcpInfo":
        """Parse the kernel's answer; raises ValueError if the kernel is too old (< 4.6) to tell all
        of it."""
        if len(raw) < _LAYOUT.size:
            raise ValueError(f"struct tcp_info has {len(raw)} bytes, {_LAYOUT.size} are needed")
        rtt_us, retransmits, acked, min_rtt_us = _LAYOUT.unpack_from(raw)
        return cls(rtt_us / 1e6, min_rtt_us / 1e6, acked, retransmits)


_FRESH = TcpInfo(0.0, math.inf, 0, 0)


@dataclass(frozen=True, slots=True)
class TcpSample:
    """The connections to the group's other hosts since the sample before; the main one is that
    which carried most.

    rtt_s: of the main connection, smoothed by the kernel.
    min_rtt_s: to the peer of the main connection, over the last seconds, from all connections to it
        that had traffic. None if there was none.
    retransmits: segments retransmitted by all connections, since they were opened.
    acked_bytes: payload of the main connection that was acknowledged.
    """

    rtt_s: float
    min_rtt_s: float | None
    retransmits: int
    acked_bytes: int


class TcpMonitor:
    """The TCP connections that this process has to the other hosts of its group, found by their
    file descriptors.

    The descriptors belong to others. They are only read, and only at the moment of a sample: a
    duplicate would keep a connection open that its owner has closed, and its peer would wait for
    ever. A number may be given to another socket meanwhile, so the inode must be the same, too.

    Not thread-safe: one sample at a time.
    """

    def __init__(self, peers: Collection[str]) -> None:
        """peers: IP addresses of the other hosts; those of loopback do not count. Raises ValueError
        if one is no IP address."""
        addresses = (
            ipaddress.ip_address(ipaddress.ip_address(peer).packed.removeprefix(_V4_IN_V6))
            for peer in peers
        )
        self._peers = frozenset(address.packed for address in addresses if not address.is_loopback)
        # inode, peer, and as of the sample before
        self._connections: dict[int, tuple[int, bytes, TcpInfo]] = {}
        self._search_due_s = 0.0
        self._retransmits = 0
        self._min_rtt_s: dict[bytes, float] = {}
        self._min_rtt_before_s: dict[bytes, float] = {}
        self._epoch_ends_s = 0.0

    def sample(self) -> TcpSample | None:
        """What happened since the last call; None if there is no connection that the kernel tells
        about.

        Takes some microseconds for each connection. New ones are looked for about once a second.
        """
        if not self._peers:
            return None
        now_s = monotonic_s()
        if now_s >= self._search_due_s:
            self._search(now_s)
        if now_s >= self._epoch_ends_s:
            self._min_rtt_before_s, self._min_rtt_s = self._min_rtt_s, {}
            self._epoch_ends_s = now_s + _EPOCH_S
        main, before, after = None, _FRESH, _FRESH
        for fd, (inode, peer, last) in list(self._connections.items()):
            info = read(fd) if _inode(fd) == inode else None
            if info is None:
                del self._connections[fd]
                continue
            self._connections[fd] = inode, peer, info
            self._retransmits += info.retransmits - last.retransmits
            if info.bytes_acked > last.bytes_acked:
                # A new minimum of the kernel's is fresh, an old one may be that of a route which is
                # no more.
                rtt_s = info.min_rtt_s if info.min_rtt_s < last.min_rtt_s else info.rtt_s
                self._min_rtt_s[peer] = min(rtt_s, self._min_rtt_s.get(peer, math.inf))
            if (
                main is None
                or info.bytes_acked - last.bytes_acked > after.bytes_acked - before.bytes_acked
            ):
                main, before, after = peer, last, info
        if main is None:
            return None
        lowest_s = min(
            known.get(main, math.inf) for known in (self._min_rtt_s, self._min_rtt_before_s)
        )
        return TcpSample(
            rtt_s=after.rtt_s,
            min_rtt_s=lowest_s if lowest_s < math.inf else None,
            retransmits=self._retransmits,
            acked_bytes=after.bytes_acked - before.bytes_acked,
        )

    def _search(self, now_s: float) -> None:
        for fd in _descriptors():
            peer, inode = _other_host(fd), _inode(fd)
            if (
                peer in self._peers
                and inode is not None
                and self._connections.get(fd, (None,))[0] != inode
            ):
                self._connections[fd] = inode, peer, _FRESH
        self._search_due_s = now_s + max(_SEARCH_S, _SEARCH_FACTOR * (monotonic_s() - now_s))


def read(fd: int) -> TcpInfo | None:
    """The kernel's view of one connection; None if it is gone or the kernel tells too little."""
    try:
        return TcpInfo.parse(_asked(_LIBC.getsockopt, fd, socket.IPPROTO_TCP, socket.TCP_INFO))
    except ValueError:
        return None


def is_connected(fd: int) -> bool:
    """Whether a socket has a peer."""
    return bool(_asked(_LIBC.getpeername, fd))


def shut_down(fd: int) -> None:
    """End a connection for all who hold it."""
    _LIBC.shutdown(fd, socket.SHUT_RDWR)


def local_address(interface: str | None) -> str | None:
    """IP address by which the other hosts of the group see this one; None where that is unknown.

    interface: as in GLOO_SOCKET_IFNAME, of whose names the first counts. Without it the address is,
        as in Gloo, the first of the host's name that can be bound. Never one of loopback. Sends
        nothing, but the resolver may ask for the name.
    """
    found = _addresses_of(interface.partition(",")[0]) if interface else _addresses_of_name()
    return next(
        (str(address) for address in map(ipaddress.ip_address, found) if not address.is_loopback),
        None,
    )


def _asked(call: Callable[..., int], fd: int, *option: int) -> bytes:
    """What a call of libc says of a descriptor; nothing if it fails."""
    answer, size = _Answer(), ctypes.c_uint(_LAYOUT.size)
    return b"" if call(fd, *option, answer, ctypes.byref(size)) else answer.raw[: size.value]


def _descriptors() -> list[int]:
    """All that are open; none where there is no /proc."""
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 - many times as fast as Path.iterdir
    except OSError:
        return []


def _inode(fd: int) -> int | None:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return None


def _other_host(fd: int) -> bytes | None:
    """Packed IP address of the peer of a connection that leaves this host; None if the descriptor
    is no such thing."""
    there = _packed(_asked(_LIBC.getpeername, fd))
    return None if there == _packed(_asked(_LIBC.getsockname, fd)) else there


def _packed(end: bytes) -> bytes | None:
    """The IP address in a ``struct sockaddr``; None if there is none."""
    family = int.from_bytes(end[:2], sys.byteorder)
    return (
        end[4:8]
        if family == socket.AF_INET
        else end[8:24].removeprefix(_V4_IN_V6)
        if family == socket.AF_INET6
        else None
    )


def _addresses_of(interface: str) -> Iterator[bytes]:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        # SIOCGIFADDR
        yield fcntl.ioctl(own, 0x8915, struct.pack("16s24x", os.fsencode(interface)))[20:24]
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as table:
        # by scope: 00 reaches farthest
        rows = sorted(map(str.split, table), key=lambda row: row[3])
        yield from (bytes.fromhex(row[0]) for row in rows if row[5] == interface)


def _addresses_of_name() -> Iterator[str]:
    with contextlib.suppress(OSError, UnicodeError):  # the name is not known
        for family, kind, protocol, _, end in socket.getaddrinfo(
            socket.gethostname(), None, type=socket.SOCK_STREAM
        ):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as own:
                own.bind(end)
                yield str(end[0])
