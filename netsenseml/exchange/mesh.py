"""The ranks that exchange tensors, on which hosts they are, and what lasts from one exchange to the
next."""

import atexit
import json
import os
import socket
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import distributed as c10d

from netsenseml.compress.feedback import ErrorFeedback
from netsenseml.exchange.scheduler import Scheduler
from netsenseml.records import monotonic_s
from netsenseml.sensing.tcp import is_connected, local_address, shut_down

CONCURRENT = 4
"""Collectives of one group that are under way at the same time; Gloo's default is 2. On long paths
a collective mostly waits, and others may wait beside it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """What a rank tells the others of itself. host: equal for ranks that share a network interface.
    address: IP, None if unknown. device: type of the device that its tensors are on. card: which
    CUDA device that is, None if none or unknown."""

    host: str
    address: str | None
    device: str = "cpu"
    card: str | None = None


class Topology(NamedTuple):
    """How many ranks there are, and how many of them share a host; what costs depend on."""

    ranks: int
    ranks_per_host: int = 1

    @property
    def ranks_crossing(self) -> float:
        """Times the bytes of a rank that a host's interface carries, if every rank sends each of
        the others as much."""
        return self.ranks_per_host * (self.ranks - self.ranks_per_host) / max(self.ranks - 1, 1)

    @property
    def of_hosts(self) -> "Topology":
        """Of one rank a host."""
        return Topology(self.ranks // self.ranks_per_host)


class Mesh:
    """The ranks of a process group, with all that ``all_reduce_mean`` needs beside a tensor.

        mesh = Mesh(dist.group.WORLD)
        work = all_reduce_mean(tensor, "fc1", DirectAllReduce(Codec("int8")), mesh)
        mean = work.wait()
        mesh.close()

    ``hosts`` has for every rank the number of its host: ranks of one host share its network
    interface. Residuals of error feedback are in ``memory``. The process groups are Gloo's, so that
    collectives of a thread of our own never meet those of DDP; they keep the time-out of ``group``.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        memory: ErrorFeedback | None = None,
        config: Mapping[str, Any] | None = None,
        hosts: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Called on all ranks of ``group``.

        config: what must be the same on all ranks. hosts: in place of what is found out. device:
            that the tensors of this rank are on; for all ranks to say where it is not the same for
            all.
        Raises ValueError, one line, where a rank's config differs; RuntimeError where a rank does
        not come in time.
        """
        self.group = group
        self.rank, self.ranks = group.rank(), group.size()
        self.memory = memory or ErrorFeedback()
        self._schedulers: list[Scheduler] = []
        self.scheduler = self.new_scheduler()
        self.sequence = 0
        """Exchanges so far, from which all randomness is drawn."""
        self._number, self.peers = _meet(group, config or {}, device)
        names = list(dict.fromkeys(peer.host for peer in self.peers))
        self.hosts = (
            tuple(hosts)
            if hosts is not None
            else tuple(names.index(peer.host) for peer in self.peers)
        )
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._process = os.getpid()
        _open.add(self)

    def new_scheduler(self) -> Scheduler:
        """A thread that ends with the mesh."""
        self._schedulers.append(Scheduler())
        return self._schedulers[-1]

    @property
    def topology(self) -> Topology:
        """Hosts of unequal size, or whose ranks are not numbered one after another, count as hosts
        of one rank each."""
        if len(set(self.hosts)) == 1:  # what joins them is the network
            return Topology(self.ranks)
        size = self.hosts.count(self.hosts[0])
        regular = (
            all(host == self.hosts[i // size * size] for i, host in enumerate(self.hosts))
            and self.ranks % size == 0
        )
        return Topology(
            self.ranks, size if regular and len(set(self.hosts)) == self.ranks // size else 1
        )

    @property
    def machine_ranks(self) -> list[int]:
        """Ranks that share this rank's processors."""
        machine = self.peers[self.rank].host.partition("/")[0]
        return [
            rank for rank, peer in enumerate(self.peers) if peer.host.partition("/")[0] == machine
        ]

    @property
    def host_ranks(self) -> list[int]:
        """Ranks of this rank's host."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]

    @property
    def cross_host_ranks(self) -> list[int]:
        """The ranks of all hosts that have this rank's number within theirs; hosts are of equal
        size."""
        number = self.host_ranks.index(self.rank)
        return [
            [rank for rank, one in enumerate(self.hosts) if one == host][number]
            for host in dict.fromkeys(self.hosts)
        ]

    @property
    def within_by_nccl(self) -> bool:
        """Whether the ranks of this host exchange by NCCL among themselves: as DDP does, each on a
        GPU of its own, and where torch can end what is under way."""
        cards = [self.peers[rank].card for rank in self.host_ranks]
        if None in cards or len(set(cards)) < len(cards) or not hasattr(_NCCL, "abort"):
            return False
        return self.group._get_backend(torch.device("cuda")).name() == dist.Backend.NCCL

    def by_stream(self, device: torch.device) -> bool:
        """Whether collectives of ``group`` itself work in the order of a device's streams, so that
        nobody waits for these."""
        if any(peer.device != self.peers[self.rank].device for peer in self.peers):
            return False
        return device.type == "cpu" or self.group._get_backend(device).name() != dist.Backend.GLOO

    def stage(self, number: int) -> dist.ProcessGroup:
        """The process group of all ranks for a stage of an exchange; made at its first use, on all
        ranks."""
        return self._made(f"stage{number}", range(self.ranks))

    def host_stage(self, number: int) -> dist.ProcessGroup:
        """Likewise of the ranks of this host."""
        return self._made(
            f"host{number}-{self.hosts[self.rank]}", self.host_ranks, by_nccl=self.within_by_nccl
        )

    def cross_host_stage(self, number: int) -> dist.ProcessGroup:
        """Likewise of ``cross_host_ranks``."""
        return self._made(
            f"share{number}-{self.host_ranks.index(self.rank)}", self.cross_host_ranks
        )

    def _made(self, name: str, ranks: Iterable[int], *, by_nccl: bool = False) -> dist.ProcessGroup:
        if name not in self._groups:
            new = new_nccl if by_nccl else new_group
            self._groups[name] = new(self.group, f"{self._number}/{name}", list(ranks))
        return self._groups[name]

    def close(self) -> None:
        """End the threads and the groups, after all that is under way; call it on all ranks, or
        ``abort`` first."""
        for scheduler in self._schedulers:
            scheduler.close()
        for group in self._groups.values():
            if group in _made_of_nccl.get(self.group, ()):
                group.shutdown()  # or torch warns
        self._groups.clear()
        _open.discard(self)

    def leave(self) -> None:
        """Likewise, though other ranks may not: what is under way gets a moment, and fails then."""
        if self._process == os.getpid():  # and not one that was forked off
            given_up_s = monotonic_s() + _LEAVING_S
            while (
                any(scheduler.busy for scheduler in self._schedulers) and monotonic_s() < given_up_s
            ):
                time.sleep(_LEAVING_S / 100)
            abort(self.group)
            self.close()


_open: WeakSet[Mesh] = WeakSet()
_LEAVING_S = 1.0


@atexit.register
def _leave() -> None:
    """What a script has left open: a thread of Gloo that calls back into an interpreter that is
    ending aborts the process."""
    for mesh in list(_open):
        mesh.leave()


def new_group(group: dist.ProcessGroup, name: str, ranks: Sequence[int]) -> dist.ProcessGroup:
    """A Gloo group of some ranks of ``group``, with its time-out and interfaces; called on all of
    them, and no others.

    name: never used before among the ranks of ``group``.

    It is not registered with torch.distributed: it ends with its last reference, and leaves nothing
    that a later group of the same ranks could mistake for its own. Both ``new_group`` and
    ``destroy_process_group`` of torch do, for part of the ranks.

    Returns when all of them have it: who lets go of it at once would fail those that are still
    connecting.
    """
    rank = group.rank()
    store = store_of(group)
    gloo: Any = dist.ProcessGroupGloo  # whose options torch itself reaches by their underscores
    options = gloo._Options()
    options._timeout, options._threads = timeout(group), CONCURRENT
    backend: Any = (
        group._get_backend(torch.device("cpu"))
        if dist.get_backend(group) == dist.Backend.GLOO
        else None
    )
    if backend is not None and backend.options._devices:
        options._devices = backend.options._devices
    else:
        interfaces = [
            given for given in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if given
        ]
        options._devices = [gloo.create_device(interface=given) for given in interfaces] or [
            gloo.create_default_device()
        ]
    prefix: Any = c10d.PrefixStore(f"netsenseml/{name}", store)  # type: ignore[attr-defined]
    before = _connections()
    made: dist.ProcessGroup = gloo(prefix, ranks.index(rank), len(ranks), options)
    found = {
        inode: descriptor for inode, descriptor in _connections().items() if inode not in before
    }
    peers = len(ranks) - 1
    if len(found) == peers * len(options._devices):
        _connections_of.setdefault(group, []).append(found)
    else:  # another thread has connected meanwhile, to nobody knows whom
        found = {}
    prefix.set(f"connected/{rank}", "")
    _wait_until_connected(
        prefix, {other: f"connected/{other}" for other in ranks}, found, timeout(group)
    )
    return made


def _wait_until_connected(
    store: Any, keys: Mapping[int, str], own: Mapping[int, int], patience: timedelta
) -> None:
    """Until all ranks have set their keys. own: this rank's connections to them, which end with a
    rank that ends, or with ``abort``.

    Raises RuntimeError, one line, when one has ended, or after so long.
    """
    given_up_s, pause_s = monotonic_s() + patience.total_seconds(), 0.001
    while not store.check(list(keys.values())):
        ended = not own.keys() <= _connections().keys()
        late = [rank for rank, key in keys.items() if not store.check([key])]
        if late and ended:
            raise RuntimeError(
                f"a connection ended while ranks {_listed(late)} were still connecting"
            )
        if late and monotonic_s() > given_up_s:
            raise RuntimeError(
                f"ranks {_listed(late)} did not connect within {patience.total_seconds():g} s"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)


def new_nccl(group: dist.ProcessGroup, name: str, ranks: Sequence[int]) -> dist.ProcessGroup:
    """As ``new_group``, of NCCL; its ranks have a CUDA device each."""
    options = _NCCL.Options()
    options._timeout, options.is_high_priority_stream = timeout(group), True
    prefix: Any = c10d.PrefixStore(f"netsenseml/{name}", store_of(group))  # type: ignore[attr-defined]
    made: dist.ProcessGroup = _NCCL(prefix, ranks.index(group.rank()), len(ranks), options)
    _made_of_nccl.setdefault(group, WeakSet()).add(made)
    return made


_NCCL: Any = getattr(dist, "ProcessGroupNCCL", None)
_made_of_nccl: WeakKeyDictionary[dist.ProcessGroup, WeakSet[dist.ProcessGroup]] = (
    WeakKeyDictionary()
)

_connections_of: WeakKeyDictionary[dist.ProcessGroup, list[dict[int, int]]] = WeakKeyDictionary()
"""Of the groups that ``new_group`` has made of a group: descriptors by inode, which tells whether
one still means the same."""


def abort(group: dist.ProcessGroup) -> None:
    """End all that is under way in the groups made of ``group``, here with an error and so on all
    other ranks, which need not wait.

    Gloo has nothing of the kind: what waits for a silent peer waits until the time-out, and so does
    whoever lets go of the group. NCCL's groups end here alone, as the other ranks learn it from
    Gloo's.
    """
    for found in _connections_of.pop(group, []):
        for inode, descriptor in found.items():
            try:
                own = os.dup(descriptor)  # which cannot be reused meanwhile
            except OSError:  # it is closed already
                continue
            if os.fstat(own).st_ino == inode:
                shut_down(own)
            os.close(own)
    for made in _made_of_nccl.pop(group, ()):
        made.abort()


def _connections() -> dict[int, int]:
    """Connected sockets of this process: descriptors by inode."""
    found = {}
    try:
        for entry in os.scandir("/proc/self/fd"):
            descriptor = int(entry.name)
            try:
                if stat.S_ISSOCK((inode := os.fstat(descriptor)).st_mode) and is_connected(
                    descriptor
                ):
                    found[inode.st_ino] = descriptor
            except OSError:  # it is closed
                pass
    except OSError:  # no Linux
        pass
    return found


def timeout(group: dist.ProcessGroup) -> timedelta:
    """What the user gave to ``init_process_group``."""
    given: timedelta = group._get_backend(next(iter(group._device_types))).options._timeout
    return given


def agree(group: dist.ProcessGroup, config: Mapping[str, Any]) -> list[Peer]:
    """Meet all ranks of ``group``: who they are, in order of rank. Goes through the store, so that
    nothing crosses the links.

    Raises ValueError, one line, on every rank whose ``config`` differs from that of rank 0, as JSON
    has it; RuntimeError, which names the ranks that are missing, after the time-out of the group.
    """
    return _meet(group, config, None)[1]


def _meet(
    group: dist.ProcessGroup, config: Mapping[str, Any], device: torch.device | None
) -> tuple[int, list[Peer]]:
    """(number of the meeting, the same on all ranks; as ``agree``)."""
    store, rank = store_of(group), group.rank()
    meeting = store.add(f"netsenseml/meeting/{rank}", 1)
    mine = {
        "config": dict(config),
        "host": _host(),
        "address": local_address(os.environ.get("GLOO_SOCKET_IFNAME")),
        "device": device.type if device is not None else "cpu",
        "card": _card(device),
    }
    store.set(
        f"netsenseml/meeting/{meeting}/{rank}",
        json.dumps(mine, default=lambda value: type(value).__name__),
    )
    keys = [f"netsenseml/meeting/{meeting}/{other}" for other in range(group.size())]
    try:
        store.wait(keys, timeout(group))
    except RuntimeError:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(
            f"ranks {_listed(missing)} did not come within {timeout(group).total_seconds():g} s"
        ) from None
    told = [json.loads(store.get(key)) for key in keys]
    for other, theirs in enumerate(told):
        if theirs["config"] != told[0]["config"]:
            names = list({**told[0]["config"], **theirs["config"]})
            name = next(
                name for name in names if told[0]["config"].get(name) != theirs["config"].get(name)
            )
            first, differs = told[0]["config"].get(name), theirs["config"].get(name)
            raise ValueError(
                f"rank {other} has {name} = {differs!r}, rank 0 has {first!r}; all ranks must have"
                " the same"
            )
    return meeting, [
        Peer(theirs["host"], theirs["address"], theirs["device"], theirs["card"]) for theirs in told
    ]


def store_of(group: dist.ProcessGroup) -> Any:
    """Where the ranks of a group met."""
    return c10d.distributed_c10d._get_process_group_store(group)


def _host() -> str:
    """What ranks share that share a network interface: the kernel, and the network namespace in
    it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/net")
    try:
        return f"{boot.read_text().strip()}/{namespace.stat().st_ino}"
    except OSError:  # no Linux
        return socket.gethostname()


def _card(device: torch.device | None) -> str | None:
    """Which GPU; None if it is none, or PyTorch does not tell, as before 2.5."""
    if device is None or device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else str(uuid)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
