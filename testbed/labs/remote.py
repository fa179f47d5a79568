"""A lab whose hosts and links are on other machines: the orchestrator's side of the node agents.

An agent (``testbed.agent``) makes on its node what is there of the lab. Here is what looks like any
other lab (``labs.base``), and sends each agent what concerns it. The agents dial in, over the
network that the machines have anyway, and never over a link of the lab.
"""

import contextlib
import itertools
import math
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from netsenseml.records import monotonic_s
from testbed import protocol
from testbed.clock import Clock
from testbed.files import everything_in, explained
from testbed.labs.base import HostFailed, LabError, LabPlan
from testbed.links.qdiscs import QdiscCounters
from testbed.links.shaper import Place
from testbed.links.state import LinkState
from testbed.nodes import messages
from testbed.nodes.channel import MAX_PAYLOAD_BYTES, Channel, make_secret, secured
from testbed.recording.link_server import check_name
from testbed.recording.recorder import Recorder, Recording
from testbed.spec.load import parse_link
from testbed.timeline import Change

_ANSWER_S = 30.0
_END_S = 10.0
_MOST_END_S = 600.0
"""A node that goes on sending what programs have left has so long at most."""
_REQUESTS_S = 0.1
_CHANGES_IN_A_MESSAGE = 500
_MOST_STRANGERS = 32
"""Connections that have not shown the secret yet; for one more the oldest is dropped."""
_TIMELINE: TypeAdapter[list[Change]] = TypeAdapter(list[Change])
_PLAN: TypeAdapter[LabPlan] = TypeAdapter(LabPlan)


class NodeLost(HostFailed):
    """A node's agent is not there any more. The message is one line that names the node."""


class NodeRefused(HostFailed):
    """A node's agent cannot do what it was asked for. The message is one line that names the
    node."""


class _Made(BaseModel):
    """What a node says of its part of a lab, by host: where it sees the run directory; address and
    interface."""

    root: dict[str, str]
    hosts: dict[str, tuple[str, str]]


class _Counted(BaseModel):
    counters: list[
        tuple[str, Literal["up", "down"], tuple[int, int, int, int, int, int, int | None]]
    ]


class _Links(BaseModel):
    links: dict[str, dict[str, Any]]


_Result = TypeVar("_Result", bound=BaseModel)


class RemoteNode:
    """The agent of one node, as long as its connection lasts.

    name: of the node. clock: its clock against ours. Whatever is asked of it raises NodeLost once
    it is lost.
    """

    def __init__(self, sock: ssl.SSLSocket, arrived: Callable[["RemoteNode"], None]) -> None:
        self.name = ""
        self.clock = Clock(unsure_s=float("inf"))
        self.arrived: Mapping[str, int] = {}
        """By link, the bytes that have come down; newest word of it."""
        self.failure = ""
        """Why its records, or ours of it, are not whole."""
        self.codes: dict[int, int] = {}
        """Exit codes of programs that have ended, by their number."""
        self.started: set[int] = set()
        """Numbers of the programs that were started."""
        self._lost = ""
        self._cell: _Home | None = None
        self._answers: dict[int, messages.Answer | messages.Refused] = {}
        self._asked: set[int] = set()
        self._grown_s = float("-inf")
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._said_hello = arrived
        self._channel = Channel(sock, messages.FROM_AGENT, self._heard, self._ended)
        self._channel.start()

    @property
    def lost(self) -> str:
        """Why it is lost, in one line that names it; empty while it is not."""
        return self._lost and f"node {self.name} is lost: {self._lost}"

    def number(self) -> int:
        """A number that no request and no program of this node has had."""
        return next(self._numbers)

    def send(self, message: messages.Message, payload: bytes = b"") -> None:
        """Send what needs no answer."""
        if self._lost:
            raise NodeLost(self.lost)
        self._channel.send(message, payload)

    def ask(self, message: messages.Request, payload: bytes = b"") -> int:
        """Send a request; its number is for ``answer``."""
        with self._changed:
            self._asked.add(message.request)
        self.send(message, payload)
        return message.request

    def answer(
        self, request: int, timeout_s: float = _ANSWER_S, most_s: float = 0.0
    ) -> Mapping[str, Any]:
        """What came to a request, when it has come. Raises NodeRefused if the node refuses,
        NodeLost if it does not answer.

        most_s: as long as files still come, it has more time, but no more than this.
        """
        began_s = monotonic_s()
        with self._changed:
            while request not in self._answers and not self._lost:
                given_up_s = max(
                    began_s + timeout_s, min(self._grown_s + timeout_s, began_s + most_s)
                )
                if (left_s := given_up_s - monotonic_s()) <= 0:
                    self._asked.discard(request)
                    raise NodeLost(f"node {self.name} does not answer")
                self._changed.wait(left_s)
            answer = self._answers.pop(request, None)
        match answer:
            case messages.Answer(result=result):
                return result
            case messages.Refused(error=error):
                raise NodeRefused(f"node {self.name}: {protocol.one_line(error, 2000)}")
        raise NodeLost(self.lost)

    def result(self, request: int, kind: type[_Result]) -> _Result:
        """What came to a request, in the shape that it has to have."""
        try:
            return kind.model_validate(self.answer(request))
        except ValidationError as error:
            raise self.nonsense(protocol.one_line(str(error))) from None

    def nonsense(self, what: str) -> NodeRefused:
        """What to raise if an answer makes no sense."""
        return NodeRefused(f"node {self.name} answers what makes no sense: {what}")

    def attach(self, home: "_Home | None") -> None:
        """Where what comes from the node belongs: the cell that runs."""
        before, self._cell = self._cell, home
        if before is not None:
            before.close()

    def close(self) -> None:
        """Hang up; the agent then ends."""
        self.attach(None)
        self._channel.close()

    def _ended(self, reason: str) -> None:
        with self._changed:
            self._lost = protocol.one_line(reason) or "its connection has ended"
            self._changed.notify_all()

    def _heard(self, message: Any, payload: bytes) -> None:
        now_s = monotonic_s()
        cell = self._cell  # another thread may detach it meanwhile
        if not self.name and not isinstance(message, messages.Hello):
            raise ValueError("no hello")
        match message:
            case messages.Hello(node=name):
                if self.name:
                    raise ValueError("a second hello")
                self.name = name
                self._said_hello(self)
            case messages.AskTime(number=number):
                self._channel.send(messages.Time(number=number, at_s=now_s))
            case messages.Status(clock=clock, arrived=arrived, failure=failure):
                self.clock, self.arrived = Clock(*clock) if clock else self.clock, arrived
                self.failure = self.failure or (
                    f"node {self.name}: {protocol.one_line(failure, 500)}" if failure else ""
                )
            case messages.Answer(request=request) | messages.Refused(request=request):
                with self._changed:
                    if request in self._asked:
                        self._asked.remove(request)
                        self._answers[request] = message
                        self._changed.notify_all()
            case messages.Exited(number=number, code=code) if number in self.started:
                self.codes[number] = code
            case _ if cell is None:
                pass  # of a cell that has ended
            case messages.FileGrew(path=path):
                self._grown_s = now_s
                try:
                    cell.append(path, payload)
                except OSError as error:
                    self.failure = (
                        self.failure or f"records could not be written: {explained(error)}"
                    )
            case messages.Connected(connection=connection):
                cell.connect(connection)
            case messages.Data(connection=connection):
                cell.say(connection, payload)
            case messages.Disconnected(connection=connection):
                cell.hang_up(connection)


class Nodes:
    """Waits for the agents of a run, from entering to leaving.

    secret: what they need to be let in. port: where they have to call; host: of which address of
    this machine, "" for all.
    """

    def __init__(self, host: str = "", port: int = 0) -> None:
        self.secret = make_secret()
        self._nodes: dict[str, RemoteNode] = {}
        self._strangers: dict[socket.socket, None] = {}
        self._changed = threading.Condition()
        self._server = socket.create_server((host, port), backlog=_MOST_STRANGERS)
        self.port: int = self._server.getsockname()[1]
        self._closing = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="nodes", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._changed:
            nodes = list(self._nodes.values())
        for node in nodes:
            node.close()

    def wait(self, names: Collection[str], timeout_s: float) -> Mapping[str, RemoteNode]:
        """The nodes of these names, when all are there and their clocks are known. Raises LabError
        that names those missing."""

        given_up_s = monotonic_s() + timeout_s
        while True:
            with self._changed:
                there = {name: node for name, node in self._nodes.items() if not node.lost}
            ready = {
                name: node for name, node in there.items() if math.isfinite(node.clock.unsure_s)
            }
            missing = [name for name in names if name not in ready]
            if not missing:
                return {name: ready[name] for name in names}
            if monotonic_s() > given_up_s:
                raise LabError(f"no agent has called from {', '.join(missing)} in {timeout_s:g} s")
            time.sleep(0.02)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
                handle = sock.dup()  # TLS takes the socket itself away
            except OSError:
                if self._closing:
                    return
                continue  # whoever called has hung up
            with self._changed:
                if len(self._strangers) >= _MOST_STRANGERS:
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    with contextlib.suppress(OSError):  # which ends its thread
                        oldest.shutdown(socket.SHUT_RDWR)
                self._strangers[handle] = None
            threading.Thread(
                target=self._admit, args=(sock, handle), name="stranger", daemon=True
            ).start()

    def _admit(self, sock: socket.socket, handle: socket.socket) -> None:
        try:
            RemoteNode(secured(sock, self.secret, server=True), self._add)
        except OSError:
            sock.close()  # whoever does not have the secret hears nothing
        finally:
            with self._changed:
                self._strangers.pop(handle, None)
                handle.close()

    def _add(self, node: RemoteNode) -> None:
        with self._changed:
            before = self._nodes.get(node.name)
            if before is not None and not before.lost:
                raise ValueError(f"there is a node {node.name} already")
            self._nodes[node.name] = node


class RemoteProcess:
    """A program on a host of a node (``labs.base.Process``)."""

    def __init__(self, node: RemoteNode, number: int) -> None:
        self._node, self._number = node, number

    def poll(self) -> int | None:
        """Raises NodeLost."""
        code = self._node.codes.get(self._number)
        if code is None and self._node.lost:
            raise NodeLost(self._node.lost)
        return code

    def kill(self) -> None:
        with contextlib.suppress(NodeLost):  # whose agent ends it
            self._node.send(messages.Kill(number=self._number))


class RemoteHost:
    """A host of a node (``labs.base.Host``)."""

    def __init__(
        self, name: str, address: str, interface: str, node: RemoteNode, directory: Path, root: str
    ) -> None:
        self.name, self.address, self.interface, self.node = name, address, interface, node
        self._directory, self._root = directory, root

    @property
    def clock(self) -> Clock:
        return self.node.clock

    @property
    def nsenter_target(self) -> Mapping[str, int | str]:
        raise ValueError(
            f"{self.name} is on another machine, {self.node.name}, which has its programs; there:"
            f" docker exec $(docker ps --quiet --filter name=netsense-.*-{self.name}\\.) …"
        )

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> RemoteProcess:
        number = self.node.number()
        self.node.started.add(number)
        wanted = messages.Start(
            number=number,
            host=self.name,
            argv=list(argv),
            env=dict(env),
            log=_relative(log, self._directory),
        )
        self.node.send(wanted)
        return RemoteProcess(self.node, number)

    def path_on_host(self, path: Path) -> str:
        return f"{self._root}/{_relative(path, self._directory)}"


class RemoteLinks:
    """The links of all nodes together (``labs.base.Links``)."""

    def __init__(self, plan: LabPlan, nodes: Collection[RemoteNode]) -> None:
        self._plan, self._nodes = plan, nodes
        self._timeline: Sequence[Change] = ()
        self._t0_s = 0.0

    def follow(self, timeline: Sequence[Change], t0_s: float) -> None:
        """The nodes make these changes from now on."""
        self._timeline, self._t0_s = timeline, t0_s

    @property
    def states(self) -> Mapping[str, LinkState]:
        now_s = monotonic_s() - self._t0_s
        return {
            **self._plan.links,
            **{change.link: change.state for change in self._timeline if change.at_s <= now_s},
        }

    def counters(self) -> Mapping[Place, QdiscCounters]:
        asked = [
            (node, node.ask(messages.ReadCounters(request=node.number()))) for node in self._nodes
        ]
        rows = [row for node, request in asked for row in node.result(request, _Counted).counters]
        return {(link, direction): QdiscCounters(*counted) for link, direction, counted in rows}


class RemoteRecorder:
    """The recorders of all nodes (``recording.recorder.Recorder``); the timeline of each is sent
    before anything begins."""

    def __init__(
        self, recording: Recording, links: RemoteLinks, hosts: Mapping[str, RemoteHost]
    ) -> None:
        self._recording, self._links = recording, links
        self._nodes = list({host.node.name: host.node for host in hosts.values()}.values())
        self._hosts = hosts
        self._node_of = {name: host.node for name, host in hosts.items()}
        self._ended = threading.Event()
        self._answering = threading.Thread(
            target=self._answer_requests, name="link requests", daemon=True
        )

    def __enter__(self) -> Self:
        asked = [(node, request) for node in self._nodes for request in self._send_timeline(node)]
        for node, request in asked:
            node.answer(request)
        return self

    def _send_timeline(self, node: RemoteNode) -> Iterable[int]:
        changes = [
            change for change in self._recording.timeline if self._node_of[change.link] is node
        ]
        for first in range(0, len(changes) or 1, _CHANGES_IN_A_MESSAGE):
            some = changes[first : first + _CHANGES_IN_A_MESSAGE]
            last = first + _CHANGES_IN_A_MESSAGE >= len(changes)
            message = messages.Timeline(
                request=node.number(), last=last, dilation=self._recording.dilation
            )
            yield node.ask(message, _TIMELINE.dump_json(some))

    def begin(self, t0_s: float) -> None:
        for node in self._nodes:
            node.send(messages.Begin(t0_s=t0_s))
        self._links.follow(self._recording.timeline, t0_s)
        self._answering.start()

    def _answer_requests(self) -> None:
        requests = self._recording.requests
        while requests is not None and not self._ended.is_set():
            try:
                request = requests.get(timeout=_REQUESTS_S)
            except queue.Empty:
                continue
            request.fulfil(self._host_info, self._answer_links)

    def _host_info(self, name: str) -> Mapping[str, Any]:
        check_name("host", name, self._hosts)
        return self._hosts[name].nsenter_target

    def _answer_links(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """As a lab on this machine does. What no link can have is refused before any is changed;
        what only some can, by their nodes."""
        names = list(body.get("links") or self._node_of)
        for name in names:
            check_name("link", name, self._node_of)
        wanted = body.get("set") or {}
        parse_link(wanted)
        asked, found = [], {}
        try:
            for node in self._nodes:
                if ours := [name for name in names if self._node_of[name] is node]:
                    message = messages.AskLinks(request=node.number(), links=ours, wanted=wanted)
                    asked.append((node, node.ask(message)))
            for node, request in asked:
                found.update(node.result(request, _Links).links)
        except HostFailed as error:
            raise ValueError(str(error)) from None
        return {name: found[name] for name in names if name in found}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        message = _finish(
            self._nodes, messages.End, patient=not isinstance(error, KeyboardInterrupt)
        )
        if message and error is None:
            raise NodeLost(f"its records are not whole: {message}")

    @property
    def failure(self) -> str:
        return next((error for node in self._nodes if (error := node.lost or node.failure)), "")

    def arrived_bytes(self, links: Iterable[str]) -> int:
        return sum(self._node_of[link].arrived.get(link, 0) for link in links)


class RemoteLab:
    """A lab over several nodes (``labs.base.Lab``).

    On entering, the nodes are first given what programs on the hosts read and write, so that hosts
    can be made that see it.

    plan: with a view. directory: the run directory. place: makes the hosts; returns by host its
    node, and what that node's part of the lab has to know of it. user: who the programs run as, if
    not as the agents.
    """

    shared_files = False

    def __init__(
        self,
        plan: LabPlan,
        directory: Path,
        nodes: Mapping[str, RemoteNode],
        place: Callable[[], Mapping[str, tuple[str, Mapping[str, Any]]]],
        user: tuple[int, int] | None = None,
    ) -> None:
        if plan.trunks:
            raise LabError(
                "a lab over several machines has a single switch; a topology with trunks runs with"
                " --lab netns"
            )
        if plan.view is None:
            raise ValueError("a lab over several machines needs to know what its hosts see")
        self._plan, self._view, self._user = plan, plan.view, user
        self._directory, self._nodes, self._place = directory.resolve(), nodes, place
        self._homes: dict[str, _Home] = {}
        self.hosts: dict[str, RemoteHost] = {}
        self.links = RemoteLinks(plan, nodes.values())

    def __enter__(self) -> Self:
        try:
            self._provide()
            self._open(self._place())
        except BaseException as error:
            self._close(patient=False)
            if isinstance(error, NodeRefused):
                raise LabError(str(error)) from None
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        message = self._close(patient=not isinstance(error, KeyboardInterrupt))
        if message and error is None:
            raise NodeLost(f"what its programs have left may not be whole: {message}")

    def _provide(self) -> None:
        """Give every node the directories of all hosts, the files that they read, and the control
        socket."""
        written = [self._view.shared, *itertools.chain.from_iterable(self._view.own.values())]
        writable = [_relative(path, self._directory) for path in written]
        cell = self._view.shared.parent
        asked = []
        for name, node in self._nodes.items():
            self._homes[name] = _Home(node, cell)
            node.attach(self._homes[name])
            wanted = messages.MakeDirectories(
                request=node.number(),
                cell=_relative(cell, self._directory),
                writable=writable,
                user=self._user,
            )
            asked.append((node, node.ask(wanted)))
        for path in itertools.chain.from_iterable(map(everything_in, self._view.reads)):
            if path.is_file() and not path.is_symlink():
                self._put(path)
        for node, request in asked:
            node.answer(request)
            # of the cell before
            node.failure, node.codes, node.arrived, node.started = "", {}, {}, set()

    def _put(self, path: Path) -> None:
        executable = bool(path.stat().st_mode & 0o100)
        message = messages.AppendFile(path=_relative(path, self._directory), executable=executable)
        with open(path, "rb") as file:
            while True:
                data = file.read(MAX_PAYLOAD_BYTES)
                for node in self._nodes.values():
                    node.send(message, data)
                if len(data) < MAX_PAYLOAD_BYTES:
                    return

    def _open(self, placement: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
        """Have the nodes make their parts of the lab."""
        asked = []
        for name, node in self._nodes.items():
            details = {
                host: dict(more) for host, (where, more) in placement.items() if where == name
            }
            self._homes[name].expect(path for host in details for path in self._view.own[host])
            links = {host: self._plan.links[host] for host in details}
            plan = replace(self._plan, links=links, switches={}, view=None)
            request = messages.OpenLab(request=node.number(), details=details)
            asked.append((node, details, node.ask(request, _PLAN.dump_json(plan))))
        for node, details, number in asked:
            made = node.result(number, _Made)
            if not details.keys() == made.hosts.keys() == made.root.keys():
                raise node.nonsense("other hosts than it was given")
            for host, (address, interface) in made.hosts.items():
                self.hosts[host] = RemoteHost(
                    host, address, interface, node, self._directory, made.root[host]
                )
        self.hosts = {name: self.hosts[name] for name in self._plan.hosts}  # in their order

    def recorder(self, recording: Recording) -> Recorder:
        return RemoteRecorder(recording, self.links, self.hosts)

    def _close(self, patient: bool) -> str:
        """End all programs, take what they have left, and remove everything. Nodes that are lost do
        that by themselves.

        Returns why one of them has not, in one line, or "".
        """
        error = _finish(self._nodes.values(), messages.Close, patient)
        for node in self._nodes.values():
            node.attach(None)
        return error


def _finish(
    nodes: Iterable[RemoteNode], kind: type[messages.End] | type[messages.Close], patient: bool
) -> str:
    """Ask all nodes that are there to end something, and wait for it; returns why one has not, or
    "".

    patient: wait longer for those that go on sending files.
    """
    asked, faults = [], []
    for node in nodes:
        try:
            asked.append((node, node.ask(kind(request=node.number()))))
        except NodeLost as error:
            faults.append(str(error))
    for node, request in asked:
        try:
            node.answer(request, _END_S, _MOST_END_S if patient else 0.0)
        except (NodeLost, NodeRefused) as error:
            faults.append(str(error))
    return faults[0] if faults else ""


class _Home:
    """Where in the cell's directory belongs what comes from a node, and to whom what its programs
    say."""

    def __init__(self, node: RemoteNode, cell: Path) -> None:
        self._node, self._cell = node, cell
        self._directories: frozenset[str] = frozenset()
        self._connections: dict[int, socket.socket] = {}
        self._lock = threading.Lock()

    def expect(self, directories: Iterable[Path]) -> None:
        """In which directories the programs of this node's hosts write; what is said to come from
        others is not taken."""
        cell = self._cell.resolve()
        self._directories = frozenset(_relative(path, cell) for path in directories)

    def append(self, path: str, data: bytes) -> None:
        """Append to a file of the cell's."""
        if path.startswith("hosts/") and path.rpartition("/")[0] not in self._directories:
            return
        place = self._cell / path
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(place, flags, 0o644), "ab") as file:
            file.write(data)

    def connect(self, number: int) -> None:
        """A program has called."""
        try:
            connection = protocol.connect_unix(self._cell / protocol.SOCKET_FILE)
        except OSError:
            return  # the cell is at its end
        with self._lock:
            self._connections[number] = connection
        threading.Thread(
            target=self._listen, args=(number, connection), name="relay", daemon=True
        ).start()

    def say(self, number: int, data: bytes) -> None:
        """Pass on what a program says."""
        with self._lock:
            connection = self._connections.get(number)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.sendall(data)

    def hang_up(self, number: int) -> None:
        with self._lock:
            connection = self._connections.pop(number, None)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self, number: int, connection: socket.socket) -> None:
        """Pass on what the control server says."""
        with connection, contextlib.suppress(OSError, NodeLost):
            while data := connection.recv(1 << 16):
                self._node.send(messages.Data(connection=number), data)
            self._node.send(messages.Disconnected(connection=number))
        with self._lock:
            self._connections.pop(number, None)

    def close(self) -> None:
        for number in list(self._connections):
            self.hang_up(number)


def _relative(path: Path, directory: Path) -> str:
    return path.resolve().relative_to(directory).as_posix()
