"""A node's part of a lab over a swarm: hosts are containers of Docker's, found by their addresses,
shaped from outside.

The agent runs in a container itself and has no say over Docker. What it has is the directory in
which Docker keeps a file for each network namespace of the node. In one of them is the host's
interface; its other end is in the namespace of the overlay network, at the bridge that leads to the
containers beside it and, through VXLAN, to those on other nodes.

    worker: eth0 (up) ── veth (down), br0, vxlan0 ── the nodes' own network

The first process of each container (``labs.container_init``) listens in there. When the agent hangs
up, it ends.
"""

import contextlib
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from pyroute2.netlink.rtnl import RTM_GETADDR, RTM_GETNEIGH
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg

from testbed import protocol
from testbed.clock import HERE
from testbed.files import everything_in
from testbed.labs.base import LabError, LabPlan, make_shaper
from testbed.labs.containers import (
    DOCKER,
    INIT_SOCKET,
    ContainerProcess,
    InitConnection,
    change_interface,
    interfaces,
)
from testbed.links.neighbours import forwarding, neighbour
from testbed.links.netlink import NetlinkSocket, back_to_own_namespace, decode, encode, setns
from testbed.links.qdiscs import UNCUT_PACKET_BYTES, gso_limits
from testbed.links.routes import tcp_route
from testbed.links.shaper import Port

NAMESPACES = DOCKER / "netns"
_OVERLAY = "1-"
"""What the name of an overlay network's namespace begins with; the beginning of the network's id
follows."""
_PATIENCE_S = 15.0
"""So long the hosts have to find each other: Docker tells the nodes of each other's containers when
it gets to it."""
_CONNECT_S = 10.0
_FIRST_PAUSE_S, _PAUSE_S = 0.01, 0.3
_CLOSED_PORT = 9


class ContainerHost:
    """A container of this node (``labs.base.Host``)."""

    clock = HERE

    def __init__(
        self, name: str, address: str, namespace: int, interface: ifinfmsg, sock: NetlinkSocket
    ) -> None:
        self.name, self.address, self.socket = name, address, sock
        self.interface, self.index = interface.get_attr("IFLA_IFNAME"), interface["index"]
        self.mac = interface.get_attr("IFLA_ADDRESS")
        self.namespace = os.dup(namespace)
        self._init: InitConnection | None = None
        self._root, self._directory = PurePosixPath(), Path()
        self._counter = -1
        self._usage_s = 0.0

    @property
    def nsenter_target(self) -> Mapping[str, int | str]:
        return {}

    def open_socket(self, family: int, kind: int) -> socket.socket:
        """A socket in the host's network namespace."""
        with back_to_own_namespace():
            setns(self.namespace)
            return socket.socket(family, kind | socket.SOCK_CLOEXEC)

    def connect(self, directory: Path) -> None:
        """Connect to the init, and give it the directory. Raises OSError, LookupError or
        ValueError."""
        channel = self.open_socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel.settimeout(_CONNECT_S)
        given_up_s = time.monotonic() + _CONNECT_S
        while True:
            try:
                channel.connect("\0" + INIT_SOCKET[1:])
                break
            except ConnectionRefusedError:
                # a container begins before its first process has come so far
                if time.monotonic() > given_up_s:
                    raise
                time.sleep(0.05)
        told, descriptors, _, _ = socket.recv_fds(channel, 4096, 1)
        if protocol.decode_message(told).get("host") != self.name:
            raise ValueError(f"another program than the one of {self.name} answers there")
        self._counter = descriptors[0] if descriptors else -1
        own = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            socket.send_fds(channel, [protocol.encode_message({"directory": True})], [own])
        finally:
            os.close(own)
        number = int(protocol.decode_message(channel.recv(4096))["directory"])
        self._root, self._directory = PurePosixPath(f"/proc/1/fd/{number}"), directory
        channel.settimeout(None)
        self._init = InitConnection(channel)

    @property
    def usage_s(self) -> float:
        """Processor seconds that all programs of the container have used; 0 if the kernel does not
        count them."""
        if self._counter < 0:
            return 0.0
        try:
            fields = os.pread(self._counter, 256, 0).decode().split()
        except OSError:  # the container has ended: its last value stays
            return self._usage_s
        self._usage_s = int(fields[1]) / 1e6 if fields[0] == "usage_usec" else int(fields[0]) / 1e9
        return self._usage_s

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> ContainerProcess:
        assert self._init is not None
        return self._init.start(argv, env, log)

    def path_on_host(self, path: Path) -> str:
        return str(self._root / path.relative_to(self._directory))

    def close(self) -> None:
        if self._init is not None:
            self._init.close()
        if self._counter >= 0:
            os.close(self._counter)
        self.socket.close()
        os.close(self.namespace)


class ContainerNodeLab:
    """This node's hosts and links (``agent.program.NodeLab``).

    plan: with the links of this node's hosts. details: of each of these, ``address`` with its
    prefix, ``overlay``, the id of the network, ``user``, as whom its programs run, ``others``, the
    addresses of all other hosts of the lab by name, and what its programs write, ``own`` and
    ``shared``, as paths in the run directory. directory: stands for that here.
    """

    def __init__(
        self, plan: LabPlan, details: Mapping[str, Mapping[str, Any]], directory: Path
    ) -> None:
        self._plan, self._details, self._directory = plan, details, directory
        self._overlay: NetlinkSocket | None = None
        self._running = ExitStack()
        self.hosts: dict[str, ContainerHost] = {}
        self.links = make_shaper(plan)

    @property
    def usage_s(self) -> float:
        """Processor seconds that programs on the hosts have used so far."""
        return sum(host.usage_s for host in self.hosts.values())

    def __enter__(self) -> Self:
        try:
            if self._details:
                self._attach()
                self._introduce()
                self._hand_over()
                self.links.apply(self._plan.links)
                # What the agent writes from now on, logs and records, is not for the programs.
                self._running.callback(os.umask, os.umask(0o077))
        except BaseException as error:
            self._close()
            if isinstance(error, OSError | ValueError):
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

    def _attach(self) -> None:
        """Find the hosts, and the other ends of their veth pairs."""
        overlay_id = next(iter(self._details.values()))["overlay"]
        overlay = next(
            (
                path
                for path in NAMESPACES.glob(f"{_OVERLAY}*")
                if overlay_id.startswith(path.name[2:])
            ),
            None,
        )
        if overlay is None:
            raise LabError(
                f"Docker has no namespace of the overlay network {overlay_id[:12]} in {NAMESPACES}"
            )
        self._overlay = NetlinkSocket.in_namespace(str(overlay))
        ports = {link["index"]: link for link in interfaces(self._overlay)}
        found = dict(_namespaces())
        try:
            for name, more in self._details.items():
                address, _, prefix_bits = more["address"].partition("/")
                if address not in found:
                    raise LabError(
                        f"there is no container with the address {address} of {name} here"
                    )
                host = self._wire(name, address, int(prefix_bits), found[address], ports)
                try:
                    host.connect(self._directory)
                except (OSError, LookupError, ValueError) as error:
                    raise LabError(f"the container of {name} does not answer: {error}") from None
        finally:
            for descriptor in set(found.values()):
                os.close(descriptor)

    def _wire(
        self,
        name: str,
        address: str,
        prefix_bits: int,
        namespace: int,
        ports: Mapping[int, ifinfmsg],
    ) -> ContainerHost:
        assert self._overlay is not None
        inner = NetlinkSocket.in_namespace(namespace)
        index = next(index for one, index in _addresses(inner) if one == address)
        mine = next(link for link in interfaces(inner) if link["index"] == index)
        host = self.hosts[name] = ContainerHost(name, address, namespace, mine, inner)
        peer = ports.get(mine.get_attr("IFLA_LINK"))
        # Indices mean other interfaces in other namespaces, so both ends have to name each other.
        if peer is None or peer.get_attr("IFLA_LINK") != index or not peer.get_attr("IFLA_MASTER"):
            raise LabError(f"the veth pair of {name} does not lead into the overlay network")
        if {mine.get_attr("IFLA_QDISC"), peer.get_attr("IFLA_QDISC")} != {"noqueue"}:
            raise LabError(f"something else shapes the link of {name}; end that first")
        if mine.get_attr("IFLA_MTU") != self._plan.mtu:
            raise LabError(
                f"the interface of {name} has an MTU of {mine.get_attr('IFLA_MTU')} instead of"
                f" {self._plan.mtu}"
            )
        up = Port(inner, index, host.interface)
        down = Port(self._overlay, peer["index"], peer.get_attr("IFLA_IFNAME"))
        gso_bytes, gso_segments = gso_limits(
            self._plan.max_gso_bytes.get(name, UNCUT_PACKET_BYTES), self._plan.mtu
        )
        limits = ("IFLA_GSO_MAX_SIZE", gso_bytes), ("IFLA_GSO_MAX_SEGS", gso_segments)
        inner.batch(
            [
                change_interface(up, "largest packet", *limits),
                tcp_route(index, address, prefix_bits, self._plan.tcp),
            ]
        )
        self._overlay.batch([forwarding(down.ifindex, host.mac)])
        self.links.add(name, up=up, down=down)
        return host

    def _introduce(self) -> None:
        """Have each host know the MACs of all others for good, and wait until it reaches them.

        Docker keeps those of other nodes' containers in the overlay's namespace; what it has not
        heard of yet, hosts ask for.
        """
        assert self._overlay is not None
        macs = {
            **_neighbours(self._overlay),
            **{host.address: host.mac for host in self.hosts.values()},
        }
        for name, host in self.hosts.items():
            others = self._details[name]["others"].values()
            host.socket.batch(
                neighbour(host.index, other, macs[other]) for other in others if other in macs
            )
        self._wait_until_reached()
        for name, host in self.hosts.items():
            asked = _neighbours(host.socket)
            others = self._details[name]["others"].values()
            host.socket.batch(
                neighbour(host.index, other, asked[other]) for other in others if other not in macs
            )

    def _wait_until_reached(self) -> None:
        """Until each host reaches all others. Raises LabError.

        That is asked with a datagram to a port where nobody listens: the other's kernel answers
        that it is closed.
        """
        given_up_s = time.monotonic() + _PATIENCE_S
        waiting: dict[tuple[str, str], socket.socket] = {}
        try:
            for name, host in self.hosts.items():
                for other, address in self._details[name]["others"].items():
                    question = waiting[name, other] = host.open_socket(
                        socket.AF_INET, socket.SOCK_DGRAM
                    )
                    question.setblocking(False)
                    question.connect((address, _CLOSED_PORT))
            pause_s = _FIRST_PAUSE_S
            while waiting:
                for question in waiting.values():
                    with contextlib.suppress(OSError):
                        question.send(b"\0")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S)
                for pair in [pair for pair, question in waiting.items() if _is_answered(question)]:
                    waiting.pop(pair).close()
                if waiting and time.monotonic() > given_up_s:
                    name, other = next(iter(waiting))
                    raise LabError(
                        f"{name} does not reach {other} over the overlay network; the nodes need"
                        " udp 4789, and tcp and udp 7946, open between them"
                    )
        finally:
            for question in waiting.values():
                question.close()

    def _hand_over(self) -> None:
        """Give the programs of each host, which run as a user of their own, what they alone may
        write."""
        for name in self.hosts:
            user = self._details[name]["user"]
            (self._directory / self._details[name]["shared"]).chmod(0o1777)
            for found in self._details[name]["own"]:
                for path in everything_in(self._directory / found):
                    os.chown(path, user, user, follow_symlinks=False)
                    if stat.S_ISDIR(path.lstat().st_mode):
                        path.chmod(0o700)

    def _close(self) -> None:
        self._running.close()
        for host in self.hosts.values():
            host.close()
        self.hosts.clear()
        if self._overlay is not None:
            self._overlay.close()
            self._overlay = None


def _namespaces() -> Iterator[tuple[str, int]]:
    """Addresses of containers, and descriptors of the network namespaces that have them."""
    for path in NAMESPACES.iterdir():
        try:
            int(path.name, 16)  # a container's; those of networks have other names
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError):
            continue
        try:
            with contextlib.closing(NetlinkSocket.in_namespace(descriptor)) as sock:
                addresses = list(_addresses(sock))
        except OSError:  # its container has just ended
            os.close(descriptor)
            continue
        if not addresses:
            os.close(descriptor)
        for address, _ in addresses:
            yield address, descriptor


def _addresses(sock: NetlinkSocket) -> Iterator[tuple[str, int]]:
    """IPv4 addresses in a namespace but loopback's, and the index of each one's interface."""
    question = ifaddrmsg()
    question["family"] = socket.AF_INET
    for answer in sock.dump(encode(question, RTM_GETADDR, 0, "list addresses")):
        found = decode(answer, ifaddrmsg)
        address = found.get_attr("IFA_LOCAL") or found.get_attr("IFA_ADDRESS")
        if not address.startswith("127."):
            yield address, found["index"]


def _neighbours(sock: NetlinkSocket) -> dict[str, str]:
    """MACs by address, as far as a namespace knows them."""
    question = ndmsg()
    question["family"] = socket.AF_INET
    found = [
        decode(answer, ndmsg)
        for answer in sock.dump(encode(question, RTM_GETNEIGH, 0, "list neighbours"))
    ]
    return {
        one.get_attr("NDA_DST"): one.get_attr("NDA_LLADDR")
        for one in found
        if one.get_attr("NDA_LLADDR")
    }


def _is_answered(question: socket.socket) -> bool:
    try:
        question.recv(16)
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False
