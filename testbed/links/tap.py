"""TAP devices: network interfaces whose other side is a program that reads and writes Ethernet
frames.

What the kernel sends out of the interface is read from the descriptor, what is written to it the
kernel receives (Documentation/networking/tuntap.rst, <linux/if_tun.h>). Before each frame stands a
``struct virtio_net_hdr``: it says what is still to be done to the frame (a checksum to be filled
in, segments to be cut), so that a GSO packet can pass uncut.
"""

import errno
import fcntl
import os
import socket
import struct
import sys

VNET_HEADER_BYTES = 10
"""Size of struct virtio_net_hdr, which precedes the frame in every read and write; its first byte
are the flags below."""
NEEDS_CHECKSUM = 1
"""VIRTIO_NET_HDR_F_NEEDS_CSUM: whoever receives or cuts the frame fills in its checksum."""
LARGEST_READ_BYTES = VNET_HEADER_BYTES + 18 + 65536
"""A whole GSO packet with its Ethernet and VLAN headers."""

_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETIFINDEX = 0x400454CA, 0x400454D0, 0x400454DA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6, _TUN_F_TSO_ECN, _TUN_F_USO4, _TUN_F_USO6 = (
    0x01,
    0x02,
    0x04,
    0x08,
    0x20,
    0x40,
)
_WHOLE_TCP = _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 | _TUN_F_TSO_ECN
_IFREQ = struct.Struct("=16sH22x")  # struct ifreq with its flags
_SET_QUEUE = struct.Struct("=IHHII BxHiII HHI")  # struct nlmsghdr, struct ifinfomsg, one attribute
_RTM_NEWLINK, _NLM_F_REQUEST_ACK, _IFLA_TXQLEN = 16, 5, 13
_WAITING_FRAMES = 4000
"""What the kernel keeps until it is read; it drops the rest. 50 ms of full frames at 1 Gbit/s: no
program waits longer for a processor. The 500 of the kernel's own choice are 10 cut GSO packets."""


_MENDS = {
    errno.EACCES: "allow it with: sudo chmod 666 /dev/net/tun",
    # its control group forbids it
    errno.EPERM: "give the container the device with: docker run --device /dev/net/tun",
}
_OTHER_MEND = "load the kernel's module with: sudo modprobe tun"


class NoTapError(OSError):
    """The kernel gives out no TAP devices here. ``str()`` is one line with the mend."""

    def __str__(self) -> str:
        return str(self.args[1])


def open_tap(name: str, index: int | None = None) -> int:
    """Make a TAP device in the network namespace of the calling thread; it lives as long as the
    descriptor returned.

    index: its interface index (ifindex); None: the kernel's choice. The descriptor does not block,
    is closed on exec, and works from any namespace.
    Raises NoTapError if the machine gives out none, FileExistsError or PermissionError if this
    namespace does not.
    """
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = f"/dev/net/tun cannot be opened ({error.strerror}); "
        raise NoTapError(error.errno, reason + _MENDS.get(error.errno or 0, _OTHER_MEND)) from error
    try:
        if index is not None:
            fcntl.ioctl(fd, _TUNSETIFINDEX, struct.pack("=i", index))
        fcntl.ioctl(
            fd, _TUNSETIFF, _IFREQ.pack(name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        )
        _set_queue(socket.if_nametoindex(name), _WAITING_FRAMES)
    except OSError as error:
        os.close(fd)
        place = "" if index is None else f" with index {index}"
        raise OSError(error.errno, f"TAP device {name}{place}: {error.strerror}") from error
    return fd


def _set_queue(index: int, frames: int) -> None:
    """How many frames the kernel keeps for the reader; by netlink, because the ioctl for it is for
    the machine's root alone."""
    request = _SET_QUEUE.pack(
        _SET_QUEUE.size,
        _RTM_NEWLINK,
        _NLM_F_REQUEST_ACK,
        1,
        0,
        0,
        0,
        index,
        0,
        0,
        8,
        _IFLA_TXQLEN,
        frames,
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
        route.send(request)
        (code,) = struct.unpack_from("=i", route.recv(4096), 16)
    if code:
        raise OSError(-code, os.strerror(-code))


def set_offload(fd: int, whole: bool) -> None:
    """What the program that reads the descriptor takes (TUNSETOFFLOAD).

    whole: GSO packets uncut and frames without their checksum. Otherwise the kernel cuts packets
    into frames and fills in the checksums before it hands them out, behind the queueing discipline.
    """
    if not whole:
        fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
        return
    try:
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _WHOLE_TCP | _TUN_F_USO4 | _TUN_F_USO6)
    except OSError:
        # kernels before 6.2 know no segmentation of UDP
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _WHOLE_TCP)


# says whether this machine gives out TAP devices, in a namespace that ends with the process
if __name__ == "__main__":
    try:
        os.close(open_tap("probe-tap", 64))
    except OSError as error:
        sys.exit(str(error))
