"""Who is where, told to the kernel once and for all: which MAC an address has, and behind which
port of a switch a MAC is.

Without these the hosts ask each other (ARP, or neighbour discovery). Then a partition is not
silent, as a connection fails with EHOSTUNREACH after 3 s instead of waiting; a switch floods all
links with what it cannot place yet; and the neighbours of all namespaces share a table of 1024
(net.ipv4.neigh.default.gc_thresh3), which 33 hosts that all know each other overflow. What is
permanent does not count there (neigh_alloc in the kernel's net/core/neighbour.c, since 5.0).
"""

import ipaddress
import struct
from socket import AF_INET, AF_INET6

from pyroute2.netlink import NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST
from pyroute2.netlink.rtnl import RTM_NEWNEIGH

from testbed.links.netlink import Request

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_NDMSG = struct.Struct("=BBHiHBB")  # family, pads, ifindex, state, flags, type
_ATTRIBUTE = struct.Struct("=HH")
_DESTINATION, _MAC = 1, 2  # NDA_DST, NDA_LLADDR
# NUD_PERMANENT, NUD_NOARP; to a bridge "permanent" means that the MAC is its own
_PERMANENT, _STATIC = 0x80, 0x40
_AF_BRIDGE, _MASTER = 7, 0x04  # NTF_MASTER


def mac_of(number: int) -> str:
    """The MAC of a lab's host by its number: locally administered, unicast."""
    return "02:4e:53:" + ":".join(f"{byte:02x}" for byte in number.to_bytes(3, "big"))


def neighbour(ifindex: int, address: str, mac: str) -> Request:
    """The request by which a host knows the MAC of another one's address for good."""
    ip = ipaddress.ip_address(address)
    family = AF_INET if ip.version == 4 else AF_INET6
    attributes = _packed(_DESTINATION, ip.packed) + _packed(_MAC, _bytes(mac))
    return _request(
        _NDMSG.pack(family, 0, 0, ifindex, _PERMANENT, 0, 0) + attributes, f"neighbour {address}"
    )


def forwarding(port: int, mac: str) -> Request:
    """The request by which a bridge knows for good behind which of its ports a MAC is."""
    return _request(
        _NDMSG.pack(_AF_BRIDGE, 0, 0, port, _STATIC, _MASTER, 0) + _packed(_MAC, _bytes(mac)),
        f"port of {mac}",
    )


def _bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def _packed(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _request(body: bytes, what: str) -> Request:
    flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE
    return Request(_HEADER.pack(_HEADER.size + len(body), RTM_NEWNEIGH, flags, 0, 0) + body, what)
