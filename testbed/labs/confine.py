"""How a program on a host of the netns lab is kept from all that is not its own.

It has PID, mount and IPC namespaces of its own, in which it sees no other program; the file system is read-only, but for what
its ``View`` lets it write, a /dev/shm and a directory for temporary files; of the run directory it sees no more than the view
has; and it has no capability, nor a way to one (capabilities(7), PR_SET_NO_NEW_PRIVS in prctl(2)). So it can neither change
its link, nor speak for another program, nor touch another one's records.

The standard library only: this runs in the fork of a process that must stay single-threaded.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWIPC = 0x00020000, 0x20000000, 0x08000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
_KEPT_FLAGS = {
    os.ST_NOSUID: 2,
    os.ST_NODEV: 4,
    os.ST_NOEXEC: 8,
    os.ST_NOATIME: 1024,
    os.ST_NODIRATIME: 2048,
    os.ST_RELATIME: 1 << 21,
}
"""statvfs(3) to mount(2): what a remount has to repeat, as a user namespace may not take it back."""
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_SHARED_MEMORY = "/dev/shm"
TEMPORARY = "tmp"
"""Below the run directory, as a program there sees it."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Confinement:
    """Paths of a program's view: it sees nothing of ``root`` but ``reads`` and ``writes``, and may change ``writes``."""

    root: str
    reads: Sequence[str]
    writes: Sequence[str]


def next_child_in_new_pid_namespace(own_namespace: int) -> None:
    """The next fork of this process is the first process of a PID namespace. own_namespace: descriptor of this process's."""
    _check(_libc.setns(own_namespace, _CLONE_NEWPID), "setns")  # or the one of the fork before would be its parent
    _check(_libc.unshare(_CLONE_NEWPID), "unshare")


def next_child_in_own_pid_namespace(own_namespace: int) -> None:
    _check(_libc.setns(own_namespace, _CLONE_NEWPID), "setns")


def stay_as_init(status: int) -> None:
    """Fork; returns in the child only. The parent, first process of its PID namespace, waits for the child, writes its wait
    status to a descriptor and ends; with it the kernel ends all that is left in the namespace."""
    pid = os.fork()
    if pid == 0:
        os.close(status)
        return
    while True:
        ended, how = os.wait()  # whoever loses its parent becomes a child of this process
        if ended == pid:
            os.write(status, how.to_bytes(4, "little"))
            os._exit(0)


def confine(to: Confinement) -> None:
    """Confine this process, which is alone in its PID namespace. Raises OSError where the kernel refuses."""
    where = Path.cwd()
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC), "unshare")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("proc", "/proc", "proc", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    shown = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in (*to.reads, *to.writes)}  # before they are hidden
    for mounted in _mount_points():
        _remount(mounted, read_only=True)
    _mount("tmpfs", _SHARED_MEMORY, "tmpfs", _MS_NOSUID | _MS_NODEV)
    _mount("tmpfs", to.root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
    for path, opened in shown.items():
        source, place = Path(f"/proc/self/fd/{opened}"), Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir() if source.is_dir() else place.touch()
        _mount(str(source), path, None, _MS_BIND)
        _remount(path, read_only=path not in to.writes)
        os.close(opened)
    temporary = Path(to.root, TEMPORARY)
    temporary.mkdir()
    _mount("tmpfs", str(temporary), "tmpfs", _MS_NOSUID | _MS_NODEV)
    _remount(to.root, read_only=True)
    try:
        os.chdir(where)  # anew, or it would still lead to what is hidden
    except OSError:
        os.chdir("/")
    _give_up_capabilities()


def _mount_points() -> list[str]:
    """All of this mount namespace but /proc, which has just been made, and what is below it."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = dict.fromkeys(_unescaped(line.split()[4]) for line in lines)
    return [point for point in points if point != "/proc" and not point.startswith("/proc/")]


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _remount(path: str, *, read_only: bool) -> None:
    try:
        found = os.statvfs(path).f_flag
    except OSError:
        return  # nobody without rights gets there either
    flags = sum(flag for kept, flag in _KEPT_FLAGS.items() if found & kept)
    _mount(None, path, None, _MS_REMOUNT | _MS_BIND | flags | _MS_RDONLY * read_only)


def _give_up_capabilities() -> None:
    number = 0
    while _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    with contextlib.suppress(OSError):  # a kernel before 4.3 has none
        _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl")
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, none), "capset")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = (None if word is None else os.fsencode(word) for word in (source, target, kind))
    done = _libc.mount(*words, ctypes.c_ulong(flags), None if options is None else options.encode())
    _check(done, f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
