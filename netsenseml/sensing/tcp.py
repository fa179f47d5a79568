"""What the kernel knows about the TCP connections of this process."""

import contextlib
import ipaddress
import math
import os
import socket
import stat
import struct
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from netsenseml.agent.protocol import monotonic_s

# struct tcp_info of <linux/tcp.h>, whose fields never move: 7 single bytes, one with bit fields, then 24 u32 from tcpi_rto to
# tcpi_total_retrans, 4 u64, 6 u32, and 4 u64 from tcpi_delivery_rate on.
_LAYOUT = struct.Struct("=7xB24I4Q6I4Q")
_FLAGS, _RTT, _TOTAL_RETRANS, _BYTES_ACKED, _MIN_RTT = 0, 16, 24, 27, 32
_DELIVERY_RATE, _BUSY, _RWND_LIMITED, _SNDBUF_LIMITED = 35, 36, 37, 38
_APP_LIMITED = 1 if sys.byteorder == "little" else 0x80  # the first bit field of its byte
_SPACE = 512
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
        field = _LAYOUT.unpack_from(raw)
        return cls(
            rtt_s=field[_RTT] / 1e6,
            min_rtt_s=field[_MIN_RTT] / 1e6,
            bytes_acked=field[_BYTES_ACKED],
            retransmits=field[_TOTAL_RETRANS],
            delivery_bps=8.0 * field[_DELIVERY_RATE],
            app_limited=bool(field[_FLAGS] & _APP_LIMITED),
            busy_s=field[_BUSY] / 1e6,
            rwnd_limited_s=field[_RWND_LIMITED] / 1e6,
            sndbuf_limited_s=field[_SNDBUF_LIMITED] / 1e6,
        )


_FRESH = TcpInfo(0.0, math.inf, 0, 0, 0.0, True, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class TcpSample:
    """The connections of this process to other hosts since the sample before; the main one is that which carried most.

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


@dataclass(slots=True)
class _Connection:
    inode: int
    peer: str
    before: TcpInfo


class TcpMonitor:
    """The TCP connections that this process has to other hosts, found by their file descriptors.

    The process group owns the descriptors. They are only borrowed for the moment of a reading: a duplicate would keep
    a connection open that the group has closed, and its peer would wait for ever. A number may be given to another
    socket meanwhile, so the inode must be the same, too.

    Not thread-safe: one sample at a time.
    """

    def __init__(self) -> None:
        self._connections: dict[int, _Connection] = {}
        self._search_due_s = 0.0
        self._retransmits = 0
        self._busy: deque[tuple[int, float]] = deque()
        self._min_rtt_s: dict[str, float] = {}
        self._min_rtt_before_s: dict[str, float] = {}
        self._epoch_ends_s = 0.0

    def sample(self) -> TcpSample | None:
        """What happened since the last call; None if there is no connection that the kernel tells about.

        Takes some microseconds for each connection. New ones are looked for about once a second.
        """
        now_s = monotonic_s()
        if now_s >= self._search_due_s:
            self._search(now_s)
        if now_s >= self._epoch_ends_s:
            self._min_rtt_before_s, self._min_rtt_s = self._min_rtt_s, {}
            self._epoch_ends_s = now_s + _EPOCH_S
        main, before, after = None, _FRESH, _FRESH
        for fd, connection in list(self._connections.items()):
            info = read(fd) if _inode(fd) == connection.inode else None
            if info is None:
                del self._connections[fd]
                continue
            last, connection.before = connection.before, info
            self._retransmits += info.retransmits - last.retransmits
            if info.bytes_acked > last.bytes_acked:
                # A new minimum of the kernel's is fresh, an old one may be that of a route which is no more.
                rtt_s = info.min_rtt_s if info.min_rtt_s < last.min_rtt_s else info.rtt_s
                self._min_rtt_s[connection.peer] = min(rtt_s, self._min_rtt_s.get(connection.peer, math.inf))
            if main is None or info.bytes_acked - last.bytes_acked > after.bytes_acked - before.bytes_acked:
                main, before, after = connection, last, info
        if main is None:
            return None
        lowest_s = min(known.get(main.peer, math.inf) for known in (self._min_rtt_s, self._min_rtt_before_s))
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
        for fd, inode in _sockets():
            known = self._connections.get(fd)
            if known is None or known.inode != inode:
                peer = _other_host(fd)
                if peer is not None:
                    self._connections[fd] = _Connection(inode, peer, _FRESH)
        took_s = monotonic_s() - now_s
        self._search_due_s = now_s + max(_SEARCH_S, _SEARCH_FACTOR * took_s)

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
        if total_s < _BUSY_S:
            return None
        return 8 * sum(acked for acked, _ in self._busy) / total_s


def read(fd: int) -> TcpInfo | None:
    """The kernel's view of one connection; None if it is gone or the kernel tells too little."""
    try:
        # Family and type, which Python would ask the kernel for, do not matter for an option.
        borrowed = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
    except OSError:
        return None
    try:
        return TcpInfo.parse(borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SPACE))
    except (OSError, ValueError):
        return None
    finally:
        borrowed.detach()


def _sockets() -> Iterator[tuple[int, int]]:
    """Descriptor and inode of every open socket; nothing where there is no /proc."""
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - many times as fast as Path.iterdir
            with contextlib.suppress(OSError):
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    yield int(name), status.st_ino


def _inode(fd: int) -> int | None:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return None


def _other_host(fd: int) -> str | None:
    """Address of the peer of a TCP connection that leaves this host; None if the descriptor is no such thing."""
    try:
        borrowed = socket.socket(fileno=fd)
    except OSError:  # closed since
        return None
    try:
        if borrowed.family not in (socket.AF_INET, socket.AF_INET6) or borrowed.type != socket.SOCK_STREAM:
            return None
        here, there = (_address(end[0]) for end in (borrowed.getsockname(), borrowed.getpeername()))
    except OSError:  # listening, or not connected yet
        return None
    finally:
        borrowed.detach()
    return None if there.is_loopback or here == there else str(there)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address
