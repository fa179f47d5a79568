"""What shaping this kernel offers, found out by asking it: ``python -m testbed.links.probe KIND…`` prints what is missing.

Runs in a scratch network namespace that ends with the process, so it needs the right to make one and touches nothing.
"""

import errno
import sys
from collections.abc import Iterable

from testbed.links import qdiscs
from testbed.links.netlink import NetlinkError, NetlinkSocket, back_to_own_namespace, unshare_network
from testbed.links.state import Shape

_LOOPBACK_INDEX = 1
_SHAPES = {"tbf": Shape(rate_bps=10**7), "netem": Shape(delay_s=0.001)}


def missing_qdiscs(kinds: Iterable[str]) -> list[str]:
    """Those of the qdisc kinds ("tbf", "netem") that the kernel does not know. Raises OSError without the rights to ask."""
    missing = []
    with back_to_own_namespace():
        unshare_network()
        socket = NetlinkSocket()
        try:
            for kind in kinds:
                tree = qdiscs.compile_tree(_SHAPES[kind])
                try:
                    socket.batch(qdiscs.requests(tree, _LOOPBACK_INDEX, "lo"))
                except NetlinkError as error:
                    if error.errno != errno.ENOENT:
                        raise
                    missing.append(kind)
        finally:
            socket.close()
    return missing


if __name__ == "__main__":
    print(" ".join(missing_qdiscs(sys.argv[1:])))
