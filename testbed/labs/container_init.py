"""First process of a worker container: starts programs that the orchestrator asks for, and ends
with it.

The orchestrator sends this file's text with the container (``python -c``), so it imports nothing
but the standard library. Both ends speak JSON, one object a line, over a Unix socket in the run
directory:

    orchestrator: {"start": id, "argv": [..], "env": {..}}     {"kill": id}
    init:         {"host": name}, once                         {"exited": id, "code": int}

With each start comes the descriptor of the log. The code is as in subprocess: -9 for SIGKILL.

A task of a swarm shares no files with anybody. There the init listens at a name that begins with
"@", in the network namespace of its container (unix(7), abstract); the node's agent enters that and
is let in because it is root, which nobody in the container is. Descriptors then take the place of
shared files:

    agent:        {"directory": true}, once, with a descriptor of its copy of the run directory
    init:         {"directory": number}    programs find it as /proc/1/fd/number

and with the init's {"host": name} comes one of the file in which the kernel counts the container's
processor time.

The connection is also the lease. When the orchestrator dies, in whatever way, the kernel closes it;
the init then ends, and as it is the first process of the container's PID namespace, everything else
in the container ends too.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import sys
from typing import Any

_ACCEPT_S = 120.0
"""Nobody will connect any more after so long."""
_PROCESSOR_TIME = (
    "/sys/fs/cgroup/cpu.stat",
    "/sys/fs/cgroup/cpuacct/cpuacct.usage",
    "/sys/fs/cgroup/cpu,cpuacct/cpuacct.usage",
)
_DEATH_CODE = 127  # as the shell: the program could not be started


_PR_SET_NO_NEW_PRIVS = 38


def main(path: str, host: str, oom_score_adj: str = "") -> None:
    """Serve one orchestrator until it hangs up. oom_score_adj: of a task of a swarm."""
    # the first process gets no default actions
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # The orchestrator must be on time while the workers are busy.
    os.nice(5)
    if path.startswith("@"):
        # Docker before 27 leaves both out of what it makes of a service.
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # less than it has may be forbidden
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write(oom_score_adj)
        channel = _accept_agent(path)
        counters = [os.open(name, os.O_RDONLY) for name in _PROCESSOR_TIME if os.path.exists(name)]  # noqa: PTH110
        socket.send_fds(channel, [json.dumps({"host": host}).encode() + b"\n"], counters[:1])
    else:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel.connect(path)
        _send(channel, {"host": host})

    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    programs: dict[int, int] = {}  # pid → id
    pending, logs = b"", list[int]()
    while True:
        for key, _ in selector.select():
            if key.fd == wake_read:
                os.read(wake_read, 4096)
                _report_ended(channel, programs)
                continue
            data, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 16)
            if not data:
                os._exit(0)
            logs += descriptors
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                _serve(channel, programs, json.loads(line), logs)


def _accept_agent(name: str) -> socket.socket:
    """Wait for the agent of the node: whoever connects must be root."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind("\0" + name[1:])
        server.listen()
        server.settimeout(_ACCEPT_S)
        while True:
            try:
                channel, _ = server.accept()
            except TimeoutError:
                os._exit(0)
            _, user, _ = struct.unpack(
                "3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            if user == 0:
                channel.settimeout(None)
                return channel
            channel.close()


def _serve(
    channel: socket.socket, programs: dict[int, int], request: dict[str, Any], logs: list[int]
) -> None:
    if "kill" in request:
        for pid, number in programs.items():
            if number == request["kill"]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        return
    if "directory" in request:
        directory = logs.pop(0)
        os.set_inheritable(directory, False)
        _send(channel, {"directory": directory})
        return
    number = request["start"]
    try:
        programs[_spawn(request["argv"], request["env"], logs.pop(0))] = number
    except (OSError, ValueError) as error:
        print(f"cannot start {request['argv'][0]}: {error}", file=sys.stderr)
        _send(channel, {"exited": number, "code": _DEATH_CODE})


def _spawn(argv: list[str], env: dict[str, str], output: int) -> int:
    os.set_inheritable(output, False)  # but as what it is dup2'ed to
    try:
        return os.posix_spawnp(
            argv[0],
            argv,
            {**os.environ, **env},
            file_actions=[(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGTERM],
        )
    except (OSError, ValueError) as error:  # the latter for a NUL in a word
        os.write(output, f"cannot start {argv[0]}: {error}\n".encode())
        raise
    finally:
        os.close(output)


def _report_ended(channel: socket.socket, programs: dict[int, int]) -> None:
    # Whoever loses its parent in a container becomes a child of the first process, so there are
    # strangers among them.
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        number = programs.pop(pid, None)
        if number is not None:
            _send(channel, {"exited": number, "code": os.waitstatus_to_exitcode(status)})


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    try:
        channel.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
