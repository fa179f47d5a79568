"""UDP: datagrams at an even rate, numbered, so that the receiver knows how many were lost."""

import errno
import math
import selectors
import socket
import struct

from netsenseml.records import monotonic_s
from testbed.traffic.flows import Flow, Phase, family_of

_NUMBER = struct.Struct("!Q")
_BATCH = 256
"""So many datagrams are sent, or taken, before anything else has its turn."""
_BUFFER_BYTES = 4 << 20
_PASSING = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENOBUFS}
"""What a datagram may meet on its way out; it is lost then, as it would be further on."""


class Sender:
    """Datagram k of a phase is due k intervals after its begin; one that is late is sent at once
    (``program.Sender``)."""

    def __init__(self, flow: Flow, address: str, selector: selectors.BaseSelector) -> None:
        self.due_s = math.inf
        self._target = address, flow.port
        self._interval_s = flow.packet_bytes * 8 / flow.rate_bps
        self._packet = bytearray(flow.packet_bytes)
        self._number = 0
        self._begun = 0.0, 0
        self._socket = socket.socket(family_of(address), socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)

    def begin(self, phase: Phase) -> None:
        self.due_s = monotonic_s()
        self._begun = self.due_s, self._number

    def tick(self) -> None:
        begin_s, first = self._begun
        for _ in range(_BATCH):
            if monotonic_s() < self.due_s:
                return
            _NUMBER.pack_into(self._packet, 0, self._number)
            try:
                self._socket.sendto(self._packet, self._target)
            except BlockingIOError:
                pass  # more waits on this host than it may hold: lost, as in any other queue
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
            self._number += 1
            # From the begin, not from the last one: rounding and lateness must not add up.
            self.due_s = begin_s + (self._number - first) * self._interval_s

    def end(self) -> None:
        self.due_s = math.inf


class Receiver:
    """Counts datagrams (``program.Receiver``). lost: numbers up to the highest one seen, less the
    datagrams that came."""

    streams = None

    def __init__(self, flow: Flow, address: str, selector: selectors.BaseSelector) -> None:
        self.bytes = self.packets = 0
        self._expected = 0
        self._buffer = bytearray(1 << 16)
        self._socket = socket.socket(family_of(address), socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._socket.bind((address, flow.port))
        selector.register(self._socket, selectors.EVENT_READ, self.collect)

    @property
    def lost(self) -> int:
        return max(0, self._expected - self.packets)

    def collect(self) -> None:
        for _ in range(_BATCH):
            try:
                size = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return
            if size >= _NUMBER.size:
                (number,) = _NUMBER.unpack_from(self._buffer)
                self._expected = max(self._expected, number + 1)
                self.packets += 1
                self.bytes += size
