"""The swarm lab: hosts are tasks of a Docker Swarm, spread over its nodes, joined by an overlay
network, shaped by agents.

The orchestrator talks to a manager of the swarm and makes services there; Swarm places them. On
every node runs an agent (``testbed.agent``), a task of a global service, which finds the containers
of its node and does all that has to be done there (``testbed.agent.containers``). Nothing restarts
behind our back, and no file of a node is touched: what workers read and write is in the memory of
the agent's container.

Everything made carries ``LABEL``, with the run that it belongs to, and ``OWNER``, the process that
made it. Agents end when their orchestrator hangs up, and containers when their agent does; the
services, which are then empty, are removed by the next run or by ``testbed clean``.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import docker
from docker.errors import APIError, NotFound

from testbed.labs.base import OOM_SCORE_ADJ, LabError, LabPlan, Limits, View
from testbed.labs.containers import DOCKER, INIT_SOCKET
from testbed.labs.docker import (
    DEFAULT_IMAGE,
    ENV_IMAGE,
    ENVIRONMENT,
    NOT_COMPOSE,
    PIDS,
    connect,
    docker_errors,
    require_image,
)
from testbed.labs.owner import boot_id, owner_lives, owner_mark
from testbed.labs.remote import Nodes, RemoteLab, RemoteNode
from testbed.links.state import LinkState
from testbed.protocol import one_line
from testbed.signals import undisturbed
from testbed.spec.models import OVERLAY_MTU

LABEL = "netsense.swarm"
OWNER = "netsense.swarm.owner"
PLACEMENT_FILE = "placement.json"
"""In the directory of a cell: the node of each host."""
_AGENT_DIRECTORY = "/run/netsense"
_SECRET = "netsense"  # noqa: S105  (a file's name)
_AGENT = (
    'exec python -m testbed.agent "$0" --name "$NODE" --secret /run/secrets/'
    + _SECRET
    + f" --lab testbed.agent.containers:ContainerNodeLab --directory {_AGENT_DIRECTORY}"
)
_AGENT_CAPABILITIES = ("SYS_ADMIN", "NET_ADMIN", "NET_RAW", "CHOWN", "FOWNER", "DAC_OVERRIDE")
"""To enter the namespaces of containers, to shape what is in there, to wake a link, to hand files
over to the programs."""
_VXLAN_BYTES = 50
"""That the overlay adds; Docker asks for the MTU of the network below it."""
_FIRST_USER = 64000
"""Of the hosts' programs; each host has one of its own, so that none reads what another has
written."""
_RUNNING_S = 60.0
_PLACED_S = 5.0
_CALL_S = 30.0
_REMOVED_S = 8.0
_POLL_S = 0.1
_FINAL = frozenset({"complete", "shutdown", "failed", "rejected", "orphaned", "remove"})
_MANAGER_PORT = 2377
_THREADS = 8


class Swarm:
    """A swarm with an agent on each of its nodes, from entering to leaving. Labs are made on it,
    one after the other."""

    def __init__(self, image: str | None = None) -> None:
        self._image = image or os.environ.get(ENV_IMAGE, DEFAULT_IMAGE)
        self.token = secrets.token_hex(4)
        self.labels = {LABEL: self.token, OWNER: owner_mark()}
        self._closing = ExitStack()
        self._agents: Mapping[str, RemoteNode] = {}

    def __enter__(self) -> Self:
        try:
            self.client = self._closing.enter_context(contextlib.closing(connect()))
            with docker_errors():
                require_manager(self.client)
                require_image(self.client, self._image)
                clean(dry_run=False, client=self.client)
            # Whatever the daemon makes is asked for on other threads: Ctrl-C must not cut off a
            # request that is then fulfilled.
            self.pool = self._closing.enter_context(
                ThreadPoolExecutor(_THREADS, thread_name_prefix="swarm")
            )
            self._closing.callback(self._remove_all)
            self._closing.callback(self.pool.shutdown, cancel_futures=True)
            self._nodes = self._closing.enter_context(Nodes())
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with undisturbed():
            self._closing.close()

    @property
    def image(self) -> str:
        """The image, by what names it on all nodes alike: its digest, by which a node can pull it,
        or its id."""
        found = self.client.images.get(self._image).attrs
        return next(iter(found.get("RepoDigests") or ()), found["Id"])

    def agents(self) -> Mapping[str, RemoteNode]:
        """The agents of all nodes that are ready, by name of the node; they are started anew if one
        is missing or lost."""
        with docker_errors():
            known = self._agents
            names = _ready_nodes(self.client).values()
            if sorted(names) != sorted(known) or any(agent.lost for agent in known.values()):
                self.remove()
                # which takes as long as Swarm needs to see that a node is gone
                self._start_agents()
                self._agents = self._nodes.wait(list(_ready_nodes(self.client).values()), _CALL_S)
        return self._agents

    def _start_agents(self) -> None:
        name = f"netsense-{self.token}-agent"
        secret = self.make(
            self.client.api.create_secret,
            f"netsense-{self.token}-{secrets.token_hex(2)}",
            self._nodes.secret,
            labels=self.labels,
        )
        container = {
            "Image": self.image,
            "Command": ["sh", "-c", _AGENT, f"{_own_address(self.client)}:{self._nodes.port}"],
            "Env": ["NODE={{.Node.Hostname}}"],
            "User": "0:0",
            "ReadOnly": True,
            "CapabilityDrop": ["ALL"],
            "CapabilityAdd": [f"CAP_{name}" for name in _AGENT_CAPABILITIES],
            "Secrets": [
                {
                    "SecretID": secret["ID"],
                    "SecretName": self.client.secrets.get(secret["ID"]).name,
                    "File": {"Name": _SECRET, "UID": "0", "GID": "0", "Mode": 0o400},
                }
            ],
            "Mounts": [
                {
                    "Type": "bind",
                    "Source": str(DOCKER),
                    "Target": str(DOCKER),
                    "ReadOnly": True,
                    "BindOptions": {"Propagation": "rslave"},  # those of containers to come, too
                },
                {"Type": "tmpfs", "Target": _AGENT_DIRECTORY, "TmpfsOptions": {"Mode": 0o755}},
                {"Type": "tmpfs", "Target": "/tmp"},
            ],
        }
        self.make(self.create_service, name, container, "host", mode={"Global": {}})
        self.running([name], lambda: len(_ready_nodes(self.client)))

    def make(self, call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """What the daemon says to a request."""
        return self.pool.submit(call, *arguments, **more).result()

    def create_service(
        self,
        name: str,
        container: Mapping[str, Any],
        network: str,
        *,
        mode: Mapping[str, Any],
        constraints: Sequence[str] = (),
        limits: Limits = Limits(),  # noqa: B008
    ) -> None:
        """Make a service whose tasks run once."""
        template = {
            "ContainerSpec": {
                **container,
                "Labels": {**NOT_COMPOSE, **self.labels},
                "StopGracePeriod": 10**9,
            },
            "RestartPolicy": {"Condition": "none"},
            "Placement": {"Constraints": list(constraints)},
            "Networks": [{"Target": network}],
            "Resources": {
                "Limits": {"Pids": limits.pids or PIDS, "MemoryBytes": limits.memory_bytes or 0}
            },
        }
        self.client.api.create_service(
            template, name, labels=self.labels, mode=mode, endpoint_spec={"Mode": "dnsrr"}
        )

    def running(self, services: Sequence[str], count: Callable[[], int]) -> list[Mapping[str, Any]]:
        """The tasks of services, when so many run. Raises LabError that names the node and the
        reason if one cannot."""
        begun_s = time.monotonic()
        while True:
            away = {
                id for id, node in _nodes(self.client).items() if node["Status"]["State"] != "ready"
            }
            found = self.client.api.tasks(filters={"service": list(services)})
            tasks = [task for task in found if task.get("NodeID") not in away]
            for task in tasks:
                if task["Status"]["State"] in _FINAL:
                    raise LabError(self._why_it_ended(task))
            if len(tasks) >= count() and all(
                task["Status"]["State"] == "running" for task in tasks
            ):
                return tasks
            waited_s = time.monotonic() - begun_s
            unplaced = [
                task
                for task in tasks
                if task["Status"]["State"] == "pending" and task["Status"].get("Err")
            ]
            if unplaced and waited_s > _PLACED_S:
                raise LabError(self._why_it_ended(unplaced[0]))
            if waited_s > _RUNNING_S:
                late = next((task for task in tasks if task["Status"]["State"] != "running"), None)
                raise LabError(
                    self._why_it_ended(late)
                    if late
                    else f"Swarm has started no task in {_RUNNING_S:g} s"
                )
            time.sleep(_POLL_S)

    def _why_it_ended(self, task: Mapping[str, Any]) -> str:
        status = task["Status"]
        words = one_line(status.get("Err") or status.get("Message") or status["State"], 300)
        node = (
            _nodes(self.client)
            .get(task.get("NodeID", ""), {})
            .get("Description", {})
            .get("Hostname")
        )
        if node is None:
            return f"Swarm places no task: {words}"
        if "No such image" in words:
            load = f"docker save {self._image} | ssh {node} docker load"
            return f"node {node} does not have the image {self._image}; load it there: {load}"
        return f"node {node}: a task is {status['State']}: {words}"

    def remove(self, prefix: str = "") -> None:
        """Remove what the run has made, or of that what has a name that begins so."""
        lost = {name for name, agent in self._agents.items() if agent.lost}
        _remove(self.client, lambda labels: labels.get(LABEL) == self.token, prefix, lost)

    def _remove_all(self) -> None:
        """The results are there then, so a daemon that refuses ends nothing any more."""
        try:
            with docker_errors():
                self.remove()
        except LabError as error:
            print(
                f"testbed: what the run has made in the swarm is left: {error}; testbed clean"
                " removes it",
                file=sys.stderr,
            )


class SwarmLab(RemoteLab):
    """Hosts and links on the nodes of a swarm (``labs.base.Lab``). directory: the run directory."""

    def __init__(self, plan: LabPlan, swarm: Swarm, directory: Path) -> None:
        super().__init__(plan, directory, swarm.agents(), self._place)
        self._swarm = swarm
        self._name = f"netsense-{swarm.token}-{secrets.token_hex(2)}"
        self._placed = False

    def __enter__(self) -> Self:
        try:
            return self._enter()
        except LabError:
            if not self._placed:
                raise
            return self._enter()  # Swarm's overlay sometimes tells a node too late who is where

    def _enter(self) -> Self:
        self._placed = False
        try:
            return super().__enter__()
        except BaseException:
            self._remove()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with undisturbed():
            try:
                super().__exit__(kind, error, trace)
            finally:
                self._remove()

    def _place(self) -> Mapping[str, tuple[str, Mapping[str, Any]]]:
        """Have Swarm start the hosts; returns by host its node, and what the agent there has to
        know."""
        swarm, plan = self._swarm, self._plan
        with docker_errors():
            network = swarm.make(
                swarm.client.networks.create,
                self._name,
                driver="overlay",
                internal=True,
                labels=swarm.labels,
                options={"com.docker.network.driver.mtu": str(plan.mtu + _VXLAN_BYTES)},
            ).id
            users = {host: _FIRST_USER + number for number, host in enumerate(plan.hosts)}
            services = {f"{self._name}-{host}": host for host in plan.hosts}
            made = [
                swarm.pool.submit(
                    swarm.create_service,
                    service,
                    self._container(host, users[host]),
                    network,
                    mode={"Replicated": {"Replicas": 1}},
                    limits=plan.limits,
                    constraints=[
                        f"node.labels.{key} == {value}"
                        for key, value in plan.placement.get(host, {}).items()
                    ],
                )
                for service, host in services.items()
            ]
            try:
                for future in made:
                    future.result()
            finally:
                # what one failure leaves undone must not be made after the rest is removed
                for future in made:
                    future.cancel()
                wait(made)
            tasks = swarm.running(list(services), lambda: len(services))
            ids = {
                service.id: services[service.name]
                for service in swarm.client.services.list()
                if service.name in services
            }
            nodes = _ready_nodes(swarm.client)
        where = {ids[task["ServiceID"]]: nodes.get(task["NodeID"], "") for task in tasks}
        if strays := [host for host, node in where.items() if node not in self._nodes]:
            raise LabError(f"{strays[0]} is on a node that has just come or gone; run it again")
        addresses = {ids[task["ServiceID"]]: _address(task, network) for task in tasks}
        self._placed = True
        (self._view.shared.parent / PLACEMENT_FILE).write_text(
            json.dumps({host: where[host] for host in plan.hosts}, indent=1)
        )
        return {
            host: (
                where[host],
                {
                    "address": addresses[host],
                    "overlay": network,
                    "user": users[host],
                    "others": {
                        other: addresses[other].partition("/")[0]
                        for other in plan.hosts
                        if other != host
                    },
                    "own": [self._relative(path) for path in self._view.own[host]],
                    "shared": self._relative(self._view.shared),
                },
            )
            for host in plan.hosts
        }

    def _relative(self, path: Path) -> str:
        return path.resolve().relative_to(self._directory).as_posix()

    def _container(self, host: str, user: int) -> dict[str, Any]:
        init = Path(__file__).with_name("container_init.py").read_text()
        return {
            "Image": self._swarm.image,
            "Command": ["python", "-I", "-S", "-c", init, INIT_SOCKET, host, str(OOM_SCORE_ADJ)],
            "Hostname": host,
            "User": f"{user}:{user}",
            "ReadOnly": True,
            "CapabilityDrop": ["ALL"],
            "Privileges": {"NoNewPrivileges": True},
            "DNSConfig": {"Options": ["attempts:0"]},  # as in the Docker lab
            "Env": [f"{name}={value}" for name, value in ENVIRONMENT.items()],
            "Mounts": [
                {"Type": "tmpfs", "Target": "/tmp"},
                *(
                    {"Type": "bind", "Source": str(folder), "Target": str(folder), "ReadOnly": True}
                    for folder in self._plan.folders
                ),
            ],
        }

    def _remove(self) -> None:
        with contextlib.suppress(LabError), docker_errors():
            self._swarm.remove(self._name)


def try_out(image: str | None = None) -> list[str]:
    """Make a small lab over all nodes of the swarm, and remove it; returns their names. Raises
    LabError."""
    with Swarm(image) as swarm, tempfile.TemporaryDirectory() as scratch:
        names = list(swarm.agents())
        hosts = [f"host{number}" for number, _ in enumerate(names)]
        cell = Path(scratch, "cells", "doctor")
        cell.mkdir(parents=True)
        view = View(
            Path(scratch), (), cell / "shared", {host: (cell / "hosts" / host,) for host in hosts}
        )
        plan = LabPlan(dict.fromkeys(hosts, LinkState()), mtu=OVERLAY_MTU, view=view)
        with SwarmLab(plan, swarm, Path(scratch)):
            return names


def require_manager(client: docker.DockerClient) -> None:
    """Raise LabError with the mend if the daemon is no manager of a swarm."""
    swarm = client.info()["Swarm"]
    if swarm["LocalNodeState"] != "active":
        raise LabError(
            "this Docker daemon belongs to no swarm; make one: docker swarm init --advertise-addr"
            " ADDRESS, then on the other machines what it prints"
        )
    if not swarm["ControlAvailable"]:
        managers = ", ".join(manager["Addr"] for manager in swarm.get("RemoteManagers") or ())
        raise LabError(
            f"this node of the swarm is no manager; run on one ({managers}), or here: "
            "docker node promote NODE there, or DOCKER_HOST=ssh://MANAGER"
        )


def _nodes(client: docker.DockerClient) -> dict[str, Mapping[str, Any]]:
    return {node.id: node.attrs for node in client.nodes.list()}


def _ready_nodes(client: docker.DockerClient) -> dict[str, str]:
    """Names of the nodes that take tasks, by id. Raises LabError if two have the same."""
    nodes = {
        id: node["Description"]["Hostname"]
        for id, node in _nodes(client).items()
        if node["Status"]["State"] == "ready" and node["Spec"]["Availability"] == "active"
    }
    for name in nodes.values():
        if list(nodes.values()).count(name) > 1:
            raise LabError(
                f"two nodes of the swarm are called {name}; give them different host names"
            )
    return nodes


def nodes_away(client: docker.DockerClient) -> dict[str, str]:
    """The nodes that take no tasks, by name, and why."""
    return {
        node["Description"][
            "Hostname"
        ]: f"{node['Status']['State']}, {node['Spec']['Availability']}"
        for id, node in _nodes(client).items()
        if id not in _ready_nodes(client)
    }


def _own_address(client: docker.DockerClient) -> str:
    """The address of this machine in the network that the nodes are in."""
    leader = next(
        node["ManagerStatus"]
        for node in _nodes(client).values()
        if node.get("ManagerStatus", {}).get("Leader")
    )
    host = leader["Addr"].rpartition(":")[0].strip("[]")
    with socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM
    ) as sock:
        sock.connect((host, _MANAGER_PORT))  # which sends nothing
        return str(sock.getsockname()[0])


def _address(task: Mapping[str, Any], network: str) -> str:
    """Of a task in an overlay network, with its prefix."""
    return next(
        str(one["Addresses"][0])
        for one in task.get("NetworksAttachments") or ()
        if one["Network"]["ID"] == network
    )


def clean(
    dry_run: bool, client: docker.DockerClient | None = None
) -> tuple[list[str], dict[str, str]]:
    """Remove what runs have left in a swarm whose orchestrator is gone. Nothing if there is no
    swarm.

    Returns (what is gone, or would be, {what could not be removed: why}). An orchestrator on
    another machine lives as long as any of its tasks does.
    """
    with contextlib.ExitStack() as stack:
        if client is None:
            client = stack.enter_context(contextlib.closing(connect()))
        swarm = client.info()["Swarm"]
        if swarm["LocalNodeState"] != "active" or not swarm["ControlAvailable"]:
            return [], {}
        running = {
            task["ServiceID"]
            for task in client.api.tasks()
            if task["Status"]["State"] not in _FINAL
        }
        busy = {one["labels"].get(LABEL) for one in _made(client) if one["id"] in running}

        def is_left(labels: Mapping[str, str]) -> bool:
            mark = labels.get(OWNER, "")
            return not owner_lives(mark) and (boot_id() in mark or labels[LABEL] not in busy)

        found = [f"{one['kind']} {one['name']}" for one in _made(client) if is_left(one["labels"])]
        left = _remove(client, is_left) if found and not dry_run else {}
        return [name for name in found if name not in left], left


def _made(client: docker.DockerClient) -> Iterator[dict[str, Any]]:
    """Services, networks and secrets of ours: kind, id, name, labels and remove, in the order in
    which they can be removed."""
    chosen = {"label": LABEL}
    for service in client.services.list(filters=chosen):
        spec = service.attrs["Spec"]
        yield {
            "kind": "service",
            "id": service.id,
            "name": service.name,
            "labels": spec["Labels"],
            "remove": service.remove,
        }
    for network in client.networks.list(filters=chosen):
        labels = network.attrs["Labels"]
        yield {
            "kind": "network",
            "id": network.id,
            "name": network.name,
            "labels": labels,
            "remove": network.remove,
        }
    for secret in client.secrets.list(filters=chosen):
        labels = secret.attrs["Spec"]["Labels"]
        yield {
            "kind": "secret",
            "id": secret.id,
            "name": secret.name,
            "labels": labels,
            "remove": secret.remove,
        }


def _remove(
    client: docker.DockerClient,
    chosen: Callable[[Mapping[str, str]], bool],
    prefix: str = "",
    lost: Collection[str] = (),
) -> dict[str, str]:
    """Remove what is ours and chosen by its labels, and wait until the nodes have ended the tasks,
    but those that are lost. Returns what could not be removed, and why."""
    given_up_s = time.monotonic() + _REMOVED_S
    services: set[str] = set()
    why: dict[str, str] = {}
    while time.monotonic() < given_up_s:
        left = [
            one for one in _made(client) if chosen(one["labels"]) and one["name"].startswith(prefix)
        ]
        services |= {one["id"] for one in left if one["kind"] == "service"}
        why = {}
        for one in left:
            try:
                one["remove"]()
            except NotFound:
                pass
            except APIError as error:  # what is still in use is removed a moment later
                why[f"{one['kind']} {one['name']}"] = one_line(str(error.explanation or error))
        ready = {id for id, name in _ready_nodes(client).items() if name not in lost}
        if not left and not any(
            task["ServiceID"] in services and task.get("NodeID") in ready
            for task in client.api.tasks()
        ):
            break
        time.sleep(_POLL_S)
    return why
