"""What a schedule does to workers: ``kill: w1``, ``restart: w1``, ``slow: {w1: 3}``."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field, StrictFloat

from testbed.spec.errors import SpecError
from testbed.spec.models import Entry, Time, WorkerEntry, written_as
from testbed.timeline.changes import check_end, placed

Workers = Annotated[
    list[str],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1, max_length=64),
    written_as("workers"),
]
"""Names of workers, written as ``w1`` or ``[w1, w2]``."""


class Kill(WorkerEntry):
    """SIGKILL, as an accident: what comes of it is for ``on_failure`` to say."""

    kill: Workers = Field(examples=["w1"])
    """Names of workers."""

    @property
    def workers(self) -> Iterable[str]:
        return self.kill


class Restart(WorkerEntry):
    """SIGKILL, and all workers are started again, as where a machine is lent for a time."""

    restart: Workers = Field(examples=["w1"])
    """Names of workers."""

    @property
    def workers(self) -> Iterable[str]:
        return self.restart


class Slow(WorkerEntry):
    """Workers compute so many times as long, for some time or to the end; ``stragglers`` of the
    workload multiply with it."""

    LENGTH = "for"

    slow: dict[str, Annotated[StrictFloat, Field(ge=0.1, le=1000)]] = Field(
        min_length=1, examples=["{w1: 3}"]
    )
    """By worker: how many times as long it computes."""
    duration: Annotated[Time, written_as("positive_time"), Field(gt=0)] | None = Field(
        None, alias="for", examples=["5s"]
    )
    """For how long; to the end if left out."""

    @property
    def workers(self) -> Iterable[str]:
        return self.slow

    @property
    def length_s(self) -> float:
        return self.duration or 0.0


WORKER_ENTRIES: dict[str, type[WorkerEntry]] = {"kill": Kill, "restart": Restart, "slow": Slow}
"""By the key that tells what an entry does."""


@dataclass(frozen=True, slots=True)
class Kills:
    """At ``at_s`` seconds after t = 0 these workers are killed. restart: all are started again in
    any case."""

    at_s: float
    workers: tuple[str, ...]
    restart: bool


@dataclass(frozen=True, slots=True)
class Slowdown:
    """From ``from_s`` to ``to_s`` seconds after t = 0 (None: to the end) a worker computes
    ``factor`` times as long."""

    worker: str
    from_s: float
    to_s: float | None
    factor: float


def kills(schedule: Sequence[Entry], end_s: float | None = None) -> tuple[Kills, ...]:
    """The kills of a schedule in order of time. Raises SpecError with the place of one after the
    end of the run."""
    found = []
    for index, entry in enumerate(schedule):
        if isinstance(entry, Kill | Restart):
            with placed(index):
                check_end(entry, end_s)
            found.append(Kills(entry.at, tuple(entry.workers), isinstance(entry, Restart)))
    return tuple(sorted(found, key=lambda kill: kill.at_s))


def slowdowns(
    schedule: Sequence[Entry], end_s: float | None = None, paced: bool = True
) -> tuple[Slowdown, ...]:
    """The slowdowns of a schedule. Raises SpecError with the place of one after the end of the run,
    or without a pace."""
    found = []
    for index, entry in enumerate(schedule):
        if isinstance(entry, Slow):
            with placed(index):
                check_end(entry, end_s)
                if not paced:
                    text = (
                        "what real compute takes is for this machine to say; it needs compute:"
                        " {pace: …} or {emulate: …}"
                    )
                    raise SpecError([("slow", text)])
            to_s = None if entry.duration is None else entry.at + entry.duration
            found += [
                Slowdown(worker, entry.at, to_s, factor) for worker, factor in entry.slow.items()
            ]
    return tuple(found)
