"""Routes of a host whose TCP is to wait longer than usual before it takes a segment for lost."""

import ipaddress

from pyroute2.netlink import NLM_F_CREATE, NLM_F_REPLACE
from pyroute2.netlink.rtnl import RTM_NEWROUTE
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from testbed.links.netlink import Request, encode

_AF_INET, _MAIN_TABLE, _BY_KERNEL, _TO_LINK, _UNICAST = 2, 254, 2, 253, 1
_RTO_MIN_METRIC = 13  # RTAX_RTO_MIN: a metric counts only where it is locked


def slow_timeouts(index: int, address: str, prefix_bits: int, min_rto_s: float) -> Request:
    """Replace the route to an interface's own network by one with a minimum of TCP's retransmission time-out.

    Connections that begin afterwards obey it. The same time-out decides when an idle connection forgets its window.
    """
    message = rtmsg()
    message |= {
        "family": _AF_INET,
        "dst_len": prefix_bits,
        "table": _MAIN_TABLE,
        "proto": _BY_KERNEL,
        "scope": _TO_LINK,
        "type": _UNICAST,
    }
    metrics = [("RTAX_LOCK", 1 << _RTO_MIN_METRIC), ("RTAX_RTO_MIN", round(min_rto_s * 1000))]
    message["attrs"] = [
        ("RTA_DST", str(ipaddress.ip_network(f"{address}/{prefix_bits}", strict=False).network_address)),
        ("RTA_OIF", index),
        ("RTA_PREFSRC", address),
        ("RTA_METRICS", {"attrs": metrics}),
    ]
    return encode(message, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, f"route of {address}")
