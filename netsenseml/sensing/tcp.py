"""What the kernel knows about the TCP connections of this process to the other hosts of its group."""

import contextlib
import ctypes
import fcntl
import ipaddress
import math
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from netsenseml.records import monotonic_s

# What TcpInfo tells of struct tcp_info in <linux/tcp.h>, whose fields never move: the byte with tcpi_delivery_rate_app_limited,
# tcpi_rtt, tcpi_total_retrans, tcpi_bytes_acked, tcpi_min_rtt, tcpi_delivery_rate and the three times after it.
_LAYOUT = struct.Struct("=7xB60xI28xI16xQ20xI8x4Q")
_APP_LIMITED = 1 if sys.byteorder == "little" else 0x80  # the first bit field of its byte
_Answer = ctypes.c_char * _LAYOUT.size  # has room for any address, too
_V4_IN_V6 = bytes(10) + b"\xff\xff"
# Python's socket objects would make a descriptor non-blocking where a default time-out is set. The GIL is kept (PyDLL): another
# thread may not give it back for 5 ms, and a call takes a microsecond.
_LIBC = ctypes.PyDLL(None)
_SEARCH_S, _SEARCH_FACTOR = 1.0, 1000  # new connections are looked for so often, and so many times rarer than it takes
_EPOCH_S = 2.0  # the smallest RTT is that of this epoch and the one before: 2 to 4 s
_BUSY_S = 0.2  # 50 jiffies at 250 Hz, so that their rounding costs 2 to 4 %
_BUFFERS = 0.1  # share of the busy time


class TcpInfo(NamedTuple):
    """Sender side of one connection since it was opened (Linux ``struct tcp_info``).

    rtt_s: smoothed round-trip time. min_rtt_s: smallest of the kernel's window (300 s by default).
    bytes_acked: payload that the peer has acknowledged. retransmits: segments.
    delivery_bps: payload rate over the round trip that ended with the newest acknowledgement that counted.
    app_limited: in that round trip the application had not enough to send, so the path carries at least this.
    busy_s: time with data to send or to be acknowledged, in steps of a jiffy (4 ms at 250 Hz); within it, the time in which
        the peer's window or the send buffer was the limit.
    """

    rtt_s: float
    min_rtt_s: float
    bytes_acked: int
    retransmits: int
    delivery_bps: float
    app_limited: bool
    busy_s: float
    rwnd_limited_s: float
    sndbuf_limited_s: float

    @classmethod
    def parse(cls, raw: bytes) -> "TcpInfo":
        """Parse the kernel's answer; raises ValueError if the kernel is too old (< 4.10) to tell all of it."""
        if len(raw) < _LAYOUT.size:
            raise ValueError(f"struct tcp_info has {len(raw)} bytes, {_LAYOUT.size} are needed")
        flags, rtt_us, retransmits, acked, min_rtt_us, rate, busy_us, rwnd_us, sndbuf_us = _LAYOUT.unpack_from(raw)
        limited, times_s = bool(flags & _APP_LIMITED), (busy_us / 1e6, rwnd_us / 1e6, sndbuf_us / 1e6)
        return cls(rtt_us / 1e6, min_rtt_us / 1e6, acked, retransmits, 8.0 * rate, limited, *times_s)


_FRESH = TcpInfo(0.0, math.inf, 0, 0, 0.0, True, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class TcpSample:
    """The connections to the group's other hosts since the sample before; the main one is that which carried most.

    rtt_s: of the main connection, smoothed by the kernel.
    min_rtt_s: to the peer of the main connection, over the last seconds, from all connections to it that had traffic. None if
        there was none.
    retransmits: segments retransmitted by all connections, since they were opened.
    acked_bytes: payload of the main connection that was acknowledged. 0: the sample is stale, nothing in it is news.
    delivery_bps, app_limited: of the main connection (``TcpInfo``). One round trip only, in which a token bucket may give away
        what it saved: it jumps by factors.
    bandwidth_bps: payload rate of the main connections over the last samples that together were busy long enough. Latency
        and slow start are part of that time, so the path carries at least this, but for what token buckets give away
        after a pause. None while there is not enough of it.
    """

    rtt_s: float
    min_rtt_s: float | None
    retransmits: int
    acked_bytes: int
    delivery_bps: float
    app_limited: bool
    bandwidth_bps: float | None

    def stale(self) -> "TcpSample":
        """The same later on, when nothing in it is news."""
        return replace(self, acked_bytes=0, bandwidth_bps=None)


class TcpMonitor:
    """The TCP connections that this process has to the other hosts of its group, found by their file descriptors.

    The descriptors belong to others. They are only read, and only at the moment of a sample: a duplicate would keep a
    connection open that its owner has closed, and its peer would wait for ever. A number may be given to another
    socket meanwhile, so the inode must be the same, too.

    Not thread-safe: one sample at a time.
    """

    def __init__(self, peers: Collection[str]) -> None:
        """peers: IP addresses of the other hosts; those of loopback do not count. Raises ValueError if one is no IP address."""
        addresses = (ipaddress.ip_address(ipaddress.ip_address(peer).packed.removeprefix(_V4_IN_V6)) for peer in peers)
        self._peers = frozenset(address.packed for address in addresses if not address.is_loopback)
        self._connections: dict[int, tuple[int, bytes, TcpInfo]] = {}  # inode, peer, and as of the sample before
        self._search_due_s = 0.0
        self._retransmits = 0
        self._busy: deque[tuple[int, float]] = deque()
        self._min_rtt_s: dict[bytes, float] = {}
        self._min_rtt_before_s: dict[bytes, float] = {}
        self._epoch_ends_s = 0.0

    def sample(self) -> TcpSample | None:
        """What happened since the last call; None if there is no connection that the kernel tells about.

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
                # A new minimum of the kernel's is fresh, an old one may be that of a route which is no more.
                rtt_s = info.min_rtt_s if info.min_rtt_s < last.min_rtt_s else info.rtt_s
                self._min_rtt_s[peer] = min(rtt_s, self._min_rtt_s.get(peer, math.inf))
            if main is None or info.bytes_acked - last.bytes_acked > after.bytes_acked - before.bytes_acked:
                main, before, after = peer, last, info
        if main is None:
            return None
        lowest_s = min(known.get(main, math.inf) for known in (self._min_rtt_s, self._min_rtt_before_s))
        return TcpSample(
            rtt_s=after.rtt_s,
            min_rtt_s=lowest_s if lowest_s < math.inf else None,
            retransmits=self._retransmits,
            acked_bytes=after.bytes_acked - before.bytes_acked,
            delivery_bps=after.delivery_bps,
            app_limited=after.app_limited,
            bandwidth_bps=self._busy_bps(before, after),
        )

    def _search(self, now_s: float) -> None:
        for fd in _descriptors():
            peer, inode = _other_host(fd), _inode(fd)
            if peer in self._peers and inode is not None and self._connections.get(fd, (None,))[0] != inode:
                self._connections[fd] = inode, peer, _FRESH
        self._search_due_s = now_s + max(_SEARCH_S, _SEARCH_FACTOR * (monotonic_s() - now_s))

    def _busy_bps(self, before: TcpInfo, after: TcpInfo) -> float | None:
        busy_s = after.busy_s - before.busy_s
        buffers_s = after.rwnd_limited_s - before.rwnd_limited_s + after.sndbuf_limited_s - before.sndbuf_limited_s
        # Where the buffers were the limit, the sample says nothing of the path; to subtract the time alone would leave
        # in what was carried in it.
        if busy_s > 0 and buffers_s <= _BUFFERS * busy_s:
            self._busy.append((after.bytes_acked - before.bytes_acked, busy_s))
        total_s = sum(seconds for _, seconds in self._busy)
        while self._busy and total_s - self._busy[0][1] >= _BUSY_S:
            total_s -= self._busy.popleft()[1]
        return 8 * sum(acked for acked, _ in self._busy) / total_s if total_s >= _BUSY_S else None


def read(fd: int) -> TcpInfo | None:
    """The kernel's view of one connection; None if it is gone or the kernel tells too little."""
    try:
        return TcpInfo.parse(_asked(_LIBC.getsockopt, fd, socket.IPPROTO_TCP, socket.TCP_INFO))
    except ValueError:
        return None


def local_address(interface: str | None) -> str | None:
    """IP address by which the other hosts of the group see this one; None where that is unknown.

    interface: as in GLOO_SOCKET_IFNAME, of whose names the first counts. Without it the address is, as in Gloo, the first of
        the host's name that can be bound. Never one of loopback. Sends nothing, but the resolver may ask for the name.
    """
    found = _addresses_of(interface.partition(",")[0]) if interface else _addresses_of_name()
    return next((str(address) for address in map(ipaddress.ip_address, found) if not address.is_loopback), None)


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
    """Packed IP address of the peer of a connection that leaves this host; None if the descriptor is no such thing."""
    there = _packed(_asked(_LIBC.getpeername, fd))
    return None if there == _packed(_asked(_LIBC.getsockname, fd)) else there


def _packed(end: bytes) -> bytes | None:
    """The IP address in a ``struct sockaddr``; None if there is none."""
    family = int.from_bytes(end[:2], sys.byteorder)
    return end[4:8] if family == socket.AF_INET else end[8:24].removeprefix(_V4_IN_V6) if family == socket.AF_INET6 else None


def _addresses_of(interface: str) -> Iterator[bytes]:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        yield fcntl.ioctl(own, 0x8915, struct.pack("16s24x", os.fsencode(interface)))[20:24]  # SIOCGIFADDR
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as table:
        rows = sorted(map(str.split, table), key=lambda row: row[3])  # by scope: 00 reaches farthest
        yield from (bytes.fromhex(row[0]) for row in rows if row[5] == interface)


def _addresses_of_name() -> Iterator[str]:
    with contextlib.suppress(OSError, UnicodeError):  # the name is not known
        for family, kind, protocol, _, end in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as own:
                own.bind(end)
                yield str(end[0])
