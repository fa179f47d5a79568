"""Write what passes an interface to a file that tcpdump and Wireshark read:
``python -m testbed.links.capture eth0 w0.pcap``.

tcpdump itself gives up root's rights by becoming another user, whom there is none of in a rootless
lab. Ends at SIGINT or SIGTERM, or with the lab, and says how much it has seen.
"""

import errno
import signal
import socket
import struct
import sys
import threading
from contextlib import closing

from testbed.files import explained

_ETH_P_ALL = 3
_SO_TIMESTAMPNS = 35
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_NANOSECONDS, _ETHERNET = 0xA1B23C4D, 1
_BUFFER_BYTES = 1 << 25
_PACKET_BYTES = 1 << 17
"""More than any packet has, also before it is cut into frames."""
_WAIT_US = 200_000
"""So long a packet is waited for before it is seen that the end has come."""


def open_tap(interface: str) -> socket.socket:
    """A socket with all that passes in both directions, see packet(7); it answers BlockingIOError
    where nothing has."""
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    try:
        tap.bind((interface, _ETH_P_ALL))
        tap.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, _WAIT_US))
    except BaseException:
        tap.close()
        raise
    return tap


def main(interface: str, path: str) -> None:
    ended = threading.Event()
    try:
        # The interface first: where it cannot be had, the file is left alone.
        with closing(open_tap(interface)) as tap, open(path, "wb") as out:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: ended.set())
            out.write(struct.pack("=IHHiIII", _NANOSECONDS, 2, 4, 0, 0, _PACKET_BYTES, _ETHERNET))
            out.flush()
            seen = 0
            while not ended.is_set():
                try:
                    frame, ancillary, _, _ = tap.recvmsg(_PACKET_BYTES, 128)
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno != errno.ENETDOWN:
                        raise
                    break  # the lab has ended
                seen += 1
                seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
                out.write(
                    struct.pack("=IIII", seconds, nanoseconds, len(frame), len(frame)) + frame
                )
            _, dropped = struct.unpack("II", tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        print(f"{seen} packets captured, {dropped} dropped for want of time", file=sys.stderr)
    except OSError as error:
        sys.exit(f"testbed: {explained(error)}")
    except KeyboardInterrupt:  # before it had begun
        sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
