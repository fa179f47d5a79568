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
from statistics import NormalDist, fmean, pstdev

from pyroute2.netlink import NLA_F_NESTED, NLM_F_CREATE, NLM_F_REPLACE, nla
from pyroute2.netlink.rtnl import RTM_NEWQDISC, TC_H_ROOT
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from testbed.links.netlink import Request, attributes, decode, encode
from testbed.links.state import Loss, Shape

MAJOR = 0x7E50
"""Handles 7e50: to 7e5f: mark the qdiscs that are ours; nothing else at a root is ever replaced (Pumba's habit)."""

ETHERNET_FRAME_BYTES = 1514
_SEGMENT_BYTES = 1448
"""TCP payload of a full frame: 1500 less IP, TCP and the timestamp option."""
UNCUT_PACKET_BYTES = 46 * ETHERNET_FRAME_BYTES
"""Wire size of the largest GSO packet that Linux builds unless told otherwise (64 KiB of TCP/IP)."""
_HANDLES = {"netem": MAJOR | 1, "tbf": MAJOR | 2, "pfifo": MAJOR | 3}
_SMALLEST_FRAME_BYTES = 60
_UNLIMITED_PACKETS = 10_000
_TABLE_ENTRIES = 1024
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
    return min(max(wanted, burst + ETHERNET_FRAME_BYTES), 2**32 - 1)


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
    """Delay and its standard deviation in ns; shares of packets between 0 and 1; how many packets it can hold.

    seed: of the kernel's random numbers; kernels before 6.6 do not take one.
    """

    delay_ns: int
    jitter_ns: int
    distribution: str
    loss: Loss
    duplicate: float
    corrupt: float
    reorder: float
    limit_packets: int
    seed: int
    kind = "netem"

    def tc_arguments(self) -> str:
        words = [f"netem limit {self.limit_packets}"]
        if self.delay_ns or self.jitter_ns:
            words.append(f"delay {self.delay_ns / 1e3:g}us")
        if self.jitter_ns:
            words.append(f"{self.jitter_ns / 1e3:g}us distribution {self.distribution}")
        if self.loss.burst is not None:
            p, r = self.loss.transitions
            rates = (p, r, self.loss.bad_loss, self.loss.good_loss)
            words.append("loss gemodel " + " ".join(f"{100 * rate:.6g}%" for rate in rates))
        elif self.loss.share:
            words.append(f"loss {100 * self.loss.share:.6g}%")
            words += [f"{100 * self.loss.correlation:.6g}%"] if self.loss.correlation else []
        for name in ("duplicate", "corrupt", "reorder"):
            if share := getattr(self, name):
                words.append(f"{name} {100 * share:.6g}%")
        if self.seed:
            words.append(f"seed {self.seed}")
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Pfifo:
    """Plain queue of a number of packets."""

    limit_packets: int
    kind = "pfifo"

    def tc_arguments(self) -> str:
        return f"pfifo limit {self.limit_packets}"


Qdisc = Tbf | Netem | Pfifo
Tree = tuple[Qdisc, ...]
"""Qdiscs from the root downwards, each the only child of the one before."""


def compile_tree(shape: Shape, *, impaired: bool = False, packet_bytes: int = 0, seed: int = 0) -> Tree:
    """The qdisc tree of one direction.

    packet_bytes: largest packet that can arrive (``largest_packet_bytes``); the bucket is never smaller.
    impaired: put netem into the tree even if this shape does not need it, because a later one on the same link will; so
    that no change ever has to replace the root and lose what is queued.
    """
    below: Qdisc = Pfifo(_UNLIMITED_PACKETS)
    waiting = _UNLIMITED_PACKETS
    if shape.rate_bps is not None:
        burst = max(burst_bytes(shape.rate_bps), min(packet_bytes, UNCUT_PACKET_BYTES))
        below = Tbf(shape.rate_bps, burst, queue_bytes(shape, shape.rate_bps, burst))
        waiting = below.limit_bytes // _SMALLEST_FRAME_BYTES
    if not (impaired or shape.needs_netem):
        return (below,)
    # Room for a bandwidth-delay product of the smallest frames; older kernels count the packets of the child, too.
    flying = (shape.rate_bps or 10**10) / 8 * (shape.delay_s + 4 * shape.jitter_s) / _SMALLEST_FRAME_BYTES
    netem = Netem(
        delay_ns=round(shape.delay_s * 1e9),
        jitter_ns=round(shape.jitter_s * 1e9),
        distribution=shape.distribution,
        loss=shape.loss,
        duplicate=shape.duplicate,
        corrupt=shape.corrupt,
        reorder=shape.reorder,
        limit_packets=min(math.ceil(flying) + waiting + 1000, 2**31),
        seed=seed,
    )
    return (netem, below)


@lru_cache
def distribution_table(name: str) -> bytes:
    """Table of a delay distribution for netem: quantiles with mean 0 and standard deviation 1, as int16 in units of 1/8192.

    normal: cut at 4 standard deviations by the range of int16. uniform. pareto: shape 3, netem's own choice, cut likewise.
    """
    ranks = [(i + 0.5) / _TABLE_ENTRIES for i in range(_TABLE_ENTRIES)]
    if name == "normal":
        values = [NormalDist().inv_cdf(rank) for rank in ranks]
    elif name == "uniform":
        values = [(rank - 0.5) * math.sqrt(12) for rank in ranks]
    else:
        values = [(1 - rank) ** (-1 / 3) for rank in ranks]
    values = [min(max(value, -10.0), 10.0) for value in values]
    for _ in range(20):  # the cut moves mean and deviation, so scale again until both hold
        mean, deviation = fmean(values), pstdev(values)
        values = [min(max((value - mean) / deviation, -3.9999), 3.9999) for value in values]
    return struct.pack(f"={_TABLE_ENTRIES}h", *(round(value * 8192) for value in values))


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


class _NetemOptions(nla):  # struct tc_netem_qopt of <linux/pkt_sched.h>, then attributes
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
            ("CORR", "cdata"),
            ("DELAY_DIST", "cdata"),
            ("REORDER", "cdata"),
            ("CORRUPT", "cdata"),
            ("LOSS", "loss"),
            ("RATE", "cdata"),
            ("ECN", "uint32"),
            ("RATE64", "uint64"),
            ("PAD", "cdata"),
            ("LATENCY64", "int64"),
            ("JITTER64", "int64"),
            ("SLOT", "cdata"),
            ("SLOT_DIST", "cdata"),
            ("PRNG_SEED", "uint64"),
        )
    )

    class loss(nla):  # noqa: N801
        nla_flags = NLA_F_NESTED
        nla_map = (("NETEM_LOSS_UNSPEC", "none"), ("NETEM_LOSS_GI", "cdata"), ("NETEM_LOSS_GE", "cdata"))


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
        case Netem():
            # All attributes every time: netem keeps what a change leaves out, so an impairment could never be taken back.
            loss = qdisc.loss
            netem: list[tuple[str, object]] = [
                ("TCA_NETEM_LATENCY64", qdisc.delay_ns),
                ("TCA_NETEM_JITTER64", qdisc.jitter_ns),
                ("TCA_NETEM_CORR", struct.pack("=III", 0, _u32(loss.correlation), 0)),
                ("TCA_NETEM_REORDER", struct.pack("=II", _u32(qdisc.reorder), 0)),
                ("TCA_NETEM_CORRUPT", struct.pack("=II", _u32(qdisc.corrupt), 0)),
            ]
            if loss.burst is not None:
                netem.append(("TCA_NETEM_LOSS", {"attrs": [("NETEM_LOSS_GE", _gilbert_elliott(loss))]}))
            if qdisc.jitter_ns:
                netem.append(("TCA_NETEM_DELAY_DIST", distribution_table(qdisc.distribution)))
            if qdisc.seed:
                netem.append(("TCA_NETEM_PRNG_SEED", qdisc.seed))
            return {
                "limit": qdisc.limit_packets,
                "loss": _u32(loss.share) if loss.burst is None else 0,
                "gap": 1 if qdisc.reorder else 0,
                "duplicate": _u32(qdisc.duplicate),
                "attrs": netem,
            }
        case Pfifo(limit):
            return {"limit": limit}


def _u32(share: float) -> int:
    return round(share * 0xFFFFFFFF)


def _gilbert_elliott(loss: Loss) -> bytes:
    """struct tc_netem_gemodel: p, r, h, k1; netem keeps what passes in the bad state and what is lost in the good one."""
    p, r = loss.transitions
    return struct.pack("=IIII", _u32(p), _u32(r), _u32(1 - loss.bad_loss), _u32(loss.good_loss))


def _head(data: bytes | None, words: int) -> tuple[int, ...]:
    """The first 32-bit words of a structure; zeros where the kernel left it out."""
    return struct.unpack_from(f"={words}I", data) if data else (0,) * words


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
        case Netem():
            loss = wanted.loss
            models = options.get_attr("TCA_NETEM_LOSS")
            bursts = models.get_attr("NETEM_LOSS_GE") if models is not None else None
            return (
                options["limit"] == wanted.limit_packets
                and options["loss"] == (_u32(loss.share) if loss.burst is None else 0)
                and options["duplicate"] == _u32(wanted.duplicate)
                and options.get_attr("TCA_NETEM_LATENCY64", 0) == wanted.delay_ns
                and options.get_attr("TCA_NETEM_JITTER64", 0) == wanted.jitter_ns
                and _head(options.get_attr("TCA_NETEM_CORR"), 3) == (0, _u32(loss.correlation), 0)
                and _head(options.get_attr("TCA_NETEM_REORDER"), 1) == (_u32(wanted.reorder),)
                and _head(options.get_attr("TCA_NETEM_CORRUPT"), 1) == (_u32(wanted.corrupt),)
                and bytes(bursts or b"") == (_gilbert_elliott(loss) if loss.burst is not None else b"")
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
