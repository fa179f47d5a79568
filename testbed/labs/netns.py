"""The rootless lab: every host a network namespace, joined by a bridge in a namespace of its own.

It lives inside private user, network, mount and PID namespaces, its sandbox (``sandbox_command``),
so it needs no root, touches nothing on the machine, and whatever way its first process dies the
kernel removes it all.
"""

import ipaddress
import os
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from socket import AF_INET, AF_INET6
from types import MappingProxyType, TracebackType
from typing import Self

from pyroute2.netlink import NLM_F_CREATE, NLM_F_EXCL
from pyroute2.netlink.rtnl import RTM_NEWADDR, RTM_NEWLINK
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from testbed.clock import HERE
from testbed.labs.base import LabError, LabPlan, Process, View, make_shaper
from testbed.labs.cgroups import host_groups, remove_group
from testbed.labs.confine import ENVIRONMENT, Confinement
from testbed.labs.forkserver import ForkServer
from testbed.links.delayline import DelayLine, DelayLineDied
from testbed.links.neighbours import forwarding, mac_of, neighbour
from testbed.links.netlink import (
    NetlinkSocket,
    Request,
    back_to_own_namespace,
    encode,
    setns,
    unshare_network,
)
from testbed.links.qdiscs import UNCUT_PACKET_BYTES, gso_limits
from testbed.links.routes import tcp_route
from testbed.links.shaper import Port, set_port
from testbed.links.tap import open_tap
from testbed.recording.recorder import LocalRecorder, Recorder, Recording

INTERFACE = "eth0"
_NETWORKS = {4: ipaddress.ip_network("10.77.0.0/16"), 6: ipaddress.ip_network("fd77::/64")}
_LOOPBACK_INDEX, _ETH0_INDEX, _BRIDGE_INDEX = 1, 2, 2
_IFF_UP, _IFA_F_NODAD = 1, 2
_NOBODY = 65534
_NEW = NLM_F_CREATE | NLM_F_EXCL


def sandbox_command() -> list[str]:
    """The command prefix that runs a program in fresh private namespaces; raises LabError with the
    mend."""
    if shutil.which("unshare") is None:
        raise LabError(
            "the program unshare is missing; install it with: apt-get install util-linux (or dnf"
            " install util-linux)"
        )
    private = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    rootless = ["unshare", "--user", "--map-root-user", *private]
    attempts = [rootless]
    # without a user namespace the delay line may ask for the processor at once (SCHED_FIFO)
    if os.geteuid() == 0:
        attempts.insert(0, ["unshare", *private])
    reason = ""
    for prefix in attempts:
        done = subprocess.run(
            [*prefix, "true"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        if done.returncode == 0:
            return prefix
        reason = reason or why_it_failed(done)
    raise LabError(
        f"this machine forbids unprivileged user namespaces ({reason}); either allow them "
        "(sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu, "
        "sudo sysctl -w user.max_user_namespaces=10000 elsewhere), "
        "or run it as root with sudo, or use Docker: docker compose up experiment"
    )


def why_it_failed(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line of what a program wrote to standard error, or its exit code if it wrote
    nothing."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _user_of(view: View) -> tuple[int, int] | None:
    """As root: in whose closed home, or other directory, the run lies. Without capabilities root
    may not enter it, either.

    None: who the caller is. In a user namespace all owners but the caller are nobody
    (user_namespaces(7)).
    """
    if os.geteuid() != 0:
        return None
    closed = (
        one for one in map(Path.stat, view.root.resolve().parents) if not one.st_mode & stat.S_IXOTH
    )
    return next(
        ((one.st_uid, one.st_gid) for one in closed if one.st_uid not in (0, _NOBODY)), None
    )


def _resolved(paths: Sequence[Path]) -> list[str]:
    return [str(path.resolve()) for path in paths]


class NetnsHost:
    """A network namespace with loopback and one interface (``labs.base.Host``)."""

    interface = INTERFACE
    clock = HERE

    def __init__(
        self,
        name: str,
        address: str,
        mac: str,
        namespace: int,
        socket: NetlinkSocket,
        server: ForkServer,
        plan: LabPlan,
        groups: Sequence[Path],
    ) -> None:
        self.name = name
        self._view, self._folders = plan.view, plan.folders
        self.address = address
        self.mac = mac
        self.namespace = namespace
        self.socket = socket
        self._server = server
        self.groups = groups
        self._processes: list[Process] = []

    @property
    def nsenter_target(self) -> Mapping[str, int | str]:
        return {"namespace": self.namespace}

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
        confined = None
        if view := self._view:
            reads, writes = (*view.reads, *self._folders), (view.shared, *view.own[self.name])
            user = _user_of(view)
            if user:
                for path in writes:
                    os.chown(path, *user)
            confined = Confinement(
                str(view.root.resolve()), _resolved(reads), _resolved(writes), user
            )
            env = {**ENVIRONMENT, **env}
        process = self._server.start(argv, env, log, self.namespace, confined, self.groups)
        self._processes.append(process)
        return process

    def path_on_host(self, path: Path) -> str:
        return str(path.resolve())

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        os.close(self.namespace)


class NetnsLab:
    """Hosts and links in namespaces of the calling process (``labs.base.Lab``).

    Sockets and namespaces are held by descriptors alone: closing them, or dying, is the whole
    teardown, but for control groups.

    groups: from ``cgroups.groups_of_run``, if the plan has limits.
    """

    shared_files = True

    def __init__(
        self, plan: LabPlan, server: ForkServer, groups: Mapping[str, Path] = MappingProxyType({})
    ) -> None:
        self._plan = plan
        self._server = server
        self._groups = groups
        self._switches: dict[str, _Switch] = {}
        self.hosts: dict[str, NetnsHost] = {}
        self._tap_pairs: dict[str, tuple[int, int]] = {}
        self._taps: list[int] = []
        self._line = ExitStack()
        self.links = make_shaper(plan)

    def __enter__(self) -> Self:
        self._server.revive()
        try:
            with back_to_own_namespace():
                for name in self._plan.hosts_by_switch:
                    self._switches[name] = _Switch(*_new_namespace())
                addresses = _NETWORKS[self._plan.ip].hosts()
                for number, (name, address) in enumerate(
                    zip(self._plan.hosts, addresses, strict=False), 1
                ):
                    namespace, socket = _new_namespace(ipv6=self._plan.ip == 6)
                    groups = host_groups(self._groups, name, self._plan.limits)
                    self.hosts[name] = NetnsHost(
                        name,
                        str(address),
                        mac_of(number),
                        namespace,
                        socket,
                        self._server,
                        self._plan,
                        groups,
                    )
            for switch, hosts in self._plan.hosts_by_switch.items():
                self._wire_hosts(self._switches[switch], [self.hosts[name] for name in hosts])
            self._wire_trunks()
            self._introduce()
            if self._tap_pairs:
                self._taps.clear()  # they are the line's now
                self.links.line = self._line.enter_context(DelayLine(self._tap_pairs))
            self.links.apply(self._plan.links)
        except BaseException as error:
            self._close()
            # a delay line that has died may live the next time
            if isinstance(error, OSError) and not isinstance(error, DelayLineDied):
                raise LabError(f"the lab cannot be made: {error}") from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def recorder(self, recording: Recording) -> Recorder:
        return LocalRecorder(recording, self.links, self.hosts)

    def _wire_hosts(self, switch: "_Switch", hosts: Sequence[NetnsHost]) -> None:
        # Interface indices are chosen by us, so nothing has to be looked up and each namespace
        # takes one batch.
        mtu = self._plan.mtu
        requests = [_link("bridge", _BRIDGE_INDEX, "br0", kind="bridge", up=True)]
        for host in hosts:
            port = switch.next_port()
            if host.name in self._plan.lined:
                self._tap_pairs[host.name] = (
                    self._tap(host.namespace, INTERFACE, _ETH0_INDEX),
                    self._tap(switch.namespace, host.name, port),
                )
            else:
                requests.append(_veth(host.name, port, INTERFACE, _ETH0_INDEX, host.namespace))
            requests.append(_link("port", port, host.name, master=_BRIDGE_INDEX, mtu=mtu, up=True))
            self.links.add(
                host.name,
                up=Port(host.socket, _ETH0_INDEX, INTERFACE),
                down=Port(switch.socket, port, host.name),
            )
            switch.ports[host.name] = port
        switch.socket.batch(requests)
        for host in hosts:
            largest = self._plan.max_gso_bytes.get(host.name, UNCUT_PACKET_BYTES)
            host.socket.batch(
                [
                    _link("loopback", _LOOPBACK_INDEX, "lo", up=True),
                    # An interface that is up keeps its MAC.
                    _link(
                        "interface",
                        _ETH0_INDEX,
                        INTERFACE,
                        mac=host.mac,
                        mtu=mtu,
                        gso=gso_limits(largest, mtu),
                    ),
                    _link("interface", _ETH0_INDEX, INTERFACE, up=True),
                    _address(host.address),
                    tcp_route(
                        _ETH0_INDEX,
                        host.address,
                        _NETWORKS[self._plan.ip].prefixlen,
                        self._plan.tcp,
                    ),
                ]
            )

    def _wire_trunks(self) -> None:
        for number, (name, ends) in enumerate(self._plan.trunks.items()):
            first, second = (self._switches[end] for end in ends)
            ports = first.next_port(), second.next_port()
            interface = f"trunk{number}"
            if name in self._plan.lined:
                self._tap_pairs[name] = (
                    self._tap(first.namespace, interface, ports[0]),
                    self._tap(second.namespace, interface, ports[1]),
                )
            else:
                first.socket.batch(
                    [_veth(interface, ports[0], interface, ports[1], second.namespace)]
                )
            for switch, port, far in zip((first, second), ports, reversed(ends), strict=True):
                switch.socket.batch(
                    [
                        _link(
                            "trunk",
                            port,
                            interface,
                            master=_BRIDGE_INDEX,
                            mtu=self._plan.mtu,
                            up=True,
                        ),
                        set_port(port, f"trunk {name}", "IFLA_BRPORT_ISOLATED", 1),
                    ]
                )
                switch.ports |= dict.fromkeys(self._plan.hosts_by_switch[far], port)
            self.links.add(
                name,
                up=Port(first.socket, ports[0], interface),
                down=Port(second.socket, ports[1], interface),
            )

    def _tap(self, namespace: int, name: str, index: int) -> int:
        with back_to_own_namespace():
            setns(namespace)
            self._taps.append(open_tap(name, index))
        return self._taps[-1]

    def _introduce(self) -> None:
        """Tell every host where the others are, and every switch behind which port."""
        for host in self.hosts.values():
            others = [other for other in self.hosts.values() if other is not host]
            host.socket.batch(neighbour(_ETH0_INDEX, other.address, other.mac) for other in others)
        for switch in self._switches.values():
            switch.socket.batch(
                forwarding(port, self.hosts[name].mac) for name, port in switch.ports.items()
            )

    def _close(self) -> None:
        self._line.close()
        for tap in self._taps:
            os.close(tap)
        self._taps.clear()
        ends: list[NetnsHost | _Switch] = [*self.hosts.values(), *self._switches.values()]
        for end in ends:
            end.close()
            end.socket.close()
        if self.hosts:
            self._server.end_all()
        for host in self.hosts.values():
            for group in host.groups:
                remove_group(group)
        self.hosts.clear()
        self._switches.clear()


class _Switch:
    """A namespace with a bridge."""

    def __init__(self, namespace: int, socket: NetlinkSocket) -> None:
        self.namespace = namespace
        self.socket = socket
        self.ports: dict[str, int] = {}
        """By host, the port behind which it is."""
        self._ports = 0

    def next_port(self) -> int:
        """A fresh interface index."""
        self._ports += 1
        return _BRIDGE_INDEX + self._ports

    def close(self) -> None:
        os.close(self.namespace)


_QUIET_IPV6 = {
    "accept_dad": 0,
    "accept_ra": 0,
    "addr_gen_mode": 1,
    "autoconf": 0,
    "router_solicitations": 0,
}
"""An address that is given is used at once, none is made up, and no router is looked for
(ip-sysctl.rst)."""


def _new_namespace(ipv6: bool = False) -> tuple[int, NetlinkSocket]:
    """Descriptor and socket of a fresh network namespace; the calling thread is left inside it."""
    unshare_network()
    # IPv6 would add multicast chatter to the counters of every link.
    for name, value in (_QUIET_IPV6 if ipv6 else {"disable_ipv6": 1}).items():
        for scope in ("all", "default"):
            try:
                Path(f"/proc/sys/net/ipv6/conf/{scope}/{name}").write_text(str(value))
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
    mac: str | None = None,
    mtu: int | None = None,
    gso: tuple[int, int] | None = None,
) -> Request:
    message = ifinfmsg()
    message["index"] = index
    if up:
        message["flags"] = message["change"] = _IFF_UP
    attrs: list[tuple[str, object]] = [("IFLA_IFNAME", name)] if kind else []
    if kind:
        # Without snooping a bridge joins no group, and sends no reports that would be counted on
        # every link.
        quiet = {"attrs": [("IFLA_BR_MCAST_SNOOPING", 0)]}
        attrs.append(
            ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", kind), ("IFLA_INFO_DATA", quiet)]})
        )
    if master is not None:
        attrs.append(("IFLA_MASTER", master))
    if mac is not None:
        attrs.append(("IFLA_ADDRESS", mac))
    if mtu is not None:
        attrs.append(("IFLA_MTU", mtu))
    if gso is not None:
        attrs += [("IFLA_GSO_MAX_SIZE", gso[0]), ("IFLA_GSO_MAX_SEGS", gso[1])]
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
            {
                "attrs": [
                    ("IFLA_INFO_KIND", "veth"),
                    ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]}),
                ]
            },
        ),
    ]
    return encode(message, RTM_NEWLINK, _NEW, f"veth pair of {name}")


def _address(address: str) -> Request:
    network = _NETWORKS[ipaddress.ip_address(address).version]
    message = ifaddrmsg()
    message["family"] = AF_INET if network.version == 4 else AF_INET6
    message["prefixlen"] = network.prefixlen
    message["index"] = _ETH0_INDEX
    # Without looking for duplicates first (IFA_F_NODAD), or an IPv6 address could not be used yet.
    more = (
        ("IFA_BROADCAST", str(network.broadcast_address))
        if network.version == 4
        else ("IFA_FLAGS", _IFA_F_NODAD)
    )
    message["attrs"] = [("IFA_ADDRESS", address), ("IFA_LOCAL", address), more]
    return encode(message, RTM_NEWADDR, _NEW, f"address {address}")
