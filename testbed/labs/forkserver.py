"""A process that has imported the heavy modules once and forks programs into network namespaces.

Importing torch takes seconds, a fork of a process that has imported it takes milliseconds. The
server is a process of its own so that it stays single-threaded, which is what makes forking safe,
and so that the orchestrator never imports torch.

Requests go over a Unix socket pair, one JSON object a datagram, with the descriptor of the network
namespace beside it: {"log", "confined", "groups"} → {"pid"} or {"error"}; {"end"} → {"ended"}. The
program's arguments and environment come in a file, of any size, of which the descriptor is the
second: the environment has the program's token, and what the server reads all forks have. Ends come
back unasked, as {"exited": pid, "code": int}. A program that is confined has a PID namespace of its
own, whose first process is the child.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from testbed.children import module_command
from testbed.labs.base import OOM_SCORE_ADJ, HostFailed
from testbed.labs.cgroups import enter_host_group
from testbed.labs.confine import (
    Confinement,
    close_all_but,
    confine,
    fork_below_init,
    new_pid_namespace_for_children,
    reset_pid_namespace_for_children,
)
from testbed.links.netlink import setns

_DATAGRAM = 1 << 17
_PR_SET_CHILD_SUBREAPER = 36
_END_S = 5.0
"""A process that the kernel cannot end, because it waits for a disk, is waited for no longer."""
_NICE = 10
"""Enough that the delay line is late with less than 1 % of its frames beside workers that fill all
processors; 5 was not."""


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

    preload: modules that the server imports before it answers. A program given as
    ``python -m <preloaded module>``, or as ``python <script>.py``, runs inside the fork; anything
    else is executed.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._preload = list(preload)
        self._pid = 0
        self._children: dict[int, ForkedProcess] = {}
        self._replies: list[dict[str, Any]] = []
        self._arrived = threading.Condition()
        self._dead = False

    def __enter__(self) -> Self:
        self._spawn()
        return self

    def _spawn(self) -> None:
        self._children, self._replies, self._dead = {}, [], False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            argv = module_command("testbed.labs.forkserver", str(theirs.fileno()), *self._preload)
            # Ctrl-C is the orchestrator's to handle; until the server can ignore it, it waits.
            # Its input would be the pipe that tells our own process of its parent's end.
            no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
            self._pid = os.posix_spawn(
                sys.executable,
                argv,
                environment,
                file_actions=[no_input],
                setsigmask=[signal.SIGINT],
            )
        threading.Thread(target=self._listen, args=(ours,), name="forkserver", daemon=True).start()

    def revive(self) -> None:
        """Start the server again if it has died, with nothing left of what it had started."""
        if not self._dead:
            return
        os.waitpid(self._pid, 0)
        if os.getpid() == 1:  # of a PID namespace: all others in it descended from the server
            for pid in psutil.pids():
                if pid != 1:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        self._spawn()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in list(self._children.values()):
            child.kill()
        with contextlib.suppress(OSError):  # it may have died
            # shutdown, not close: the listening thread is blocked in recv and holds the socket
            # open.
            self._socket.shutdown(socket.SHUT_RDWR)
        os.waitpid(self._pid, 0)

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        namespace: int,
        confined: Confinement | None = None,
        groups: Sequence[Path] = (),
    ) -> ForkedProcess:
        """Run a program in a network namespace (descriptor) and control groups; raises HostFailed
        if the server has died."""
        request = {
            "log": str(log),
            "confined": confined and asdict(confined),
            "groups": list(map(str, groups)),
        }
        with open(os.memfd_create("program"), "wb") as program:
            program.write(json.dumps({"argv": list(argv), "env": dict(env)}).encode())
            program.flush()
            reply = self._ask(request, [namespace, program.fileno()])
        if "pid" not in reply:
            raise HostFailed(f"cannot start {argv[0]}: {reply['error']}")
        child: ForkedProcess = reply["process"]
        return child

    def end_all(self) -> None:
        """Kill all programs and what they have started, and wait until they have ended; a session
        of its own hides none."""
        if self._pid and not self._dead:  # what a server that has died had started has been killed
            with contextlib.suppress(HostFailed):
                self._ask({"end": True}, [])

    def _ask(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        except OSError as error:
            raise HostFailed(
                f"the process that starts workers has died ({error.strerror})"
            ) from None
        with self._arrived:
            while not self._replies:
                self._arrived.wait()
            return self._replies.pop(0)

    def _listen(self, channel: socket.socket) -> None:
        while True:
            try:
                data = channel.recv(_DATAGRAM)
            except OSError:
                data = b""
            with self._arrived:
                if not data:
                    self._replies.append(
                        {"error": "the process that starts workers has ended; see the terminal"}
                    )
                    for child in self._children.values():
                        child.kill()  # nobody would tell of its end any more
                        child.code = -signal.SIGKILL if child.code is None else child.code
                    self._dead = True
                    self._arrived.notify_all()
                    channel.close()
                    return
                message = json.loads(data)
                if "exited" in message:
                    # Of what a program started and left behind nothing was said. PIDs come round
                    # again.
                    if ended := self._children.pop(message["exited"], None):
                        ended.code = message["code"]
                    continue
                if "pid" in message:
                    message["process"] = self._children[message["pid"]] = ForkedProcess(
                        message["pid"]
                    )
                self._replies.append(message)
                self._arrived.notify_all()


def serve(channel: socket.socket, preload: Sequence[str]) -> list[str]:
    """Answer requests until the other side closes; returns nothing then.

    In a forked child it returns a script with its arguments, to be run with nothing of the server
    on the stack, or not at all.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    # whoever loses its parent is ours, to be ended with the rest
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _give_way()
    for name in preload:
        importlib.import_module(name)
    # Each collection writes to all objects it looks at, and so copies the pages that forks share.
    gc.freeze()
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    statuses: dict[int, int] = {}
    while True:
        for key, _ in selector.select():
            if key.fd == wake_read:
                os.read(wake_read, 4096)
                _report_ended(channel, statuses)
                continue
            data, fds, _, _ = socket.recv_fds(channel, _DATAGRAM, 2)
            if not data:
                return []
            request = json.loads(data)
            if "end" in request:
                _end_all()
                _send(channel, {"ended": True})
                continue
            status_read, status_write = os.pipe2(os.O_CLOEXEC)
            try:
                (
                    new_pid_namespace_for_children
                    if request["confined"]
                    else reset_pid_namespace_for_children
                )(own_pids)
                pid = os.fork()
            except OSError as error:
                os.close(status_read)
                _send(channel, {"error": error.strerror})
            else:
                if pid == 0:
                    selector.close()
                    channel.close()
                    return _become(request, fds[0], fds[1], preload, status_write)
                statuses[pid] = status_read
                _send(channel, {"pid": pid})
            for fd in (*fds, status_write):
                os.close(fd)


def _give_way() -> None:
    """Let the orchestrator and the delay line, which must be on time, go before all that is started
    here, however busy it is.

    Where the kernel makes every session a scheduling group of its own (autogroup, sched(7)), only
    the group's nice value counts against other groups; so there is one session for all programs,
    with one value.
    """
    os.setsid()
    os.nice(_NICE)
    try:
        Path("/proc/self/autogroup").write_text(str(_NICE))
    except OSError:
        pass  # a kernel without it


def _end_all() -> None:
    """Kill what descends from this process, until nothing is left; the ends are reported
    afterwards, as always."""
    own = psutil.Process()
    given_up_s = time.monotonic() + _END_S
    while (
        living := list(filter(_lives, own.children(recursive=True)))
    ) and time.monotonic() < given_up_s:
        for one in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        time.sleep(0.002)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _report_ended(channel: socket.socket, statuses: dict[int, int]) -> None:
    """statuses: by child, where the first process of a PID namespace says how the program itself
    has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if said := statuses.pop(pid, None):
            status = int.from_bytes(os.read(said, 4) or status.to_bytes(4, "little"), "little")
            os.close(said)
        _send(channel, {"exited": pid, "code": os.waitstatus_to_exitcode(status)})


def _send(channel: socket.socket, message: Mapping[str, Any]) -> None:
    try:
        channel.send(json.dumps(message).encode())
    except OSError:
        sys.exit(0)  # the orchestrator is gone; the kernel ends the children with the PID namespace


def _become(
    request: Mapping[str, Any], namespace: int, program: int, preload: Sequence[str], status: int
) -> list[str]:
    """The forked child: becomes the program. Returns only what is to run as a script, with its
    arguments.

    program: descriptor of {"argv", "env"}, the latter being what is added to the environment.
    status: where the wait status of the program goes if it is confined, and so has a first process
    of its PID namespace above it.
    """
    code = 1
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        score = Path("/proc/self/oom_score_adj")
        # less may be forbidden (Kubernetes gives 1000)
        score.write_text(str(max(OOM_SCORE_ADJ, int(score.read_text()))))
        for group in request["groups"]:
            enter_host_group(group)
        setns(namespace)
        with open(program, "rb") as file:
            file.seek(0)  # the orchestrator has written it
            wanted = json.load(file)
        os.environ.update(wanted["env"])
        close_all_but([status] if request["confined"] else [])
        if request["confined"]:
            confine(Confinement(**request["confined"]))
            fork_below_init(status)
        # what was imported may have looked for it already, by another environment
        tempfile.tempdir = None
        argv: list[str] = wanted["argv"]
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        if argv[0] == "python" and argv[1] == "-m" and argv[2] in preload:
            sys.argv = [argv[2], *argv[3:]]
            if sys.flags.safe_path:
                sys.path.insert(0, os.getcwd())  # noqa: PTH109  (where python -m looks first)
            # it is run as __main__ now; runpy would warn of two copies in every log
            sys.modules.pop(argv[2])
            runpy.run_module(argv[2], run_name="__main__", alter_sys=False)
            code = 0
        elif argv[0] == "python" and argv[1].endswith(".py") and not _shadows(Path(argv[1])):
            return argv[1:]
        else:
            name = sys.executable if argv[0] == "python" else argv[0]
            os.execvp(name, [name, *argv[1:]])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _shadows(script: Path) -> bool:
    """Whether a module beside a script has the name of one that is imported already, and should
    have come first."""
    beside = {
        path.stem if path.suffix == ".py" else path.name for path in script.parent.iterdir()
    } - {script.stem}
    return not beside.isdisjoint(sys.modules)


def _run_script(argv: list[str]) -> None:
    """As ``python script.py``, but that much is imported already; never returns.

    Its folder is searched first, and it is ``__main__``. At its end threads are waited for, exit
    functions run, and what its own modules hold is let go; only what was imported before is not
    taken apart, which takes more than a second.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = argv[0]
    folder = str(Path(path).parent)
    sys.argv[:] = argv
    # in the place of the working directory, where that is searched
    sys.path[: not sys.flags.safe_path] = [folder]
    # Forked processes have the same random numbers ahead of them; Python's own and torch's are as
    # in a fresh one.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    main = types.ModuleType("__main__")
    main.__file__ = path
    sys.modules["__main__"] = main
    code = 0
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)  # noqa: S102  (what it is for)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        # without this function
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        del trace
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for name, module in list(sys.modules.items()):
        if module is main or str(getattr(module, "__file__", "")).startswith(folder + os.sep):
            del sys.modules[name]
    del main, module
    gc.collect()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        # a script may have closed it, or put something else in its place
        with contextlib.suppress(Exception):
            stream.flush()  # type: ignore[union-attr]
    os._exit(code & 0xFF)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        script = serve(inherited, sys.argv[2:])
    if script:
        _run_script(script)
