"""Who made something that outlives its maker, so that it is removed once that one is gone, and
never before."""

import os
from pathlib import Path


def owner_mark() -> str:
    """A text by which any process of this machine can tell whether this one still lives."""
    pid = os.getpid()
    return f"{pid}:{_start_time(pid)}:{boot_id()}:{_pid_namespace()}"


def owner_lives(mark: str) -> bool:
    """False only if the process is known to be gone."""
    try:
        pid, started, boot, namespace = mark.split(":")
        if boot != boot_id():
            return False
        if namespace != _pid_namespace():
            return True  # its PID means nothing to us
        return _start_time(int(pid)) == started
    except ValueError:
        return True  # not a mark of this version
    except (FileNotFoundError, ProcessLookupError):
        return False


def _start_time(pid: int) -> str:
    # Field 22 of proc(5) stat; the name in parentheses before it may hold anything. PIDs come round
    # again, this does not.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _pid_namespace() -> str:
    return str(Path("/proc/self/ns/pid").stat().st_ino)


def boot_id() -> str:
    """Of this machine since it was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
