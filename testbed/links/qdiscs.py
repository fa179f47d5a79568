"""LinkState → qdisc tree, as pure data; and its encoding for the kernel and for ``tc``.

One direction is one tree at the root of one interface:

    rate only              tbf
    with impairments       netem ─ tbf        netem delays, tbf below it limits rate and bounds the queue in bytes
    neither                pfifo              only so that the kernel counts the traffic

netem above tbf keeps the queue honest: packets leave netem when their delay is over, enter the byte-limited queue of tbf
and are dropped there when it is full. The other way round netem's packet limit would replace the queue (tbf(8), netem(8)).
"""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pyroute2.netlink import NLM_F_CREATE, NLM_F_REPLACE, nla
from pyroute2.netlink.rtnl import RTM_NEWQDISC, TC_H_ROOT
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from testbed.links.netlink import Request, attributes, decode, encode
from testbed.links.state import Shape

MAJOR = 0x7E50
"""Handles 7e50: to 7e5f: mark the qdiscs that are ours; nothing else at a root is ever replaced (Pumba's habit)."""

ETHERNET_FRAME_BYTES = 1514
_SEGMENT_BYTES = 1448
"""TCP payload of a full frame: 1500 less IP, TCP and the timestamp option."""
UNCUT_PACKET_BYTES = 46 * ETHERNET_FRAME_BYTES
"""Wire size of the largest GSO packet that Linux builds unless told otherwise (64 KiB of TCP/IP)."""
_HANDLES = {"netem": MAJOR | 1, "tbf": MAJOR | 2, "pfifo": MAJOR | 3}
_TCMSG = struct.Struct("=BBHiIII")  # family, pads, ifindex, handle, parent, info
_NLMSG_BYTES = 16
_STATS2, _STATS_BASIC, _STATS_QUEUE = 7, 1, 3


def burst_bytes(rate_bps: int) -> int:
    """Bucket of tbf for a rate in bits/s.

    Two opposing needs. The timer that refills the bucket, and the softirq behind it, run some ms late on a busy machine, and
    a bucket that was full meanwhile loses rate: with 2 ms of line rate a ring all-reduce got 42 of 50 Mbit/s on a loaded
    2-core machine, with 4 ms and more 44 to 48. But a full bucket is a free ride after every pause: 64 KiB let 10.8 Mbit/s of
    payload through a 10 Mbit/s link. So: 4 ms of line rate, and at low rates a few frames.
    """
    return max(math.ceil(rate_bps / 8 * 0.004), 8 * ETHERNET_FRAME_BYTES)


def largest_packet_bytes(rates_bps: Iterable[int | None]) -> int:
    """Wire size that no packet may exceed, so that it fits the bucket of every rate that a lab's links will ever have.

    tbf cuts a packet that is larger than the bucket when it is queued, but not one that was queued before the bucket became
    smaller: that one can never collect its tokens, and the link stands still until the rate rises again.
    """
    return min((burst_bytes(rate) for rate in rates_bps if rate is not None), default=UNCUT_PACKET_BYTES)


def gso_max_size(packet_bytes: int) -> int:
    """IFLA_GSO_MAX_SIZE for an interface whose packets must not exceed a wire size."""
    return min(packet_bytes // ETHERNET_FRAME_BYTES * _SEGMENT_BYTES, 65536)


def queue_bytes(shape: Shape, rate_bps: int, burst: int) -> int:
    """Bytes that may wait at a rate: the time or size asked for, but never less than one burst and a frame."""
    wanted = shape.queue_bytes if shape.queue_bytes is not None else math.ceil(rate_bps / 8 * shape.queue_s)
    return max(wanted, burst + ETHERNET_FRAME_BYTES)


@dataclass(frozen=True, slots=True)
class Tbf:
    """Token bucket: rate in bits/s; bucket and queue in bytes."""

    rate_bps: int
    burst_bytes: int
    limit_bytes: int
    kind = "tbf"

    def tc_arguments(self) -> str:
        return f"tbf rate {self.rate_bps}bit burst {self.burst_bytes} limit {self.limit_bytes}"


@dataclass(frozen=True, slots=True)
class Netem:
    """Delay and its standard deviation in ns; loss as a fraction of 2**32 - 1; packets it can hold."""

    delay_ns: int
    jitter_ns: int
    loss_u32: int
    limit_packets: int
    kind = "netem"

    def tc_arguments(self) -> str:
        words = [f"netem limit {self.limit_packets}"]
        if self.delay_ns:
            words.append(f"delay {self.delay_ns / 1e3:g}us")
        if self.jitter_ns:
            words.append(f"{self.jitter_ns / 1e3:g}us")
        if self.loss_u32:
            words.append(f"loss {self.loss_u32 / 0xFFFFFFFF * 100:.6g}%")
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Pfifo:
    """Plain queue of a number of packets."""

    limit_packets: int = 10_000
    kind = "pfifo"

    def tc_arguments(self) -> str:
        return f"pfifo limit {self.limit_packets}"


Qdisc = Tbf | Netem | Pfifo
Tree = tuple[Qdisc, ...]
"""Qdiscs from the root downwards, each the only child of the one before."""


def compile_tree(shape: Shape, *, impaired: bool = False, packet_bytes: int = 0) -> Tree:
    """The qdisc tree of one direction.

    packet_bytes: largest packet that can arrive (``largest_packet_bytes``); the bucket is never smaller.
    impaired: put netem into the tree even if this shape does not need it, because a later one on the same link will; so
    that no change ever has to replace the root and lose what is queued.
    """
    below: Qdisc = Pfifo()
    if shape.rate_bps is not None:
        burst = max(burst_bytes(shape.rate_bps), min(packet_bytes, UNCUT_PACKET_BYTES))
        below = Tbf(shape.rate_bps, burst, queue_bytes(shape, shape.rate_bps, burst))
    if not (impaired or shape.needs_netem):
        return (below,)
    held_s = shape.delay_s + 4 * shape.jitter_s
    packets = math.ceil((shape.rate_bps or 10**10) / 8 * held_s / 64) + 1000  # every frame may be a small one
    return (
        Netem(round(shape.delay_s * 1e9), round(shape.jitter_s * 1e9), round(shape.loss * 0xFFFFFFFF), packets),
        below,
    )


def handle_of(tree: Sequence[Qdisc], level: int) -> tuple[int, int]:
    """(handle, parent) of the qdisc at a level of its tree."""
    parent = TC_H_ROOT if level == 0 else (_HANDLES[tree[level - 1].kind] << 16) | 1
    return _HANDLES[tree[level].kind] << 16, parent


def is_ours(handle: int) -> bool:
    """True if a qdisc's handle carries our mark."""
    return (handle >> 16) & 0xFFF0 == MAJOR


def tc_commands(tree: Tree, interface: str, prefix: str = "") -> list[str]:
    """The ``tc`` commands that would make the same tree."""
    commands = []
    for level, qdisc in enumerate(tree):
        handle, parent = handle_of(tree, level)
        place = "root" if parent == TC_H_ROOT else f"parent {parent >> 16:x}:{parent & 0xFFFF:x}"
        commands.append(f"{prefix}tc qdisc replace dev {interface} {place} handle {handle >> 16:x}: {qdisc.tc_arguments()}")
    return commands


class _TbfOptions(nla):
    nla_map = (
        ("TCA_TBF_UNSPEC", "none"),
        ("TCA_TBF_PARMS", "parms"),
        ("TCA_TBF_RTAB", "hex"),
        ("TCA_TBF_PTAB", "hex"),
        ("TCA_TBF_RATE64", "uint64"),
        ("TCA_TBF_PRATE64", "uint64"),
        ("TCA_TBF_BURST", "uint32"),
        ("TCA_TBF_PBURST", "uint32"),
        ("TCA_TBF_PAD", "hex"),
    )

    class parms(nla):  # noqa: N801 (pyroute2 wants the name of the map) struct tc_tbf_qopt of <linux/pkt_sched.h>
        fields = (
            ("rate_head", "Q"),
            ("rate", "I"),
            ("peak_head", "Q"),
            ("peak", "I"),
            ("limit", "I"),
            ("buffer", "I"),
            ("mtu", "I"),
        )


class _NetemOptions(nla):  # struct tc_netem_qopt, then attributes
    fields = (
        ("latency", "I"),
        ("limit", "I"),
        ("loss", "I"),
        ("gap", "I"),
        ("duplicate", "I"),
        ("jitter", "I"),
    )
    nla_map = tuple(
        (f"TCA_NETEM_{name}", kind)
        for name, kind in (
            ("UNSPEC", "none"),
            ("CORR", "hex"),
            ("DELAY_DIST", "hex"),
            ("REORDER", "hex"),
            ("CORRUPT", "hex"),
            ("LOSS", "hex"),
            ("RATE", "hex"),
            ("ECN", "uint32"),
            ("RATE64", "uint64"),
            ("PAD", "hex"),
            ("LATENCY64", "int64"),
            ("JITTER64", "int64"),
        )
    )


class _PfifoOptions(nla):
    fields = (("limit", "I"),)


_OPTIONS: dict[str, type[nla]] = {"tbf": _TbfOptions, "netem": _NetemOptions, "pfifo": _PfifoOptions}


class QdiscMessage(tcmsg):
    """A tcmsg that knows all attributes of tbf and netem; pyroute2's own lack the 64-bit ones and tbf's burst."""

    @staticmethod
    def get_options(message: "QdiscMessage", *args: object, **kwargs: object) -> type[nla]:
        return _OPTIONS.get(message.get_attr("TCA_KIND"), nla.hex)


def _options(qdisc: Qdisc) -> dict[str, object]:
    match qdisc:
        case Tbf(rate_bps, burst, limit):
            rate = rate_bps // 8
            parms = {"rate": min(rate, 0xFFFFFFFF), "limit": limit, "buffer": 0, "mtu": 0}
            attrs: list[tuple[str, object]] = [("TCA_TBF_PARMS", parms), ("TCA_TBF_BURST", burst)]
            if rate > 0xFFFFFFFF:
                attrs.append(("TCA_TBF_RATE64", rate))
            return {"attrs": attrs}
        case Netem(delay, jitter, loss, limit):
            return {
                "limit": limit,
                "loss": loss,
                "attrs": [("TCA_NETEM_LATENCY64", delay), ("TCA_NETEM_JITTER64", jitter)],
            }
        case Pfifo(limit):
            return {"limit": limit}


@lru_cache(maxsize=4096)
def _template(tree: Tree) -> tuple[tuple[bytes, str], ...]:
    messages = []
    for level, qdisc in enumerate(tree):
        message = QdiscMessage()
        message["handle"], message["parent"] = handle_of(tree, level)
        message["attrs"] = [("TCA_KIND", qdisc.kind), ("TCA_OPTIONS", _options(qdisc))]
        request = encode(message, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, qdisc.kind)
        messages.append((request.data, qdisc.tc_arguments()))
    return tuple(messages)


def requests(tree: Tree, ifindex: int, interface: str) -> list[Request]:
    """The netlink requests that put a tree on an interface or change the one that is there."""
    out = []
    for data, words in _template(tree):
        patched = bytearray(data)
        struct.pack_into("=i", patched, _NLMSG_BYTES + 4, ifindex)
        out.append(Request(bytes(patched), f"{interface}: {words}"))
    return out


def same_on_kernel(wanted: Qdisc, answer: bytes) -> bool:
    """True if a qdisc message of the kernel (RTM_NEWQDISC) has what was asked for, within its own rounding.

    tbf keeps the bucket as time in ticks of 64 ns, so the burst may come back a few bytes smaller.
    """
    message = decode(answer, QdiscMessage)
    options = message.get_attr("TCA_OPTIONS")
    if message.get_attr("TCA_KIND") != wanted.kind or options is None:
        return False
    match wanted:
        case Tbf(rate_bps, burst, limit):
            parms = options.get_attr("TCA_TBF_PARMS")
            rate = options.get_attr("TCA_TBF_RATE64") or parms["rate"]
            kept = parms["buffer"] * 64e-9 * rate
            return rate == rate_bps // 8 and parms["limit"] == limit and abs(kept - burst) <= 64e-9 * rate + 1
        case Netem(delay, jitter, loss, limit):
            return (
                options["limit"] == limit
                and options["loss"] == loss
                and options.get_attr("TCA_NETEM_LATENCY64", 0) == delay
                and options.get_attr("TCA_NETEM_JITTER64", 0) == jitter
            )
        case Pfifo(limit):
            return bool(options["limit"] == limit)


@dataclass(frozen=True, slots=True)
class QdiscCounters:
    """The kernel's counters of one qdisc: cumulative, except what waits now."""

    bytes: int
    packets: int
    drops: int
    overlimits: int
    backlog_bytes: int
    qlen: int


def read_counters(answer: bytes) -> tuple[int, int, int, QdiscCounters | None]:
    """(ifindex, handle, parent, counters) of one qdisc message; without pyroute2, as it is read ten times a second.

    Layout: TCA_STATS2 holds TCA_STATS_BASIC (u64 bytes, u32 packets) and TCA_STATS_QUEUE (u32 qlen, backlog, drops,
    requeues, overlimits), <linux/gen_stats.h>.
    """
    _, _, _, ifindex, handle, parent, _ = _TCMSG.unpack_from(answer, _NLMSG_BYTES)
    for kind, start, end in attributes(answer, _NLMSG_BYTES + _TCMSG.size):
        if kind == _STATS2:
            basic = queue = None
            for inner, at, _ in attributes(answer[:end], start):
                if inner == _STATS_BASIC:
                    basic = struct.unpack_from("=QI", answer, at)
                elif inner == _STATS_QUEUE:
                    queue = struct.unpack_from("=5I", answer, at)
            if basic and queue:
                qlen, backlog, drops, _, overlimits = queue
                return ifindex, handle, parent, QdiscCounters(basic[0], basic[1], drops, overlimits, backlog, qlen)
    return ifindex, handle, parent, None
