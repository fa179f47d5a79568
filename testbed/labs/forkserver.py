"""A process that has imported the heavy modules once and forks programs into network namespaces.

Importing torch takes seconds, a fork of a process that has imported it takes milliseconds. The server is a process of its own
so that it stays single-threaded, which is what makes forking safe, and so that the orchestrator never imports torch.

Requests go over a Unix socket pair, one JSON object a datagram, with the descriptor of the network namespace beside it:
{"argv", "env", "log"} → {"pid"} or {"error"}. Ends of children come back unasked as {"exited": pid, "code": int}.
"""

import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testbed.labs.base import LabError
from testbed.links.netlink import setns

_DATAGRAM = 1 << 17
_NICE = 10
"""Enough that the delay line is late with less than 1 % of its frames beside workers that fill all processors; 5 was not."""


class ForkedProcess:
    """A program started by the server (``labs.base.Process``)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        if self.code is not None:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            # It ended meanwhile, or it was forked just now and leads no group yet.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class ForkServer:
    """Client side: starts the server on entering, ends it and every program it started on leaving.

    preload: modules that the server imports before it answers. A program given as ``python -m <preloaded module>``
    runs inside the fork; anything else is executed.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._preload = list(preload)
        self._pid = 0
        self._children: dict[int, ForkedProcess] = {}
        self._replies: list[dict[str, Any]] = []
        self._arrived = threading.Condition()

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            argv = [sys.executable, "-m", "testbed.labs.forkserver", str(theirs.fileno()), *self._preload]
            self._pid = os.posix_spawn(sys.executable, argv, environment)
        threading.Thread(target=self._listen, name="forkserver", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for child in self._children.values():
            child.kill()
        # shutdown, not close: the listening thread is blocked in recv and holds the socket open.
        self._socket.shutdown(socket.SHUT_RDWR)
        os.waitpid(self._pid, 0)

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path, namespace: int) -> ForkedProcess:
        """Run a program in a network namespace (descriptor); raises LabError if the server has died."""
        request = json.dumps({"argv": list(argv), "env": dict(env), "log": str(log)}).encode()
        try:
            socket.send_fds(self._socket, [request], [namespace])
        except OSError as error:
            raise LabError(f"the process that starts workers has died ({error.strerror})") from None
        with self._arrived:
            while not self._replies:
                self._arrived.wait()
            reply = self._replies.pop(0)
        if "pid" not in reply:
            raise LabError(f"cannot start {argv[0]}: {reply['error']}")
        with self._arrived:
            return self._children.setdefault(reply["pid"], ForkedProcess(reply["pid"]))

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(_DATAGRAM)
            except OSError:
                data = b""
            with self._arrived:
                if not data:
                    self._replies.append({"error": "the process that starts workers has ended; see the terminal"})
                    for child in self._children.values():
                        child.code = -signal.SIGKILL if child.code is None else child.code
                    self._arrived.notify_all()
                    self._socket.close()
                    return
                message = json.loads(data)
                if "exited" in message:
                    child = self._children.setdefault(message["exited"], ForkedProcess(message["exited"]))
                    child.code = message["code"]
                else:
                    self._replies.append(message)
                    self._arrived.notify_all()


def serve(channel: socket.socket, preload: Sequence[str]) -> None:
    """Answer requests until the other side closes; never returns in a forked child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the orchestrator's to handle
    _give_way()
    for name in preload:
        importlib.import_module(name)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == wake_read:
                os.read(wake_read, 4096)
                _report_ended(channel)
                continue
            data, fds, _, _ = socket.recv_fds(channel, _DATAGRAM, 1)
            if not data:
                return
            request = json.loads(data)
            pid = os.fork()
            if pid == 0:
                selector.close()
                channel.close()
                _run(request, fds[0], preload)
            os.close(fds[0])
            _send(channel, {"pid": pid})


def _give_way() -> None:
    """Let the orchestrator and the delay line, which must be on time, go before all that is started here, however busy it is.

    Where the kernel makes every session a scheduling group of its own (autogroup, sched(7)), only the group's nice value counts
    against other groups; so there is one session for all programs, with one value.
    """
    os.setsid()
    os.nice(_NICE)
    try:
        Path("/proc/self/autogroup").write_text(str(_NICE))
    except OSError:
        pass  # a kernel without it


def _report_ended(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _send(channel, {"exited": pid, "code": os.waitstatus_to_exitcode(status)})


def _send(channel: socket.socket, message: Mapping[str, Any]) -> None:
    try:
        channel.send(json.dumps(message).encode())
    except OSError:
        sys.exit(0)  # the orchestrator is gone; the kernel ends the children with the PID namespace


def _run(request: Mapping[str, Any], namespace: int, preload: Sequence[str]) -> None:
    """The forked child: becomes the program and never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        setns(namespace)
        os.environ.update(request["env"])
        argv: list[str] = request["argv"]
        if argv[0] == "python" and argv[1] == "-m" and argv[2] in preload:
            sys.argv = [argv[2], *argv[3:]]
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.modules.pop(argv[2])  # it is run as __main__ now; runpy would warn of two copies in every log
            runpy.run_module(argv[2], run_name="__main__", alter_sys=False)
            code = 0
        else:
            program = sys.executable if argv[0] == "python" else argv[0]
            os.execvp(program, [program, *argv[1:]])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        serve(inherited, sys.argv[2:])
