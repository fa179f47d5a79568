"""What hosts that are containers have in common, whoever made them: their first process, and their
interfaces."""

import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_NEWLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from testbed import protocol
from testbed.links.netlink import NetlinkSocket, Request, decode, encode
from testbed.links.shaper import Port

DOCKER = Path("/var/run/docker")
"""Docker's own directory, in an agent's container as on its node; what is below it, Docker makes
with the first container."""
INIT_SOCKET = "@netsense-init"
"""On which an agent waits for the first processes of its node's containers."""
_IFF_UP = 1


class InitConnection:
    """Our end of the connection to one container's init."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._incoming = protocol.MessageBuffer()
        self._codes: dict[int, int] = {}
        self._started = 0
        self._gone = False
        self._lock = threading.Lock()

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> "ContainerProcess":
        """Start a program. Its output goes to a file that is ours; a program there has no more of
        it than the descriptor."""
        output = os.open(
            log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        try:
            with self._lock:
                self._started += 1
                self._send({"start": self._started, "argv": list(argv), "env": dict(env)}, [output])
                return ContainerProcess(self, self._started)
        finally:
            os.close(output)

    def kill(self, number: int) -> None:
        with self._lock:
            self._send({"kill": number})

    def poll(self, number: int) -> int | None:
        with self._lock:
            while not self._gone:
                try:
                    data = self._connection.recv(1 << 16, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                except OSError:
                    data = b""
                try:
                    for message in self._incoming.feed(data):
                        self._codes[int(message["exited"])] = int(message["code"])
                except (ValueError, LookupError, TypeError):  # no init says that
                    data = b""
                self._gone = not data
            # With the container everything in it has been killed.
            return self._codes.get(number, -signal.SIGKILL if self._gone else None)

    def close(self) -> None:
        self._connection.close()

    def _send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        line = protocol.encode_message(message)
        try:
            sent = socket.send_fds(self._connection, [line], descriptors)
            self._connection.sendall(line[sent:])
        except OSError:
            self._gone = True


@dataclass(frozen=True, slots=True)
class ContainerProcess:
    """A program in a container (``labs.base.Process``)."""

    init: InitConnection
    number: int

    def poll(self) -> int | None:
        return self.init.poll(self.number)

    def kill(self) -> None:
        if self.poll() is None:
            self.init.kill(self.number)


def interfaces(sock: NetlinkSocket) -> list[ifinfmsg]:
    """All interfaces of a network namespace."""
    return [
        decode(answer, ifinfmsg)
        for answer in sock.dump(encode(ifinfmsg(), RTM_GETLINK, 0, "list interfaces"))
    ]


def change_interface(
    port: Port, what: str, *attributes: tuple[str, object], up: bool | None = None
) -> Request:
    """The request that sets attributes of an interface, or puts it into use or out of use."""
    message = ifinfmsg()
    message["index"] = port.ifindex
    if up is not None:
        message["flags"], message["change"] = _IFF_UP * up, _IFF_UP
    message["attrs"] = list(attributes)
    return encode(message, RTM_NEWLINK, 0, f"{what} {port.interface}")
