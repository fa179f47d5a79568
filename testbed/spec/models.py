"""The YAML spec as pydantic models. What a key means stands here; how it is read is in ``load``."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializeAsAny,
    StrictBool,
    StrictFloat,
    StrictInt,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from netsenseml.catalog import METHODS, check_method
from testbed import catalog
from testbed.links.state import AQMS, DIRECTIONS, DISTRIBUTIONS, LinkState, Loss
from testbed.protocol import StopConfig
from testbed.spec import units
from testbed.spec.errors import did_you_mean
from testbed.traffic.flows import MAX_STREAMS, ONE_STREAM, Duration, Streams

if TYPE_CHECKING:
    from testbed.timeline.updates import StartContext, Update


class Queue(NamedTuple):
    """How much may wait at a link: a time at the line rate, or bytes. Exactly one of them is
    set."""

    seconds: float | None
    bytes: int | None


def parse_queue(text: object) -> Queue:
    """A queue from "50ms" or "64KiB"."""
    if isinstance(text, Queue):
        return text
    try:
        return Queue(units.parse_time(text), None)
    except ValueError as no_time:
        try:
            return Queue(None, units.parse_size(text))
        except ValueError as no_size:
            if "out of range" in str(no_time) or "negative" in str(no_time):
                raise no_time from None
            if "out of range" in str(no_size):
                raise no_size from None
            times, sizes = ", ".join(units.TIMES), ", ".join(units.SIZES)
            raise ValueError(
                f"{text!r} is not a queue; write a time like 50ms ({times}) or a size like 64KiB"
                f" ({sizes})"
            ) from None


def _format_queue(queue: Queue) -> str:
    return (
        units.format_size(queue.bytes)
        if queue.bytes is not None
        else units.format_time(queue.seconds or 0.0)
    )


def written_as(name: str) -> WithJsonSchema:
    """Names the definition in the JSON Schema that says what people write for a value
    (``spec.schema``)."""
    return WithJsonSchema({"$comment": name})


Rate = Annotated[
    int,
    BeforeValidator(units.parse_rate),
    PlainSerializer(units.format_rate, return_type=str),
    written_as("rate"),
]
Time = Annotated[
    float,
    BeforeValidator(units.parse_time),
    PlainSerializer(units.format_time, return_type=str),
    written_as("time"),
]
Delay = Annotated[Time, Field(le=units.MAX_DELAY_S)]
Share = Annotated[float, BeforeValidator(units.parse_share), written_as("share")]
Size = Annotated[
    int,
    BeforeValidator(units.parse_size),
    PlainSerializer(units.format_size, return_type=str),
    written_as("size"),
]
Memory = Annotated[
    int,
    BeforeValidator(units.parse_memory),
    PlainSerializer(units.format_size, return_type=str),
    written_as("size"),
]
QueueText = Annotated[
    Queue,
    BeforeValidator(parse_queue),
    PlainSerializer(_format_queue, return_type=str),
    written_as("queue"),
]


class Model(BaseModel):
    """Base of all parts of a spec: frozen, and an unknown key is an error that names the nearest
    valid one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        valid = [field.alias or name for name, field in cls.model_fields.items()]
        if not isinstance(data, dict):
            raise PydanticCustomError(
                "mapping", f"must be a mapping with the keys {', '.join(valid)}, not {data!r:.40}"
            )
        for key in data:
            if key not in valid:
                raise PydanticCustomError(
                    "at_key", f"unknown key; {did_you_mean(str(key), valid)}", {"path": [key]}
                )
        check_filled(data, dict(zip(valid, cls.model_fields.values(), strict=True)))
        return data


def check_filled(
    data: Mapping[str, Any], fields: Mapping[str, FieldInfo] = MappingProxyType({})
) -> None:
    """Refuse a key with nothing behind it: it would count as left out, and for a rate that means no
    limit."""
    for key, value in data.items():
        if value is None:
            examples = fields[key].examples if key in fields else None
            raise PydanticCustomError(
                "at_key", empty(examples[0] if examples else None), {"path": [key]}
            )


def empty(example: str | None = None) -> str:
    """What is wrong with a key that has nothing behind it, or null."""
    return (
        f"is empty; give it a value{f' such as {example}' if example else ''}, or remove the line"
    )


class LossSpec(Model):
    """Loss of packets, written as ``1%`` or as a mapping.

    share with correlation: random loss. share with burst: a Gilbert model; with bad and good, too:
    Gilbert-Elliott.
    """

    share: Share = Field(examples=["1%"])
    """Of all packets."""
    correlation: Share = 0.0
    """Of random loss: ties each packet to the one before."""
    burst: StrictFloat | None = Field(None, ge=1, le=1e6)
    """Packets are lost in bursts of this mean length, in packets."""
    bad: Share = 1.0
    """Loss within a burst."""
    good: Share = 0.0
    """Loss between bursts."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return data if isinstance(data, dict | LossSpec) else {"share": data}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.burst is None and (self.bad != 1 or self.good != 0):
            raise PydanticCustomError(
                "at_key",
                "is missing; bad and good belong to bursts of a mean length",
                {"path": ["burst"]},
            )
        if self.burst is not None and self.correlation:
            text = "goes with random loss only; bursts have their own"
            raise PydanticCustomError("at_key", text, {"path": ["correlation"]})
        if self.burst is not None and not self.good <= self.share < self.bad:
            text = (
                f"{self.share:g} must lie between the loss in the good state ({self.good:g}) and in"
                f" the bad one ({self.bad:g})"
            )
            raise PydanticCustomError("at_key", text, {"path": ["share"]})
        if self.burst is not None and self.burst * (self.bad - self.share) < self.share - self.good:
            text = (
                f"bursts of mean length {self.burst:g} cannot make up a loss of {self.share:g};"
                " make them longer"
            )
            raise PydanticCustomError("at_key", text, {"path": ["burst"]})
        return self

    def loss(self) -> Loss:
        """As a value of ``links.state``."""
        bursts = (self.burst, self.bad, self.good) if self.share or self.good else (None, 1.0, 0.0)
        return Loss(self.share, self.correlation, *bursts)


NO_ECN = "needs a queue that marks packets, and fifo only drops them"


class LinkParametersSpec(Model):
    """Properties of one direction of a link; what is left out stays as it is."""

    rate: Rate | None = Field(default=None, examples=["50mbit"])
    """Of Ethernet frames; no limit if left out at the beginning."""
    queue: QueueText | None = Field(default=None, examples=["50ms"])
    """How much may wait, as a time at the rate or in bytes; one frame always may, and bytes that
    hold none are refused."""
    delay: Delay | None = Field(default=None, examples=["10ms"])
    """One way, at most 1000s."""
    jitter: Delay | None = Field(default=None, examples=["2ms"])
    """Standard deviation of the delay, which is at least twice as long."""
    distribution: Literal[*DISTRIBUTIONS] | None = Field(default=None, examples=["normal"])  # type: ignore[valid-type]
    """Of the delay around its mean, with jitter as standard deviation."""
    loss: LossSpec | None = Field(default=None, examples=["1%"])
    """Share of the packets that are lost, or how they are."""
    duplicate: Share | None = Field(default=None, examples=["1%"])
    """Share of the packets that arrive twice."""
    corrupt: Share | None = Field(default=None, examples=["1%"])
    """Share of the packets in which a bit is wrong."""
    reorder: Share | None = Field(default=None, examples=["1%"])
    """Share of the packets that are not delayed, and so overtake others."""
    in_order: StrictBool | None = Field(default=None, examples=["true"])
    """Jitter lets no packet overtake another, as on most real paths; otherwise it reorders packets,
    as in netem."""
    aqm: Literal[*AQMS] | None = Field(default=None, examples=["fq_codel"])  # type: ignore[valid-type]
    """What manages the queue. fifo: drops what does not fit; codel: also drops what has waited for
    too long; fq_codel: that, and a queue for each flow; cake: that, and a queue for each host."""
    ecn: StrictBool | None = Field(default=None, examples=["true"])
    """The queue marks packets of flows that understand it, where it would drop them. All hosts'
    flows do where one link has it, and then cake marks, too, whatever is said of its own link."""

    @model_validator(mode="after")
    def _marks_or_drops(self) -> Self:
        if self.ecn and self.aqm == "fifo":
            raise PydanticCustomError(
                "at_key",
                f"{NO_ECN}; use aqm: codel, fq_codel or cake, or remove it",
                {"path": ["ecn"]},
            )
        return self

    def changes(self) -> dict[str, Any]:
        """The given properties under the names of ``LinkParameters``."""
        out: dict[str, Any] = {}
        if self.queue is not None:
            out["queue_bytes"] = self.queue.bytes
            if self.queue.seconds is not None:
                out["queue_s"] = self.queue.seconds
        for name, target in _DIRECT.items():
            if (value := getattr(self, name)) is not None:
                out[target] = value
        if self.loss is not None:
            out["loss"] = self.loss.loss()
        return out


_DIRECT = {
    "rate": "rate_bps",
    "delay": "delay_s",
    "jitter": "jitter_s",
    "distribution": "distribution",
    "duplicate": "duplicate",
    "corrupt": "corrupt",
    "reorder": "reorder",
    "in_order": "in_order",
    "aqm": "aqm",
    "ecn": "ecn",
}
_BOTH_DIRECTIONS = ("rate_bps", "queue_s", "queue_bytes", "aqm", "ecn")


def _up(value: Any) -> Any:
    # A union would report the faults of both its sides; a bool is itself, all else must be link
    # parameters.
    return (
        value
        if isinstance(value, bool | LinkParametersSpec) or value is None
        else LinkParametersSpec.model_validate(value)
    )


class LinkSpec(LinkParametersSpec):
    """Properties of a link: both directions, then what differs in one of them.

    Rate, queue, aqm and ecn hold in both directions. All else is put on down, where netem does not
    get in the way of TCP's small queues, so that a one-way delay of 10 ms is an RTT of 20 ms
    between two workers; what stands under ``up`` is on up. ``up: false`` is a partition,
    ``up: true`` ends it.
    """

    up: Annotated[LinkParametersSpec | bool | None, BeforeValidator(_up)] = None
    """What differs from the worker to the switch; false cuts the link off, of which nobody is told,
    and true joins it again."""
    down: LinkParametersSpec | None = None
    """What differs from the switch to the worker."""

    def changes_by_direction(self, trunk: bool = False) -> dict[str, dict[str, Any]]:
        """{"up": …, "down": …} under the names of ``LinkParameters``; on a trunk everything holds
        in both directions."""
        both = self.changes()
        up = (
            both
            if trunk
            else {name: value for name, value in both.items() if name in _BOTH_DIRECTIONS}
        )
        return {
            "up": up | (self.up.changes() if isinstance(self.up, LinkParametersSpec) else {}),
            "down": both | (self.down.changes() if self.down else {}),
        }

    def applied_to(self, state: LinkState, trunk: bool = False) -> LinkState:
        """The state with these properties replaced."""
        changes = self.changes_by_direction(trunk)
        up, down = (getattr(state, side).with_changes(changes[side]) for side in DIRECTIONS)
        return LinkState(
            up, down, connected=self.up if isinstance(self.up, bool) else state.connected
        )


class LinkChange(LinkSpec):
    """Properties that a link gets while it is in use, by a schedule or by hand."""

    @model_validator(mode="after")
    def _keeps_its_queue(self) -> Self:
        for path, part in (((), self), (("up",), self.up), (("down",), self.down)):
            for key, reason in KEPT.items():
                if isinstance(part, LinkParametersSpec) and getattr(part, key) is not None:
                    text = (
                        f"cannot change while a link is in use, as {reason}; give it under network"
                    )
                    raise PydanticCustomError("at_key", text, {"path": [*path, key]})
        return self


KEPT = {
    "aqm": "what waits in its queue would be lost",
    "ecn": "both ends of a connection agree on it when they open it",
}


def parse_congestion(value: object) -> str:
    """The name of a congestion control, as the kernel might know it."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,15}", value):
        raise ValueError(
            f"{value!r:.40} is no congestion control; write its name in the kernel, such as cubic,"
            " reno or bbr"
        )
    return value


CongestionControl = Annotated[str, BeforeValidator(parse_congestion), written_as("congestion")]


OVERLAY_MTU = 1450
"""What VXLAN leaves of 1500 bytes: it adds 50, with Ethernet's 14 (RFC 7348)."""
NodeLabel = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
MIN_IPV6_MTU = 1280
"""RFC 8200; Linux takes IPv6 off an interface with less."""


class NetworkSpec(Model):
    """How hosts are joined."""

    topology: Literal["star", "dumbbell", "regions"] = "star"
    """star: one switch. dumbbell: two switches with workers at the ``left`` and all others at the
    right, and the shared ``trunk`` between them. regions: one switch for each of the ``regions``,
    and a trunk ``between`` any two of them."""
    link: LinkSpec = LinkSpec()
    """Every worker's access link."""
    links: dict[str, LinkSpec] = Field(default_factory=dict, examples=["{w3: {rate: 20mbit}}"])
    """What differs, by worker (w0, w1, …) or trunk."""
    trunk: LinkSpec | None = Field(default=None, examples=["{rate: 20mbit}"])
    """Of a dumbbell. A trunk has delay and all other impairments in both directions."""
    left: list[str] | None = Field(default=None, examples=["[w0, w1]"])
    """Workers at the left of a dumbbell; the first half of them if left out."""
    regions: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*$")], list[str]] | None = Field(
        default=None, examples=["{eu: [w0, w1], us: [w2, w3]}"]
    )
    """Workers by region; each is in one of them."""
    between: dict[str, LinkSpec] | None = Field(default=None, examples=["{all: {rate: 100mbit}}"])
    """Trunks by pair of regions (``eu-us``), or ``all`` for what every pair has. The delay is that
    of one way."""
    congestion: CongestionControl | None = Field(default=None, examples=["cubic"])
    """TCP's congestion control on all hosts; left out: the kernel's own, under dilation reno."""
    engine: Literal["auto", "netem", "userspace"] = "auto"
    """What makes delay, jitter and loss. netem: the kernel. userspace: a delay line of our own, for
    kernels without netem. auto: netem where the kernel has it, else userspace."""
    shaper: Literal["htb", "tbf"] = "htb"
    """What makes a rate. htb: keeps its tokens when the rate changes. tbf: refills its bucket with
    every change, which is a free burst."""
    mtu: StrictInt = Field(default=1500, ge=576, le=9000)
    """Of all interfaces, in bytes of IP; a frame has 14 more."""
    ip: Literal[4, 6] = 4
    """The version that the workers talk to each other with; 6 needs an mtu of at least 1280."""
    connections: StrictInt = Field(default=1, ge=1, le=16)
    """That Gloo has between any two ranks of a group, for long fat paths, which one TCP connection
    may not fill. Each collective goes over one of them, the next over another."""

    @model_validator(mode="after")
    def _packets_may_be_so_small(self) -> Self:
        if self.ip == 6 and self.mtu < MIN_IPV6_MTU:
            text = (
                f"{self.mtu} is too small for ip: 6, which needs {MIN_IPV6_MTU}; make it larger, or"
                " use ip: 4"
            )
            raise PydanticCustomError("at_key", text, {"path": ["mtu"]})
        return self

    @model_validator(mode="after")
    def _keys_of_topology(self) -> Self:
        needed = {"star": (), "dumbbell": ("trunk",), "regions": ("regions", "between")}[
            self.topology
        ]
        allowed = {*needed, *(("left",) if self.topology == "dumbbell" else ())}
        for key in ("trunk", "left", "regions", "between"):
            given = getattr(self, key) is not None
            if key in needed and not given:
                raise PydanticCustomError(
                    "at_key", f"is missing; topology {self.topology} needs it", {"path": [key]}
                )
            if given and key not in allowed:
                raise PydanticCustomError(
                    "at_key",
                    f"does not belong to topology {self.topology}; remove it",
                    {"path": [key]},
                )
        return self

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        left = self.left or []
        for position, host in enumerate(left):
            if host in left[:position]:
                path: list[str | int] = ["left", position]
                raise PydanticCustomError(
                    "at_key", f"{host!r} stands there twice; remove one", {"path": path}
                )
        pairs = list(self.between or {})
        for position, pair in enumerate(pairs):
            if (turned := "-".join(reversed(pair.split("-")))) in pairs[:position]:
                text = f"is the same trunk as {turned}, and the later one would win; remove one"
                raise PydanticCustomError("at_key", text, {"path": ["between", pair]})
        return self


def _links(value: object) -> object:
    if value == "all":
        return ["all"]
    return [value] if isinstance(value, str) else value


class Entry(Model):
    """One line of the script: something begins at a time. LENGTH: the key that says how long it
    takes."""

    LENGTH: ClassVar[str] = "at"

    at: Time = Field(examples=["5s"])
    """When it begins; 0s is the moment at which every worker was ready."""

    @property
    def length_s(self) -> float:
        """Seconds from its start to its last possible change, as far as the spec says; else 0."""
        return 0.0


class WorkerEntry(Entry):
    """What happens to workers: killed, started again, slowed down
    (``testbed.timeline.workers``)."""

    @property
    @abstractmethod
    def workers(self) -> Iterable[str]:
        """Their names."""


class ScheduleEntry(Entry, ABC):
    """From a time on, some links follow a pattern. The patterns are in
    ``testbed.timeline.patterns``."""

    links: Annotated[list[str], BeforeValidator(_links), written_as("links")] = Field(
        default_factory=lambda: ["all"], min_length=1, examples=["[w1, w2]"]
    )
    """Names of links, or all: those of all workers."""

    @abstractmethod
    def updates(self, start: "StartContext") -> "Iterator[Update]":
        """What it does to one link, in order of time; may go on for ever. Raises SpecError with a
        place within the entry."""


def _parsed_entry(entry: object) -> object:
    # The patterns are built from the models above, so they cannot be imported before these are
    # complete.
    from testbed.timeline.patterns import parse_entry

    return parse_entry(entry)


AnyEntry = Annotated[SerializeAsAny[Entry], BeforeValidator(_parsed_entry)]


_SHORTEST_PHASE_S = 0.1


def parse_streams(value: object) -> Streams:
    """Parallel streams from 4, ``{random: [1, 50]}`` or ``{ramp: [1, 50]}``."""
    if isinstance(value, Streams):
        return value
    bounds: Any
    kind, bounds = (
        next(iter(value.items()))
        if isinstance(value, dict) and len(value) == 1
        else ("random", value)
    )
    bounds = bounds if isinstance(bounds, list) else [bounds, bounds]
    numbers = all(isinstance(n, int) and not isinstance(n, bool) for n in bounds)
    if kind not in ("random", "ramp") or not numbers or len(bounds) != 2:
        text = (
            f"{value!r:.40} is not a number of streams; write one like 4, {{random: [1, 50]}} or"
            " {ramp: [1, 50]}"
        )
        raise ValueError(text)
    fewest, most = bounds
    if not 1 <= fewest <= most <= MAX_STREAMS:
        raise ValueError(
            f"{value!r:.40} is out of range; a flow has 1 to {MAX_STREAMS} streams, the smaller"
            " number first"
        )
    return Streams(fewest, most, ramp=kind == "ramp")


def _format_streams(streams: Streams) -> int | dict[str, list[int]]:
    if streams.fewest == streams.most:
        return streams.most
    return {"ramp" if streams.ramp else "random": [streams.fewest, streams.most]}


def parse_duration(value: object) -> Duration:
    """How long a flow is on or off, from "60s" or ``{mean: 60s}``."""
    if isinstance(value, Duration):
        return value
    if isinstance(value, dict) and set(value) != {"mean"}:
        raise ValueError(
            f"{value!r:.40} is no duration; write one like 60s, or {{mean: 60s}} for an"
            " exponential one"
        )
    exponential = isinstance(value, dict)
    seconds = units.parse_time(value["mean"] if isinstance(value, dict) else value)
    if seconds < _SHORTEST_PHASE_S:
        raise ValueError(
            f"{value!r:.40} is too short; it must be at least"
            f" {units.format_time(_SHORTEST_PHASE_S)}"
        )
    return Duration(seconds, exponential)


def _format_duration(duration: Duration) -> str | dict[str, str]:
    text = units.format_time(duration.seconds)
    return {"mean": text} if duration.exponential else text


Phase = Annotated[
    Duration,
    BeforeValidator(parse_duration),
    PlainSerializer(_format_duration),
    written_as("duration"),
]


class TcpSpec(Model):
    """TCP as fast as it goes."""

    streams: Annotated[
        Streams,
        BeforeValidator(parse_streams),
        PlainSerializer(_format_streams),
        written_as("streams"),
    ] = ONE_STREAM
    """Parallel streams: a number, or ``{random: [1, 50]}``, drawn anew each time it goes on."""
    congestion: CongestionControl | None = Field(default=None, examples=["cubic"])
    """Congestion control; left out: the host's own."""


class UdpSpec(Model):
    """Datagrams at an even rate."""

    rate: Rate
    """Of their payload."""
    packet: Annotated[Size, Field(ge=16, le=1472)] = 1200
    """Payload of each, 16B to 1472B, in one frame."""


class TrafficSpec(Model):
    """A flow that competes with the training: from one host to another, TCP or UDP."""

    source: str = Field(alias="from", examples=["bg0"])
    """A worker, or a host that exists for traffic alone: bg0, bg1, …"""
    target: str = Field(alias="to", examples=["w1"])
    """Another one."""
    at: Time = 0.0
    """When it begins."""
    duration: Annotated[Time, written_as("positive_time")] | None = Field(
        None, alias="for", examples=["5s"]
    )
    """How long it goes on, at least 100ms; to the end of the cell if left out."""
    tcp: TcpSpec | None = Field(None, examples=["{streams: 4}"])
    """TCP as fast as it goes."""
    udp: UdpSpec | None = Field(None, examples=["{rate: 5mbit}"])
    """Datagrams at an even rate."""
    on: Phase | None = Field(None, examples=["60s"])
    """It flows for so long and pauses for ``off``, in turn; ``{mean: 60s}`` is drawn from an
    exponential distribution."""
    off: Phase | None = Field(None, examples=["10s"])
    """How long it pauses, like ``on``."""
    seed: StrictInt = Field(0, ge=0, lt=2**31)
    """Of what is drawn at random; the same in every cell, so that all methods meet the same
    traffic."""
    engine: Literal["builtin", "iperf3"] = "builtin"
    """builtin needs nothing; iperf3 where the hosts have it."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.tcp is None) == (self.udp is None):
            raise PydanticCustomError(
                "kind", "needs exactly one of tcp and udp, for example tcp: {streams: 4}"
            )
        if self.source == self.target:
            raise PydanticCustomError(
                "at_key", "is the host that it comes from; name another one", {"path": ["to"]}
            )
        if self.duration is not None and self.duration < _SHORTEST_PHASE_S:
            raise PydanticCustomError(
                "at_key", "is too short; it must be at least 100ms", {"path": ["for"]}
            )
        if (self.on is None) != (self.off is None):
            key, other = ("off", "on") if self.off is None else ("on", "off")
            text = f"is missing; {other} needs it, for example {{on: 60s, off: 10s}}"
            raise PydanticCustomError("at_key", text, {"path": [key]})
        return self


class StopSpec(Model):
    """When a cell ends: whichever of the given limits comes first."""

    steps: StrictInt | None = Field(None, ge=1, le=10_000_000, examples=["60"])
    """After so many steps of every worker."""
    epochs: StrictFloat | None = Field(None, gt=0, le=100_000, examples=["2"])
    """After so many passes over the training data."""
    seconds: Annotated[Time, written_as("seconds")] | None = Field(None, examples=["30"])
    """After so long, in seconds or with a unit."""
    accuracy: Share | None = Field(None, examples=["95%"])
    """Once the test accuracy is reached; needs one of the others as a cap."""

    @model_validator(mode="before")
    @classmethod
    def _bare_seconds(cls, data: Any) -> Any:
        # `seconds: 30` says its unit in its name.
        if (
            isinstance(data, dict)
            and isinstance(data.get("seconds"), (int, float))
            and not isinstance(data["seconds"], bool)
        ):
            if data["seconds"] < 0:
                raise PydanticCustomError(
                    "at_key",
                    f"{data['seconds']} is negative; write it like 30",
                    {"path": ["seconds"]},
                )
            return {**data, "seconds": f"{data['seconds']}s"}
        return data

    @model_validator(mode="after")
    def _capped(self) -> Self:
        if self.steps is None and self.epochs is None and not self.seconds:
            raise PydanticCustomError(
                "stop", "needs one of steps, epochs and seconds, for example {steps: 60}"
            )
        return self

    def limits(self) -> StopConfig:
        """Only the limits that are set, numbers in SI units."""
        given = {
            name: value
            for name in type(self).model_fields
            if (value := getattr(self, name)) is not None
        }
        return cast(StopConfig, given)


class Named(Model):
    """A name from a catalogue with its options, written as ``topk`` or
    ``{name: topk, ratio: 0.1}``."""

    name: str
    """Of the catalogue, or package.module:attribute."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options may stand here, too, instead of beside the name."""
    label: str = ""
    """The name in tables and directories."""

    @staticmethod
    def spread(data: Any) -> Any:
        """Bring the short forms into {name, options, label}."""
        if isinstance(data, str):
            return {"name": data}
        if isinstance(data, dict) and "name" in data:
            check_filled(data)
            inner = data.get("options", {})
            if not isinstance(inner, dict):
                raise PydanticCustomError(
                    "at_key", "must be a mapping of options", {"path": ["options"]}
                )
            if wrong := [key for key in {**data, **inner} if not isinstance(key, str)]:
                raise PydanticCustomError(
                    "at_key", f"has the key {wrong[0]!r}; names of options are texts", {"path": []}
                )
            check_filled(inner)
            options = {k: v for k, v in data.items() if k not in ("name", "options", "label")}
            return {
                "name": data["name"],
                "options": {**inner, **options},
                "label": data.get("label", ""),
            }
        if isinstance(data, dict):
            raise PydanticCustomError(
                "at_key", "is missing; write a name, or {name: …, option: …}", {"path": ["name"]}
            )
        return data


def _refuse_what_is_gone(method: str, options: Mapping[str, Any]) -> None:
    """Older specs name what netsense had when its own rule kept to a share of the compute."""
    if method == "netsense" and "share" in options:
        text = (
            "is gone; netsense keeps to no share of the compute any more, but makes the most"
            " progress a second: remove it"
        )
        raise PydanticCustomError("at_key", text, {"path": ["share"]})
    if method == "netsense" and options.get("policy") == "budget":
        text = (
            "'budget' is now 'progress', which makes the most progress a second, and is the"
            " default: remove it"
        )
        raise PydanticCustomError("at_key", text, {"path": ["policy"]})


class MethodSpec(Named):
    """A method of exchange, or package.module:Class."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        data = cls.spread(data)
        if isinstance(data, dict) and isinstance(data.get("name"), str):
            given = data.get("options") or {}
            _refuse_what_is_gone(data["name"], given)
            check_method(data["name"], given)
            if not isinstance(data.get("label", ""), str):
                raise PydanticCustomError("at_key", "must be text", {"path": ["label"]})
            if data.get("label") in METHODS and data["label"] != data["name"]:
                error = f"{data['label']!r} is the name of another method; choose another label"
                raise PydanticCustomError("at_key", error, {"path": ["label"]})
            if not data.get("label"):
                data["label"] = "-".join(
                    [data["name"].replace(":", "."), *(str(v) for v in given.values())]
                )
        return data


class ModelSpec(Named):
    """A model of the zoo, or package.module:callable."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        data = cls.spread(data)
        if isinstance(data, dict) and isinstance(data.get("name"), str):
            catalog.check_model(data["name"], data.get("options") or {})
        return data


class DataSpec(Named):
    """A data set by name, or package.module:callable."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        data = cls.spread(data)
        if isinstance(data, dict) and isinstance(data.get("name"), str):
            catalog.check_data(data["name"], data.get("options") or {})
        return data


class OptimizerSpec(Named):
    """An optimizer by name with its options, for example
    ``{name: sgd, lr: 0.1, momentum: 0.9}``."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        data = cls.spread(data)
        if isinstance(data, dict) and isinstance(data.get("name"), str):
            catalog.check_optimizer(data["name"], data.get("options") or {})
        return data


class ComputeSpec(Model):
    """What a step's compute takes. ``real``: the time it takes."""

    pace: Time | None = Field(default=None, examples=["120ms"])
    """Real compute that waits so that it takes at least so long a step; it stands for a faster or
    slower accelerator."""
    emulate: Annotated[Time, written_as("positive_time"), Field(gt=0)] | None = Field(
        default=None, examples=["120ms"]
    )
    """No arithmetic; every layer waits for its share of this time. It measures throughput, never
    accuracy."""
    jitter: Share = Field(default=0.0, examples=["5%"])
    """From step to step, as a standard deviation; needs emulate."""
    stragglers: dict[str, Annotated[StrictFloat, Field(ge=0.1, le=1000)]] = Field(
        default_factory=dict, examples=["{w3: 2}"]
    )
    """Workers that take so many times as long; needs pace or emulate."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.pace is not None and self.emulate is not None:
            raise PydanticCustomError(
                "at_key", "cannot stand beside pace; keep one of them", {"path": ["emulate"]}
            )
        if self.jitter and self.emulate is None:
            raise PydanticCustomError(
                "at_key",
                "needs emulate, for example {emulate: 120ms, jitter: 5%}",
                {"path": ["jitter"]},
            )
        if self.stragglers and self.pace is None and self.emulate is None:
            text = "needs pace or emulate, for example {pace: 120ms, stragglers: {w3: 2}}"
            raise PydanticCustomError("at_key", text, {"path": ["stragglers"]})
        return self

    @model_validator(mode="before")
    @classmethod
    def _real(cls, data: Any) -> Any:
        if data == "real":
            return {}
        if isinstance(data, str):
            raise PydanticCustomError(
                "compute", f"{data!r} is unknown; valid: real, {{pace: 120ms}}, {{emulate: 120ms}}"
            )
        return data


class WorkloadSpec(Model):
    """What the workers train."""

    model: ModelSpec = ModelSpec(name="mlp")
    """A model of the zoo, or package.module:callable."""
    data: DataSpec = DataSpec(name="digits")
    """A data set that the model can learn from, or package.module:callable."""
    batch: StrictInt = Field(64, ge=1, le=1_000_000)
    """Samples a step of each rank."""
    stop: StopSpec
    """When a cell ends."""
    optimizer: OptimizerSpec = OptimizerSpec(name="sgd", options={"lr": 0.1, "momentum": 0.9})
    """With its options."""
    compute: ComputeSpec = ComputeSpec()
    """real, or how long a step's compute is to take."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where model and gradients are; with cuda the workers share the GPUs of the machine in turn,
    with auto if it has any."""
    evaluate_every: Time = 1.0
    """Between two evaluations of the test set, for which all wait."""
    target: Share | None = Field(None, examples=["95%"])
    """An accuracy whose time is reported, without an end of the run."""
    warmup: StrictInt = Field(0, ge=0, le=1_000_000)
    """So many steps at the beginning do not count for throughput."""
    checkpoint_every: StrictInt = Field(20, ge=1, le=1_000_000)
    """Steps between two checkpoints, which are made only where workers may be started again."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.compute.emulate is None:
            try:
                catalog.check_pair(
                    self.model.name, self.model.options, self.data.name, self.data.options
                )
            except ValueError as error:
                raise PydanticCustomError(
                    "at_key", "{fault}", {"path": ["data"], "fault": str(error)}
                ) from None
            return self
        if ":" in self.model.name:
            text = (
                "cannot be emulated, as only a model of the zoo says what its layers cost; use"
                " compute: {pace: 120ms}"
            )
            raise PydanticCustomError("at_key", text, {"path": ["model"]})
        if self.stop.steps is None and not self.stop.seconds:
            text = "needs steps or seconds with compute: emulate, which has no epochs"
            raise PydanticCustomError("at_key", text, {"path": ["stop"]})
        learning = {
            "target": self.target,
            "stop.accuracy": self.stop.accuracy,
            "stop.epochs": self.stop.epochs,
        }
        for place, given in learning.items():
            if given is not None:
                text = (
                    "cannot be had from compute: emulate, which learns nothing; use pace, or"
                    " remove it"
                )
                raise PydanticCustomError("at_key", text, {"path": place.split(".")})
        return self


_ARGS_BYTES = 100_000
"""execve(2) takes no word of more than 128 KiB, and JSON may write a character in six."""


class ScriptSpec(Model):
    """A program of the user that every worker runs."""

    file: str = Field(examples=["train.py"])
    """Beside the spec."""
    files: list[str] = Field(default_factory=list, max_length=1000, examples=["[config.yaml]"])
    """What it opens in its own folder; the modules that it imports from there need not be named."""
    args: list[str] = Field(default_factory=list)
    """Its arguments."""
    stop: StopSpec | None = None
    """Seconds or accuracy that end it from outside."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"file": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _beside_it(self) -> Self:
        for index, name in enumerate(self.files):
            if (
                PurePath(name).is_absolute()
                or ".." in PurePath(name).parts
                or not PurePath(name).parts
            ):
                text = (
                    f"{name!r:.60} is not in the folder of the script; move it there, or give its"
                    " path by args"
                )
                raise PydanticCustomError("at_key", text, {"path": ["files", index]})
        return self

    @model_validator(mode="after")
    def _can_be_handed_over(self) -> Self:
        for index, word in enumerate(self.args):
            if "\0" in word:
                text = (
                    "has the character NUL, which no argument of a program can have; give it in a"
                    " file"
                )
                raise PydanticCustomError("at_key", text, {"path": ["args", index]})
        if (size := sum(len(word.encode(errors="replace")) for word in self.args)) > _ARGS_BYTES:
            text = (
                f"has {size} bytes, and at most {_ARGS_BYTES} can be handed over; put them into a"
                " file named under files"
            )
            raise PydanticCustomError("at_key", text, {"path": ["args"]})
        return self

    @model_validator(mode="after")
    def _ends_from_outside(self) -> Self:
        for key in ("steps", "epochs"):
            if self.stop is not None and getattr(self.stop, key) is not None:
                text = (
                    "is for the script to count; give stop: {seconds: 60}, or the number to the"
                    " script by args"
                )
                raise PydanticCustomError("at_key", text, {"path": ["stop", key]})
        return self


class LimitsSpec(Model):
    """What the programs of one worker may use together."""

    memory: Memory | None = Field(default=None, examples=["2GiB"])
    """A worker that takes more is ended by the kernel, and its cell says so. No limit if left
    out."""
    pids: Annotated[StrictInt, Field(ge=16, le=2**22)] | None = Field(
        default=None, examples=["1000"]
    )
    """Processes and threads. If left out 4096 in the Docker and swarm labs, no limit in the netns
    lab."""


_IP_AND_UDP_BYTES = {4: 28, 6: 48}
_ETHERNET_BYTES = 14


def small_queues(part: Any, mtu: int) -> Iterator[tuple[list[str | int], str]]:
    """(place, what is wrong) for each queue in a part of a spec whose bytes hold no frame, so that
    nothing would pass."""
    queue = part.queue if isinstance(part, LinkParametersSpec) else None
    if queue and queue.bytes is not None and queue.bytes < mtu + _ETHERNET_BYTES:
        text = (
            f"{units.format_size(queue.bytes)} do not hold one frame; with this mtu give it at"
            " least"
        )
        yield ["queue"], f"{text} {mtu + _ETHERNET_BYTES}B"
    inside: Iterable[tuple[list[str | int], Any]] = ()
    if isinstance(part, Model):
        inside = (
            ([field.alias or name], getattr(part, name))
            for name, field in type(part).model_fields.items()
        )
    elif isinstance(part, dict):
        inside = (([key], value) for key, value in part.items())
    elif isinstance(part, list):
        inside = (([index], value) for index, value in enumerate(part))
    elif isinstance(part, tuple):  # a pair of values, which have one place in the spec
        inside = (([], value) for value in part)
    for place, value in inside:
        yield from ((place + below, text) for below, text in small_queues(value, mtu))


class Spec(Model):
    """A whole experiment: every method trains once with every seed under every combination of the
    matrix."""

    name: str = Field("experiment", pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}$")
    """Of the experiment; run directories begin with it."""
    lab: Literal["netns", "docker", "swarm"] = "netns"
    """Where the workers run: in rootless network namespaces, in Docker containers, or in containers
    on the nodes of a Docker Swarm. There an mtu that is left out is 1450, as the overlay network
    takes 50 bytes of each frame."""
    placement: dict[str, dict[NodeLabel, NodeLabel]] = Field(
        default_factory=dict, examples=["{w0: {zone: a}, w1: {zone: b}}"]
    )
    """In a swarm, the labels that a host's node must have; hosts that are left out go where Swarm
    puts them."""
    workers: StrictInt = Field(4, ge=1, le=64)
    """How many; they are called w0, w1, …"""
    ranks_per_worker: StrictInt = Field(1, ge=1, le=16)
    """Processes that train on each worker. They share its link; what they send each other stays on
    its loopback."""
    limits: LimitsSpec = LimitsSpec()
    """What each worker may use of this machine's memory and processes."""
    network: NetworkSpec = NetworkSpec()
    """How they are joined, and what their links are like at the beginning."""
    schedule: list[AnyEntry] = Field(default_factory=list, max_length=10_000)
    """What happens to the links, and when."""
    traffic: list[TrafficSpec] = Field(default_factory=list, max_length=100)
    """Flows that compete with the training."""
    workload: WorkloadSpec | None = None
    """What the workers train; or give a script."""
    script: ScriptSpec | None = Field(None, examples=["train.py"])
    """A program of your own in place of the workload."""
    methods: list[MethodSpec] = Field(
        min_length=1, max_length=100, examples=["[allreduce, netsense]"]
    )
    """What is compared; the baseline is allreduce, or else the label that comes first in the
    alphabet."""
    seeds: list[Annotated[StrictInt, Field(ge=0, lt=2**31)]] = Field(
        default_factory=lambda: [0], min_length=1, max_length=1000, examples=["[0, 1, 2]"]
    )
    """Of the initial parameters and the order of the data; several give an interval."""
    matrix: dict[str, list[Any]] = Field(
        default_factory=dict, examples=["{network.link.rate: [20mbit, 200mbit]}"]
    )
    """Values by dotted key of this spec: one cell for every combination."""
    calibrate: StrictBool = True
    """Whether every cell measures its links before it starts, which takes about a second."""
    dilation: StrictFloat = Field(1.0, ge=1, le=1000)
    """Rates, delays, compute and schedule are slowed by this factor, and the times reported divided
    by it."""
    step_timeout: Annotated[Time, Field(ge=2)] = 600.0
    """A cell fails when for so long no step has ended and nothing has come to any worker, or when a
    worker that is done has not ended. With competing traffic a step may not take longer."""
    on_failure: Literal["stop", "continue"] = "stop"
    """Whether a worker that dies ends its cell, or all are started again, from their last
    checkpoint."""

    @model_validator(mode="before")
    @classmethod
    def _as_swarms_have_it(cls, raw: Any) -> Any:
        if (
            not isinstance(raw, dict)
            or raw.get("lab") != "swarm"
            or not isinstance(raw.get("network", {}), dict)
        ):
            return raw
        network = {"mtu": OVERLAY_MTU, **raw.get("network", {})}
        if network.get("engine", "auto") == "auto":
            network["engine"] = "netem"  # if any: what the nodes' kernels have is not known here
        return {**raw, "network": network}

    @model_validator(mode="after")
    def _all_is_slower(self) -> Self:
        paced = self.workload is not None and (
            self.workload.compute.pace or self.workload.compute.emulate
        )
        if self.dilation > 1 and not paced:
            text = (
                "slows links and times, but not real compute; use compute: {pace: …} or {emulate:"
                " …}, or dilation: 1"
            )
            raise PydanticCustomError("at_key", text, {"path": ["dilation"]})
        return self

    @model_validator(mode="after")
    def _workers_exist(self) -> Self:
        stragglers = self.workload.compute.stragglers if self.workload else {}
        named: list[tuple[list[str | int], str]] = [
            (["workload", "compute", "stragglers", name], name) for name in stragglers
        ]
        for index, entry in enumerate(self.schedule):
            if isinstance(entry, WorkerEntry):
                named += [(["schedule", index], name) for name in entry.workers]
        for place, name in named:
            if name not in {f"w{rank}" for rank in range(self.workers)}:
                text = f"there is no worker {name!r}; there are w0 to w{self.workers - 1}"
                raise PydanticCustomError("at_key", text, {"path": place})
        return self

    @model_validator(mode="after")
    def _one_program(self) -> Self:
        if (self.workload is None) == (self.script is None):
            raise PydanticCustomError("program", "needs exactly one of workload and script")
        for key in ("methods", "seeds"):
            names = [m.label if isinstance(m, MethodSpec) else m for m in getattr(self, key)]
            for index, name in enumerate(names):
                if name in names[:index]:
                    fix = "remove one, or give it a label" if key == "methods" else "remove one"
                    raise PydanticCustomError(
                        "at_key", f"{name!r} stands there twice; {fix}", {"path": [key, index]}
                    )
        return self

    @model_validator(mode="after")
    def _frames_fit(self) -> Self:
        room = self.network.mtu - _IP_AND_UDP_BYTES[self.network.ip]
        for index, flow in enumerate(self.traffic):
            if flow.udp is not None and flow.udp.packet > room:
                text = (
                    f"{units.format_size(flow.udp.packet)} do not fit into one frame; with this mtu"
                    f" at most {room}B do"
                )
                raise PydanticCustomError(
                    "at_key", text, {"path": ["traffic", index, "udp", "packet"]}
                )
        if error := next(small_queues(self, self.network.mtu), None):
            raise PydanticCustomError("at_key", error[1], {"path": error[0]})
        return self

    @property
    def stop(self) -> StopSpec | None:
        """When a cell ends; None if the script alone decides."""
        program = self.workload or self.script
        return program.stop if program else None
