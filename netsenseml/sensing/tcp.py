"""What the kernel knows about the TCP connections of this process."""

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# struct tcp_info of <linux/tcp.h>, whose fields never move: 8 single bytes, then the u32 from tcpi_rto on.
_LAYOUT = struct.Struct("=8x24I4Q4I")
_RTT, _TOTAL_RETRANS, _BYTES_ACKED, _MIN_RTT = 15, 23, 26, 31
_SPACE = 512


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """Sender side of one connection since it was opened (Linux ``struct tcp_info``).

    rtt_s: smoothed round-trip time. min_rtt_s: smallest of the kernel's window (300 s by default).
    """

    rtt_s: float
    min_rtt_s: float
    bytes_acked: int
    retransmits: int

    @classmethod
    def parse(cls, raw: bytes) -> "TcpInfo":
        """Parse the kernel's answer; raises ValueError if the kernel is too old (< 4.6) to tell all of it."""
        if len(raw) < _LAYOUT.size:
            raise ValueError(f"struct tcp_info has {len(raw)} bytes, {_LAYOUT.size} are needed")
        field = _LAYOUT.unpack_from(raw)
        return cls(
            rtt_s=field[_RTT] / 1e6,
            min_rtt_s=field[_MIN_RTT] / 1e6,
            bytes_acked=field[_BYTES_ACKED],
            retransmits=field[_TOTAL_RETRANS],
        )


_NOTHING = TcpInfo(0.0, 0.0, 0, 0)


@dataclass(frozen=True, slots=True)
class TcpSample:
    """All connections of this process together.

    rtt_s, min_rtt_s: of the connection that carried most since the sample before.
    retransmits: segments retransmitted since the connections were opened.
    """

    rtt_s: float
    min_rtt_s: float
    retransmits: int


class TcpMonitor:
    """The TCP connections that this process has to other hosts, found by their file descriptors.

    The process group owns the descriptors. They are only borrowed for the moment of a reading: a duplicate would keep
    a connection open that the group has closed, and its peer would wait for ever.
    """

    def __init__(self) -> None:
        self._before: dict[int, TcpInfo] | None = None

    def sample(self) -> TcpSample | None:
        """What happened since the last call; None if there is no connection that the kernel tells about.

        The first call looks for the connections, so it belongs after the first exchange.
        """
        before = self._before
        if before is None:
            before = {fd: _NOTHING for fd in _descriptors() if _leaves_the_host(fd)}
        now = {fd: info for fd in before if (info := read(fd)) is not None}
        self._before = now
        if not now:
            return None
        acked = {fd: info.bytes_acked - before[fd].bytes_acked for fd, info in now.items()}
        main = max(now, key=acked.__getitem__)
        return TcpSample(
            rtt_s=now[main].rtt_s,
            min_rtt_s=now[main].min_rtt_s,
            retransmits=sum(info.retransmits for info in now.values()),
        )


def read(fd: int) -> TcpInfo | None:
    """The kernel's view of one connection; None if it is gone or the kernel tells too little."""
    try:
        with _borrowed(fd) as connection:
            return TcpInfo.parse(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SPACE))
    except (OSError, ValueError):
        return None


def _descriptors() -> Iterator[int]:
    for entry in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            if str(entry.readlink()).startswith("socket:"):
                yield int(entry.name)


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    borrowed = socket.socket(fileno=fd)
    try:
        yield borrowed
    finally:
        borrowed.detach()


def _leaves_the_host(fd: int) -> bool:
    try:
        with _borrowed(fd) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                return False
            here, there = (_address(end[0]) for end in (connection.getsockname(), connection.getpeername()))
    except OSError:  # listening, or closed since
        return False
    return not (there.is_loopback or here == there)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address
