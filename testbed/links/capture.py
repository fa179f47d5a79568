"""Write what passes an interface to a file that tcpdump and Wireshark read: ``python -m testbed.links.capture eth0 w0.pcap``.

tcpdump itself gives up root's rights by becoming another user, whom there is none of in a rootless lab. Ends at SIGINT or
SIGTERM, or with the lab, and says how much it has seen.
"""

import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import closing

from testbed.files import explained

_ETH_P_ALL = 3
_SO_TIMESTAMPNS = 35
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_NANOSECONDS, _ETHERNET = 0xA1B23C4D, 1
_BUFFER_BYTES = 1 << 25
_PACKET_BYTES = 1 << 17
"""More than any packet has, also before it is cut into frames."""


def frames(interface: str) -> Iterator[tuple[int, int, bytes]]:
    """(seconds, nanoseconds, frame) of all that passes in both directions, see packet(7); at the end, a line on stderr."""
    with closing(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))) as tap:
        tap.bind((interface, _ETH_P_ALL))
        tap.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        seen = 0
        try:
            while True:
                frame, ancillary, _, _ = tap.recvmsg(_PACKET_BYTES, 128)
                seen += 1
                yield (*struct.unpack("qq", ancillary[0][2]), frame)
        except KeyboardInterrupt:
            _, dropped = struct.unpack("II", tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
            print(f"{seen} packets captured, {dropped} dropped for want of time", file=sys.stderr)


def main(interface: str, path: str) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with open(path, "wb") as out:
            out.write(struct.pack("=IHHiIII", _NANOSECONDS, 2, 4, 0, 0, _PACKET_BYTES, _ETHERNET))
            for seconds, nanoseconds, frame in frames(interface):
                out.write(struct.pack("=IIII", seconds, nanoseconds, len(frame), len(frame)) + frame)
    except OSError as error:
        sys.exit(f"testbed: {explained(error)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
