"""LinkState → qdisc tree, as pure data; and its encoding for the kernel and for ``tc``.

One direction is one tree at the root of one interface:

    rate only              htb ─ class ─ tbf ─ bfifo     the class limits the rate, tbf only cuts
                                                         packets, bfifo is the queue
    with impairments       netem ─ the same              netem delays and loses, what is below it
                                                         limits rate and queue
    with ``shaper: tbf``   (netem ─) tbf
    no limit               (netem ─) pfifo               only so that the kernel counts the traffic

Why htb: every change of a tbf, whatever it changes, fills its bucket. With a change every 100 ms a
link of 1 Mbit/s carried 1.9 times its rate, and after a rise the packet that waits keeps the time
that the old rate had set. htb keeps its tokens, and looks at once. ``shaper: tbf`` is there to
compare with testbeds that use it.

Why a tbf below the class: htb lets a GSO packet of up to 64 KiB pass as one, and afterwards waits
for the debt. A tbf whose rate is far above any link's never limits, but cuts what is larger than
its bucket into frames, as the wire would; so that a thin link gets frames however large the packets
are that a fast one sends. For htb also keeps its debt as time: after a rise the next packet waits
until the one that has left would have been sent at the old rate, which should be no more than a
frame.

pyroute2 knows neither tbf's burst and 64-bit rate nor most of netem, and is slow at ten changes a
second of many links, so the options are packed here, straight from <linux/pkt_sched.h>.

netem above the limiter keeps the queue honest: packets leave netem when their delay is over, enter
the byte-limited queue and are dropped there when it is full. The other way round netem's packet
limit would replace the queue (tbf(8), netem(8)).
"""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist, fmean, pstdev

from pyroute2.netlink import NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST
from pyroute2.netlink.rtnl import RTM_NEWQDISC, RTM_NEWTCLASS, TC_H_ROOT

from testbed.links.netlink import Request, attributes
from testbed.links.state import LinkParameters, Loss

MAJOR = 0x7E50
"""Handles 7e50: to 7e5f: mark the qdiscs that are ours (Pumba's habit)."""

ETHERNET_HEADER_BYTES = 14
ETHERNET_FRAME_BYTES = 1500 + ETHERNET_HEADER_BYTES
_TCP_HEADERS_BYTES = 52
"""IPv4, TCP and the timestamp option."""
UNCUT_PACKET_BYTES = 46 * ETHERNET_FRAME_BYTES
"""Wire size of the largest GSO packet that Linux builds unless told otherwise (64 KiB of
TCP/IP)."""
_NETEM, _HTB, _CUT, _FIFO, _TBF, _AQM, _PLAIN = (MAJOR | number for number in range(1, 8))
_SMALLEST_FRAME_BYTES = 60
_UNLIMITED_PACKETS = 10_000
_TABLE_ENTRIES = 1024
_WHOLE_BPS, _WHOLE_S = 100_000_000, 0.004
"""From that rate on a packet passes whole that the link needs no longer for, though its bucket is
smaller. When a fast link has become slower, its hosts' packets are as large as before, and as
frames they would keep the processors busy: eight links that fell from 500 to 375 Mbit/s carried but
82 % of that, by 93 % of two processors; before by 35 %."""
_CUT_BPS = 8 * 10**15
"""So fast that a packet takes less than 1 ns, which is 0 to the kernel: no bucket is ever empty, or
too small for a packet that was queued when the bucket was larger."""
_SHUT_BPS = 8
"""A frame takes 25 minutes."""
_OUTAGE_BPS = 10_000_000
"""Of the class during an outage, when the tbf below it lets nothing pass: any rate, but so low that
a change leaks nothing."""
_CODEL_TARGET_S, _CODEL_INTERVAL_S = 0.005, 0.1  # RFC 8289, section 4.4
_TCA_KIND, _TCA_OPTIONS = 1, 2
_NESTED = 0x8000  # NLA_F_NESTED
# rate and peak as (head, bytes/s), limit, buffer, mtu: struct tc_tbf_qopt
_TBF_PARMS = struct.Struct("=QIQIIII")
_TBF_PARMS_KIND, _TBF_RATE64, _TBF_BURST = 1, 4, 6
# rate and ceil as struct tc_ratespec, buffer, cbuffer, quantum, level, prio
_HTB_OPT = struct.Struct("=BBHhHIBBHhHIIIIII")
# version, rate2quantum, default class, debug, direct packets: struct tc_htb_glob
_HTB_GLOB = struct.Struct("=5I")
_HTB_PARMS, _HTB_INIT, _HTB_RATE64, _HTB_CEIL64 = 1, 2, 6, 7
_HTB_VERSION, _DEFAULT_CLASS, _LINKLAYER_ETHERNET = 3, 1, 1
_CODEL_TARGET, _CODEL_LIMIT, _CODEL_INTERVAL, _CODEL_ECN = 1, 2, 3, 4  # the same for fq_codel
_CAKE_RATE64, _CAKE_DIFFSERV, _CAKE_INTERVAL, _CAKE_TARGET, _CAKE_MEMORY, _CAKE_SPLIT_GSO = (
    2,
    3,
    7,
    8,
    10,
    17,
)
_CAKE_BEST_EFFORT = 3
_SKB_BYTES = 768
"""What a packet takes in memory beside its bytes, about: struct sk_buff and struct
skb_shared_info."""
# latency, limit, loss, gap, duplicate, jitter: struct tc_netem_qopt
_NETEM_QOPT = struct.Struct("=6I")
_NETEM_CORR, _NETEM_DELAY_DIST, _NETEM_REORDER, _NETEM_CORRUPT, _NETEM_LOSS, _NETEM_RATE = (
    1,
    2,
    3,
    4,
    5,
    6,
)
_NETEM_LATENCY64, _NETEM_JITTER64, _NETEM_PRNG_SEED = 10, 11, 14
_NETEM_LOSS_GE = 2
# rate in bytes/s, overheads and cells: struct tc_netem_rate
_NETEM_RATE_OPT = struct.Struct("=IiIi")
_FASTEST_NETEM_BYTES_PER_S = 2**32 - 1
_TICK_S = 64e-9
"""Unit in which qdiscs keep times that once were bytes (PSCHED_SHIFT)."""
_TCMSG = struct.Struct("=BBHiIII")  # family, pads, ifindex, handle, parent, info
_NLMSG_BYTES = 16
_IFINFOMSG_BYTES, _IFLA_STATS64 = 16, 23
_STATS2, _STATS_BASIC, _STATS_QUEUE = 7, 1, 3


def frame_bytes(mtu: int) -> int:
    """Wire size of a full frame."""
    return mtu + ETHERNET_HEADER_BYTES


def burst_bytes(rate_bps: int, frame: int = ETHERNET_FRAME_BYTES, shaper: str = "htb") -> int:
    """Bucket of the shaper for a rate in bits/s. htb: 1 ms of line rate, but at least a frame. tbf:
    4 ms, at least 8 frames.

    Two opposing needs. The timer that refills the bucket, and the softirq behind it, run late on a
    busy machine, and a bucket that was full meanwhile loses rate. But a full bucket is a free ride
    after every pause, and a training step has one.

    Measured on 2 cores with these buckets, goodput over 5 s against what TCP can have
    (``testbed calibrate``): of one flow 99.99 to 100.00 % at 1, 50 and 900 Mbit/s, with and without
    a delay of up to 80 ms one way; of the slowest of four in a ring 98.8, 99.6 and 100.9 %. With 2
    frames instead of one it was the same.
    """
    share_s, frames = (0.001, 1) if shaper == "htb" else (0.004, 8)
    return max(math.ceil(rate_bps / 8 * share_s), frames * frame)


def tbf_max_packet_bytes(rates_bps: Iterable[int | None], frame: int = ETHERNET_FRAME_BYTES) -> int:
    """Wire size that no packet may exceed with tbf, so that it fits the bucket of every rate that a
    lab's links will ever have.

    tbf cuts a packet that is larger than the bucket when it is queued, but not one that was queued
    before the bucket became smaller: that one can never collect its tokens, and the link stands
    still until the rate rises again.
    """
    limited = [rate for rate in rates_bps if rate is not None]
    return min((burst_bytes(rate, frame, "tbf") for rate in limited), default=UNCUT_PACKET_BYTES)


def gso_limits(max_gso_bytes: int, mtu: int = 1500) -> tuple[int, int]:
    """(IFLA_GSO_MAX_SIZE, IFLA_GSO_MAX_SEGS) for an interface whose packets must not exceed a wire
    size."""
    frames = max(1, max_gso_bytes // frame_bytes(mtu))
    return min(frames * (mtu - _TCP_HEADERS_BYTES), 65536), min(frames, 65535)


def queue_bytes(
    parameters: LinkParameters, rate_bps: int, frame: int = ETHERNET_FRAME_BYTES
) -> int:
    """Bytes that may wait at a rate: the time or size asked for, but never less than one frame."""
    wanted = (
        parameters.queue_bytes
        if parameters.queue_bytes is not None
        else math.ceil(rate_bps / 8 * parameters.queue_s)
    )
    return min(max(wanted, frame), 2**32 - 1)


@dataclass(frozen=True, slots=True)
class Htb:
    """Hierarchical token bucket with one class, to which everything belongs."""

    kind = "htb"
    handle = _HTB

    def tc_arguments(self) -> str:
        return f"htb default {_DEFAULT_CLASS}"


@dataclass(frozen=True, slots=True)
class HtbClass:
    """The class of an htb: rate in bits/s, bucket in bytes."""

    rate_bps: int
    burst_bytes: int
    kind = "htb"
    handle = _HTB

    def tc_arguments(self) -> str:
        rate, burst = f"{self.rate_bps}bit", self.burst_bytes
        return f"htb rate {rate} ceil {rate} burst {burst} cburst {burst} quantum {_QUANTUM}"


_QUANTUM = 60_000
"""Of one class among none it means nothing; without it the kernel derives one and complains."""


@dataclass(frozen=True, slots=True)
class SegmentingTbf:
    """A tbf that does not limit, and cuts packets that are larger than ``largest_bytes`` into
    frames.

    shut: it lets nothing pass any more, once its bucket has been used up.
    """

    largest_bytes: int
    limit_bytes: int
    shut: bool = False
    kind = "tbf"
    handle = _CUT

    @property
    def rate_bps(self) -> int:
        return _SHUT_BPS if self.shut else _CUT_BPS

    def tc_arguments(self) -> str:
        return f"tbf rate {self.rate_bps}bit burst {self.largest_bytes} limit {self.limit_bytes}"


@dataclass(frozen=True, slots=True)
class Bfifo:
    """Plain queue of a number of bytes."""

    limit_bytes: int
    kind = "bfifo"
    handle = _FIFO

    def tc_arguments(self) -> str:
        return f"bfifo limit {self.limit_bytes}"


@dataclass(frozen=True, slots=True)
class Codel:
    """A queue that CoDel manages (RFC 8289), by flows if ``fair`` (fq_codel, RFC 8290); times in
    µs, packets at most."""

    fair: bool
    target_us: int
    interval_us: int
    limit_packets: int
    ecn: bool
    handle = _AQM

    @property
    def kind(self) -> str:
        return "fq_codel" if self.fair else "codel"

    def tc_arguments(self) -> str:
        times = f"target {self.target_us}us interval {self.interval_us}us"
        return f"{self.kind} limit {self.limit_packets} {times} {'ecn' if self.ecn else 'noecn'}"


@dataclass(frozen=True, slots=True)
class Cake:
    """A queue for each host and each flow, managed by COBALT (tc-cake(8)); times in µs, and bytes
    of memory.

    It does not limit the rate, which htb does, nor cut packets, which has been done, nor go by the
    packets' classes, which hosts do not set. It marks packets of connections that understand it,
    with no way to say no.
    """

    target_us: int
    interval_us: int
    memory_bytes: int
    kind = "cake"
    handle = _AQM

    def tc_arguments(self) -> str:
        # tc sets the target to a twentieth of rtt, so on thin links, whose target is longer, this
        # is not quite the same.
        return (
            f"cake unlimited besteffort no-split-gso rtt {self.interval_us}us memlimit"
            f" {self.memory_bytes}"
        )


@dataclass(frozen=True, slots=True)
class Tbf:
    """Token bucket: rate in bits/s; bucket and queue in bytes."""

    rate_bps: int
    burst_bytes: int
    limit_bytes: int
    kind = "tbf"
    handle = _TBF

    def tc_arguments(self) -> str:
        return f"tbf rate {self.rate_bps}bit burst {self.burst_bytes} limit {self.limit_bytes}"


@dataclass(frozen=True, slots=True)
class Netem:
    """Delay and its standard deviation in ns; shares of packets between 0 and 1; how many packets
    it can hold.

    in_order: jitter lets no packet overtake another. seed: of the random numbers; kernels before
    6.6 do not take one.
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
    in_order: bool = False
    kind = "netem"
    handle = _NETEM

    def tc_arguments(self) -> str:
        words = [f"netem limit {self.limit_packets}"]
        if self.delay_ns or self.jitter_ns:
            words.append(f"delay {self.delay_ns / 1e3:g}us")
        if self.jitter_ns:
            words.append(f"{self.jitter_ns / 1e3:g}us distribution {self.distribution}")
        if self.in_order:
            # a netem with a rate keeps the order
            words.append(f"rate {8 * _FASTEST_NETEM_BYTES_PER_S}bit")
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
    handle = _PLAIN

    def tc_arguments(self) -> str:
        return f"pfifo limit {self.limit_packets}"


Node = Htb | HtbClass | SegmentingTbf | Bfifo | Codel | Cake | Tbf | Netem | Pfifo
Tree = tuple[Node, ...]
"""Qdiscs, and htb's class, from the root downwards, each the only child of the one before."""


def compile_tree(
    parameters: LinkParameters,
    *,
    impaired: bool = False,
    shaper: str = "htb",
    mtu: int = 1500,
    max_packet_bytes: int = 0,
    seed: int = 0,
) -> Tree:
    """The qdisc tree of one direction.

    max_packet_bytes: largest packet that can arrive; the bucket of a tbf is never smaller
    (``tbf_max_packet_bytes``). impaired: put netem into the tree even if these parameters do not
    need it, because later ones on the same link will; so that no change ever has to replace the
    root and lose what is queued.
    """
    below, waiting = _limiter(parameters, shaper, frame_bytes(mtu), max_packet_bytes)
    if not (impaired or parameters.impaired):
        return below
    # Room for a bandwidth-delay product of the smallest frames; older kernels count the packets of
    # the child, too.
    flying = (
        (parameters.rate_bps or 10**10)
        / 8
        * (parameters.delay_s + 4 * parameters.jitter_s)
        / _SMALLEST_FRAME_BYTES
    )
    netem = Netem(
        delay_ns=round(parameters.delay_s * 1e9),
        jitter_ns=round(parameters.jitter_s * 1e9),
        distribution=parameters.distribution,
        loss=parameters.loss,
        duplicate=parameters.duplicate,
        corrupt=parameters.corrupt,
        reorder=parameters.reorder,
        limit_packets=min(math.ceil(flying) + waiting + 1000, 2**31),
        seed=seed,
        in_order=parameters.in_order,
    )
    return (netem, *below)


def _limiter(
    parameters: LinkParameters, shaper: str, frame: int, max_packet_bytes: int
) -> tuple[Tree, int]:
    """What limits rate and queue, and how many packets may wait in it."""
    if parameters.rate_bps is None:
        return (Pfifo(_UNLIMITED_PACKETS),), _UNLIMITED_PACKETS
    if parameters.rate_bps == 0:
        return _outage(parameters, shaper, frame, max_packet_bytes)
    burst = burst_bytes(parameters.rate_bps, frame, shaper)
    limit = queue_bytes(parameters, parameters.rate_bps, frame)
    waiting = limit // _SMALLEST_FRAME_BYTES
    if shaper == "tbf":
        # A tbf holds what waits for its bucket, so a queue below that could never fill the bucket.
        burst = max(burst, min(max_packet_bytes, UNCUT_PACKET_BYTES))
        limit = max(limit, burst + frame)
        return (Tbf(parameters.rate_bps, burst, limit),), waiting
    whole = (
        math.ceil(parameters.rate_bps / 8 * _WHOLE_S) if parameters.rate_bps >= _WHOLE_BPS else 0
    )
    # What is larger than the queue could never enter it.
    cut = SegmentingTbf(max(frame, min(max(burst, min(whole, UNCUT_PACKET_BYTES)), limit)), limit)
    return (
        Htb(),
        HtbClass(parameters.rate_bps, burst),
        cut,
        _queue(parameters, parameters.rate_bps, limit, frame),
    ), waiting


def _outage(
    parameters: LinkParameters, shaper: str, frame: int, max_packet_bytes: int
) -> tuple[Tree, int]:
    """Nothing passes and what comes waits; htb alone could not be told so without a debt that
    outlasts the outage.

    A frame that leaves at a low rate leaves a debt of its time at that rate, 1.5 s at 8 kbit/s,
    which no rise shortens. So the class keeps a rate, and it is the tbf that is shut. A queue given
    as a time holds as many bytes as at ``_OUTAGE_BPS``.
    """
    tree, waiting = _limiter(
        parameters.with_changes({"rate_bps": _OUTAGE_BPS}), shaper, frame, max_packet_bytes
    )
    return tuple(_shut(node) for node in tree), waiting


def _shut(node: Node) -> Node:
    match node:
        case SegmentingTbf():
            return replace(node, shut=True)
        case Tbf():
            return replace(node, rate_bps=_SHUT_BPS)
        case _:
            return node


def _queue(
    parameters: LinkParameters, rate_bps: int, limit: int, frame: int
) -> Bfifo | Codel | Cake:
    if parameters.aqm == "fifo":
        return Bfifo(limit)
    # One frame must be able to wait for the one before it (RFC 8289, section 4.4).
    target_s = max(_CODEL_TARGET_S, 1.5 * frame * 8 / rate_bps)
    interval_s = max(_CODEL_INTERVAL_S, 10 * target_s)
    target_us, interval_us, packets = (
        round(target_s * 1e6),
        round(interval_s * 1e6),
        max(1, limit // frame),
    )
    if parameters.aqm == "cake":
        return Cake(target_us, interval_us, min(packets * (frame + _SKB_BYTES), 0xFFFFFFFF))
    return Codel(parameters.aqm == "fq_codel", target_us, interval_us, packets, parameters.ecn)


def bucket_of(tree: Tree) -> int | None:
    """Bucket of the shaper in bytes; None where nothing limits."""
    return next((node.burst_bytes for node in tree if isinstance(node, HtbClass | Tbf)), None)


def queue_of(tree: Tree) -> int | None:
    """Bytes that may wait, as far as bytes limit that; None where nothing does, or packets do and
    an AQM drops sooner."""
    if any(isinstance(node, Codel | Cake) for node in tree):
        return None
    return next(
        (
            node.limit_bytes
            for node in reversed(tree)
            if isinstance(node, Bfifo | Tbf | SegmentingTbf)
        ),
        None,
    )


@lru_cache
def distribution_table(name: str) -> bytes:
    """Table of a delay distribution for netem: quantiles with mean 0 and standard deviation 1, as
    int16 in units of 1/8192.

    normal: cut at 4 standard deviations by the range of int16. uniform. pareto: shape 3, netem's
    own choice, cut likewise.
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


def place_of(tree: Sequence[Node], level: int) -> tuple[int, int]:
    """(handle, parent) of what is at a level of its tree."""
    handle = tree[level].handle << 16
    if isinstance(tree[level], HtbClass):
        return handle | _DEFAULT_CLASS, handle
    parent = TC_H_ROOT if level == 0 else (tree[level - 1].handle << 16) | 1
    return handle, parent


def is_netem(handle: int) -> bool:
    """True if a qdisc's handle is that of our netem."""
    return handle >> 16 == _NETEM


def is_queue(handle: int) -> bool:
    """True if a qdisc's handle is that of the one in which our packets wait for the limiter."""
    return handle >> 16 in (_FIFO, _AQM, _TBF, _PLAIN)


def is_limiter(handle: int) -> bool:
    """True if a qdisc's handle is that of the one that limits the rate."""
    return handle >> 16 in (_HTB, _TBF)


def changed(tree: Tree, before: Tree | None) -> list[int]:
    """The levels that have to be sent so that one tree becomes another; all, where there is none.

    Where a kind differs, everything from there downwards is made anew; a qdisc that stays as it is,
    is not touched.
    """
    for level, node in enumerate(tree):
        if (
            before is None
            or level >= len(before)
            or (type(before[level]), before[level].kind) != (type(node), node.kind)
        ):
            kept = [one for one in range(level) if before is not None and tree[one] != before[one]]
            return [*kept, *range(level, len(tree))]
    return [
        level for level, node in enumerate(tree) if before is not None and node != before[level]
    ]


def tc_commands(
    tree: Tree, interface: str, prefix: str = "", before: Tree | None = None
) -> list[str]:
    """The ``tc`` commands that would make the same tree, or make it of the one before."""
    commands = []
    for level in changed(tree, before):
        handle, parent = place_of(tree, level)
        place = "root" if parent == TC_H_ROOT else f"parent {parent >> 16:x}:{parent & 0xFFFF:x}"
        if isinstance(tree[level], HtbClass):
            what, place = (
                "class",
                f"parent {parent >> 16:x}: classid {handle >> 16:x}:{handle & 0xFFFF:x}",
            )
        else:
            what, place = "qdisc", f"{place} handle {handle >> 16:x}:"
        commands.append(
            f"{prefix}tc {what} replace dev {interface} {place} {tree[level].tc_arguments()}"
        )
    return commands


def _u32(share: float) -> int:
    return round(share * 0xFFFFFFFF)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _gilbert_elliott(loss: Loss) -> bytes:
    """struct tc_netem_gemodel: p, r, h, k1; netem keeps what passes in the bad state and what is
    lost in the good one."""
    p, r = loss.transitions
    return struct.pack("=4I", _u32(p), _u32(r), _u32(1 - loss.bad_loss), _u32(loss.good_loss))


def _options(node: Node) -> bytes:
    """TCA_OPTIONS as <linux/pkt_sched.h> lays them out."""
    match node:
        case Tbf():
            return _tbf_options(node.rate_bps, node.burst_bytes, node.limit_bytes)
        case SegmentingTbf():
            return _tbf_options(node.rate_bps, node.largest_bytes, node.limit_bytes)
        case Htb():
            return _attribute(_HTB_INIT, _HTB_GLOB.pack(_HTB_VERSION, 10, _DEFAULT_CLASS, 0, 0))
        case HtbClass():
            rate = node.rate_bps // 8
            spec = (0, _LINKLAYER_ETHERNET, 0, 0, 0, min(rate, 0xFFFFFFFF))
            ticks = _ticks(node.burst_bytes, rate)
            out = _attribute(_HTB_PARMS, _HTB_OPT.pack(*spec, *spec, ticks, ticks, _QUANTUM, 0, 0))
            if rate > 0xFFFFFFFF:
                out += _attribute(_HTB_RATE64, struct.pack("=Q", rate)) + _attribute(
                    _HTB_CEIL64, struct.pack("=Q", rate)
                )
            return out
        case Bfifo():
            return struct.pack("=I", node.limit_bytes)
        case Codel():
            values = {
                _CODEL_TARGET: node.target_us,
                _CODEL_LIMIT: node.limit_packets,
                _CODEL_INTERVAL: node.interval_us,
                _CODEL_ECN: int(node.ecn),
            }
            return b"".join(
                _attribute(kind, struct.pack("=I", value)) for kind, value in values.items()
            )
        case Cake():
            values = {
                _CAKE_DIFFSERV: _CAKE_BEST_EFFORT,
                _CAKE_INTERVAL: node.interval_us,
                _CAKE_TARGET: node.target_us,
                _CAKE_MEMORY: node.memory_bytes,
                _CAKE_SPLIT_GSO: 0,
            }
            out = _attribute(_CAKE_RATE64, struct.pack("=Q", 0))
            return out + b"".join(
                _attribute(kind, struct.pack("=I", value)) for kind, value in values.items()
            )
        case Netem():
            # All attributes every time: netem keeps what a change leaves out, so an impairment
            # could never be taken back.
            loss = node.loss
            out = _NETEM_QOPT.pack(
                0,
                node.limit_packets,
                _u32(loss.share) if loss.burst is None else 0,
                1 if node.reorder else 0,
                _u32(node.duplicate),
                0,
            )
            out += _attribute(_NETEM_LATENCY64, struct.pack("=q", node.delay_ns))
            out += _attribute(_NETEM_JITTER64, struct.pack("=q", node.jitter_ns))
            out += _attribute(_NETEM_CORR, struct.pack("=3I", 0, _u32(loss.correlation), 0))
            out += _attribute(_NETEM_REORDER, struct.pack("=2I", _u32(node.reorder), 0))
            out += _attribute(_NETEM_CORRUPT, struct.pack("=2I", _u32(node.corrupt), 0))
            if loss.burst is not None:
                out += _attribute(
                    _NETEM_LOSS | _NESTED, _attribute(_NETEM_LOSS_GE, _gilbert_elliott(loss))
                )
            if node.jitter_ns:
                out += _attribute(_NETEM_DELAY_DIST, distribution_table(node.distribution))
            out += _attribute(
                _NETEM_RATE,
                _NETEM_RATE_OPT.pack(_FASTEST_NETEM_BYTES_PER_S if node.in_order else 0, 0, 0, 0),
            )
            if node.seed:
                out += _attribute(_NETEM_PRNG_SEED, struct.pack("=Q", node.seed))
            return out
        case Pfifo():
            return struct.pack("=I", node.limit_packets)


def _tbf_options(rate_bps: int, burst: int, limit: int) -> bytes:
    rate = rate_bps // 8
    parms = _TBF_PARMS.pack(0, min(rate, 0xFFFFFFFF), 0, 0, limit, 0, 0)
    large = _attribute(_TBF_RATE64, struct.pack("=Q", rate)) if rate > 0xFFFFFFFF else b""
    return (
        _attribute(_TBF_PARMS_KIND, parms)
        + large
        + _attribute(_TBF_BURST, struct.pack("=I", burst))
    )


def _ticks(burst: int, rate: int) -> int:
    return min(math.ceil(burst / rate / _TICK_S), 0xFFFFFFFF)


def requests(
    tree: Tree, ifindex: int, interface: str, before: Tree | None = None
) -> list[tuple[Node, Request]]:
    """The netlink requests that put a tree on an interface, or make it of the one that is there;
    each with what it makes."""
    out = []
    for level in changed(tree, before):
        node = tree[level]
        handle, parent = place_of(tree, level)
        body = _TCMSG.pack(0, 0, 0, ifindex, handle, parent, 0)
        body += _attribute(_TCA_KIND, node.kind.encode() + b"\0") + _attribute(
            _TCA_OPTIONS, _options(node)
        )
        flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE
        kind = RTM_NEWTCLASS if isinstance(node, HtbClass) else RTM_NEWQDISC
        header = struct.pack("=IHHII", _NLMSG_BYTES + len(body), kind, flags, 0, 0)
        out.append((node, Request(header + body, f"{interface}: {node.tc_arguments()}")))
    return out


def same_on_kernel(wanted: Node, answer: bytes) -> bool:
    """True if a message of the kernel (RTM_NEWQDISC, RTM_NEWTCLASS) has what was asked for, within
    its own rounding.

    Buckets are kept as time in ticks of 64 ns, so a burst may come back a few bytes smaller.
    """
    found = {
        kind: (start, end) for kind, start, end in attributes(answer, _NLMSG_BYTES + _TCMSG.size)
    }
    start, end = found.get(_TCA_KIND, (0, 0))
    if answer[start:end].rstrip(b"\0") != wanted.kind.encode() or _TCA_OPTIONS not in found:
        return False
    start, end = found[_TCA_OPTIONS]
    options = answer[start:end]
    offset = _NETEM_QOPT.size if isinstance(wanted, Netem) else 0
    parts = (
        {}
        if isinstance(wanted, Pfifo | Bfifo)
        else {kind: options[a:b] for kind, a, b in attributes(options, offset)}
    )
    match wanted:
        case Tbf() | SegmentingTbf():
            _, rate, _, _, limit, buffer, _ = _TBF_PARMS.unpack_from(parts[_TBF_PARMS_KIND])
            if _TBF_RATE64 in parts:
                (rate,) = struct.unpack("=Q", parts[_TBF_RATE64])
            # The kernel keeps a bucket as time: nothing where this does not limit, more than it can
            # tell where it is shut.
            if isinstance(wanted, SegmentingTbf) or wanted.rate_bps == _SHUT_BPS:
                return rate == wanted.rate_bps // 8 and limit == wanted.limit_bytes
            off = abs(buffer * _TICK_S * rate - wanted.burst_bytes)
            return (
                rate == wanted.rate_bps // 8
                and limit == wanted.limit_bytes
                and off <= _TICK_S * rate + 1
            )
        case Htb():
            return _HTB_GLOB.unpack_from(parts[_HTB_INIT])[2] == _DEFAULT_CLASS
        case HtbClass():
            words = _HTB_OPT.unpack_from(parts[_HTB_PARMS])
            rates = [words[5], words[11]]
            for place, kind in enumerate((_HTB_RATE64, _HTB_CEIL64)):
                if kind in parts:
                    (rates[place],) = struct.unpack("=Q", parts[kind])
            rate = wanted.rate_bps // 8
            return rates == [rate, rate] and all(
                abs(found - _ticks(wanted.burst_bytes, rate)) <= 1 for found in words[12:14]
            )
        case Bfifo():
            return struct.unpack("=I", options) == (wanted.limit_bytes,)
        case Codel():
            target, limit, interval, ecn = (
                struct.unpack("=I", parts[kind])[0]
                for kind in (_CODEL_TARGET, _CODEL_LIMIT, _CODEL_INTERVAL, _CODEL_ECN)
            )
            # CoDel keeps times in units of 1024 ns.
            near = abs(target - wanted.target_us) <= 2 and abs(interval - wanted.interval_us) <= 2
            return near and limit == wanted.limit_packets and bool(ecn) == wanted.ecn
        case Cake():
            sent = {kind: _options(wanted)[a:b] for kind, a, b in attributes(_options(wanted), 0)}
            return all(
                _stripped(parts.get(kind)) == _stripped(value) for kind, value in sent.items()
            )
        case Netem():
            # What is sent and comes back the same; the table does not come back, and the seed not
            # from old kernels.
            sent = {
                kind: _options(wanted)[a:b]
                for kind, a, b in attributes(_options(wanted), _NETEM_QOPT.size)
            }
            same = (
                _NETEM_LATENCY64,
                _NETEM_JITTER64,
                _NETEM_CORR,
                _NETEM_REORDER,
                _NETEM_CORRUPT,
                _NETEM_LOSS,
                _NETEM_RATE,
            )
            _, limit, loss, _, duplicate, _ = _NETEM_QOPT.unpack_from(options)
            _, limit_sent, loss_sent, _, duplicate_sent, _ = _NETEM_QOPT.unpack_from(
                _options(wanted)
            )
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
    """The kernel's counters of one qdisc: cumulative, except what waits now.

    lost: packets that were lost on purpose, by the netem above it or by the delay line; None where
    there is neither.
    """

    bytes: int
    packets: int
    drops: int
    overlimits: int
    backlog_bytes: int
    qlen: int
    lost: int | None = None


def read_interface_drops(answer: bytes) -> int:
    """tx_dropped of one interface message (RTM_NEWLINK): the eighth number of struct
    rtnl_link_stats64."""
    for kind, start, _ in attributes(answer, _NLMSG_BYTES + _IFINFOMSG_BYTES):
        if kind == _IFLA_STATS64:
            return int(struct.unpack_from("=8Q", answer, start)[7])
    return 0


def read_counters(answer: bytes) -> tuple[int, int, int, QdiscCounters | None]:
    """(ifindex, handle, parent, counters) of one qdisc message; without pyroute2, as it is read ten
    times a second.

    Layout: TCA_STATS2 holds TCA_STATS_BASIC (u64 bytes, u32 packets) and TCA_STATS_QUEUE (u32 qlen,
    backlog, drops, requeues, overlimits), <linux/gen_stats.h>.
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
                return (
                    ifindex,
                    handle,
                    parent,
                    QdiscCounters(basic[0], basic[1], drops, overlimits, backlog, qlen),
                )
    return ifindex, handle, parent, None
