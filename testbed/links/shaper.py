"""Apply link states to interfaces, read back what the kernel took, and read its counters.

Thin on purpose: what to send is compiled in ``qdiscs``; this only sends it, one batch per network
namespace.
"""

import functools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pyroute2.netlink import NLA_F_NESTED, NLM_F_ECHO
from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_GETQDISC, RTM_GETTCLASS, RTM_SETLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from netsenseml.records import monotonic_s
from testbed.links import qdiscs
from testbed.links.delayline import DelayLine, LineCounters
from testbed.links.netlink import BATCH, NetlinkSocket, Packed, Request, decode, encode
from testbed.links.qdiscs import QdiscCounters, compile_tree
from testbed.links.state import DIRECTIONS, LinkParameters, LinkState

AF_BRIDGE = 7
BR_STATE_DISABLED, BR_STATE_FORWARDING = 0, 3  # <linux/if_bridge.h>


Place = tuple[str, str]
"""A link and a direction."""


@dataclass(frozen=True, slots=True)
class Port:
    """An interface whose egress is one direction of a link; the socket sits in the interface's
    namespace."""

    socket: NetlinkSocket
    ifindex: int
    interface: str


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one change: when its batch was acknowledged, and whether the kernel reports
    what was asked."""

    applied_s: float
    verified: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """A change of links, encoded; for every socket, what it sends, and the link and qdisc of each
    request.

    trees: what the change makes of each direction. line: what the delay line is told. version: of
    the shaper, when it was prepared; an encoded change holds only what differs from the trees of
    then.
    """

    changes: Mapping[str, LinkState]
    trees: Mapping[Place, qdiscs.Tree]
    work: Sequence[tuple[NetlinkSocket, Packed, Sequence[tuple[str, qdiscs.Node]]]]
    line: Mapping[Place, qdiscs.Netem]
    version: int


def set_port(ifindex: int, what: str, attribute: str, value: int) -> Request:
    """The request that sets an attribute of a bridge port.

    As ``bridge link set`` does it: the other way, IFLA_INFO_SLAVE_DATA, takes a port state and
    ignores it.
    """
    message = ifinfmsg()
    message["family"] = AF_BRIDGE
    message["index"] = ifindex
    message["attrs"] = [("IFLA_PROTINFO", {"attrs": [(attribute, value)]}, NLA_F_NESTED)]
    return encode(message, RTM_SETLINK, 0, f"{what}: {attribute} {value}")


class Shaper:
    """All links of a lab. Ports are added once, then states are applied and counters read for many
    links at a time.

    impaired: (link, direction) that carries netem from the start, because some state of it will
    need it.
    shaper, mtu, max_packet_bytes: see ``qdiscs.compile_tree``. seed: of the random impairments.
    line: the delay line that stands for netem; None: the kernel's netem impairs.
    """

    def __init__(
        self,
        impaired: Iterable[Place] = (),
        *,
        shaper: str = "htb",
        mtu: int = 1500,
        max_packet_bytes: int = qdiscs.UNCUT_PACKET_BYTES,
        seed: int = 0,
    ) -> None:
        self.line: DelayLine | None = None
        self.line_counters: LineCounters | None = None
        self._impaired = frozenset(impaired)
        self.mtu = mtu
        self._shaper, self._max_packet_bytes, self._seed = shaper, max_packet_bytes, seed
        self._changes = 0
        self._version = 0
        self._ports: dict[Place, Port] = {}
        self._states: dict[str, LinkState] = {}
        self._trees: dict[Place, qdiscs.Tree] = {}

    def add(self, link: str, up: Port, down: Port) -> None:
        """Make a link known by its two egress ports."""
        self._ports[link, "up"] = up
        self._ports[link, "down"] = down

    @property
    def impaired(self) -> frozenset[Place]:
        """(link, direction) that carries netem, or has the delay line in its way."""
        return self._impaired

    @property
    def states(self) -> Mapping[str, LinkState]:
        """The state that each link was given last."""
        return self._states

    @property
    def trees(self) -> Mapping[Place, qdiscs.Tree]:
        """What each direction of each link was given last."""
        return self._trees

    def apply(self, changes: Mapping[str, LinkState]) -> dict[str, Applied]:
        """Put links into new states; raises NetlinkError if the kernel refuses one."""
        return self.commit(self.prepare(changes))

    def prepare(self, changes: Mapping[str, LinkState]) -> Prepared:
        """Compile and encode a change ahead of its time. What stays as it is, is not sent."""
        work: dict[NetlinkSocket, list[tuple[str, qdiscs.Node, Request]]] = {}
        trees: dict[Place, qdiscs.Tree] = {}
        line: dict[Place, qdiscs.Netem] = {}
        for link, state in changes.items():
            for direction in DIRECTIONS:
                place = link, direction
                port, before = self._ports[place], self._trees.get(place)
                tree = trees[place] = self._tree(place, getattr(state, direction), before)
                if self.line is not None and isinstance(tree[0], qdiscs.Netem):
                    if before is None or tree[0] != before[0]:
                        line[place] = tree[0]
                    tree, before = tree[1:], before[1:] if before else None
                for node, request in qdiscs.requests(
                    tree, port.ifindex, f"{link} {direction}", before
                ):
                    work.setdefault(port.socket, []).append(
                        (link, node, request.with_flags(NLM_F_ECHO))
                    )
        packed = [
            (
                socket,
                socket.pack(request for *_, request in parts),
                [(link, node) for link, node, _ in parts],
            )
            for socket, parts in work.items()
        ]
        return Prepared(changes, trees, packed, line, self._version)

    def commit(self, prepared: Prepared) -> dict[str, Applied]:
        """Make a prepared change: first everything is sent, one write a namespace, then the answers
        are read.

        The kernel echoes each qdisc as it took it, and the delay line what it has in force;
        ``verified`` says if that is what was asked.
        """
        if prepared.version != self._version:  # links were changed by hand meanwhile
            prepared = self.prepare(prepared.changes)
        self._version += 1
        changes = prepared.changes
        verified = dict.fromkeys(changes, True)
        done_s = dict.fromkeys(changes, monotonic_s())
        for socket, packed, parts in prepared.work:
            socket.post(packed)
            now = monotonic_s()
            for link, _ in parts[:BATCH]:
                done_s[link] = max(done_s[link], now)
        if self.line is not None and prepared.line:
            found = self.line.apply(prepared.line)
            now = monotonic_s()
            for place, netem in prepared.line.items():
                verified[place[0]] &= found.get(place) == netem
                done_s[place[0]] = now
        for socket, packed, parts in prepared.work:
            replies = socket.collect(packed)
            now = monotonic_s()
            for position, ((link, node), answers) in enumerate(zip(parts, replies, strict=True)):
                verified[link] &= any(qdiscs.same_on_kernel(node, answer) for answer in answers)
                if position >= BATCH:
                    done_s[link] = max(done_s[link], now)
        self._trees.update(prepared.trees)
        self._wake(changes)
        for link, state in changes.items():
            before = self._states.get(link)
            if state.connected != (before is None or before.connected):
                verified[link] &= self._connect(link, state.connected)
                done_s[link] = monotonic_s()
        self._states.update(changes)
        return {link: Applied(done_s[link], verified[link]) for link in changes}

    def _wake(self, changes: Mapping[str, LinkState]) -> None:
        """Have the kernel look again where an outage is over: until the next packet comes it would
        not, for up to 5 s."""
        for link, state in changes.items():
            for direction in DIRECTIONS:
                before = (
                    getattr(self._states[link], direction).rate_bps
                    if link in self._states
                    else None
                )
                if before == 0 and getattr(state, direction).rate_bps != 0:
                    port = self._ports[link, direction]
                    port.socket.send_wakeup_frame(port.interface)

    def _tree(
        self, place: Place, parameters: LinkParameters, before: qdiscs.Tree | None
    ) -> qdiscs.Tree:
        def compiled(seed: int) -> qdiscs.Tree:
            return compile_tree(
                parameters,
                impaired=place in self._impaired,
                shaper=self._shaper,
                mtu=self.mtu,
                max_packet_bytes=self._max_packet_bytes,
                seed=seed,
            )

        if place not in self._impaired:
            return compiled(0)
        if (
            before is not None
            and isinstance(before[0], qdiscs.Netem)
            and (tree := compiled(before[0].seed))[0] == before[0]
        ):
            return tree
        # The seed differs between links, or all would lose the same packets, and between changes,
        # because netem begins its random numbers anew with each.
        self._changes += 1
        return compiled(zlib.crc32(f"{place[0]} {self._changes}".encode(), self._seed))

    def _connect(self, link: str, connected: bool) -> bool:
        """Let the switch forward to and from a link, or not; True if the kernel confirms it.

        A disabled port of a bridge drops in both directions, and neither end is told: no carrier is
        lost, no address is unreachable. That is what a partition looks like.
        """
        port = self._ports[link, "down"]
        wanted = BR_STATE_FORWARDING if connected else BR_STATE_DISABLED
        # the bridge enables a port anew when it hears, late, that it has a carrier
        port.socket.flush_carrier(port.interface)
        port.socket.batch([set_port(port.ifindex, link, "IFLA_BRPORT_STATE", wanted)])
        ((answer,),) = port.socket.batch([_interface_request(port)])
        found = decode(answer, ifinfmsg).get_nested(
            "IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_STATE"
        )
        return bool(found == wanted)

    def deviating(self) -> list[str]:
        """Links on whose interfaces the kernel does not report what they were given last: something
        else has changed them."""
        found: dict[tuple[NetlinkSocket, int, int], bytes] = {}
        for socket in {port.socket for port in self._ports.values()}:
            for answer in socket.dump(_dump_request()):
                ifindex, handle, *_ = qdiscs.read_counters(answer)
                found[socket, ifindex, handle] = answer
        for port in self._ports.values():
            for answer in port.socket.dump(_class_request(port.ifindex, port.interface)):
                _, handle, *_ = qdiscs.read_counters(answer)
                found[port.socket, port.ifindex, handle] = answer
        links = []
        for place, tree in self._trees.items():
            port = self._ports[place]
            nodes = [(node, qdiscs.place_of(tree, level)[0]) for level, node in enumerate(tree)]
            answers = [
                (node, found.get((port.socket, port.ifindex, handle))) for node, handle in nodes
            ]
            if self.line is not None:
                answers = [
                    (node, answer) for node, answer in answers if not isinstance(node, qdiscs.Netem)
                ]
            if not all(
                answer is not None and qdiscs.same_on_kernel(node, answer)
                for node, answer in answers
            ):
                links.append(place[0])
        return list(dict.fromkeys(links))

    def _refused(self) -> int:
        """Frames that the shaper let go and the delay line had not read in time, so that the
        interface dropped them."""
        questions: dict[NetlinkSocket, list[Request]] = {}
        for place in (
            (link, side)
            for link in sorted({link for link, _ in self._impaired})
            for side in DIRECTIONS
        ):
            questions.setdefault(self._ports[place].socket, []).append(
                _interface_request(self._ports[place])
            )
        answers = (
            answer for socket, requests in questions.items() for (answer,) in socket.batch(requests)
        )
        return sum(qdiscs.read_interface_drops(answer) for answer in answers)

    def counters(self) -> dict[Place, QdiscCounters]:
        """Counters of every link and direction, of the queue behind its limiter: one dump per
        namespace."""
        found: dict[tuple[NetlinkSocket, int], QdiscCounters] = {}
        waits: dict[tuple[NetlinkSocket, int], int] = {}
        for socket in {port.socket for port in self._ports.values()}:
            netem: dict[int, int] = {}
            below: dict[int, int] = {}
            for answer in socket.dump(_dump_request()):
                ifindex, handle, parent, counters = qdiscs.read_counters(answer)
                if counters is None:
                    continue
                if qdiscs.is_queue(handle):
                    found[socket, ifindex] = counters
                if qdiscs.is_limiter(handle):
                    waits[socket, ifindex] = counters.overlimits
                if qdiscs.is_netem(handle):
                    netem[ifindex] = counters.drops
                elif qdiscs.is_netem(parent):
                    below[ifindex] = counters.drops
            # netem counts what the qdisc below it refuses, too
            for ifindex, drops in netem.items():
                if (socket, ifindex) in found:
                    found[socket, ifindex] = replace(
                        found[socket, ifindex], lost=drops - below.get(ifindex, 0)
                    )
        by_place = {
            place: replace(
                found[port.socket, port.ifindex],
                overlimits=waits.get((port.socket, port.ifindex), 0),
            )
            for place, port in self._ports.items()
            if (port.socket, port.ifindex) in found
        }
        if self.line is not None:
            self.line_counters = replace(self.line.counters(), refused=self._refused())
            for place, counted in self.line_counters.directions.items():
                if place in by_place:
                    by_place[place] = replace(
                        by_place[place], lost=counted.lost + counted.overflowed
                    )
        return by_place


def _interface_request(port: Port) -> Request:
    question = ifinfmsg()
    question["index"] = port.ifindex
    return encode(question, RTM_GETLINK, 0, f"{port.interface}: counters")


@functools.lru_cache(4096)
def _class_request(ifindex: int, interface: str) -> Request:
    question = tcmsg()
    question["index"] = ifindex
    return encode(question, RTM_GETTCLASS, 0, f"list classes of {interface}")


@functools.cache
def _dump_request() -> Request:
    return encode(tcmsg(), RTM_GETQDISC, 0, "list qdiscs")
