"""A delay line in user space, for kernels without netem.

A link is a pair of TAP devices, one at either end. A program of ours stands between them: it reads
a frame from one, decides its fate (``impairment``), holds it for its delay and writes it to the
other. The kernel's shaper sits on the egress of each TAP, in front of the program, so that the
queue of the link is the kernel's and the program only holds what propagates.

``DelayLine`` is the client's side, ``python -m testbed.links.delayline DESCRIPTOR`` the program.
They speak JSON over a SOCK_SEQPACKET pair, one object a datagram.
"""

import contextlib
import ctypes
import errno
import gc
import heapq
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from testbed.children import module_command
from testbed.links.impairment import Conditions, Impairment
from testbed.links.state import Loss
from testbed.links.tap import LARGEST_READ_BYTES, VNET_HEADER_BYTES, set_offload

if TYPE_CHECKING:
    from testbed.links.qdiscs import Netem

LATE_TOLERANCE_S = 1e-3
"""A frame is late if it leaves later than this after its time, or than LATE_TOLERANCE_SHARE of its
delay if that is more."""
LATE_TOLERANCE_SHARE = 0.03
_ANSWER_S = 10.0
_DATAGRAM_BYTES = 1 << 20
_CHANGES_AT_ONCE = 8
"""Directions in one datagram: reading it takes the program about 0.1 ms, during which no frame
moves."""
_FRAMES_AT_ONCE = 16
"""Frames read from one TAP before the others have their turn."""
_ASLEEP_NS = 5_000
"""A poll that took no longer has not slept."""
_EARLIEST_NS = 100_000
"""The timer is set at most this much too early, however late it mostly is; polling takes processor
time from the workers."""
_PR_SET_PDEATHSIG = 1
_TFD_NONBLOCK, _TFD_CLOEXEC, _TFD_TIMER_ABSTIME = 0o4000, 0o2000000, 1
_CLOCK_MONOTONIC = 1
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # struct sched_attr
_TURN_NS = 100_000
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}


class DelayLineDied(OSError):
    """The program has ended, or does not answer. ``str()`` is one line."""


@dataclass(frozen=True, slots=True)
class DirectionCounters:
    """Frames of one direction since the start, except what is held now.

    frames, bytes: read, without the virtio header. duplicated: copies made. overflowed: dropped
    because as many frames as may be were under way. Of frames + duplicated - lost - overflowed, all
    that is not held has left.
    late: left later than the tolerance after their time (LATE_TOLERANCE_S), or may have: of frames
    that came while the program waited for a processor, only when the first came is known. latest_s:
    worst such lateness since the last question.
    """

    frames: int
    bytes: int
    lost: int
    duplicated: int
    corrupted: int
    reordered: int
    overflowed: int
    held: int
    late: int
    latest_s: float


@dataclass(frozen=True, slots=True)
class LineCounters:
    """cpu_s: processor time of the program since its start. directions: by (link, direction).

    refused: frames that an interface dropped because the program had not read those before them;
    counted by the kernel.
    """

    cpu_s: float
    directions: Mapping[tuple[str, str], DirectionCounters]
    refused: int = 0


class DelayLine:
    """Starts the program on entering, ends it on leaving.

    tap_pairs: for each link, descriptors of two TAP devices, at the host, or first switch, and at
    the switch, or second switch. "up" is what is read from the first and written to the second.
    Entering closes them here, whatever comes of it, so that the devices vanish with the program.
    Directions without conditions pass their frames at once.

    Enter it in a thread that lives as long as the line: the kernel ends the program when that
    thread ends (prctl(2)).
    """

    def __init__(self, tap_pairs: Mapping[str, tuple[int, int]]) -> None:
        self._tap_pairs = dict(tap_pairs)
        self._tables: set[str] = set()
        self.pid = 0

    def __enter__(self) -> Self:
        taps = [fd for pair in self._tap_pairs.values() for fd in pair]
        try:
            self._start(taps)
        finally:
            for fd in taps:
                os.close(fd)
        return self

    def _start(self, taps: Sequence[int]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        ours.settimeout(_ANSWER_S)
        with theirs:
            # In a session of its own, a Ctrl-C at the terminal does not reach it: the lab ends it,
            # in its own time.
            self._process = subprocess.Popen(
                module_command(__name__, str(theirs.fileno())),
                pass_fds=[theirs.fileno(), *taps],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self.pid = self._process.pid
        try:
            self._ask({"tap_pairs": self._tap_pairs})
        except BaseException:
            self._close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def apply(self, changes: "Mapping[tuple[str, str], Netem]") -> "dict[tuple[str, str], Netem]":
        """Put conditions in force; returns those that the program reports to have in force. Raises
        DelayLineDied.

        Frames that are held keep their time.
        """
        in_force: dict[tuple[str, str], Netem] = {}
        places = list(changes)
        for begin in range(0, len(places), _CHANGES_AT_ONCE):
            some = places[begin : begin + _CHANGES_AT_ONCE]
            tables = self._new_tables(changes[place] for place in some)
            answer = self._ask(
                {"tables": tables, "set": [[*place, _plain(changes[place])] for place in some]}
            )
            self._tables.update(tables)
            for link, direction, found in answer["set"]:
                in_force[link, direction] = type(changes[link, direction])(**_conditions(found))
        return in_force

    def counters(self) -> LineCounters:
        """What the program has counted. Raises DelayLineDied."""
        answer = self._ask({"counters": True})
        return LineCounters(
            answer["cpu_s"],
            {
                (link, direction): DirectionCounters(*numbers)
                for link, direction, numbers in answer["counters"]
            },
        )

    def _new_tables(self, conditions: "Iterator[Netem]") -> dict[str, Sequence[int]]:
        from testbed.links.qdiscs import distribution_table

        names = {netem.distribution for netem in conditions if netem.jitter_ns} - self._tables
        return {name: memoryview(distribution_table(name)).cast("h").tolist() for name in names}

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._socket.send(json.dumps(question).encode())
            answer = self._socket.recv(_DATAGRAM_BYTES)
        except TimeoutError:
            self._process.kill()  # its next answer would be taken for that of another question
            raise DelayLineDied("the delay line does not answer") from None
        except ConnectionError:
            answer = b""
        if not answer:
            raise DelayLineDied(self._obituary)
        return dict(json.loads(answer))

    @cached_property
    def _obituary(self) -> str:
        assert self._process.stderr
        try:
            code = self._process.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            return "the delay line has closed its socket and does not end"
        last_words = (
            self._process.stderr.read().decode(errors="replace").strip().splitlines() or [""]
        )[-1]
        if code < 0:
            return f"the delay line was ended by signal {-code}"
        return f"the delay line ended with exit code {code}" + (
            f": {last_words}" if last_words else ""
        )

    def _close(self) -> None:
        self._socket.close()
        try:
            self._process.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()


_CONDITIONS = tuple(field.name for field in fields(Conditions))
_LOSS = tuple(field.name for field in fields(Loss))


def _plain(conditions: "Netem | Conditions") -> dict[str, Any]:
    """Conditions as JSON has them; dataclasses.asdict takes several times as long, and the frames
    wait for it."""
    plain = {name: getattr(conditions, name) for name in _CONDITIONS}
    return plain | {"loss": [getattr(conditions.loss, name) for name in _LOSS]}


def _conditions(plain: dict[str, Any]) -> dict[str, Any]:
    """The fields of conditions from what ``_plain`` made of them."""
    return plain | {"loss": Loss(*plain["loss"])}


class _Lane:
    """One direction: where its frames come from and go to, what becomes of them, and how they
    fared."""

    __slots__ = (
        "bytes",
        "conditions",
        "constant_ns",
        "frames",
        "held",
        "impairment",
        "late",
        "latest_ns",
        "limit",
        "since_ns",
        "sink",
        "source",
        "tolerance_ns",
        "whole",
    )

    def __init__(self, source: int, sink: int) -> None:
        self.source = source
        self.sink = sink
        self.frames = self.bytes = self.held = self.late = self.latest_ns = 0
        self.since_ns = 0
        self.whole: bool | None = None
        self.impairment = Impairment(Conditions())
        self.change(Conditions(), ())

    def change(self, conditions: Conditions, table: Sequence[int]) -> None:
        if self.whole is not (not conditions.per_frame):
            self.whole = not conditions.per_frame
            set_offload(self.source, self.whole)
        self.impairment.change(conditions, table)
        self.conditions = conditions
        self.limit = conditions.limit_packets
        self.constant_ns = conditions.delay_ns if conditions.constant else -1
        self.tolerance_ns = max(
            round(LATE_TOLERANCE_S * 1e9), round(LATE_TOLERANCE_SHARE * conditions.delay_ns)
        )

    def refuse(self, error: OSError) -> None:
        """Count a frame that the interface at its end did not take; one that is down takes none."""
        if error.errno != errno.EIO:
            self.impairment.overflowed += 1

    def counters(self) -> list[float]:
        latest_s, self.latest_ns = self.latest_ns / 1e9, 0
        fates = self.impairment
        counted = (
            self.frames,
            self.bytes,
            fates.lost,
            fates.duplicated,
            fates.corrupted,
            fates.reordered,
            fates.overflowed,
        )
        return [*counted, self.held, self.late, latest_s]


class _Control:
    """Answers the client's questions."""

    def __init__(self, control: socket.socket) -> None:
        self._socket = control
        self._tables: dict[str, Sequence[int]] = {}
        tap_pairs = json.loads(control.recv(_DATAGRAM_BYTES))["tap_pairs"]
        self.lanes: dict[tuple[str, str], _Lane] = {}
        for link, (first, second) in tap_pairs.items():
            self.lanes[link, "up"] = _Lane(first, second)
            self.lanes[link, "down"] = _Lane(second, first)
        control.send(b"{}")

    def answer(self) -> None:
        """Answer one question; EOFError when there will be no more."""
        try:
            data = self._socket.recv(_DATAGRAM_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        question = json.loads(data)
        if "set" in question:
            self._tables.update(question["tables"])
            answer: dict[str, Any] = {"set": [self._change(*change) for change in question["set"]]}
        else:
            answer = {
                "cpu_s": time.process_time(),
                "counters": [[*place, lane.counters()] for place, lane in self.lanes.items()],
            }
        with contextlib.suppress(ConnectionError):
            self._socket.send(json.dumps(answer).encode())

    def _change(
        self, link: str, direction: str, wanted: dict[str, Any]
    ) -> tuple[str, str, dict[str, Any]]:
        lane = self.lanes[link, direction]
        conditions = Conditions(**_conditions(wanted))
        lane.change(conditions, self._tables.get(conditions.distribution, ()))
        return link, direction, _plain(lane.conditions)


class _Timer:
    """A timer of CLOCK_MONOTONIC that wakes an epoll (timerfd_create(2)); Python has none of its
    own before 3.13."""

    def __init__(self) -> None:
        # PyDLL keeps the interpreter's lock, which nobody else wants.
        libc = ctypes.PyDLL(None, use_errno=True)
        self.fd: int = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create: " + os.strerror(ctypes.get_errno()))
        self._settime = libc.timerfd_settime
        # struct itimerspec: interval, then value, each in s and ns
        self._value = (ctypes.c_long * 4)()
        self._at = ctypes.byref(self._value)

    def set(self, at_ns: int) -> None:
        """Go off once, at a time of ``time.monotonic_ns``."""
        self._value[2], self._value[3] = divmod(at_ns, 10**9)
        self._settime(self.fd, _TFD_TIMER_ABSTIME, self._at, None)


def _schedule() -> Callable[[], tuple[int, int]]:
    """Tells for how long (ns) this program was ready but had no processor so far, and how often it
    was given one.

    From /proc/self/schedstat (Documentation/scheduler/sched-stats.rst). Zeros on a kernel that does
    not count them.
    """
    try:
        fd = os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return lambda: (0, 0)

    def read() -> tuple[int, int]:
        _, ready_ns, times = os.pread(fd, 64, 0).split()
        return int(ready_ns), int(times)

    return read


def _run(control: _Control, control_fd: int) -> None:
    """Carry frames until the client has gone (EOFError)."""
    clock, read, write, push, pop = (
        time.monotonic_ns,
        os.read,
        os.write,
        heapq.heappush,
        heapq.heappop,
    )
    lanes = {lane.source: lane for lane in control.lanes.values()}
    timer = _Timer()
    epoll = select.epoll()
    for fd in (*lanes, control_fd):
        epoll.register(fd, select.EPOLLIN)
    # setting it anew makes it ready anew; nobody reads it
    epoll.register(timer.fd, select.EPOLLIN | select.EPOLLET)
    schedule, getrusage = _schedule(), resource.getrusage
    sleeps = 0
    # due time, number that keeps the order of frames due at once, and whose
    held: list[tuple[int, int, _Lane, bytes]] = []
    number = 0
    timer_ns = 0
    # The timer is set so much before its time that mostly it goes off in time; the rest is spent
    # looking for frames.
    early_ns = 10_000
    woken_ns = clock()

    def release(now_ns: int) -> int:
        while held and held[0][0] <= now_ns:
            due_ns, _, lane, frame = pop(held)
            try:
                write(lane.sink, frame)
            except OSError as error:
                lane.refuse(error)
            lane.held -= 1
            late_ns = now_ns - due_ns
            if late_ns > lane.latest_ns:
                lane.latest_ns = late_ns
            if late_ns > lane.tolerance_ns:
                lane.late += 1
            now_ns = clock()
        return now_ns

    while True:
        now_ns = release(clock())
        idle = True
        if held:
            wake_ns = held[0][0] - early_ns
            if wake_ns <= now_ns:
                idle = False
            elif wake_ns != timer_ns:
                timer.set(wake_ns)
                timer_ns = wake_ns
        # What is read now came after ``since_ns``: when the poll before this one had returned, or,
        # if this one has slept, as long before it returned as the program was ready and had no
        # processor.
        since_ns, first = woken_ns, False
        if idle:
            ready_ns, runs = schedule()
            asleep_ns = clock()
            events = epoll.poll()
            woken_ns = clock()
            if woken_ns - asleep_ns > _ASLEEP_NS:
                ready_after_ns, runs_after = schedule()
                sleeps, sleeps_before = getrusage(resource.RUSAGE_SELF).ru_nvcsw, sleeps
                if sleeps > sleeps_before:
                    since_ns = woken_ns - (ready_after_ns - ready_ns)
                    # or some of it was before it slept
                    first = sleeps == sleeps_before + 1 and runs_after == runs + 1
        else:
            events = epoll.poll(0)
            woken_ns = clock()
        for fd, event in events:
            lane = lanes.get(fd)
            if lane is None:
                if fd == control_fd:
                    control.answer()
                elif idle:
                    early_ns = (
                        min(early_ns + 1000, _EARLIEST_NS)
                        if woken_ns - timer_ns > early_ns
                        else early_ns - 250
                    )
                first = False
                continue
            lane_since_ns = lane.since_ns or since_ns
            for _ in range(_FRAMES_AT_ONCE):
                try:
                    frame = read(fd, LARGEST_READ_BYTES)
                except BlockingIOError:
                    lane.since_ns = 0
                    break
                except OSError:
                    # the device has gone with its namespace
                    if event & (select.EPOLLERR | select.EPOLLHUP):
                        epoll.unregister(fd)
                    break
                now_ns = clock()
                lane.frames += 1
                lane.bytes += len(frame) - VNET_HEADER_BYTES
                delay_ns = lane.constant_ns
                if first and delay_ns:
                    # Who woke the program is first on epoll's list, and its first frame came just
                    # then.
                    came_ns = since_ns
                else:
                    # It came at some time since, and must not leave too early: the wait can only be
                    # counted.
                    came_ns = now_ns
                    late_ns = now_ns - lane_since_ns
                    if late_ns > lane.latest_ns:
                        lane.latest_ns = late_ns
                    if late_ns > lane.tolerance_ns:
                        lane.late += 1
                first = False
                if delay_ns == 0:
                    try:
                        write(lane.sink, frame)
                    except OSError as error:
                        lane.refuse(error)
                elif delay_ns > 0:
                    if lane.held < lane.limit:
                        lane.held += 1
                        number += 1
                        push(held, (came_ns + delay_ns, number, lane, frame))
                    else:
                        lane.impairment.overflowed += 1
                else:
                    for due_ns, copy in lane.impairment.admit(frame, came_ns, lane.held):
                        lane.held += 1
                        number += 1
                        push(held, (due_ns, number, lane, copy))
                if held and held[0][0] <= now_ns:
                    release(now_ns)
            else:
                lane.since_ns = lane_since_ns
            first = False


def _hurry(libc: ctypes.CDLL) -> None:
    """Have the processor soon after a frame or the timer has come, as far as this user may ask for
    it.

    It matters. Packets more than 1 ms late at 500 Mbit/s and 20 ms, two processors, two programs
    that compute on them: 0 to 0.2 % with SCHED_FIFO. Without, 20 to 28 % if each program has an
    autogroup of its own (sched(7)), as a new session does, where nice values have no say, and 0 to
    5 % if the others share one whose nice value is 19.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        return
    except OSError:
        pass
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    except OSError:
        pass
    # Who asks for short turns has them sooner (EEVDF; sched_setattr(2), and Linux 6.12 for turns of
    # one's own length).
    if call := _SCHED_SETATTR.get(os.uname().machine):
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        size = _SCHED_ATTR.size
        libc.syscall(call, 0, _SCHED_ATTR.pack(size, os.SCHED_OTHER, 0, nice, 0, _TURN_NS, 0, 0), 0)


def _main() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _hurry(libc)
    control = _Control(socket.socket(fileno=int(sys.argv[1])))
    # Nothing here makes cycles, and a collection is a pause.
    gc.disable()
    with contextlib.suppress(EOFError):
        _run(control, int(sys.argv[1]))
    # For each device the kernel waits 16 ms, until nobody looks at it; for all at the same time.
    closing = [
        threading.Thread(target=os.close, args=(lane.source,)) for lane in control.lanes.values()
    ]
    for thread in closing:
        thread.start()


if __name__ == "__main__":
    _main()
