"""The rootless lab: every host a network namespace, joined by a bridge in a namespace of its own.

It lives inside private user, network, mount and PID namespaces (``enclosure`` gives the command), so it needs no root, touches
nothing on the machine, and whatever way its first process dies the kernel removes it all.
"""

import ipaddress
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pyroute2.netlink import NLM_F_CREATE, NLM_F_EXCL
from pyroute2.netlink.rtnl import RTM_NEWADDR, RTM_NEWLINK
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from testbed.labs.base import LabError, LabPlan, Process
from testbed.labs.forkserver import ForkServer
from testbed.links.netlink import NetlinkSocket, Request, back_to_own_namespace, encode, unshare_network
from testbed.links.qdiscs import gso_max_size
from testbed.links.routes import tcp_route
from testbed.links.shaper import Port, Shaper, set_port

INTERFACE = "eth0"
_NETWORK = ipaddress.ip_network("10.77.0.0/16")
_LOOPBACK_INDEX, _ETH0_INDEX, _BRIDGE_INDEX = 1, 2, 2
_IFF_UP = 1
_NEW = NLM_F_CREATE | NLM_F_EXCL


def enclosure() -> list[str]:
    """The command prefix that runs a program in fresh private namespaces; raises LabError with the mend."""
    if shutil.which("unshare") is None:
        raise LabError(
            "the program unshare is missing; install it with: apt-get install util-linux (or dnf install util-linux)"
        )
    private = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    rootless = ["unshare", "--user", "--map-root-user", *private]
    attempts = [rootless]
    if os.geteuid() == 0:
        attempts.append(["unshare", *private])
    elif shutil.which("sudo"):
        attempts.append(["sudo", "--non-interactive", "--preserve-env", "unshare", *private])
    reason = ""
    for prefix in attempts:
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode == 0:
            return prefix
        reason = reason or why_it_failed(done)
    raise LabError(
        f"this machine forbids unprivileged user namespaces ({reason}); either allow them "
        "(sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu, "
        "sudo sysctl -w user.max_user_namespaces=10000 elsewhere), "
        "or refresh sudo with: sudo -v, or use Docker: docker compose up experiment"
    )


def why_it_failed(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line of what a program wrote to standard error, or its exit code if it wrote nothing."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


class NetnsHost:
    """A network namespace with loopback and one interface (``labs.base.Host``)."""

    interface = INTERFACE

    def __init__(self, name: str, address: str, namespace: int, socket: NetlinkSocket, server: ForkServer) -> None:
        self.name = name
        self.address = address
        self.namespace = namespace
        self.socket = socket
        self._server = server
        self._processes: list[Process] = []

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
        process = self._server.start(argv, env, log, self.namespace)
        self._processes.append(process)
        return process

    def seen(self, path: Path) -> str:
        return str(path.resolve())

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        os.close(self.namespace)


class NetnsLab:
    """Hosts and links in namespaces of the calling process (``labs.base.Lab``).

    Sockets and namespaces are held by descriptors alone: closing them, or dying, is the whole teardown.
    """

    def __init__(self, plan: LabPlan, server: ForkServer) -> None:
        self._plan = plan
        self._server = server
        self._switches: dict[str, _Switch] = {}
        self.hosts: dict[str, NetnsHost] = {}
        self.links = Shaper(plan.impaired, plan.packet_bytes, plan.seed)

    def __enter__(self) -> Self:
        try:
            with back_to_own_namespace():
                for name in self._plan.hosts_by_switch:
                    self._switches[name] = _Switch(*_new_namespace())
                addresses = _NETWORK.hosts()
                for name in self._plan.hosts:
                    namespace, socket = _new_namespace()
                    self.hosts[name] = NetnsHost(name, str(next(addresses)), namespace, socket, self._server)
            for switch, hosts in self._plan.hosts_by_switch.items():
                self._wire_hosts(self._switches[switch], [self.hosts[name] for name in hosts])
            self._wire_trunks()
            self.links.apply(self._plan.links)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    @property
    def pids(self) -> tuple[int, ...]:
        return ()

    def _wire_hosts(self, switch: "_Switch", hosts: Sequence[NetnsHost]) -> None:
        # Interface indices are chosen by us, so nothing has to be looked up and each namespace takes one batch.
        requests = [_link("bridge", _BRIDGE_INDEX, "br0", kind="bridge", up=True)]
        for host in hosts:
            port = switch.next_port()
            requests.append(_veth(host.name, port, INTERFACE, _ETH0_INDEX, host.namespace))
            requests.append(_link("port", port, host.name, master=_BRIDGE_INDEX, up=True))
            self.links.add(
                host.name,
                up=Port(host.socket, _ETH0_INDEX, INTERFACE),
                down=Port(switch.socket, port, host.name),
            )
        switch.socket.batch(requests)
        for host in hosts:
            host.socket.batch(
                [
                    _link("loopback", _LOOPBACK_INDEX, "lo", up=True),
                    _address(host.address),
                    _link("interface", _ETH0_INDEX, INTERFACE, up=True, gso_max=gso_max_size(self._plan.packet_bytes)),
                    tcp_route(_ETH0_INDEX, host.address, _NETWORK.prefixlen, self._plan.tcp),
                ]
            )

    def _wire_trunks(self) -> None:
        for number, (name, ends) in enumerate(self._plan.trunks.items()):
            first, second = (self._switches[end] for end in ends)
            ports = first.next_port(), second.next_port()
            interface = f"trunk{number}"
            first.socket.batch([_veth(interface, ports[0], interface, ports[1], second.namespace)])
            for switch, port in zip((first, second), ports, strict=True):
                switch.socket.batch(
                    [
                        _link("trunk", port, interface, master=_BRIDGE_INDEX, up=True),
                        set_port(port, f"trunk {name}", "IFLA_BRPORT_ISOLATED", 1),
                    ]
                )
            self.links.add(
                name,
                up=Port(first.socket, ports[0], interface),
                down=Port(second.socket, ports[1], interface),
            )

    def _close(self) -> None:
        ends: list[NetnsHost | _Switch] = [*self.hosts.values(), *self._switches.values()]
        for end in ends:
            end.close()
        NetlinkSocket.close_all([end.socket for end in ends])
        self.hosts.clear()
        self._switches.clear()


class _Switch:
    """A namespace with a bridge."""

    def __init__(self, namespace: int, socket: NetlinkSocket) -> None:
        self.namespace = namespace
        self.socket = socket
        self._ports = 0

    def next_port(self) -> int:
        """A fresh interface index."""
        self._ports += 1
        return _BRIDGE_INDEX + self._ports

    def close(self) -> None:
        os.close(self.namespace)


def _new_namespace() -> tuple[int, NetlinkSocket]:
    """Descriptor and socket of a fresh network namespace; the calling thread is left inside it."""
    unshare_network()
    # IPv6 would add multicast chatter to the counters of every link.
    for scope in ("all", "default"):
        setting = Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6")
        try:
            setting.write_text("1")
        except OSError:
            pass  # a kernel without IPv6
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), NetlinkSocket()


def _link(
    what: str,
    index: int,
    name: str,
    *,
    kind: str | None = None,
    master: int | None = None,
    up: bool = False,
    gso_max: int | None = None,
) -> Request:
    message = ifinfmsg()
    message["index"] = index
    if up:
        message["flags"] = message["change"] = _IFF_UP
    attrs: list[tuple[str, object]] = [("IFLA_IFNAME", name)] if kind else []
    if kind:
        # Without snooping a bridge joins no group, and sends no reports that would be counted on every link.
        quiet = {"attrs": [("IFLA_BR_MCAST_SNOOPING", 0)]}
        attrs.append(("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", kind), ("IFLA_INFO_DATA", quiet)]}))
    if master is not None:
        attrs.append(("IFLA_MASTER", master))
    if gso_max is not None:
        attrs.append(("IFLA_GSO_MAX_SIZE", gso_max))
    message["attrs"] = attrs
    return encode(message, RTM_NEWLINK, _NEW if kind else 0, f"{what} {name}")


def _veth(name: str, index: int, peer_name: str, peer_index: int, peer_namespace: int) -> Request:
    peer = {
        "index": peer_index,
        "attrs": [("IFLA_IFNAME", peer_name), ("IFLA_NET_NS_FD", peer_namespace)],
    }
    message = ifinfmsg()
    message["index"] = index
    message["attrs"] = [
        ("IFLA_IFNAME", name),
        (
            "IFLA_LINKINFO",
            {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]})]},
        ),
    ]
    return encode(message, RTM_NEWLINK, _NEW, f"cable of {name}")


def _address(address: str) -> Request:
    message = ifaddrmsg()
    message["family"] = 2  # AF_INET
    message["prefixlen"] = _NETWORK.prefixlen
    message["index"] = _ETH0_INDEX
    message["attrs"] = [
        ("IFA_ADDRESS", address),
        ("IFA_LOCAL", address),
        ("IFA_BROADCAST", str(_NETWORK.broadcast_address)),
    ]
    return encode(message, RTM_NEWADDR, _NEW, f"address {address}")
