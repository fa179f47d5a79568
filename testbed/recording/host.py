"""How busy the machine is while a cell runs, and how much of that is not the cell's doing."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from netsenseml.records import RecordFile, monotonic_s

SAMPLE_S = 0.1
_WINDOW_S = 1.0
"""Shares are those of the last second: the kernel counts the time of processes in steps of 10
ms."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class _Counters:
    """Seconds since boot. waiting_s: time in which some program waited for a processor; NaN if the
    kernel does not tell.

    busy_s, total_s: of all processors. programs_s: what programs used of busy_s, with what a
    hypervisor took away (stolen_s); ours_s: what our programs used of that, hidden_s: those of them
    that cannot be seen as processes. waits_s: how long each of our processes has waited for a
    processor, by its PID. stopped: whether one of them stands still, by a signal. softnet_drops:
    packets that did not fit into a processor's input queue.
    """

    t_s: float
    waiting_s: float
    busy_s: float
    total_s: float
    programs_s: float
    stolen_s: float
    ours_s: float
    hidden_s: float
    waits_s: Mapping[int, float]
    stopped: bool
    softnet_drops: int


class HostMonitor:
    """Records the load of the machine ten times a second, from entering to leaving
    (``results.columns.HOST_COLUMNS``).

    roots: processes that are ours, with all that descends from them. usage_s: processor time so far
    of other programs of ours, which cannot be seen as processes. node: what the machine is called,
    if there are several.
    """

    def __init__(
        self,
        roots: Iterable[int],
        t0_s: float,
        directory: Path,
        node: str = "",
        usage_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._roots = frozenset(roots)
        self._usage_s = usage_s
        self._where = {"node": node, "machine": _boot_id() if node else ""}
        self._t0_s = t0_s
        self._records = RecordFile(directory / "host.jsonl", new=True)
        self._history: deque[_Counters] = deque(maxlen=round(_WINDOW_S / SAMPLE_S) + 1)
        self._ours: Sequence[int] = ()
        self._next_search_s = 0.0
        self.failure: OSError | None = None
        """What ended it early, if anything did."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="host", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()
        self._records.close()

    def _run(self) -> None:
        try:
            self._sample()
        except OSError as error:  # the orchestrator ends the cell and reports it
            self.failure = error

    def _sample(self) -> None:
        begin = self._count()
        self._history.append(begin)
        while not self._stopping.wait(SAMPLE_S):
            self._history.append(now := self._count())
            drops = {"softnet_drops": now.softnet_drops - begin.softnet_drops}
            self._records.append(
                [{**shares(self._history[0], now, self._t0_s), **drops, **self._where}]
            )

    def _count(self) -> _Counters:
        now_s = monotonic_s()
        if now_s >= self._next_search_s:
            self._ours = descendants(self._roots)
            self._next_search_s = now_s + 1.0
        user, nice, system, idle, iowait, irq, softirq, steal = _processor_times()
        busy_s = user + nice + system + irq + softirq + steal
        states = {pid: fields for pid in self._ours if (fields := _stat(pid))}
        hidden_s = self._usage_s()
        return _Counters(
            t_s=now_s,
            waiting_s=_waiting_s(),
            busy_s=busy_s,
            total_s=busy_s + idle + iowait,
            programs_s=user + nice + system + steal,
            stolen_s=steal,
            ours_s=sum(map(_time_of, states.values())) + hidden_s,
            hidden_s=hidden_s,
            waits_s={pid: waited_s for pid in states if (waited_s := _waited_s(pid)) is not None},
            stopped=any(fields[0] in "Tt" for fields in states.values()),
            softnet_drops=_softnet_drops(),
        )


def shares(first: _Counters, last: _Counters, t0_s: float) -> dict[str, Any]:
    """The load between two moments."""
    window_s = max(last.t_s - first.t_s, 1e-9)
    total_s = max(last.total_s - first.total_s, 1e-9)
    foreign_s = (last.programs_s - first.programs_s) - (last.ours_s - first.ours_s)
    return {
        "t_s": round(last.t_s - t0_s, 6),
        "cpu_some_share": (last.waiting_s - first.waiting_s) / window_s,
        "cpu_busy_share": (last.busy_s - first.busy_s) / total_s,
        "cpu_foreign_share": max(0.0, foreign_s / total_s),
        "cpu_own_share": (last.ours_s - first.ours_s) / total_s,
        "cpu_waited_share": _waited_share(first, last, window_s, total_s),
        "processors": round(total_s / window_s),
        "stopped": last.stopped,
    }


def _waited_share(
    first: _Counters, last: _Counters, window_s: float, total_s: float
) -> float | None:
    """Of that one of our processes which waited longest; None if not known of all of them."""
    both = first.waits_s.keys() & last.waits_s
    if last.hidden_s or not both:
        return None
    # a hypervisor takes from whoever has the processor, who then does not wait
    stolen_share = (last.stolen_s - first.stolen_s) / total_s
    return max(last.waits_s[pid] - first.waits_s[pid] for pid in both) / window_s + stolen_share


def descendants(roots: Iterable[int]) -> list[int]:
    """The processes that exist of some and of all that descend from them."""
    children: dict[int, list[int]] = {}
    for pid in psutil.pids():
        if fields := _stat(pid):
            children.setdefault(int(fields[1]), []).append(pid)
    found: list[int] = []
    pending = [pid for pid in roots if _stat(pid)]
    while pending:
        pid = pending.pop()
        found.append(pid)
        pending += children.get(pid, [])
    return found


def _stat(pid: int) -> list[str]:
    # Fields of proc(5) stat from the third on; the second, the name in parentheses, may hold
    # anything.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []  # it has ended


def _time_of(fields: Sequence[str]) -> float:
    """Seconds on processors of a process and of its children that have ended."""
    return sum(map(int, fields[11:15])) / _TICKS_PER_S


def _waited_s(pid: int) -> float | None:
    """Seconds for which the first thread of a process, which is what computes in a worker, could
    have run and waited for a processor (the kernel's Documentation/scheduler/sched-stats.rst); None
    if it has ended, or the kernel does not tell."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def _processor_times() -> list[float]:
    with open("/proc/stat") as file:
        return [int(ticks) / _TICKS_PER_S for ticks in file.readline().split()[1:9]]


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _softnet_drops() -> int:
    # One line a processor; the second field counts what its queue (net.core.netdev_max_backlog) had
    # no room for.
    with open("/proc/net/softnet_stat") as file:
        return sum(int(line.split()[1], 16) for line in file)


def _waiting_s() -> float:
    try:
        with open("/proc/pressure/cpu") as file:
            return int(file.readline().rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):
        return float("nan")
