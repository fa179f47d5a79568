"""How a program on a host of the netns lab is kept from all that is not its own.

It has PID, mount and IPC namespaces of its own, in which it sees no other program. The file system
is read-only, but for the directories in which it may write; /dev has a handful of devices, /run,
/tmp and /dev/shm are empty and its own; of the run directory it sees what it is shown. And it has
no capability, nor a way to one (capabilities(7), PR_SET_NO_NEW_PRIVS in prctl(2)). So it can
neither change its link, nor speak for another program, nor touch another one's records.

The standard library only: this runs in the fork of a process that must stay single-threaded.
"""

import contextlib
import ctypes
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWIPC = 0x00020000, 0x20000000, 0x08000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 5, 1 << 12, 1 << 14, 1 << 18
_FLAGS = {b"nosuid": _MS_NOSUID, b"nodev": _MS_NODEV, b"noexec": _MS_NOEXEC}
"""What a remount has to repeat, as a user namespace may not take it back; how times are kept stays
by itself (mount(2))."""
(
    _PR_SET_DUMPABLE,
    _PR_CAPBSET_DROP,
    _PR_SET_NO_NEW_PRIVS,
    _PR_CAP_AMBIENT,
    _PR_CAP_AMBIENT_CLEAR_ALL,
) = (4, 24, 38, 47, 4)
_CAPABILITY_VERSION_3 = 0x20080522
_TEMPORARY, _SHARED_MEMORY = "/tmp", "/dev/shm"
_EMPTIED = (_TEMPORARY, "/run", "/dev")
"""Where programs of the machine keep sockets, pipes and devices, which a read-only mount does not
guard."""
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}

ENVIRONMENT = {"TMPDIR": _TEMPORARY, "TRITON_CACHE_DIR": f"{_TEMPORARY}/triton"}
"""For what would write elsewhere by itself."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Confinement:
    """hidden: a directory of which the program sees nothing but what follows. reads, writes: paths
    anywhere, which it may read, or also write. user: user and group that it becomes; None: it stays
    who it is.
    """

    hidden: str
    reads: Sequence[str]
    writes: Sequence[str]
    user: Sequence[int] | None = None


def new_pid_namespace_for_children(own_namespace: int) -> None:
    """The next fork of this process is the first process of a PID namespace. own_namespace:
    descriptor of this process's."""
    # or that of the fork before would be its parent
    reset_pid_namespace_for_children(own_namespace)
    _check(_libc.unshare(_CLONE_NEWPID), "unshare")


def reset_pid_namespace_for_children(own_namespace: int) -> None:
    """The next fork of this process is in its own PID namespace."""
    _check(_libc.setns(own_namespace, _CLONE_NEWPID), "setns")


def fork_below_init(status: int) -> None:
    """Fork; returns in the child only. The parent, first process of its PID namespace, waits for
    the child, writes its wait status to a descriptor and ends; with it the kernel ends all that is
    left in the namespace."""
    # nobody looks into the first process, or takes its descriptors
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    pid = os.fork()
    if pid == 0:
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
        os.close(status)
        return
    while True:
        ended, how = os.wait()  # whoever loses its parent becomes a child of this process
        if ended == pid:
            os.write(status, how.to_bytes(4, "little"))
            os._exit(0)


def close_all_but(kept: Sequence[int]) -> None:
    """Close what was inherited, but for standard input, output and error, and some."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(name))


def confine(to: Confinement) -> None:
    """Confine this process, which is alone in its PID namespace. Raises OSError where the kernel
    refuses."""
    where = str(Path.cwd())
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC), "unshare")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("proc", "/proc", "proc", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    shown = {
        path: os.open(path, os.O_PATH | os.O_CLOEXEC)
        for path in dict.fromkeys([*to.reads, *to.writes])
    }
    kept = {
        path: os.open(path, os.O_PATH | os.O_CLOEXEC)
        for path in _needed(to.hidden, where)
        if path not in shown
    }
    devices = {str(path): os.open(path, os.O_PATH | os.O_CLOEXEC) for path in _devices()}
    for mounted, flags in _mounts():
        _remount(mounted, flags | _MS_RDONLY)
    for emptied in filter(os.path.isdir, _EMPTIED):
        _mount(
            "tmpfs",
            emptied,
            "tmpfs",
            _MS_NOSUID | _MS_NODEV,
            "mode=755" if emptied == "/dev" else "mode=1777",
        )
    Path(_SHARED_MEMORY).mkdir(parents=True)
    _mount("tmpfs", _SHARED_MEMORY, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777")
    for name, target in _LINKS.items():
        Path("/dev", name).symlink_to(target)
    for path, opened in devices.items():
        _show(path, opened, _MS_NOSUID)
    for path, opened in kept.items():
        _show(path, opened, _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    Path(to.hidden).mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", to.hidden, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
    for path, opened in shown.items():
        _show(path, opened, _MS_NOSUID | _MS_NODEV | _MS_RDONLY * (path not in to.writes))
    for read_only in (to.hidden, "/dev"):
        _remount(read_only, _MS_NOSUID | _MS_NODEV | _MS_RDONLY)
    try:
        os.chdir(where)  # anew, or it would still lead to what is hidden
    except OSError:
        os.chdir("/")
    _give_up_capabilities(to.user)


def _needed(hidden: str, where: str) -> Iterator[str]:
    """What lies in a directory that is emptied, but programs cannot do without: Python, packages,
    PATH, and where they run."""
    for path in dict.fromkeys([sys.prefix, sys.base_prefix, *sys.path, *os.get_exec_path(), where]):
        inside = any(path.startswith(emptied + "/") for emptied in _EMPTIED)
        if inside and os.path.isdir(path) and not Path(path).is_relative_to(hidden):  # noqa: PTH112
            yield path


def _devices() -> Iterator[Path]:
    yield from (path for path in (Path("/dev", name) for name in _DEVICES) if path.exists())
    yield from (path for path in Path("/dev").glob("nvidia*") if not path.is_dir())


def _show(path: str, opened: int, flags: int) -> None:
    """Bind what a descriptor refers to, with what is mounted below it, and close that."""
    source, place = Path(f"/proc/self/fd/{opened}"), Path(path)
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir() if source.is_dir() else place.touch()
    _mount(str(source), path, None, _MS_BIND | _MS_REC)
    _remount(path, flags)
    os.close(opened)


def _mounts() -> Iterator[tuple[str, int]]:
    """Mount points of this mount namespace with their flags, but /proc, which has just been made,
    and what is below it."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        words = line.split(b" ")
        point = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), words[4])
        if point != b"/proc" and not point.startswith(b"/proc/"):
            flags = sum(_FLAGS.get(word, 0) for word in words[5].split(b","))
            yield (
                os.fsdecode(point),
                flags | (0 if point == b"/dev" or point.startswith(b"/dev/") else _MS_NODEV),
            )


def _remount(path: str, flags: int) -> None:
    try:
        _mount(None, path, None, _MS_REMOUNT | _MS_BIND | flags)
    except OSError as error:
        # Hidden below a later mount, or behind a directory that is closed to us: there no program
        # gets, either.
        if error.errno not in (errno.EINVAL, errno.ENOENT, errno.EACCES, errno.ENOTDIR):
            raise


def _give_up_capabilities(user: Sequence[int] | None) -> None:
    number = 0
    # where this is not allowed, what follows is enough
    while _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1
    if user is not None:
        with contextlib.suppress(PermissionError):  # in a container that may not
            os.setgroups([])
            os.setresgid(user[1], user[1], user[1])
            os.setresuid(user[0], user[0], user[0])
            _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    with contextlib.suppress(OSError):  # a kernel before 4.3 has none
        _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl")
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, none), "capset")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    words = (None if word is None else os.fsencode(word) for word in (source, target, kind))
    done = _libc.mount(*words, ctypes.c_ulong(flags), None if options is None else options.encode())
    _check(done, f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
