"""The Docker lab: every host a container, joined by a network of the daemon, links shaped from
outside.

Workers have no privileges at all. The orchestrator enters a worker's network namespace to shape the
worker's egress (up), and finds the other end of its veth pair among the daemon's interfaces to
shape the way back (down). That needs root in the daemon's own PID and network namespaces, which is
what ``docker compose up experiment`` gives it.

Where the kernel has no netem, a worker's veth pair to the bridge is put out of use, and a pair of
TAP devices with the delay line between them takes its place: one in the container, with the address
of the veth, one at the bridge.

Everything made carries labels. ``LABEL`` names the lab, ``OWNER`` the process that made it, so that
``clean`` never touches a lab whose orchestrator lives. Containers end with their orchestrator by
themselves (``labs.container_init``).
"""

import contextlib
import itertools
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import docker
import requests
from docker.errors import APIError, ContainerError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.models.networks import Network
from docker.types import DeviceRequest, Mount
from pyroute2.netlink import NLM_F_CREATE
from pyroute2.netlink.rtnl import RTM_DELADDR, RTM_NEWADDR
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from testbed import gpus, protocol
from testbed.clock import HERE
from testbed.files import everything_in
from testbed.labs.base import OOM_SCORE_ADJ, HostFailed, LabError, LabPlan, make_shaper
from testbed.labs.capabilities import lacking_capabilities
from testbed.labs.containers import ContainerProcess, InitConnection, change_interface, interfaces
from testbed.labs.owner import owner_lives, owner_mark
from testbed.links.delayline import DelayLine, DelayLineDied
from testbed.links.neighbours import forwarding, neighbour
from testbed.links.netlink import NetlinkSocket, Request, back_to_own_namespace, encode, setns
from testbed.links.qdiscs import UNCUT_PACKET_BYTES, gso_limits
from testbed.links.routes import tcp_route
from testbed.links.shaper import Port
from testbed.links.tap import open_tap
from testbed.recording.recorder import LocalRecorder, Recorder, Recording
from testbed.signals import undisturbed

LABEL = "netsense.testbed"
OWNER = "netsense.testbed.owner"
DEFAULT_IMAGE = "netsense-testbed:local"
ENV_IMAGE = "TESTBED_IMAGE"
INTERFACE = "eth0"
"""The veth in a container; Docker's own name, and it looks for it when the container ends."""
LINED_INTERFACE = "eth1"
"""The delay line's end in a container."""

NOT_COMPOSE = {"com.docker.compose.project": "", "com.docker.compose.service": ""}
"""Compose marks the images that it builds, containers inherit that, and Compose would take a worker
for one of its own."""
_RUN_DIR = PurePosixPath("/run/netsense")
ENVIRONMENT = {"HOME": "/tmp", "TMPDIR": "/tmp", "OMP_NUM_THREADS": "1"}
_NOBODY = 65534
PIDS = 4096
"""Processes and threads of a container: far more than training takes, and no fork bomb."""
_NO_IPV6_ADDRESS = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]})]}
"""An interface that makes up no address (IN6_ADDR_GEN_MODE_NONE), and so says nothing on its link
of its own accord."""
_READY_S = 60.0
_SIGNALLED = 128
"""Above it an exit code tells of the signal that ended a program."""
_DEATH_NOTICE_S = 0.3
"""Within it, at most, the daemon hears of a death."""
_START_THREADS = 8
_COMPOSE = "docker compose up experiment"
_OTHER_NAMESPACE = (
    f"this process needs the PID and network namespaces of the Docker daemon; run: {_COMPOSE}"
)
_OWN_MOUNT = re.compile(r"/containers/([0-9a-f]{64})/(?:hostname|hosts|resolv\.conf) /etc/")
"""A line of mountinfo(5): Docker mounts these files from a directory named after the container."""


class DockerHost:
    """A container with one interface that is in use (``labs.base.Host``)."""

    def __init__(
        self,
        name: str,
        address: str,
        mac: str,
        container: str,
        directory: Path,
        init: InitConnection,
        sock: NetlinkSocket,
    ) -> None:
        self.name = name
        self.nsenter_target: Mapping[str, int | str] = {"container": container}
        self.address = address
        self.mac = mac
        self.interface = INTERFACE
        self.clock = HERE
        self.index = 0
        """Of its interface, once that is known."""
        self.socket = sock
        self._directory = directory
        self._init = init

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> ContainerProcess:
        return self._init.start(argv, env, log)

    def path_on_host(self, path: Path) -> str:
        return str(_RUN_DIR / path.resolve().relative_to(self._directory))

    def close(self) -> None:
        self.socket.close()


class DockerLab:
    """Hosts and links made by a Docker daemon (``labs.base.Lab``).

    directory: the run directory. The workers see it as /run/netsense, all of it or what the plan's
    view has, and run as its owner, or, if that is root, as the owner of the directory above it or
    as nobody, to whom what they may write is then given.
    """

    shared_files = True

    def __init__(self, plan: LabPlan, directory: Path, image: str | None = None) -> None:
        self._plan = plan
        self._directory = directory.resolve()
        self._image = image or os.environ.get(ENV_IMAGE, DEFAULT_IMAGE)
        self._token = secrets.token_hex(4)
        self._labels = {LABEL: self._token, OWNER: owner_mark()}
        self._client: docker.DockerClient | None = None
        self._inits: dict[str, InitConnection] = {}
        self._switch: NetlinkSocket | None = None
        self._taps: list[int] = []
        self._line = ExitStack()
        self.hosts: dict[str, DockerHost] = {}
        self.pids: list[int] = []
        self.links = make_shaper(plan)

    @property
    def user(self) -> tuple[int, int]:
        """User and group that the workers run as."""
        for path in (self._directory, self._directory.parent):
            owner = path.stat()
            if owner.st_uid:
                return owner.st_uid, owner.st_gid
        return _NOBODY, _NOBODY

    def __enter__(self) -> Self:
        if self._plan.trunks:
            raise LabError(
                "the Docker lab has a single switch; a topology with trunks runs with --lab netns"
            )
        _require_capabilities()
        self._client = connect()
        try:
            with docker_errors():
                self._build(self._client)
            self.links.apply(self._plan.links)
        except BaseException as error:
            killed = self._killed_container() if isinstance(error, LabError | OSError) else ""
            self._close()
            if killed:
                raise HostFailed(killed) from error
            # a delay line that has died may live the next time
            if isinstance(error, OSError) and not isinstance(error, DelayLineDied):
                raise LabError(f"the lab cannot be made: {error}") from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def recorder(self, recording: Recording) -> Recorder:
        return LocalRecorder(recording, self.links, self.hosts, self.pids)

    def _build(self, client: docker.DockerClient) -> None:
        require_image(client, self._image)
        clean(dry_run=False, client=client)
        rendezvous = self._directory / f".hosts-{self._token}.sock"
        user, paths = self.user, _DaemonPaths(client)
        devices = (
            device_requests(self._plan.device, gpus.found(), client.info())
            if self._plan.device != "cpu"
            else []
        )
        for written in self._written():
            _give(written, *user)
        # Whatever the daemon makes is asked for on other threads: Ctrl-C, which comes to this one,
        # must not cut off a request, because the daemon would fulfil it after we have looked for
        # what there is to remove.
        pool = ThreadPoolExecutor(_START_THREADS, thread_name_prefix="docker")
        try:
            network = pool.submit(
                client.networks.create,
                f"netsense-{self._token}",
                driver="bridge",
                internal=True,
                labels=self._labels,
                options={
                    "com.docker.network.driver.mtu": str(self._plan.mtu),
                    # or the bridge has an address, at which workers reach what this machine serves
                    "com.docker.network.bridge.inhibit_ipv4": "true",
                },
            ).result()
            with protocol.listen_unix(rendezvous, backlog=len(self._plan.hosts) + 8) as listener:
                os.chown(rendezvous, *user)
                starting = {
                    name: pool.submit(
                        self._start_container,
                        client,
                        network,
                        name,
                        self._mounts(paths, name, rendezvous),
                        devices,
                        user,
                    )
                    for name in self._plan.hosts
                }
                self._answer(listener, starting)
                # Nobody else must be able to speak for a host, so the socket is removed before any
                # program runs.
                rendezvous.unlink()
            containers = {name: future.result() for name, future in starting.items()}
        finally:
            with undisturbed():
                pool.shutdown(wait=True, cancel_futures=True)
            rendezvous.unlink(missing_ok=True)
        self._wire(network, containers)

    def _written(self) -> list[Path]:
        if view := self._plan.view:
            return [view.shared, *itertools.chain.from_iterable(view.own.values())]
        return [self._directory, self._directory / "cells", self._directory / "script"]

    def _mounts(self, paths: "_DaemonPaths", host: str, rendezvous: Path) -> list[Mount]:
        """What a container sees of the run directory, and of folders elsewhere, which it sees under
        their own paths."""
        seen = {str(folder): (folder, True) for folder in self._plan.folders}
        if view := self._plan.view:
            reads, writes = (*view.reads, rendezvous), (view.shared, *view.own[host])
            for path in (*reads, *writes):
                seen[str(_RUN_DIR / path.resolve().relative_to(self._directory))] = (
                    path.resolve(),
                    path in reads,
                )
        else:
            seen[str(_RUN_DIR)] = (self._directory, False)
        return [
            Mount(target, paths[path], type="bind", read_only=read_only)
            for target, (path, read_only) in seen.items()
        ]

    def _start_container(
        self,
        client: docker.DockerClient,
        network: Network,
        name: str,
        mounts: list[Mount],
        devices: list[DeviceRequest],
        user: tuple[int, int],
    ) -> Container:
        init = Path(__file__).with_name("container_init.py").read_text()
        rendezvous = str(_RUN_DIR / f".hosts-{self._token}.sock")
        container = client.containers.run(
            self._image,
            entrypoint=["python", "-I", "-S", "-c", init, rendezvous, name],
            command=[],
            name=f"netsense-{self._token}-{name}",
            hostname=name,
            labels={**NOT_COMPOSE, **self._labels},
            detach=True,
            auto_remove=True,
            network=network.name,
            # Without this, reverse look-ups (torch does some) wait 10 s for a server that an
            # internal network cannot reach.
            dns_opt=["attempts:0"],
            user="{}:{}".format(*user),
            cap_drop=["ALL"],
            pids_limit=self._plan.limits.pids or PIDS,
            # Swap would take no less from others, and let a worker crawl instead of failing.
            mem_limit=self._plan.limits.memory_bytes,
            memswap_limit=self._plan.limits.memory_bytes,
            oom_score_adj=OOM_SCORE_ADJ,
            read_only=True,
            security_opt=["no-new-privileges:true"],
            tmpfs={"/tmp": "rw,nosuid,nodev"},
            mounts=mounts,
            device_requests=devices,
            environment=ENVIRONMENT,
        )
        container.reload()
        return container

    def _answer(self, listener: socket.socket, starting: Mapping[str, Future[Container]]) -> None:
        """Wait until every host has called; raises what went wrong with a container, or
        LabError."""
        listener.settimeout(0.2)
        deadline = time.monotonic() + _READY_S
        while len(self._inits) < len(starting):
            for name, future in starting.items():
                if future.done() and not (future.exception() is None and name in self._inits):
                    self._expect_alive(name, future.result())
            if time.monotonic() > deadline:
                missing = ", ".join(name for name in starting if name not in self._inits)
                raise LabError(f"no answer from the container of {missing} within {_READY_S:g} s")
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(10)
            try:
                host = str(protocol.decode_message(connection.recv(4096)).get("host"))
            except (OSError, ValueError):
                host = ""
            if host not in starting or host in self._inits:
                connection.close()
                continue
            connection.settimeout(None)
            self._inits[host] = InitConnection(connection)

    def _expect_alive(self, name: str, container: Container) -> None:
        with contextlib.suppress(NotFound):
            container.reload()
            if container.status == "running":
                return
        raise LabError(
            f"the container of {name} ended at once; see: docker run --rm --entrypoint python"
            f" {self._image} --version"
        )

    def _killed_container(self) -> str:
        """In one line, which container of this lab was ended by a signal; "" if none was, as far as
        the daemon tells."""
        assert self._client is not None
        filters = {"type": "container", "event": "die", "label": f"{LABEL}={self._token}"}
        # Of a container that is removed nothing but its last events can be had. As text, since
        # whole seconds would leave this one out, or wait for its end.
        until = f"{time.time() + _DEATH_NOTICE_S:.3f}"
        with contextlib.suppress(DockerException, requests.RequestException, KeyError, ValueError):
            for event in self._client.events(since=0, until=until, filters=filters, decode=True):
                died = event["Actor"]["Attributes"]
                if int(died["exitCode"]) > _SIGNALLED:
                    host = died["name"].removeprefix(f"netsense-{self._token}-")
                    code = died["exitCode"]
                    return f"the container of {host} ended with exit code {code} too early"
        return ""

    def _wire(self, network: Network, containers: Mapping[str, Container]) -> None:
        self._switch = NetlinkSocket()
        outside = {link["index"]: link for link in interfaces(self._switch)}
        tap_pairs: dict[str, tuple[int, int]] = {}
        for name in self._plan.hosts:
            attached = containers[name].attrs["NetworkSettings"]["Networks"][network.name]
            self.pids.append(containers[name].attrs["State"]["Pid"])
            inner = _enter(self.pids[-1])
            address, mac = attached["IPAddress"], attached["MacAddress"]
            host = self.hosts[name] = DockerHost(
                name,
                address,
                mac,
                str(containers[name].name),
                self._directory,
                self._inits[name],
                inner,
            )
            mine, peer = _veth_pair(host, outside)
            up = Port(inner, mine["index"], INTERFACE)
            down = Port(self._switch, peer["index"], peer.get_attr("IFLA_IFNAME"))
            if name in self._plan.lined:
                master = peer.get_attr("IFLA_MASTER")
                up, down, tap_pairs[name] = self._replace_veth(
                    host, attached["IPPrefixLen"], up, down, master
                )
            host.interface, host.index = up.interface, up.ifindex
            gso_bytes, gso_segments = gso_limits(
                self._plan.max_gso_bytes.get(name, UNCUT_PACKET_BYTES), self._plan.mtu
            )
            inner.batch(
                [
                    change_interface(
                        up,
                        "largest packet",
                        ("IFLA_GSO_MAX_SIZE", gso_bytes),
                        ("IFLA_GSO_MAX_SEGS", gso_segments),
                    ),
                    tcp_route(up.ifindex, address, attached["IPPrefixLen"], self._plan.tcp),
                ]
            )
            self._switch.batch([forwarding(down.ifindex, mac)])
            self.links.add(name, up=up, down=down)

        for host in self.hosts.values():
            others = [other for other in self.hosts.values() if other is not host]
            host.socket.batch(neighbour(host.index, other.address, other.mac) for other in others)
        if tap_pairs:
            self._taps.clear()  # they are the line's now
            self.links.line = self._line.enter_context(DelayLine(tap_pairs))

    def _replace_veth(
        self, host: DockerHost, prefix_bits: int, inner: Port, outer: Port, bridge: int
    ) -> tuple[Port, Port, tuple[int, int]]:
        """Put TAP devices in the place of a veth pair; returns their ports, and their
        descriptors."""
        mtu, silent = ("IFLA_MTU", self._plan.mtu), ("IFLA_AF_SPEC", _NO_IPV6_ADDRESS)
        first, up = self._tap(LINED_INTERFACE, inner.socket, self.pids[-1])
        second, down = self._tap(f"tap{self._token}{len(self.hosts) - 1}", outer.socket)
        inner.socket.batch(
            [
                change_interface(inner, "veth", up=False),
                _address(RTM_DELADDR, inner, host.address, prefix_bits),
                change_interface(up, "TAP device", ("IFLA_ADDRESS", host.mac), mtu, silent),
                change_interface(up, "TAP device", up=True),
                _address(RTM_NEWADDR, up, host.address, prefix_bits),
            ]
        )
        outer.socket.batch(
            [
                change_interface(outer, "veth", up=False),
                change_interface(down, "TAP device", ("IFLA_MASTER", bridge), mtu, silent),
                change_interface(down, "TAP device", up=True),
            ]
        )
        return up, down, (first, second)

    def _tap(self, name: str, sock: NetlinkSocket, pid: int | None = None) -> tuple[int, Port]:
        """Make a TAP device, here or in the network namespace of a process."""
        with back_to_own_namespace():
            if pid is not None:
                with open(f"/proc/{pid}/ns/net") as namespace:
                    setns(namespace.fileno())
            self._taps.append(open_tap(name))
            return self._taps[-1], Port(sock, socket.if_nametoindex(name), name)

    def _close(self) -> None:
        with undisturbed():
            self._line.close()
            for tap in self._taps:
                os.close(tap)
            self._taps.clear()
            for init in self._inits.values():
                init.close()
            for host in self.hosts.values():
                host.close()
            self._inits.clear()
            self.hosts.clear()
            if self._switch is not None:
                self._switch.close()
                self._switch = None
            if self._client is not None:
                with contextlib.suppress(DockerException, requests.RequestException):
                    _remove(self._client, *_labelled(self._client, f"{LABEL}={self._token}"))
                self._client.close()
                self._client = None


def connect() -> docker.DockerClient:
    """A client of the daemon; raises LabError with the mend."""
    try:
        client = docker.from_env(timeout=60)
        client.ping()
        return client
    except (DockerException, requests.RequestException) as error:
        if "ermission denied" in str(error):
            raise LabError(f"this user may not use Docker; run with sudo, or: {_COMPOSE}") from None
        said = str(error).removeprefix("Error while fetching server API version: ")
        reason = protocol.one_line(said).replace(";", ",")
        if place := os.environ.get("DOCKER_HOST"):
            fix = "mend that, or unset the variable, or use --lab netns"
            raise LabError(
                f"no Docker daemon answers at DOCKER_HOST={place} ({reason}); {fix}"
            ) from None
        raise LabError(
            f"no Docker daemon answers ({reason}); start it (for example: sudo systemctl start"
            " docker), or use --lab netns"
        ) from None


def device_requests(
    device: str, names: list[str], daemon: Mapping[str, Any]
) -> list[DeviceRequest]:
    """What a container asks the daemon for, so that its programs may compute on ``device``: all
    GPUs, or nothing.

    names: the machine's GPUs. daemon: what it tells of itself. Raises LabError where there must be
    a GPU.
    """
    if error := gpus.why_not(device, names, daemon):
        raise LabError(error)
    wanted = device != "cpu" and gpus.reach_containers(names, daemon)
    return [DeviceRequest(count=-1, capabilities=[["gpu", "compute", "utility"]])] if wanted else []


def image_has(program: str) -> bool:
    """Whether the image of the hosts has a program; asked in a container of it that ends at once.
    Raises LabError."""
    image = os.environ.get(ENV_IMAGE, DEFAULT_IMAGE)
    question = ["sh", "-c", f"command -v {program}"]
    # On another thread, which Ctrl-C does not keep from removing the container.
    with contextlib.closing(connect()) as client, docker_errors(), ThreadPoolExecutor(1) as pool:
        require_image(client, image)
        try:
            pool.submit(
                client.containers.run,
                image,
                entrypoint=question,
                command=[],
                remove=True,
                network_mode="none",
                labels=NOT_COMPOSE,
            ).result()
        except ContainerError:
            return False
        return True


def require_image(client: docker.DockerClient, image: str) -> None:
    """Raise LabError with the mend if the daemon does not have the image of the hosts."""
    try:
        client.images.get(image)
    except ImageNotFound:
        raise LabError(
            f"the image {image} is missing; build it with: docker compose build experiment"
        ) from None


def clean(
    dry_run: bool, client: docker.DockerClient | None = None
) -> tuple[list[str], dict[str, str]]:
    """Remove what labs have left whose orchestrator is gone; raises LabError without a daemon.

    Returns (what is gone, or would be, {what could not be removed: why}).
    """
    own = client is None
    if client is None:
        client = connect()
    try:
        containers, networks = _labelled(client, LABEL)
        containers = [one for one in containers if not owner_lives(one.labels.get(OWNER, ""))]
        networks = [one for one in networks if not owner_lives(one.attrs["Labels"].get(OWNER, ""))]
        left = {} if dry_run else _remove(client, containers, networks)
        found = [f"container {one.name}" for one in containers] + [
            f"network {one.name}" for one in networks
        ]
        return [name for name in found if name not in left], left
    finally:
        if own:
            client.close()


def _labelled(client: docker.DockerClient, label: str) -> tuple[list[Container], list[Network]]:
    chosen = {"label": label}
    return client.containers.list(
        all=True, filters=chosen, ignore_removed=True
    ), client.networks.list(filters=chosen)


def _remove(
    client: docker.DockerClient, containers: Sequence[Container], networks: Sequence[Network]
) -> dict[str, str]:
    """Returns what could not be removed, and why."""
    left: dict[str, str] = {}

    def remove(container: Container) -> None:
        try:
            container.remove(force=True, v=True)
        except APIError as error:
            # It may be gone, or on its way: containers remove themselves when their orchestrator
            # hangs up.
            if error.status_code not in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):
                left[f"container {container.name}"] = protocol.one_line(
                    str(error.explanation or error)
                )

    with ThreadPoolExecutor(_START_THREADS) as pool:
        list(pool.map(remove, containers))
    for network in networks:
        # A container that is being removed by the daemon itself keeps its network for a moment
        # longer.
        for _ in range(50):
            try:
                network.remove()
            except NotFound:
                pass
            except APIError as error:
                left[f"network {network.name}"] = protocol.one_line(str(error.explanation or error))
                time.sleep(0.1)
                continue
            left.pop(f"network {network.name}", None)
            break
    return left


def _enter(pid: int) -> NetlinkSocket:
    try:
        return NetlinkSocket.in_namespace(f"/proc/{pid}/ns/net")
    except PermissionError:
        raise LabError(
            f"this process may not enter a container's network; run: {_COMPOSE}, or use sudo"
        ) from None
    except FileNotFoundError:
        raise LabError(f"cannot see the containers: {_OTHER_NAMESPACE}") from None


def _veth_pair(host: DockerHost, outside: Mapping[int, ifinfmsg]) -> tuple[ifinfmsg, ifinfmsg]:
    """The ends of a new container's veth pair: in the container, and at the bridge. outside: all
    interfaces there, by index."""
    # The daemon's word is checked: a PID means another process if we do not share its PID
    # namespace, and an index another interface if we do not share its network namespace.
    mine = next(
        (x for x in interfaces(host.socket) if x.get_attr("IFLA_IFNAME") == INTERFACE), None
    )
    if mine is None or mine.get_attr("IFLA_ADDRESS") != host.mac:
        raise LabError(f"cannot see the container of {host.name}: {_OTHER_NAMESPACE}")
    peer = outside.get(mine.get_attr("IFLA_LINK"))
    if (
        peer is None
        or peer.get_attr("IFLA_LINK") != mine["index"]
        or not peer.get_attr("IFLA_MASTER")
    ):
        raise LabError(f"cannot see the veth pair of {host.name}: {_OTHER_NAMESPACE}")
    # A new veth has no queue. What has one is being shaped by some other tool, which matches
    # containers by itself.
    if {mine.get_attr("IFLA_QDISC"), peer.get_attr("IFLA_QDISC")} != {"noqueue"}:
        raise LabError(f"something else shapes the link of {host.name}; end that first")
    return mine, peer


def _address(kind: int, port: Port, address: str, prefix_bits: int) -> Request:
    message = ifaddrmsg()
    message["family"], message["prefixlen"], message["index"] = (
        socket.AF_INET,
        prefix_bits,
        port.ifindex,
    )
    message["attrs"] = [("IFA_ADDRESS", address), ("IFA_LOCAL", address)]
    return encode(
        message,
        kind,
        NLM_F_CREATE if kind == RTM_NEWADDR else 0,
        f"address {address} of {port.interface}",
    )


def _require_capabilities() -> None:
    if missing := lacking_capabilities():
        raise LabError(
            f"shaping containers needs {', '.join(missing)}; run: {_COMPOSE}, or use sudo, or --lab"
            " netns"
        )


def require_docker() -> None:
    """Raise LabError with the mend if no lab can be made here."""
    _require_capabilities()
    with contextlib.closing(connect()) as client, docker_errors():
        require_image(client, os.environ.get(ENV_IMAGE, DEFAULT_IMAGE))


def _give(path: Path, uid: int, gid: int) -> None:
    """Hand a tree over, if it is there; a link that a worker may have put in its place is not
    followed."""
    if path.is_symlink():
        raise LabError(f"{path} is a link; something else has put it there, remove it")
    for found in everything_in(path) if path.exists() else ():
        os.chown(found, uid, gid, follow_symlinks=False)


class _DaemonPaths:
    """The paths under which the daemon's machine has ours; others than ours if we run in a
    container ourselves."""

    def __init__(self, client: docker.DockerClient) -> None:
        own = _OWN_MOUNT.search(Path("/proc/self/mountinfo").read_text())
        self._mounts: Sequence[Mapping[str, Any]] | None = None
        if own is not None:
            with contextlib.suppress(NotFound):  # a container of some other daemon
                self._mounts = client.containers.get(own[1]).attrs["Mounts"]

    def __getitem__(self, path: Path) -> str:
        if self._mounts is None:
            return str(path)
        inside = [mount for mount in self._mounts if path.is_relative_to(mount["Destination"])]
        if not inside:
            raise LabError(
                f"the workers cannot see {path}; it must be in a directory that is mounted, such as"
                " runs"
            )
        nearest = max(inside, key=lambda mount: len(mount["Destination"]))
        return str(PurePosixPath(nearest["Source"]) / path.relative_to(nearest["Destination"]))


@contextlib.contextmanager
def docker_errors() -> Iterator[None]:
    try:
        yield
    except (DockerException, requests.RequestException) as error:
        words = error.explanation if isinstance(error, APIError) else str(error)
        raise LabError(f"Docker refused: {words}") from error
