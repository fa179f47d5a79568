"""A Docker Swarm of several nodes on one machine, for tests: each node is a daemon in a network
namespace of its own.

The namespaces are joined by a bridge, which is the network between the machines. Each daemon also
has a mount namespace, in which its files lie where they do on a machine of its own
(/var/run/docker), and may have another monotonic clock.

    python tests/swarm/swarm_nodes.py [--nodes 3] -- COMMAND ARGS…

runs a command on the first node, the manager: in its network namespace, with DOCKER_HOST set. Needs
root, and dockerd.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

IMAGE = os.environ.get("TESTBED_IMAGE", "netsense-testbed:local")
_NETWORK = "10.79.0"
_READY_S = 30.0
_DOCKER_ROOT = Path(os.environ.get("NETSENSE_DOCKER_ROOT", "/var/lib/docker"))
"""Of this machine's own daemon; it is often a mount of its own, and hard links to what is in it
must be in it, too."""


class Node:
    """One daemon: node 1 is the manager."""

    def __init__(self, number: int, token: str, work: Path, monotonic_s: int) -> None:
        self.number = number
        self.name = f"node{number}"
        self.namespace = f"{token}-{self.name}"
        self.address = f"{_NETWORK}.{number}"
        self.directory = work / self.name
        self.socket = self.directory / "docker.sock"
        self.monotonic_s = monotonic_s
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": f"unix://{self.socket}", "TESTBED_IMAGE": IMAGE}

    def inside(self, command: Sequence[str]) -> list[str]:
        """A command, as it runs in the node's network namespace."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *command]

    def docker(self, *arguments: str, check: bool = True) -> str:
        """What Docker's command line says on this node."""
        done = subprocess.run(
            self.inside(["docker", *arguments]),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: docker {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def start(self) -> None:
        """Start the daemon; ``wait`` waits until it answers."""
        execute, data = self.directory / "exec", self.directory / "data"
        for path in (execute, data):
            path.mkdir(parents=True, exist_ok=True)
        clock = (
            f"unshare --time --monotonic {self.monotonic_s} --fork --kill-child"
            if self.monotonic_s
            else ""
        )
        # A task sees the namespaces of later ones only if mounts spread, as systemd has it on real
        # machines.
        script = f"""
            mount --make-rshared / && mkdir -p /run/docker && mount --bind {execute} /run/docker && hostname {self.name} &&
            exec setpriv --pdeathsig KILL {clock} \
                dockerd --data-root {data} --exec-root /run/docker --pidfile {self.directory}/pid -H unix://{self.socket} \
                --bip 172.31.{self.number}.1/24 --log-level warn"""
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                self.inside(
                    ["unshare", "--mount", "--uts", "--propagation", "slave", "sh", "-c", script]
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until the daemon answers."""
        given_up_s = time.monotonic() + _READY_S
        while not self.docker("info", "--format", "{{.ServerVersion}}", check=False):
            if (
                time.monotonic() > given_up_s
                or self.process is None
                or self.process.poll() is not None
            ):
                raise RuntimeError(
                    f"{self.name}: no daemon:\n{(self.directory / 'log').read_text()[-2000:]}"
                )
            time.sleep(0.2)

    def load_image(self) -> None:
        """Copy the image from this machine's own daemon, unless it is there."""
        if not self.docker("image", "ls", "--quiet", IMAGE):
            with subprocess.Popen(["docker", "save", IMAGE], stdout=subprocess.PIPE) as save:
                subprocess.run(
                    ["docker", "-H", f"unix://{self.socket}", "load"], stdin=save.stdout, check=True
                )

    def stop(self) -> None:
        """End the daemon and all that it has started."""
        if self.process is not None:
            with contextlib.suppress(OSError, ValueError):
                os.kill(self.daemon, signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
        end_all_in(self.namespace)

    @property
    def daemon(self) -> int:
        """The daemon's process. Raises OSError or ValueError if there is none."""
        return int((self.directory / "pid").read_text())

    def overlays(self) -> list[str]:
        """Namespaces of overlay networks that are there, by the names of their files.

        Docker leaves the file for up to a minute after the namespace, which is mounted on it
        (nsfs), has gone.
        """
        mounts = Path(f"/proc/{self.daemon}/mountinfo").read_text().splitlines()
        mounted = [line.split()[4] for line in mounts if " - nsfs " in line]
        names = sorted(path.name for path in (self.directory / "exec" / "netns").glob("1-*"))
        return [
            name for name in names if any(place.endswith(f"/netns/{name}") for place in mounted)
        ]


def end_all_in(namespace: str) -> None:
    """SIGKILL for all processes in a network namespace, such as shims of containers that lost their
    daemon."""
    for pid in subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
    ).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


class Nodes:
    """A swarm, from entering to leaving. monotonic_s: by number of a node, what its clock is
    ahead."""

    def __init__(
        self,
        count: int = 3,
        monotonic_s: Mapping[int, int] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._own = directory is None
        self._work = directory or Path(
            tempfile.mkdtemp(
                prefix="netsense-swarm-", dir=_DOCKER_ROOT if _DOCKER_ROOT.is_dir() else "/var/tmp"
            )
        )
        self._token = f"ns{os.getpid()}"
        self._bridge = f"{self._token}-net"
        self.nodes = [
            Node(number, self._token, self._work, (monotonic_s or {}).get(number, 0))
            for number in range(1, count + 1)
        ]

    @property
    def manager(self) -> Node:
        return self.nodes[0]

    def __enter__(self) -> Self:
        try:
            self._wire()
            with ThreadPoolExecutor() as pool:
                list(pool.map(self._give_image, self.nodes))
                for node in self.nodes:
                    node.start()
                list(pool.map(Node.wait, self.nodes))
                list(pool.map(Node.load_image, self.nodes))
                self._join(pool)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def left(self, seconds: float = 30.0) -> list[str]:
        """What is on the nodes that a swarm does not have from the beginning; a node takes a moment
        to remove a container."""
        given_up_s = time.monotonic() + seconds
        while (found := self._found()) and time.monotonic() < given_up_s:
            time.sleep(0.3)
        return found

    def _found(self) -> list[str]:
        found = []
        ingress = self.manager.docker("network", "inspect", "ingress", "--format", "{{.Id}}")
        for node in self.nodes:
            found += [f"{node.name}: container {name}" for name in node.docker("ps", "-aq").split()]
            found += [
                f"{node.name}: volume {name}" for name in node.docker("volume", "ls", "-q").split()
            ]
            names = node.docker(
                "network", "ls", "--filter", "name=netsense", "--format", "{{.Name}}"
            ).split()
            found += [f"{node.name}: network {name}" for name in names]
            found += [
                f"{node.name}: namespace {name}"
                for name in node.overlays()
                if not ingress.startswith(name[2:])
            ]
        found += [f"service {name}" for name in self.manager.docker("service", "ls", "-q").split()]
        found += [f"secret {name}" for name in self.manager.docker("secret", "ls", "-q").split()]
        return found

    def _wire(self) -> None:
        commands = [
            f"netns add {self._bridge}",
            f"-n {self._bridge} link add br0 type bridge mcast_snooping 0",
            f"-n {self._bridge} link set br0 up",
        ]
        for node in self.nodes:
            commands += [
                f"netns add {node.namespace}",
                f"-n {node.namespace} link set lo up",
                (
                    f"-n {node.namespace} link add net0 type veth peer name {node.name} netns"
                    f" {self._bridge}"
                ),
                f"-n {self._bridge} link set {node.name} master br0 up",
                f"-n {node.namespace} link set net0 up",
                f"-n {node.namespace} address add {node.address}/24 dev net0",
            ]
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)

    def _give_image(self, node: Node) -> None:
        """Layers are only read, so hard links to those of this machine's own daemon do."""
        if (node.directory / "data").exists():
            return
        layers, names = _DOCKER_ROOT / "overlay2", _DOCKER_ROOT / "image" / "overlay2"
        if not names.is_dir():
            return  # a daemon that keeps its layers otherwise
        data = node.directory / "data"
        (data / "image").mkdir(parents=True)
        for copy in (["cp", "-a", names, data / "image"], ["cp", "-al", layers, data]):
            # such as on another file system
            if subprocess.run(copy, check=False, stderr=subprocess.DEVNULL).returncode:
                shutil.rmtree(data)
                return

    def _join(self, pool: ThreadPoolExecutor) -> None:
        manager = self.manager
        if manager.docker("info", "--format", "{{.Swarm.LocalNodeState}}") == "active":
            return
        manager.docker("swarm", "init", "--advertise-addr", manager.address)
        token = manager.docker("swarm", "join-token", "--quiet", "worker")
        joins = [
            pool.submit(
                node.docker,
                "swarm",
                "join",
                "--token",
                token,
                "--advertise-addr",
                node.address,
                manager.address,
            )
            for node in self.nodes[1:]
        ]
        for join in joins:
            join.result()

    def _close(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.stop, self.nodes))
        for namespace in (self._bridge, *(node.namespace for node in self.nodes)):
            subprocess.run(
                ["ip", "netns", "delete", namespace], check=False, stderr=subprocess.DEVNULL
            )
        if self._own:
            shutil.rmtree(self._work, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = [word for word in options.command if word != "--"]
    with Nodes(options.nodes, directory=options.directory) as nodes:
        places = json.dumps(
            {
                node.name: {"socket": str(node.socket), "namespace": node.namespace}
                for node in nodes.nodes
            }
        )
        environment = {**nodes.manager.environment, "NETSENSE_NODES": places}
        return subprocess.run(
            nodes.manager.inside(command), env=environment, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
