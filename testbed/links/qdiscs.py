"""LinkState → qdisc tree, as pure data; and its encoding for the kernel and for ``tc``.

One direction is one tree at the root of one interface:

    rate only              tbf
    with impairments       netem ─ tbf        netem delays, tbf below it limits rate and bounds the queue in bytes
    neither                pfifo              only so that the kernel counts the traffic

pyroute2 knows neither tbf's burst and 64-bit rate nor most of netem, and is slow at ten changes a second of many links, so the
options are packed here, straight from <linux/pkt_sched.h>.

netem above tbf keeps the queue honest: packets leave netem when their delay is over, enter the byte-limited queue of tbf
and are dropped there when it is full. The other way round netem's packet limit would replace the queue (tbf(8), netem(8)).
"""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, pstdev

from pyroute2.netlink import NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST
from pyroute2.netlink.rtnl import RTM_NEWQDISC, TC_H_ROOT

from testbed.links.netlink import Request, attributes
from testbed.links.state import Loss, Shape

MAJOR = 0x7E50
"""Handles 7e50: to 7e5f: mark the qdiscs that are ours (Pumba's habit)."""

ETHERNET_FRAME_BYTES = 1514
_SEGMENT_BYTES = 1448
"""TCP payload of a full frame: 1500 less IP, TCP and the timestamp option."""
UNCUT_PACKET_BYTES = 46 * ETHERNET_FRAME_BYTES
"""Wire size of the largest GSO packet that Linux builds unless told otherwise (64 KiB of TCP/IP)."""
_HANDLES = {"netem": MAJOR | 1, "tbf": MAJOR | 2, "pfifo": MAJOR | 3}
_SMALLEST_FRAME_BYTES = 60
_UNLIMITED_PACKETS = 10_000
_TABLE_ENTRIES = 1024
_TCA_KIND, _TCA_OPTIONS = 1, 2
_NESTED = 0x8000  # NLA_F_NESTED
_TBF_PARMS = struct.Struct("=QIQIIII")  # rate and peak as (head, bytes/s), limit, buffer, mtu: struct tc_tbf_qopt
_TBF_PARMS_KIND, _TBF_RATE64, _TBF_BURST = 1, 4, 6
_NETEM_QOPT = struct.Struct("=6I")  # latency, limit, loss, gap, duplicate, jitter: struct tc_netem_qopt
_NETEM_CORR, _NETEM_DELAY_DIST, _NETEM_REORDER, _NETEM_CORRUPT, _NETEM_LOSS = 1, 2, 3, 4, 5
_NETEM_LATENCY64, _NETEM_JITTER64, _NETEM_PRNG_SEED = 10, 11, 14
_NETEM_LOSS_GE = 2
_TCMSG = struct.Struct("=BBHiIII")  # family, pads, ifindex, handle, parent, info
_NLMSG_BYTES = 16
_STATS2, _STATS_BASIC, _STATS_QUEUE = 7, 1, 3


def burst_bytes(rate_bps: int) -> int:
    """Bucket of tbf for a rate in bits/s: 4 ms of line rate, but at least 8 frames.

    Two opposing needs. The timer that refills the bucket, and the softirq behind it, run late on a busy machine, and a bucket
    that was full meanwhile loses rate. But a full bucket is a free ride after every pause: 4 ms of line rate, and at 1 Mbit/s
    the 97 ms that 8 frames take.

    Measured on 2 cores, goodput of the slowest of four TCP flows in a ring (cubic) against 1448/1514 of the rate, over 5 s:

        37 to 900 Mbit/s, bucket of 1 ms: 97.1 to 99.7 %; 2 ms: 96.9 to 99.9 %; 4 ms: 98.4 to 99.9 %, and 96.5 % once;
            8 ms: 99.5 to 99.9 %. With processes that compute on both cores it was the same, as softirqs come first.
        1 Mbit/s, bucket of 2, 4 and 8 frames: 97, 92 to 95 and 97.8 % (of which 2 % are acknowledgements).
        900 Mbit/s in a run that also has a low rate, so that no packet may exceed 2, 4 and 8 frames: 60 to 67 %, 69 to 76 % and
            87 to 94 %; at 333 Mbit/s 72 to 77 %, 94 to 98 % and 99.2 %. Small packets cost processor time, hence 8 frames.
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


def _u32(share: float) -> int:
    return round(share * 0xFFFFFFFF)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _gilbert_elliott(loss: Loss) -> bytes:
    """struct tc_netem_gemodel: p, r, h, k1; netem keeps what passes in the bad state and what is lost in the good one."""
    p, r = loss.transitions
    return struct.pack("=4I", _u32(p), _u32(r), _u32(1 - loss.bad_loss), _u32(loss.good_loss))


def _options(qdisc: Qdisc) -> bytes:
    """TCA_OPTIONS of a qdisc as <linux/pkt_sched.h> lays them out."""
    match qdisc:
        case Tbf():
            rate = qdisc.rate_bps // 8
            parms = _TBF_PARMS.pack(0, min(rate, 0xFFFFFFFF), 0, 0, qdisc.limit_bytes, 0, 0)
            large = _attribute(_TBF_RATE64, struct.pack("=Q", rate)) if rate > 0xFFFFFFFF else b""
            return _attribute(_TBF_PARMS_KIND, parms) + large + _attribute(_TBF_BURST, struct.pack("=I", qdisc.burst_bytes))
        case Netem():
            # All attributes every time: netem keeps what a change leaves out, so an impairment could never be taken back.
            loss = qdisc.loss
            out = _NETEM_QOPT.pack(
                0,
                qdisc.limit_packets,
                _u32(loss.share) if loss.burst is None else 0,
                1 if qdisc.reorder else 0,
                _u32(qdisc.duplicate),
                0,
            )
            out += _attribute(_NETEM_LATENCY64, struct.pack("=q", qdisc.delay_ns))
            out += _attribute(_NETEM_JITTER64, struct.pack("=q", qdisc.jitter_ns))
            out += _attribute(_NETEM_CORR, struct.pack("=3I", 0, _u32(loss.correlation), 0))
            out += _attribute(_NETEM_REORDER, struct.pack("=2I", _u32(qdisc.reorder), 0))
            out += _attribute(_NETEM_CORRUPT, struct.pack("=2I", _u32(qdisc.corrupt), 0))
            if loss.burst is not None:
                out += _attribute(_NETEM_LOSS | _NESTED, _attribute(_NETEM_LOSS_GE, _gilbert_elliott(loss)))
            if qdisc.jitter_ns:
                out += _attribute(_NETEM_DELAY_DIST, distribution_table(qdisc.distribution))
            if qdisc.seed:
                out += _attribute(_NETEM_PRNG_SEED, struct.pack("=Q", qdisc.seed))
            return out
        case Pfifo():
            return struct.pack("=I", qdisc.limit_packets)


def requests(tree: Tree, ifindex: int, interface: str) -> list[Request]:
    """The netlink requests that put a tree on an interface or change the one that is there."""
    out = []
    for level, qdisc in enumerate(tree):
        handle, parent = handle_of(tree, level)
        body = _TCMSG.pack(0, 0, 0, ifindex, handle, parent, 0)
        body += _attribute(_TCA_KIND, qdisc.kind.encode() + b"\0") + _attribute(_TCA_OPTIONS, _options(qdisc))
        flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE
        header = struct.pack("=IHHII", _NLMSG_BYTES + len(body), RTM_NEWQDISC, flags, 0, 0)
        out.append(Request(header + body, f"{interface}: {qdisc.tc_arguments()}"))
    return out


def same_on_kernel(wanted: Qdisc, answer: bytes) -> bool:
    """True if a qdisc message of the kernel (RTM_NEWQDISC) has what was asked for, within its own rounding.

    tbf keeps the bucket as time in ticks of 64 ns, so the burst may come back a few bytes smaller.
    """
    found = {kind: (start, end) for kind, start, end in attributes(answer, _NLMSG_BYTES + _TCMSG.size)}
    start, end = found.get(_TCA_KIND, (0, 0))
    if answer[start:end].rstrip(b"\0") != wanted.kind.encode() or _TCA_OPTIONS not in found:
        return False
    start, end = found[_TCA_OPTIONS]
    options = answer[start:end]
    match wanted:
        case Tbf():
            parts = {kind: options[a:b] for kind, a, b in attributes(options, 0)}
            _, rate, _, _, limit, buffer, _ = _TBF_PARMS.unpack_from(parts[_TBF_PARMS_KIND])
            if _TBF_RATE64 in parts:
                (rate,) = struct.unpack("=Q", parts[_TBF_RATE64])
            burst = buffer * 64e-9 * rate
            return (
                rate == wanted.rate_bps // 8
                and limit == wanted.limit_bytes
                and abs(burst - wanted.burst_bytes) <= 64e-9 * rate + 1
            )
        case Netem():
            parts = {kind: options[a:b] for kind, a, b in attributes(options, _NETEM_QOPT.size)}
            # What is sent and comes back the same; the table does not come back, and the seed not from old kernels.
            sent = {kind: _options(wanted)[a:b] for kind, a, b in attributes(_options(wanted), _NETEM_QOPT.size)}
            same = (_NETEM_LATENCY64, _NETEM_JITTER64, _NETEM_CORR, _NETEM_REORDER, _NETEM_CORRUPT, _NETEM_LOSS)
            _, limit, loss, _, duplicate, _ = _NETEM_QOPT.unpack_from(options)
            _, limit_sent, loss_sent, _, duplicate_sent, _ = _NETEM_QOPT.unpack_from(_options(wanted))
            return (limit, loss, duplicate) == (limit_sent, loss_sent, duplicate_sent) and all(
                _stripped(parts.get(kind)) == _stripped(sent.get(kind)) for kind in same
            )
        case Pfifo():
            return struct.unpack("=I", options) == (wanted.limit_packets,)


def _stripped(value: bytes | None) -> bytes:
    # A kernel leaves out an attribute that is all zeros, or not.
    return (value or b"").rstrip(b"\0")


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
