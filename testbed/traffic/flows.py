"""A competing flow and the times at which it flows; pure data.

The programs on the hosts work from the same data as the plan. So that they start fast, this imports
the standard library only.
"""

import itertools
import json
import math
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from random import Random
from typing import NamedTuple

TRAFFIC_PROGRAM = "testbed.traffic.program"
FIRST_PORT = 5201
"""The flows of a cell listen at this port and the next ones."""
MAX_STREAMS = 128
"""Parallel streams of one flow; iperf3 has the same limit."""
_SHORTEST_S = 0.01


def family_of(address: str) -> socket.AddressFamily:
    """The family of sockets for an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Duration(NamedTuple):
    """How long a flow is on or off: ``seconds`` each time, or, if ``exponential``, so distributed
    with that mean."""

    seconds: float
    exponential: bool = False

    def draw(self, source: Random) -> float:
        """The next duration in s."""
        return (
            max(source.expovariate(1 / self.seconds), _SHORTEST_S)
            if self.exponential
            else self.seconds
        )


class Streams(NamedTuple):
    """How many parallel streams a flow has: drawn anew for each phase, evenly between two numbers
    that may be the same.

    ramp: or one more in each phase, from the fewest to the most, and then again.
    """

    fewest: int
    most: int
    ramp: bool = False

    def of_phase(self, number: int, source: Random) -> int:
        """Streams of a phase; the first one is number 0."""
        drawn = source.randint(self.fewest, self.most)
        return self.fewest + number % (self.most - self.fewest + 1) if self.ramp else drawn


ONE_STREAM = Streams(1, 1)


@dataclass(frozen=True, slots=True)
class Flow:
    """Traffic from one host to another. Times are seconds after t = 0.

    kind: "tcp" or "udp". engine: "builtin" or "iperf3". port: where the target listens.
    end_s: infinite: it flows to the end of the cell.
    streams, congestion: of TCP; None: the host's own congestion control.
    rate_bps, packet_bytes: of UDP: bits/s and size of the payload.
    on, off: it flows for the one and pauses for the other, in turn; None: without a pause.
    seed: of what is drawn at random.
    """

    name: str
    source: str
    target: str
    kind: str
    port: int = FIRST_PORT
    engine: str = "builtin"
    at_s: float = 0.0
    end_s: float = math.inf
    streams: Streams = ONE_STREAM
    congestion: str | None = None
    rate_bps: int = 0
    packet_bytes: int = 0
    on: Duration | None = None
    off: Duration | None = None
    seed: int = 0

    def to_json(self) -> str:
        """As text, for the command line of a program."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Flow":
        """The inverse of ``to_json``."""
        values = json.loads(text)
        on, off = (Duration(*values[key]) if values[key] else None for key in ("on", "off"))
        return cls(**{**values, "streams": Streams(*values["streams"]), "on": on, "off": off})


@dataclass(frozen=True, slots=True)
class Phase:
    """A flow is on from ``at_s`` to ``end_s`` (may be infinite), in seconds after t = 0, with some
    parallel streams."""

    at_s: float
    end_s: float
    streams: int


def phases(flow: Flow) -> Iterator[Phase]:
    """The phases in which a flow is on, in order; without end if the flow pauses and has no end
    itself.

    The same flow gives the same phases everywhere: the draws depend on nothing but its seed and its
    name. The name makes flows that were given the same seed independent of each other.
    """
    source = Random(f"{flow.seed} {flow.name}")
    at_s = flow.at_s
    for number in itertools.count():
        if at_s >= flow.end_s:
            return
        end_s = (
            flow.end_s
            if flow.on is None
            else min(flow.end_s, round(at_s + flow.on.draw(source), 6))
        )
        yield Phase(at_s, end_s, flow.streams.of_phase(number, source))
        if flow.off is None:
            return
        at_s = round(end_s + flow.off.draw(source), 6)
