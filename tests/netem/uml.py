"""Run a command under User-Mode Linux, whose kernel has netem whatever the machine's own kernel
has.

    python tests/netem/uml.py [--timeout SECONDS] [--memory MIB] -- python -m pytest tests/netem

The guest is an ordinary process and needs no root. Its file system is the machine's own, read-only:
the same Python, the same checkout, and nothing it does can change a file. ``/run``, ``/dev/shm``
and ``$TMPDIR`` are its own memory. In it the command is root, on one processor, in the current
directory and with this environment; "python" means the Python that runs this.

Exit code: the command's own; 4 if User-Mode Linux is missing; 124 if the time was up.
"""

import argparse
import ctypes
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODULES = Path("/usr/lib/uml/modules")
BEGIN, END = b"--- the guest is up ---\n", b"--- the command has ended ---\n"
MISSING, TIMED_OUT, INTERRUPTED = 4, 124, 130
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29
_SHM = Path("/dev/shm")


class MissingError(Exception):
    """User-Mode Linux cannot be had here; the message is one line that says what mends it."""


def kernel() -> str:
    """Path of the User-Mode Linux kernel."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "i686"):
        raise MissingError("User-Mode Linux exists only on x86 Linux; run make test-netem there")
    path = shutil.which("linux.uml")
    if (
        path is None
        or not MODULES.is_dir()
        or not shutil.which("modprobe", path=_with_sbin(os.environ.get("PATH", "")))
    ):
        if not shutil.which("apt-get"):
            raise MissingError(
                "User-Mode Linux is packaged by Debian and Ubuntu only (user-mode-linux); run make"
                " test-netem there"
            )
        raise MissingError(
            "User-Mode Linux is missing; install it with: sudo apt-get install user-mode-linux kmod"
        )
    return path


def run(
    command: Sequence[str], *, timeout_s: float, memory_mib: int, environment: dict[str, str]
) -> int:
    """Run a command in a guest, its output on this terminal, and give its exit code."""
    binary = kernel()
    with tempfile.TemporaryDirectory(prefix="uml-") as scratch:
        place = Path(scratch)
        out = place / "out"  # the only directory that the guest can write
        out.mkdir()
        job = {
            "argv": list(command),
            "cwd": str(Path.cwd()),
            "environment": environment,
            "modules": str(MODULES),
            "out": str(out),
            "begin": BEGIN.decode(),
            "end": END.decode(),
        }
        (place / "job.json").write_text(json.dumps(job))
        init = place / "init"
        init.write_text(
            "#!/bin/sh\nexec"
            f" {shlex.join([sys.executable, str(HERE / 'guest.py'), str(place / 'job.json')])}\n"
        )
        init.chmod(0o755)
        arguments = [
            *(binary, f"mem={memory_mib}M", f"uml_dir={place}", "umid=guest", f"init={init}"),
            *(
                "rootfstype=hostfs",
                "rootflags=/",
                "ro",
                "con=null",
                "con0=fd:0,fd:1",
                "loglevel=1",
                "selinux=0",
            ),
        ]
        # The console goes through a file: a guest whose console is a pipe hangs now and then.
        with (place / "console").open("wb") as console, (place / "console").open("rb") as shown:
            guest = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={
                    "PATH": os.environ.get("PATH", os.defpath),
                    "TMPDIR": str(_memory_place(place, memory_mib)),
                    **_preloaded(place),
                },
                start_new_session=True,
                preexec_fn=_prepare,
            )
            try:
                in_time = _show(guest, shown, time.monotonic() + timeout_s)
            finally:
                _end(guest)
        status = out / "status"
        if status.exists():
            return int(status.read_text())
        if not in_time:
            print(f"\nThe guest was stopped: the {timeout_s:g} s it had are over.", file=sys.stderr)
            return TIMED_OUT
        print(
            "The guest has died. Its console:",
            (place / "console").read_text(errors="replace"),
            sep="\n",
            file=sys.stderr,
        )
        return 1


def _preloaded(place: Path) -> dict[str, str]:
    """What lets the guest run where a process has more registers than User-Mode Linux 6.1 knows
    (``registers.c``)."""
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    if not flags & {"avx512f", "amx_tile", "pku"}:
        return {}
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise MissingError(
            "on this processor User-Mode Linux needs a C compiler; install it with: sudo apt-get"
            " install gcc libc6-dev"
        )
    library = place / "registers.so"
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", library, HERE / "registers.c", "-ldl"],
        check=True,
    )
    return {"LD_PRELOAD": str(library)}


def _show(guest: subprocess.Popen[bytes], console: BinaryIO, until_s: float) -> bool:
    """Copy what the command prints to the terminal until the guest ends; False if the time was up
    first."""
    pending, began, ended = b"", False, False
    while True:
        alive = guest.poll() is None
        pending += console.read()
        if not began and BEGIN in pending:
            began, pending = True, pending.split(BEGIN, 1)[1]
        if began and not ended:
            ended = END in pending
            text, _, rest = pending.partition(END)
            # Where END may have begun, wait for the rest of it.
            keep = (
                0
                if ended
                else max((n for n in range(1, len(END)) if pending.endswith(END[:n])), default=0)
            )
            text, pending = text[: len(text) - keep], rest or text[len(text) - keep :]
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        if not alive:
            return True
        if time.monotonic() > until_s:
            return False
        time.sleep(0.05)


def _prepare() -> None:
    """In the guest's process: end with this one, on one processor, with timers that are not
    late."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    libc.prctl(_PR_SET_TIMERSLACK, 1)  # the guest's timers are ours: let none of them be 50 µs late
    # The guest's kernel and its programs are processes that take turns. On one processor a turn is
    # three times as short, and a timer fires where the guest runs, not where it has to wake a
    # processor that sleeps.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _end(guest: subprocess.Popen[bytes]) -> None:
    """End the guest and all its processes; they are the session that it was started in, and nobody
    else is."""
    if guest.poll() is None:
        guest.terminate()  # it then ends its processes itself
        try:
            guest.wait(3)
        except subprocess.TimeoutExpired:
            pass
    # Processes of the guest before its kernel: without the kernel that traces them they would run
    # as programs of this machine.
    for pid in sorted(_session(guest.pid), key=lambda pid: pid == guest.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    guest.wait()


def _session(leader: int) -> list[int]:
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[3]) == leader and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


def _memory_place(scratch: Path, memory_mib: int) -> Path:
    """Where the guest's memory can lie: a file system in memory if it is large enough (in
    containers it often is not)."""
    try:
        room = os.statvfs(_SHM)
    except OSError:
        return scratch
    return (
        _SHM
        if os.access(_SHM, os.W_OK) and room.f_bavail * room.f_frsize > memory_mib << 20
        else scratch
    )


def _with_sbin(path: str) -> str:
    return os.pathsep.join(
        [*filter(None, path.split(os.pathsep)), "/usr/local/sbin", "/usr/sbin", "/sbin"]
    )


def _environment() -> dict[str, str]:
    width = shutil.get_terminal_size((120, 40)).columns
    return {
        **os.environ,
        "PATH": _with_sbin(os.environ.get("PATH", os.defpath)),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_ADDOPTS": f"{os.environ.get('PYTEST_ADDOPTS', '')} -p no:cacheprovider".lstrip(),
        "NETSENSE_REQUIRE": "netem",  # the guest is there to have it: nothing is skipped unseen
        "PY_COLORS": str(int(sys.stdout.isatty())),
        "COLUMNS": str(width),
        "TMPDIR": "/run/tmp",
        "HOME": "/run/tmp",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--timeout",
        type=float,
        default=900,
        metavar="SECONDS",
        help="stop the guest after so long (900)",
    )
    parser.add_argument(
        "--memory", type=int, default=768, metavar="MIB", help="memory of the guest (768)"
    )
    parser.add_argument("command", nargs="+", help="what to run, after --")
    given = parser.parse_args(arguments)
    program, *rest = given.command
    command = [sys.executable if program == "python" else program, *rest]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return run(
            command, timeout_s=given.timeout, memory_mib=given.memory, environment=_environment()
        )
    except MissingError as error:
        print(error, file=sys.stderr)
        return MISSING
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
