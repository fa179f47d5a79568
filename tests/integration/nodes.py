"""Nodes for tests of a lab over several machines: network namespaces of this one, each with an
agent, and its hosts below it.

    nodes' own network   a bridge, 10.90.0.254 here, 10.90.0.<n> on node n<n>
    links of the lab     a bridge of each node, with a port for each of its hosts and one to a bridge that joins them all

The caller is inside ``testbed.labs.netns.sandbox_command``: with its first process everything here
ends.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testbed.labs.base import LabPlan, make_shaper
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import INTERFACE, NetnsHost, _address, _link, _new_namespace, _veth
from testbed.links.neighbours import mac_of
from testbed.links.netlink import NetlinkSocket, back_to_own_namespace
from testbed.links.routes import tcp_route
from testbed.links.shaper import Port

HERE = "10.90.0.254"
_FIRST_PORT = 100


class NodePart:
    """A node's part of a lab (``testbed.agent.program.NodeLab``). details: by host, {"number": of
    its address}."""

    usage_s = 0.0

    def __init__(
        self, plan: LabPlan, details: Mapping[str, Mapping[str, Any]], directory: Path
    ) -> None:
        self._plan, self._details = plan, details
        self._held = contextlib.ExitStack()
        self.hosts: dict[str, NetnsHost] = {}
        self.links = make_shaper(plan)

    def __enter__(self) -> Self:
        server = self._held.enter_context(ForkServer(os.environ.get("NODE_PRELOAD", "").split()))
        node = NetlinkSocket()
        bridge = socket.if_nametoindex("br0")
        for port, (name, detail) in enumerate(self._details.items(), _FIRST_PORT):
            address, mac = f"10.77.0.{detail['number']}", mac_of(detail["number"])
            with back_to_own_namespace():
                namespace, inner = _new_namespace()
            self.hosts[name] = NetnsHost(
                name, address, mac, namespace, inner, server, self._plan, groups=()
            )
            self._held.callback(self.hosts[name].close)
            self._held.callback(inner.close)
            node.batch(
                [
                    _veth(name, port, INTERFACE, 2, namespace),
                    _link("port", port, name, master=bridge, mtu=self._plan.mtu, up=True),
                ]
            )
            inner.batch(
                [
                    _link("loopback", 1, "lo", up=True),
                    _link("interface", 2, INTERFACE, mac=mac, mtu=self._plan.mtu),
                    _link("interface", 2, INTERFACE, up=True),
                    _address(address),
                    tcp_route(2, address, 16, self._plan.tcp),
                ]
            )
            self.links.add(name, up=Port(inner, 2, INTERFACE), down=Port(node, port, name))
        self.links.apply(self._plan.links)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()


def make_networks(nodes: int) -> None:
    """The networks of nodes n1, n2, …, as above."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    lines = ["link set lo up"]
    for bridge in ("control", "data"):
        lines += [f"link add {bridge} type bridge mcast_snooping 0", f"link set {bridge} up"]
    lines.append(f"addr add {HERE}/24 dev control")
    _ip(lines)
    for number in range(1, nodes + 1):
        name = f"n{number}"
        _ip([f"netns add {name}"])
        quiet = "for one in all default; do echo 1 >/proc/sys/net/ipv6/conf/$one/disable_ipv6; done"
        subprocess.run(["nsenter", f"--net=/run/netns/{name}", "sh", "-c", quiet], check=True)
        for bridge, inside in (("control", "ctl"), ("data", "up0")):
            outside = f"{bridge}{number}"
            _ip(
                [
                    f"link add {outside} type veth peer name {inside} netns {name}",
                    f"link set {outside} master {bridge} up",
                ]
            )
        inner = ["link set lo up", f"addr add 10.90.0.{number}/24 dev ctl", "link set ctl up"]
        _ip(
            [
                *inner,
                "link add br0 type bridge mcast_snooping 0",
                "link set up0 master br0 up",
                "link set br0 up",
            ],
            name,
        )


def _ip(lines: Sequence[str], namespace: str = "") -> None:
    command = ["ip", *(["-n", namespace] if namespace else []), "-batch", "-"]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)


@contextlib.contextmanager
def agent(
    name: str,
    port: int,
    secret: bytes,
    scratch: Path,
    own_time: Sequence[str] = (),
    program: Sequence[str] = (),
) -> Iterator["subprocess.Popen[str]"]:
    """An agent in the network of node ``name``. own_time: options of unshare(1). program: instead
    of ``-m testbed.agent``."""
    file = scratch / "secret"
    file.write_bytes(secret)
    private = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", *own_time]
    command = [
        "nsenter",
        f"--net=/run/netns/{name}",
        *private,
        sys.executable,
        *(program or ["-m", "testbed.agent"]),
    ]
    command += [f"{HERE}:{port}", "--name", name, "--secret", str(file), "--lab", "nodes:NodePart"]
    command += ["--directory", str(scratch / name)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
