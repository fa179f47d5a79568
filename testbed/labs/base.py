"""What the orchestrator knows of a lab: named hosts that start programs, and named links that
change.

A lab is a context manager. Entering it makes the hosts and the links (already shaped by their first
state),
leaving it removes every trace, whatever happened in between.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from testbed.clock import Clock
from testbed.links.qdiscs import UNCUT_PACKET_BYTES, QdiscCounters
from testbed.links.routes import Tcp
from testbed.links.shaper import Place, Shaper
from testbed.links.state import LinkState
from testbed.recording.recorder import Recorder, Recording

ENGINES = ("auto", "netem", "userspace")
OOM_SCORE_ADJ = 500
"""Of programs on hosts: where memory runs out, the kernel ends one of them before it ends anything
else (proc(5))."""


@dataclass(frozen=True, slots=True)
class View:
    """What the programs on the hosts see of a directory, and where they may write.

    root: the directory, of which they see nothing but this: reads, files and directories; shared,
    in which all write; own, by host, directories in which the programs of that host write.
    """

    root: Path
    reads: tuple[Path, ...]
    shared: Path
    own: Mapping[str, tuple[Path, ...]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What all programs of one host may use together; None: as much as there is."""

    memory_bytes: int | None = None
    pids: int | None = None

    @property
    def by_controller(self) -> Mapping[str, int]:
        """Those that there are, by the name of the control group's controller."""
        limits = {"memory": self.memory_bytes, "pids": self.pids}
        return {controller: limit for controller, limit in limits.items() if limit is not None}


@dataclass(frozen=True, slots=True)
class LabPlan:
    """What a lab has to build: hosts at switches, and links in their first state.

    links: one for every host, of the same name, and one for every trunk. A host's up is its own
    egress.
    switches: hosts by switch; empty: one switch for all. trunks: the two switches that a trunk
        joins; its up is the direction from the first to the second. Frames that come from one trunk
        never leave by another, so a full mesh of trunks makes no loop.
    impaired: (link, direction) that delays, loses or spoils packets at some time of the run, and so
        needs what does that from the start. engine: what does it (``ENGINES``); "auto": not chosen
        yet.
    shaper: what limits rates, "htb" or "tbf". mtu: of all interfaces, in bytes.
    max_gso_bytes: by host, the wire size that no GSO packet it sends may exceed; those left out may
    send whole ones. folders: what programs on the hosts read besides the run directory, absolute;
    they see it under the same path. view: None: the programs see all of the run directory, and may
    write there.
    device: what programs compute on: "cpu", "cuda", or "auto", a GPU if there is any.
    limits: of the programs of each host.
    seed: of random impairments.
    tcp: how connections between the hosts behave. ip: the version of their addresses.
    placement: labels that the machine of a host must have, by host.
    """

    links: Mapping[str, LinkState]
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    trunks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    impaired: frozenset[tuple[str, str]] = frozenset()
    engine: str = "auto"
    shaper: str = "htb"
    mtu: int = 1500
    max_gso_bytes: Mapping[str, int] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()
    view: View | None = None
    device: str = "cpu"
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    tcp: Tcp = field(default_factory=Tcp)
    ip: int = 4
    placement: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names of all hosts, in order."""
        return tuple(name for name in self.links if name not in self.trunks)

    @property
    def lined(self) -> frozenset[str]:
        """Links that need the delay line in their way."""
        return (
            frozenset(link for link, _ in self.impaired)
            if self.engine == "userspace"
            else frozenset()
        )

    @property
    def hosts_by_switch(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the hosts at each switch; there is at least one switch."""
        return self.switches or {"switch": self.hosts}

    def route(self, source: str, target: str) -> tuple[Place, ...]:
        """The directions of links that a packet passes, in order: the source's up, at most one
        trunk, the target's down."""
        switch_of = {
            host: switch for switch, hosts in self.hosts_by_switch.items() for host in hosts
        }
        ends = switch_of[source], switch_of[target]
        trunks = self.trunks.items()
        crossed = [
            (name, "up" if ends == joined else "down")
            for name, joined in trunks
            if set(ends) == set(joined)
        ]
        return (source, "up"), *crossed, (target, "down")


def make_shaper(plan: LabPlan) -> Shaper:
    """The shaper that a lab's links are added to."""
    return Shaper(
        plan.impaired,
        shaper=plan.shaper,
        mtu=plan.mtu,
        max_packet_bytes=min(plan.max_gso_bytes.values(), default=UNCUT_PACKET_BYTES),
        seed=plan.seed,
    )


class Process(Protocol):
    """A program that runs on a host."""

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""

    def kill(self) -> None:
        """End it at once; no error if it has ended."""


class Host(Protocol):
    """One machine of the lab, with an interface of its own."""

    name: str
    address: str
    interface: str

    @property
    def clock(self) -> Clock:
        """Of the machine that the host is on."""

    @property
    def nsenter_target(self) -> Mapping[str, int | str]:
        """How a program gets there that is not started by us: ``namespace``, a descriptor of this
        process for its network, or ``container``, a name."""

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
        """Start a program; ``env`` is added to the host's own, output is appended to ``log``.

        ``argv[0]`` of "python" means the Python that has the packages. Raises HostFailed.
        """

    def path_on_host(self, path: Path) -> str:
        """Path under which the host sees a file of the run directory."""


class Links(Protocol):
    """All links of a lab (``Shaper``, where they are this machine's)."""

    @property
    def states(self) -> Mapping[str, LinkState]:
        """The state that each link is in."""

    def counters(self) -> Mapping[Place, QdiscCounters]:
        """Counters of every link and direction, of the queue behind its limiter."""


class Lab(Protocol):
    """Hosts and links with a lifetime.

    shared_files: all hosts see the same files where all may write (``View.shared``).
    """

    shared_files: bool

    @property
    def hosts(self) -> Mapping[str, Host]: ...

    @property
    def links(self) -> Links: ...

    def recorder(self, recording: Recording) -> Recorder:
        """What makes the changes of the links and records them, and the load of the machines."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class HostFailed(Exception):
    """A host can start no program, or has ended; the next time it may live. One line."""


class LabError(Exception):
    """This machine cannot run the lab. The message says why and what would mend it (exit code
    4)."""
