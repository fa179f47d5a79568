"""What this kernel offers for links, found out by asking it.

``python -m testbed.links.kernel_support KIND…`` prints what is missing.

Runs in a scratch network namespace that ends with the process, so it needs the right to make one
and touches nothing.
"""

import errno
import os
import sys
from collections.abc import Iterable
from dataclasses import replace

from pyroute2.netlink import NLM_F_CREATE, NLM_F_EXCL
from pyroute2.netlink.rtnl import RTM_NEWLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from testbed.links import qdiscs
from testbed.links.netlink import (
    NetlinkError,
    NetlinkSocket,
    Request,
    back_to_own_namespace,
    encode,
    unshare_network,
)
from testbed.links.state import AQMS, LinkParameters
from testbed.links.tap import open_tap

_LOOPBACK_INDEX = 1
_LIMITED = LinkParameters(rate_bps=10**7)
_PARAMETERS_BY_KIND = {
    "tbf": _LIMITED,
    "htb": _LIMITED,
    "netem": LinkParameters(delay_s=0.001),
    **{aqm: replace(_LIMITED, aqm=aqm) for aqm in AQMS if aqm != "fifo"},
}
_UNKNOWN = (errno.ENOENT, errno.EOPNOTSUPP)
"""What the kernel says of a kind of qdisc, or of interface, that it does not know."""


def missing_kinds(kinds: Iterable[str]) -> list[str]:
    """Those kinds that the kernel does not know: of qdiscs such as "htb" and "netem", of interfaces
    such as "veth".

    Raises OSError without the rights to ask.
    """
    found = []
    with back_to_own_namespace():
        for kind in kinds:
            unshare_network()  # each finds an interface that nothing has been tried on
            socket = NetlinkSocket()
            try:
                socket.batch(_requests(kind))
            except NetlinkError as error:
                if error.errno not in _UNKNOWN:
                    raise
                found.append(kind)
            finally:
                socket.close()
    return found


def require_taps() -> None:
    """Raise OSError, whose ``str()`` has the mend, if this machine gives out no TAP devices, or
    without the rights to ask."""
    with back_to_own_namespace():
        unshare_network()
        os.close(open_tap("probe-tap"))


def _requests(kind: str) -> list[Request]:
    if kind in _PARAMETERS_BY_KIND:
        tree = qdiscs.compile_tree(
            _PARAMETERS_BY_KIND[kind], shaper="tbf" if kind == "tbf" else "htb"
        )
        return [request for _, request in qdiscs.requests(tree, _LOOPBACK_INDEX, "lo")]
    message = ifinfmsg()
    message["attrs"] = [
        ("IFLA_IFNAME", f"probe-{kind}"),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", kind)]}),
    ]
    return [encode(message, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, f"interface of kind {kind}")]


if __name__ == "__main__":
    print(" ".join(missing_kinds(sys.argv[1:])))
