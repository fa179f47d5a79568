"""Programs of this machine on the hosts of a live run: ``testbed exec`` and ``testbed capture``."""

import ipaddress
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.children import module_command
from testbed.labs.base import LabError
from testbed.recording import link_server

_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,14}")


def on_host(cell: Path, host: str, argv: Sequence[str]) -> list[str]:
    """The command that runs ``argv`` on a host of the cell that runs in ``cell``, as its own user.

    An argument that is the name of a host becomes its address. In the netns lab the program is
    this machine's, and ends with the lab; in the Docker lab it is the container's. Raises
    ValueError, one line, if there is no such host.
    """
    found = _ask(cell, host)
    argv = [*argv[:1], *(found["addresses"].get(word, word) for word in argv[1:])]
    if "container" in found:
        terminal = ["--interactive", *(["--tty"] if os.isatty(0) and os.isatty(1) else [])]
        return ["docker", "exec", *terminal, found["container"], *argv]
    # A new root directory makes / the working directory.
    return [*_into(cell, found), "env", f"--chdir={Path.cwd()}", *argv]


def capture(cell: Path, host: str, out: Path) -> list[str]:
    """The command that writes what passes a host's interface to ``out``, in the format of pcap,
    until it is interrupted.

    Raises ValueError, one line, if there is no such host, or the file exists; LabError where it may
    not be done.
    """
    if out.is_file():  # a pipe to another program may
        raise ValueError(f"{out} exists already, and is left as it is; name another one by --out")
    found = _ask(cell, host)
    return [
        *_into(cell, found),
        *module_command("testbed.links.capture", found["interface"], str(out.resolve())),
    ]


def _ask(cell: Path, host: str) -> Mapping[str, Any]:
    """What the cell tells of a host. It goes into commands: nothing but what a cell would say may
    pass."""
    found = link_server.ask(cell, {"host": host}, "host")
    try:
        for address in found["addresses"].values():
            ipaddress.ip_address(str(address))
        good = _INTERFACE.fullmatch(found["interface"]) and (
            _CONTAINER.fullmatch(found["container"])
            if "container" in found
            else type(found["namespace"]) is int
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise link_server.stranger(cell)
    return found


def _into(cell: Path, found: Mapping[str, Any]) -> list[str]:
    """The command prefix that enters a host's network, and the namespaces of the lab if it has
    any."""
    if "container" in found:
        asked = ["docker", "inspect", "--format", "{{.State.Pid}}", found["container"]]
        pid = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if not pid or os.geteuid() != 0:
            raise LabError(
                "entering a container's network needs root, and a Docker daemon on this machine;"
                " use sudo"
            )
        return ["nsenter", f"--net=/proc/{pid}/ns/net", "--"]
    pid = str(link_server.listening_pid(cell))
    ours, theirs = (Path(f"/proc/{process}/ns/user").readlink() for process in ("self", pid))
    private = ["--user", "--preserve-credentials"] if ours != theirs else []
    network = f"--net=/proc/{pid}/fd/{found['namespace']}"
    return ["nsenter", f"--target={pid}", *private, "--mount", "--pid", network, "--"]
