"""Apply link states to interfaces, read back what the kernel took, and read its counters.

Thin on purpose: what to send is compiled in ``qdiscs``; this only sends it, one batch per network namespace.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyroute2.netlink import NLA_F_NESTED, NLM_F_ECHO
from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_GETQDISC, RTM_SETLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from netsenseml.agent.protocol import monotonic_s
from testbed.links import qdiscs
from testbed.links.netlink import BATCH, NetlinkSocket, Packed, Request, decode, encode
from testbed.links.qdiscs import QdiscCounters, compile_tree
from testbed.links.state import DIRECTIONS, LinkState, Shape

AF_BRIDGE = 7
BR_STATE_DISABLED, BR_STATE_FORWARDING = 0, 3  # <linux/if_bridge.h>


@dataclass(frozen=True, slots=True)
class Port:
    """An interface whose egress is one direction of a link; the socket sits in the interface's namespace."""

    socket: NetlinkSocket
    ifindex: int
    interface: str


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one change: when its batch was acknowledged, and whether the kernel reports what was asked."""

    applied_s: float
    verified: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """A change of links, encoded; for every socket, what it sends, and the link and qdisc of each request."""

    changes: Mapping[str, LinkState]
    work: Sequence[tuple[NetlinkSocket, Packed, Sequence[tuple[str, qdiscs.Qdisc]]]]


def set_port(ifindex: int, what: str, attribute: str, value: int) -> Request:
    """The request that sets an attribute of a bridge port.

    As ``bridge link set`` does it: the other way, IFLA_INFO_SLAVE_DATA, takes a port state and ignores it.
    """
    message = ifinfmsg()
    message["family"] = AF_BRIDGE
    message["index"] = ifindex
    message["attrs"] = [("IFLA_PROTINFO", {"attrs": [(attribute, value)]}, NLA_F_NESTED)]
    return encode(message, RTM_SETLINK, 0, f"{what}: {attribute} {value}")


class Shaper:
    """All links of a lab. Ports are added once, then states are applied and counters read for many links at a time.

    impaired: (link, direction) that carries netem from the start, because some state of it will need it.
    packet_bytes: wire size of the largest packet that the hosts send (``qdiscs.largest_packet_bytes``).
    seed: of the random impairments.
    """

    def __init__(
        self, impaired: Iterable[tuple[str, str]] = (), packet_bytes: int = qdiscs.UNCUT_PACKET_BYTES, seed: int = 0
    ) -> None:
        self.packet_bytes = packet_bytes
        self.seed = seed
        self._impaired = frozenset(impaired)
        self._changes = 0
        self._ports: dict[tuple[str, str], Port] = {}
        self._states: dict[str, LinkState] = {}

    def add(self, link: str, up: Port, down: Port) -> None:
        """Make a link known by its two egress ports."""
        self._ports[link, "up"] = up
        self._ports[link, "down"] = down

    @property
    def impaired(self) -> frozenset[tuple[str, str]]:
        """(link, direction) that carries netem."""
        return self._impaired

    @property
    def states(self) -> Mapping[str, LinkState]:
        """The state that each link was given last."""
        return self._states

    def apply(self, changes: Mapping[str, LinkState]) -> dict[str, Applied]:
        """Put links into new states; raises NetlinkError if the kernel refuses one."""
        return self.commit(self.prepare(changes))

    def prepare(self, changes: Mapping[str, LinkState]) -> Prepared:
        """Compile and encode a change ahead of its time."""
        work: dict[NetlinkSocket, list[tuple[str, qdiscs.Qdisc, Request]]] = {}
        for link, state in changes.items():
            for direction in DIRECTIONS:
                port = self._ports[link, direction]
                tree = self._tree(link, direction, getattr(state, direction))
                for qdisc, request in zip(tree, qdiscs.requests(tree, port.ifindex, f"{link} {direction}"), strict=True):
                    work.setdefault(port.socket, []).append((link, qdisc, request.with_flags(NLM_F_ECHO)))
        return Prepared(
            changes,
            [
                (socket, socket.pack(request for *_, request in parts), [(link, qdisc) for link, qdisc, _ in parts])
                for socket, parts in work.items()
            ],
        )

    def commit(self, prepared: Prepared) -> dict[str, Applied]:
        """Make a prepared change: first everything is sent, one write a namespace, then the answers are read.

        The kernel echoes each qdisc as it took it; ``verified`` says if that is what was asked.
        """
        changes = prepared.changes
        verified = dict.fromkeys(changes, True)
        done_s = dict.fromkeys(changes, 0.0)
        for socket, packed, parts in prepared.work:
            socket.post(packed)
            now = monotonic_s()
            for link, _ in parts[:BATCH]:
                done_s[link] = max(done_s[link], now)
        for socket, packed, parts in prepared.work:
            replies = socket.collect(packed)
            now = monotonic_s()
            for position, ((link, qdisc), answers) in enumerate(zip(parts, replies, strict=True)):
                verified[link] &= any(qdiscs.same_on_kernel(qdisc, answer) for answer in answers)
                if position >= BATCH:
                    done_s[link] = max(done_s[link], now)
        self._wake(changes)
        for link, state in changes.items():
            before = self._states.get(link)
            if state.connected != (before is None or before.connected):
                verified[link] &= self._connect(link, state.connected)
                done_s[link] = monotonic_s()
        self._states.update(changes)
        return {link: Applied(done_s[link], verified[link]) for link in changes}

    def _wake(self, changes: Mapping[str, LinkState]) -> None:
        """Have the kernel look again where a rate has risen.

        A change gives tbf new tokens, but its timer for the packet that waits stays as the old rate had set it: after some
        seconds at 8 kbit/s a link at 20 Mbit/s stood still for five more. Any frame that is queued makes tbf look at once.
        """
        for link, state in changes.items():
            for direction in DIRECTIONS:
                before = getattr(self._states[link], direction).rate_bps if link in self._states else None
                now = getattr(state, direction).rate_bps
                if before is not None and now is not None and now > before:
                    port = self._ports[link, direction]
                    port.socket.nudge(port.interface)

    def _tree(self, link: str, direction: str, shape: Shape) -> qdiscs.Tree:
        # The seed differs between links, or all would lose the same packets, and between changes, because netem begins its
        # random numbers anew with each.
        impaired = (link, direction) in self._impaired
        if impaired:
            self._changes += 1
        seed = zlib.crc32(f"{link} {self._changes}".encode(), self.seed) if impaired else 0
        return compile_tree(shape, impaired=impaired, packet_bytes=self.packet_bytes, seed=seed)

    def _connect(self, link: str, connected: bool) -> bool:
        """Let the switch forward to and from a link, or not; True if the kernel confirms it.

        A disabled port of a bridge drops in both directions, and neither end is told: no carrier is lost, no address is
        unreachable. That is what a partition looks like.
        """
        port = self._ports[link, "down"]
        wanted = BR_STATE_FORWARDING if connected else BR_STATE_DISABLED
        port.socket.batch([set_port(port.ifindex, link, "IFLA_BRPORT_STATE", wanted)])
        question = ifinfmsg()
        question["index"] = port.ifindex
        ((answer,),) = port.socket.batch([encode(question, RTM_GETLINK, 0, f"{link}: bridge port")])
        found = decode(answer, ifinfmsg).get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_STATE")
        return bool(found == wanted)

    def counters(self) -> dict[tuple[str, str], QdiscCounters]:
        """Counters of every link and direction, of the qdisc that limits the rate: one dump per namespace."""
        by_place: dict[tuple[NetlinkSocket, int], QdiscCounters] = {}
        for socket in {port.socket for port in self._ports.values()}:
            for answer in socket.dump(_dump_request()):
                ifindex, handle, _, counters = qdiscs.read_counters(answer)
                # The leaf comes after the root in a dump, and it is the leaf that limits the rate and holds the queue.
                if counters and qdiscs.is_ours(handle):
                    by_place[socket, ifindex] = counters
        return {
            place: by_place[port.socket, port.ifindex]
            for place, port in self._ports.items()
            if (port.socket, port.ifindex) in by_place
        }


def _dump_request() -> Request:
    return encode(tcmsg(), RTM_GETQDISC, 0, "list qdiscs")
