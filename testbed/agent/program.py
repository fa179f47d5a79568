"""The agent of one node: makes its part of a lab, runs programs there, changes its links when they
are due, sends the records.

It has a copy of the run directory of its own, with what the programs on its hosts read and write.
What grows there (logs, record files) is sent while it grows. It listens on the cell's control
socket as the orchestrator does, and passes on what is said; only t = 0 is told in this machine's
time. When the orchestrator is lost, it ends what it has started, and then itself.
"""

import contextlib
import json
import math
import os
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from pydantic import TypeAdapter, ValidationError

from netsenseml.records import monotonic_s
from testbed import protocol
from testbed.files import explained, is_regular, open_regular, remove_tree
from testbed.labs.base import Host, HostFailed, LabError, LabPlan, Process
from testbed.links.shaper import Shaper
from testbed.nodes import messages
from testbed.nodes.channel import LOST_S, MAX_PAYLOAD_BYTES, Channel, secured
from testbed.nodes.clock import MeasuredClock
from testbed.recording import link_server
from testbed.recording.recorder import LocalRecorder, Recording
from testbed.timeline import Change
from testbed.timeline.changes import MAX_CHANGES

_CONNECT_S = 60.0
_FIRST_TRIPS, _FIRST_TRIP_S, _TRIP_S = 20, 0.01, 0.2
"""Round trips come in quick succession at first."""
_WATCH_S, _SEND_S, _STATUS_S = 0.01, 0.3, 1.0
_LARGEST_FILE_BYTES = 1 << 30
_LARGEST_LOG_BYTES = 64 << 20
"""Of a log, no more than its first so many bytes come home: a program may write for ever."""
_MOST_FILES = 4096
"""Of a directory that programs write in."""
_MOST_CONNECTIONS = 1024
_FULL_S = 0.5
"""Who has no descriptor left for a caller waits so long."""
_RECORDS = re.compile(r"(?:steps|evals).*\.jsonl|(?:events|traffic)-.*\.jsonl", re.DOTALL)
"""Files of programs that become tables (``results.columns.TABLES``)."""
_NOT_STARTED = 127  # as the shell: the program could not be started
_TIMELINE: TypeAdapter[list[Change]] = TypeAdapter(list[Change])
_PLAN: TypeAdapter[LabPlan] = TypeAdapter(LabPlan)


class NodeLab(Protocol):
    """What a node has of a lab: hosts and links, made on entering; leaving it ends all programs and
    removes every trace.

    usage_s: processor time so far of the programs on its hosts, unless they descend from this
    process.
    """

    @property
    def hosts(self) -> Mapping[str, Host]: ...

    @property
    def links(self) -> Shaper: ...

    @property
    def usage_s(self) -> float: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


MakeNodeLab = Callable[[LabPlan, Mapping[str, Mapping[str, Any]], Path], NodeLab]
"""Makes it from the plan, whose links are those of this node's hosts alone; from what the
orchestrator says of each host; and from the directory that stands for the run directory here."""


class Agent:
    """One node, from ``serve`` on until the orchestrator is lost.

    name: of the node. directory: for its copy of the run directory; what is in it is removed.
    """

    def __init__(self, name: str, make_lab: MakeNodeLab, directory: Path) -> None:
        self._name, self._make_lab, self._directory = name, make_lab, directory.resolve()
        self._clock = MeasuredClock()
        self._asked_s: dict[int, float] = {}
        self._requests: queue.Queue[tuple[Any, bytes] | None] = queue.Queue()
        self.lost = threading.Event()
        """Set when the connection has ended, though what was started may not have yet."""
        self.why = ""
        self._cell: _Cell | None = None

    def serve(self, sock: ssl.SSLSocket) -> None:
        """Obey until the connection is lost; nothing is left then of what was started."""
        self._channel = Channel(sock, messages.FROM_ORCHESTRATOR, self._heard, self._ended)
        self._channel.start()
        self._channel.send(messages.Hello(node=self._name))
        threading.Thread(target=self._keep_time, name="clock", daemon=True).start()
        try:
            while (item := self._requests.get()) is not None:
                self._fulfil(*item)
        finally:
            self._leave()
            self._channel.flush(1.0)
            self._channel.close()

    def leave(self) -> None:
        """Hang up; ``serve`` then comes to its end."""
        self._requests.put(None)

    def _ended(self, reason: str) -> None:
        self.why = reason
        self.lost.set()
        self._requests.put(None)

    def _heard(self, message: Any, payload: bytes) -> None:
        cell = self._cell  # which may end meanwhile, on another thread
        match message:
            case messages.Time(number=number, at_s=at_s):
                came_s = monotonic_s()
                sent_s = self._asked_s.pop(number, None)
                if sent_s is not None:
                    self._clock.add(sent_s, at_s, came_s)
            case messages.Data(connection=connection) if cell is not None:
                cell.relay.say(connection, payload)
            case messages.Disconnected(connection=connection) if cell is not None:
                cell.relay.hang_up(connection)
            case _:
                self._requests.put((message, payload))

    def _keep_time(self) -> None:
        status_s = 0.0
        for number in range(1 << 53):
            now_s = monotonic_s()
            self._asked_s[number] = now_s
            self._channel.send(messages.AskTime(number=number))
            if now_s - status_s >= _STATUS_S and number > _FIRST_TRIPS:
                status_s = now_s
                self._say_status()
            if self.lost.wait(_FIRST_TRIP_S if number < _FIRST_TRIPS else _TRIP_S):
                return

    def _say_status(self) -> None:
        now, cell = self._clock.now, self._cell
        clock = list(astuple(now)) if math.isfinite(now.unsure_s) else None
        arrived, failure = (cell.arrived(), cell.failure) if cell else ({}, "")
        self._channel.send(messages.Status(clock=clock, arrived=arrived, failure=failure[:2000]))

    def _fulfil(self, message: Any, payload: bytes) -> None:
        """Do what is asked. What cannot be done is told; only a message that is none of the
        protocol ends the conversation."""
        request = getattr(message, "request", None)
        try:
            result = self._do(message, payload)
        except Exception as error:  # whoever asked is told, also of what nobody has foreseen
            text = explained(error) if isinstance(error, OSError) else str(error)
            if not isinstance(error, LabError | HostFailed | ValueError | OSError):
                text = f"{type(error).__name__}: {text}"
            if request is not None:
                self._channel.send(
                    messages.Refused(request=request, error=protocol.one_line(text, 2000))
                )
            elif self._cell is not None:
                self._cell.failure = self._cell.failure or text
        else:
            if request is not None:
                self._channel.send(messages.Answer(request=request, result=result))

    def _do(self, message: Any, payload: bytes) -> dict[str, Any]:
        match message:
            case messages.MakeDirectories():
                self._leave()
                self._cell = _Cell(self._channel, self._clock, self._name, self._directory, message)
            case messages.AppendFile(path=path, executable=executable):
                _append(self._directory / path, payload, executable)
            case messages.Close():
                self._leave()
            case _ if self._cell is None:
                raise ValueError("there is no cell")
            case messages.OpenLab(details=details):
                return self._cell.open(self._make_lab, _PLAN.validate_json(payload), details)
            case messages.Start():
                self._cell.start(message)
            case messages.Kill(number=number):
                self._cell.kill(number)
            case messages.ReadCounters():
                return self._cell.counters()
            case messages.Timeline(last=last, dilation=dilation):
                self._cell.plan(_changes(payload), last, dilation)
            case messages.AskLinks(links=links, wanted=wanted):
                return dict(self._cell.ask_links({"links": links, "set": wanted}))
            case messages.Begin(t0_s=t0_s):
                self._cell.begin(t0_s)
            case messages.End():
                self._cell.end()
        return {}

    def _leave(self) -> None:
        cell, self._cell = self._cell, None
        if cell is not None:
            cell.close()


def _changes(payload: bytes) -> list[Change]:
    try:
        return _TIMELINE.validate_json(payload)
    except ValidationError as error:
        raise ValueError(f"the timeline is none: {protocol.one_line(str(error))}") from None


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)


def _append(path: Path, data: bytes, executable: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o755 if executable else 0o644), "ab") as file:
        file.write(data)


class _Cell:
    """What the node has of the cell that runs: its part of the lab, programs, recorder, control
    socket, files."""

    def __init__(
        self,
        channel: Channel,
        clock: MeasuredClock,
        node: str,
        directory: Path,
        wanted: messages.MakeDirectories,
    ) -> None:
        self._channel, self._clock, self._node = channel, clock, node
        self._root, self._directory = directory, directory / wanted.cell
        self.failure = ""
        self._running = contextlib.ExitStack()
        self._lab: NodeLab | None = None
        self._processes: dict[int, Process] = {}
        self._lock = threading.Lock()
        self._timeline: list[Change] = []
        self._recorder: LocalRecorder | None = None
        self._requests: link_server.Requests = queue.Queue()
        self._stopping = threading.Event()
        _empty(directory)
        (self._directory / "logs").mkdir(parents=True)
        for name in wanted.writable:
            path = directory / name
            path.mkdir(parents=True, exist_ok=True)
            if wanted.user is not None:
                os.chown(path, *wanted.user)
        self.relay = _Relay(channel, clock, self._directory / protocol.SOCKET_FILE)
        self._sender = _Sender(channel, self._root, self._directory, self.relay)
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._watcher.start()

    def open(
        self, make: MakeNodeLab, plan: LabPlan, details: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Make the part of the lab; returns what the orchestrator has to know of each host."""
        lab = make(plan, details, self._root)
        self._lab = self._running.enter_context(lab)
        return {
            "root": {name: host.path_on_host(self._root) for name, host in lab.hosts.items()},
            "hosts": {name: [host.address, host.interface] for name, host in lab.hosts.items()},
        }

    def start(self, wanted: messages.Start) -> None:
        log = self._root / wanted.log
        try:
            process = self._made.hosts[wanted.host].start(wanted.argv, wanted.env, log)
        except (HostFailed, OSError) as error:
            _append(log, f"{error}\n".encode())
            self._sender.send_growth()
            self._channel.send(messages.Exited(number=wanted.number, code=_NOT_STARTED))
            return
        with self._lock:
            self._processes[wanted.number] = process

    def kill(self, number: int) -> None:
        with self._lock:
            process = self._processes.get(number)
        if process is not None:  # or it has ended
            process.kill()

    def counters(self) -> dict[str, Any]:
        if self._recorder is not None:
            # whose thread alone may ask the kernel
            raise ValueError("the links are being recorded")
        counters = self._made.links.counters()
        return {"counters": [[*place, astuple(counted)] for place, counted in counters.items()]}

    def plan(self, changes: Iterable[Change], last: bool, dilation: float) -> None:
        self._timeline += changes
        if len(self._timeline) > MAX_CHANGES:
            raise ValueError(f"more than {MAX_CHANGES} changes")
        if last:
            lab = self._made
            recording = Recording(
                self._directory, self._timeline, self._requests, dilation=dilation
            )
            recorder = LocalRecorder(
                recording,
                lab.links,
                lab.hosts,
                usage_s=lambda: lab.usage_s,
                node=self._node,
                clock=lambda: self._clock.now,
            )
            self._recorder = self._running.enter_context(recorder)

    def begin(self, t0_s: float) -> None:
        if self._recorder is None:
            raise ValueError("there is no timeline")
        self._recorder.begin(t0_s)

    def ask_links(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the recorder, whose links they are, answers."""
        request = link_server.Request(body)
        self._requests.put(request)
        try:
            answer = request.answer.get(timeout=link_server.TIMEOUT_S)
        except queue.Empty:
            raise ValueError("its links are not driven now") from None
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def end(self) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
        self._sender.send_growth()

    def arrived(self) -> dict[str, int]:
        lab, recorder = self._lab, self._recorder
        # The hosts of a lab that is being removed become fewer, on another thread.
        return (
            {}
            if recorder is None or lab is None
            else {link: recorder.arrived_bytes([link]) for link in list(lab.hosts)}
        )

    def close(self) -> None:
        self._stopping.set()
        self._watcher.join(LOST_S)
        for process in list(self._processes.values()):
            process.kill()
        try:
            self._running.close()
        finally:
            self.relay.close()
            self._sender.send_growth(last=True)
            _empty(self._root)

    @property
    def _made(self) -> NodeLab:
        if self._lab is None:
            raise ValueError("the lab has not been made")
        return self._lab

    def _watch(self) -> None:
        """Tell of the ends of programs, and send what grows."""
        sent_s = 0.0
        while not self._stopping.wait(_WATCH_S):
            try:
                with self._lock:
                    ended = [
                        (number, code)
                        for number, one in self._processes.items()
                        if (code := one.poll()) is not None
                    ]
                    for number, _ in ended:
                        del self._processes[number]
                if ended or monotonic_s() - sent_s > _SEND_S:
                    self._sender.send_growth()
                    sent_s = monotonic_s()
                for number, code in ended:
                    self._channel.send(messages.Exited(number=number, code=code))
                if self._recorder is not None:
                    self.failure = self.failure or self._recorder.failure
            except (OSError, HostFailed) as error:
                self.failure = self.failure or (
                    explained(error) if isinstance(error, OSError) else str(error)
                )


class _Sender:
    """Sends what files of a cell have grown by; of JSON lines only whole ones, until the end.

    Times in programs' records become the orchestrator's. Other files come home as they are.
    """

    def __init__(self, channel: Channel, root: Path, cell: Path, relay: "_Relay") -> None:
        self._channel, self._root, self._cell, self._relay = channel, root, cell, relay
        self._sent: dict[Path, int] = {}
        self._lock = threading.Lock()

    def send_growth(self, last: bool = False) -> None:
        """last: and whatever else programs have left in their directories."""
        with self._lock:
            for path in self._files(last):
                # a program may do with its files what it likes, and name them
                with contextlib.suppress(OSError, ValueError):
                    self._send(path, last)

    def _files(self, last: bool) -> Iterable[Path]:
        own = [*self._cell.glob("*.jsonl"), *self._cell.glob("logs/*.log")]
        theirs: list[Path] = []
        for directory in self._cell.glob("hosts/*"):
            found = [
                path
                for path in directory.glob("[!.]*" if last else "[!.]*.jsonl")
                if not path.match(protocol.CHECKPOINTS)
            ]
            found.sort(key=lambda path: _RECORDS.fullmatch(path.name) is None)  # records first
            theirs += found[:_MOST_FILES]
        return [path for path in (*own, *theirs) if is_regular(path)]

    def _send(self, path: Path, last: bool) -> None:
        lines = path.suffix == ".jsonl"
        convert = path.parent != self._cell and _RECORDS.fullmatch(path.name) is not None
        limit = _LARGEST_LOG_BYTES if path.suffix == ".log" else _LARGEST_FILE_BYTES
        with open_regular(path) as file:
            offset = self._sent.get(path, 0)
            file.seek(offset)
            # Converted times may be longer than what stands there.
            while offset < limit and (data := file.read(MAX_PAYLOAD_BYTES // 2)):
                if lines:
                    whole = data[: data.rfind(b"\n") + 1]
                    if not whole and not last:
                        break
                    data = whole or data
                    file.seek(offset + len(data))
                offset += len(data)
                self._sent[path] = offset
                for chunk in _chunks(
                    b"".join(map(self._relay.converted, data.splitlines(True))) if convert else data
                ):
                    self._channel.send(
                        messages.FileGrew(path=str(path.relative_to(self._cell))), chunk
                    )


def _chunks(data: bytes) -> Iterable[bytes]:
    while len(data) > MAX_PAYLOAD_BYTES:
        cut = data.rfind(b"\n", 0, MAX_PAYLOAD_BYTES) + 1 or MAX_PAYLOAD_BYTES
        yield data[:cut]
        data = data[cut:]
    if data:
        yield data


class _Relay:
    """The control socket of a cell on its node: passes on what programs and the orchestrator say to
    each other."""

    def __init__(self, channel: Channel, clock: MeasuredClock, path: Path) -> None:
        self._channel, self._clock, self._path = channel, clock, path
        self._t0: tuple[float, float] | None = None
        """t = 0, as the programs were told, and of the orchestrator."""
        self._connections: dict[int, tuple[socket.socket, protocol.MessageBuffer]] = {}
        self._lock = threading.Lock()
        self._server = protocol.listen_unix(path)
        path.chmod(0o666)  # programs run as other users; the tokens guard it
        self._closing = False
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def _accept(self) -> None:
        for number in range(1 << 53):
            try:
                connection, _ = self._server.accept()
            except OSError:
                if self._closing:
                    return
                time.sleep(_FULL_S)  # no descriptor is left, until another program hangs up
                continue
            with self._lock:
                if self._closing or len(self._connections) >= _MOST_CONNECTIONS:
                    connection.close()
                    continue
                self._connections[number] = connection, protocol.MessageBuffer()
            self._channel.send(messages.Connected(connection=number))
            threading.Thread(
                target=self._listen, args=(number, connection), name="relay", daemon=True
            ).start()

    def _listen(self, number: int, connection: socket.socket) -> None:
        while True:
            try:
                data = connection.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break
            self._channel.send(messages.Data(connection=number), data)
        self._channel.send(messages.Disconnected(connection=number))
        with self._lock:
            self._connections.pop(number, None)
            connection.close()

    def say(self, number: int, data: bytes) -> None:
        """Pass on what the orchestrator says. A program that does not listen is given up, as by the
        orchestrator itself."""
        with self._lock:
            connection, buffer = self._connections.get(number, (None, None))
            if connection is None or buffer is None:
                return
            lines = b"".join(
                protocol.encode_message(self._in_own_time(message)) for message in buffer.feed(data)
            )
            try:
                sent = connection.send(lines, socket.MSG_DONTWAIT)
            except OSError:
                sent = 0
            if sent < len(lines):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _in_own_time(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("type") != "start":
            return message
        t0_s = float(message["t0"])
        self._t0 = self._clock.now.own(t0_s), t0_s
        return {**message, "t0": self._t0[0]}

    def hang_up(self, number: int) -> None:
        with self._lock:
            connection, _ = self._connections.get(number, (None, None))
            if connection is not None:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def converted(self, line: bytes) -> bytes:
        """A row of a program's records with its times in the orchestrator's clock: theirs drifts
        away from it."""
        if self._t0 is None:
            return line
        try:
            row = json.loads(line)
            own_s, reference_s = self._t0
            for name in ("t_s", "applied_s"):
                if isinstance(row.get(name), int | float):
                    row[name] = round(self._clock.now.reference(own_s + row[name]) - reference_s, 6)
            if "applied_s" in row:
                row["unsure_s"] = self._clock.now.uncertainty_s(monotonic_s())
            return protocol.encode_message(row)
        except (ValueError, AttributeError, RecursionError, OverflowError):
            return line  # whoever reads it will say what it is

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:
            for connection, _ in self._connections.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._path.unlink(missing_ok=True)


def connect(address: str, secret: bytes, patience_s: float = _CONNECT_S) -> ssl.SSLSocket:
    """A secured connection to the orchestrator at "host:port", which is waited for. Raises OSError
    or ValueError."""
    host, _, port = address.rpartition(":")
    given_up_s = monotonic_s() + patience_s
    while True:
        try:
            sock = socket.create_connection((host.strip("[]"), int(port)), timeout=LOST_S)
            return secured(sock, secret, server=False)
        except OSError:
            if monotonic_s() > given_up_s:
                raise
            time.sleep(0.2)
