"""Sockets on the hosts of a lab, and what went over the wire between them.

A socket belongs to the network namespace in which it is created, so one process can hold both ends:
nothing has to be synchronised, and one clock stamps both. System calls are dear under User-Mode
Linux; packets are sent and read many at a time.
"""

import ctypes
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from testbed.labs.netns import NetnsHost, NetnsLab
from testbed.links.netlink import back_to_own_namespace, setns

PORT = 9000
RATE_BPS = 100_000_000
"""Of every link between two hosts, unless a test is about rates."""
_BATCH = 128
_BURST_PER_S = {"netem": 150_000, "userspace": 40_000}[os.environ.get("NETSENSE_ENGINE", "netem")]
"""What impairs the packets takes so many in without a queue that runs over."""
_MOST_AHEAD = 3000
"""Datagrams sent and not yet heard of: fewer than wait for the delay line (links/tap.py), which on
a busy machine may have no processor for longer than any rate allows for."""
_ALL_LOST_S = 1.0
"""What has not come by then will not."""
_SO_RCVBUFFORCE, _SO_TIMESTAMPNS = 33, 35
_BUFFER_BYTES = 64 << 20
_TCP_INFO = 100, 156, 196
"""tcpi_total_retrans, tcpi_data_segs_out and tcpi_delivered_ce in struct tcp_info,
<linux/tcp.h>."""
_CONTROL_BYTES = 64
_STAMP = struct.Struct("=qq")  # struct timespec
# type, code, checksum, identifier, number: struct icmphdr
_ECHO, _ECHO_ID = struct.Struct("!BBHHH"), 0x7E50
_IOVEC = np.dtype([("base", "u8"), ("len", "u8")])
_MMSGHDR = np.dtype(
    [
        (name, "u8")
        for name in ("name", "namelen", "iov", "iovlen", "control", "controllen", "flags", "len")
    ]
)  # struct mmsghdr where pointers have 64 bits
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def at(host: NetnsHost) -> Iterator[None]:
    """Inside, this thread is on the host."""
    with back_to_own_namespace():
        setns(host.namespace)
        yield


class _Messages:
    """Buffers of a batch of datagrams, and the headers that sendmmsg and recvmmsg want."""

    def __init__(self, bytes_each: int, control_bytes: int) -> None:
        self.data = np.zeros((_BATCH, bytes_each), np.uint8)
        self.control = np.zeros((_BATCH, control_bytes), np.uint8)
        self._iovec = np.zeros(_BATCH, _IOVEC)
        self._iovec["base"] = self.data.ctypes.data + np.arange(_BATCH) * bytes_each
        self._iovec["len"] = bytes_each
        self.headers = np.zeros(_BATCH, _MMSGHDR)
        self.headers["iov"] = self._iovec.ctypes.data + np.arange(_BATCH) * _IOVEC.itemsize
        self.headers["iovlen"] = 1
        if control_bytes:
            self.headers["control"] = self.control.ctypes.data + np.arange(_BATCH) * control_bytes

    @property
    def numbers(self) -> Any:
        return self.data[:, :8].view("=i8")[:, 0]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Datagrams in the order of their arrival: the number that each carries, and when the kernel
    got it (ns since 1970)."""

    number: Any
    at_ns: Any

    @property
    def lost_runs(self) -> Any:
        """Lengths of the runs of numbers that never came, between the first and the last that
        did."""
        gaps = np.diff(np.unique(self.number)) - 1
        return gaps[gaps > 0]


class Flow:
    """A UDP flow of numbered datagrams from one host to another."""

    def __init__(self, source: NetnsHost, sink: NetnsHost, payload_bytes: int = 16) -> None:
        self.source, self.sink = source, sink
        self._next = 0
        self._newest = -1
        self._got: list[tuple[Any, Any]] = []
        with at(sink):
            self._in = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                self._in.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            except PermissionError:
                # in a user namespace; then as much as everyone may, and it is read often
                self._in.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            self._in.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            self._in.bind(("0.0.0.0", PORT))
        with at(source):
            self._out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._out.connect((sink.address, PORT))
        self._sending = _Messages(payload_bytes, 0)
        self._reading = _Messages(payload_bytes, _CONTROL_BYTES)

    def __enter__(self) -> "Flow":
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._in.close()

    def burst(self, count: int) -> None:
        """Send as fast as can be taken, at most ``_MOST_AHEAD`` of what has come, and read what
        comes meanwhile."""
        messages = self._sending
        address = messages.headers.ctypes.data
        end = self._next + count
        due_s = time.monotonic()
        while self._next < end:
            size = min(_BATCH, end - self._next)
            messages.numbers[:size] = np.arange(self._next, self._next + size)
            done = 0
            while done < size:
                sent = _libc.sendmmsg(
                    self._out.fileno(),
                    ctypes.c_void_p(address + done * _MMSGHDR.itemsize),
                    size - done,
                    0,
                )
                if sent < 0:
                    raise OSError(
                        ctypes.get_errno(), "sendmmsg: " + os.strerror(ctypes.get_errno())
                    )
                done += sent
            self._next += size
            self._read_what_must_have_come()
            due_s += size / _BURST_PER_S
            time.sleep(max(0.0, due_s - time.monotonic()))

    def paced(self, count: int) -> Any:
        """Send one at a time, 10 000 a second at most; the times at which each was sent (ns since
        1970)."""
        sent = np.zeros(count, np.int64)
        begin_ns = time.time_ns()
        payload = bytearray(self._sending.data.shape[1])
        for position in range(count):
            struct.pack_into("=q", payload, 0, self._next)
            while time.time_ns() < begin_ns + position * 100_000:
                pass
            sent[position] = time.time_ns()
            self._out.send(payload)
            self._next += 1
            if position % _BATCH == 0:
                self._read_what_must_have_come()
        self._read()
        return sent

    def arrivals(self, quiet_s: float = 0.3) -> Arrivals:
        """Everything that has come since the last call, once nothing has come for a while."""
        while self._comes(quiet_s):
            self._read()
        numbers, stamps = (
            zip(*self._got, strict=True)
            if self._got
            else ((np.zeros(0, np.int64),), (np.zeros(0, np.int64),))
        )
        self._got.clear()
        return Arrivals(np.concatenate(numbers), np.concatenate(stamps))

    def _read_what_must_have_come(self) -> None:
        self._read()
        while self._next - self._newest > _MOST_AHEAD:
            if not self._comes(_ALL_LOST_S):
                return
            self._read()

    def _comes(self, within_s: float) -> bool:
        """Wait until something can be read; False if nothing comes in time."""
        return bool(select.select([self._in], [], [], within_s)[0])

    def _read(self) -> None:
        messages = self._reading
        while True:
            messages.headers["controllen"] = _CONTROL_BYTES
            address = ctypes.c_void_p(messages.headers.ctypes.data)
            size = _libc.recvmmsg(self._in.fileno(), address, _BATCH, socket.MSG_DONTWAIT, None)
            if size <= 0:
                return
            seconds, ns = messages.control[:size, 16:32].view("=i8").T  # behind struct cmsghdr
            numbers = messages.numbers[:size].copy()
            self._newest = max(self._newest, int(numbers.max()))
            self._got.append((numbers, seconds * 10**9 + ns))
            if size < _BATCH:
                return


def ping(source: NetnsHost, address: str, count: int) -> Any:
    """Round-trip times (s) of ICMP echo requests, one after another; the far kernel answers, the
    near one stamps the answer.

    Polls, because a guest that waits is a process that sleeps, and waking it takes longer than the
    tests can bear.
    """
    times = []
    with at(source):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with raw:
        raw.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        raw.setblocking(False)
        for number in range(count):
            request = _ECHO.pack(8, 0, 0, _ECHO_ID, number)
            total = sum(struct.unpack("!4H", request))
            request = _ECHO.pack(8, 0, ~(total + (total >> 16)) & 0xFFFF, _ECHO_ID, number)
            sent = time.time_ns()
            raw.sendto(request, (address, 0))
            answer, control = b"", []
            while answer[20:21] != b"\0" or answer[24:28] != request[4:]:
                if time.time_ns() - sent > 2e9:
                    raise TimeoutError(f"{address} does not answer")
                try:
                    answer, control, _, _ = raw.recvmsg(256, 256)
                except BlockingIOError:
                    pass
            seconds, ns = _STAMP.unpack(control[0][2])
            times.append((seconds * 10**9 + ns - sent) / 1e9)
    return np.array(times)


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one TCP flow got: goodput in bits/s without its beginning, data segments that it sent,
    and of them again."""

    goodput_bps: float
    segments: int
    again: int
    marked: int
    """Segments that the receiver reported as marked by a queue (ECN)."""


def goodput(source: NetnsHost, sink: NetnsHost, warm_up_s: float, seconds: float) -> float:
    """Payload (bits/s) of one TCP flow, without its beginning."""
    return transfer(source, sink, warm_up_s, seconds).goodput_bps


def transfer(
    source: NetnsHost, sink: NetnsHost, warm_up_s: float, seconds: float, congestion: str = "cubic"
) -> Transfer:
    """Send as fast as TCP lets us."""
    with at(sink):
        server = socket.create_server(("0.0.0.0", PORT))
    with at(source):
        out = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        out.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        out.connect((sink.address, PORT))
    arriving, _ = server.accept()
    with server, out, arriving:
        out.setblocking(False)
        block, buffer = bytes(1 << 18), bytearray(1 << 18)
        begin, total = time.monotonic() + warm_up_s, 0
        counted_from = 0.0
        while (now := time.monotonic()) < begin + seconds:
            try:
                out.send(block)
            except BlockingIOError:
                pass
            select.select([arriving], [], [], 0.005)
            try:
                size = arriving.recv_into(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            if counted_from:
                total += size
            elif now >= begin:
                counted_from = time.monotonic()
        took_s = time.monotonic() - counted_from
        info = out.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        again, segments, marked = (
            struct.unpack_from("=I", info, at_byte)[0] for at_byte in _TCP_INFO
        )
        return Transfer(total * 8 / took_s, segments, again, marked)


def frames_left(lab: NetnsLab, link: str, direction: str = "down") -> int:
    """Frames that left what impairs them: netem stands before the queue, the delay line behind
    it."""
    counters = lab.links.counters()[link, direction]
    if lab.links.line_counters is None:
        return counters.packets
    way = lab.links.line_counters.directions[link, direction]
    return way.frames + way.duplicated - way.lost - way.overflowed - way.held


def udp_counters(host: NetnsHost) -> dict[str, int]:
    """UDP counters of a host's kernel, as in /proc/net/snmp."""
    with at(host):
        text = Path("/proc/thread-self/net/snmp").read_text()
    names, values = (line.split()[1:] for line in text.splitlines() if line.startswith("Udp:"))
    return dict(zip(names, map(int, values), strict=True))


def backlog_drops() -> int:
    """Packets that the kernel has dropped between two interfaces, because a processor had too many
    to take in."""
    return sum(
        int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines()
    )
