"""The route by which a host reaches the others, with what the kernel's TCP keeps for it."""

import ipaddress
import socket
from dataclasses import dataclass

from pyroute2.netlink import NLM_F_CREATE, NLM_F_REPLACE
from pyroute2.netlink.rtnl import RTM_NEWROUTE
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from testbed.links.netlink import Request, encode

_AF_INET6_PRIORITY = 256
"""Of the routes that the kernel makes; one of another priority would stand beside it."""
_MAIN_TABLE, _BY_KERNEL, _TO_LINK, _UNICAST = 254, 2, 253, 1
_FEATURE_ECN = 1  # RTAX_FEATURE_ECN
_RTO_MIN_METRIC = 13  # RTAX_RTO_MIN counts only where it is locked


@dataclass(frozen=True, slots=True)
class Tcp:
    """How connections of a host behave; None leaves what the kernel does.

    congestion: their congestion control, unless a program chooses another once it has connected.
    min_rto_s: minimum of the retransmission time-out, after which an idle connection also forgets
    its window.
    ecn: they ask for, and grant, congestion to be marked instead of dropped (RFC 3168).
    """

    congestion: str | None = None
    min_rto_s: float | None = None
    ecn: bool = False


def tcp_route(index: int, address: str, prefix_bits: int, tcp: Tcp) -> Request:
    """Replace the route from an interface to its own network; connections that begin afterwards
    obey it."""
    message = rtmsg()
    network = ipaddress.ip_network(f"{address}/{prefix_bits}", strict=False)
    message["family"] = socket.AF_INET if network.version == 4 else socket.AF_INET6
    message["dst_len"] = prefix_bits
    message["table"] = _MAIN_TABLE
    message["proto"] = _BY_KERNEL
    message["scope"] = _TO_LINK if network.version == 4 else 0  # IPv6 has no scopes of routes
    message["type"] = _UNICAST
    metrics: list[tuple[str, object]] = []
    if tcp.min_rto_s is not None:
        metrics += [
            ("RTAX_LOCK", 1 << _RTO_MIN_METRIC),
            ("RTAX_RTO_MIN", round(tcp.min_rto_s * 1000)),
        ]
    if tcp.congestion is not None:
        metrics.append(("RTAX_CC_ALGO", tcp.congestion))
    if tcp.ecn:
        metrics.append(("RTAX_FEATURES", _FEATURE_ECN))
    message["attrs"] = [
        ("RTA_DST", str(network.network_address)),
        ("RTA_OIF", index),
        ("RTA_PREFSRC", address),
        ("RTA_METRICS", {"attrs": metrics}),
        *([("RTA_PRIORITY", _AF_INET6_PRIORITY)] if network.version == 6 else []),
    ]
    return encode(message, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, f"route of {address}")
