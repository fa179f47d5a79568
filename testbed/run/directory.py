"""The run directory: made before anything starts, owned by the caller at the end."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil

from testbed import gpus
from testbed.files import (
    everything_in,
    is_directory,
    is_file,
    no_room,
    read_json,
    remove_tree,
    replacing,
)
from testbed.protocol import one_line
from testbed.spec.files import (
    data_folders,
    find_folder,
    script_files,
    trace_files,
    with_data_folders,
    with_trace_files,
)
from testbed.spec.load import dump_spec
from testbed.spec.models import ScriptSpec, Spec

SPEC_FILE = "spec.yaml"
LOCK_FILE = ".lock"
RESERVE_FILE = ".reserve"
_RESERVE_BYTES = 1 << 18
"""Enough for the result of a cell, whatever went wrong in it."""
_LEAST_FREE_BYTES, _LEAST_FREE_SHARE = 1 << 27, 0.01
"""Below the lesser of the two a cell ends, before its worker fills the disk for everybody; it may
write fast."""
ENVIRONMENT_FILE = "environment.json"
SCRIPT = "script"
TRACES = "traces"
DATA = "data"
_PACKAGES = ("netsenseml", "torch", "numpy", "pyroute2", "docker", "pandas", "pydantic")


class RunIsBusy(Exception):
    """Another process runs the cells of the directory. The message is one line."""


class NoPlace(OSError):
    """There can be no run directory where one is to be made. The message is one line."""


class NoRoom(Exception):
    """The disk is full. The message is one line."""


@contextmanager
def run_lock(directory: Path) -> Iterator[int]:
    """Only one at a time runs the cells of a directory; raises RunIsBusy if another does. Yields a
    descriptor.

    The lock ends with the last process that has the descriptor open, in whatever way. A file system
    without locks has none.
    """
    lock = os.open(
        directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
    )
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise RunIsBusy(
                f"{directory}: {who} is running it; wait for that to end, or end it"
            ) from None
        except OSError:
            pass
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield lock
    finally:
        os.close(lock)


def is_being_run(directory: Path) -> bool:
    """Whether a process holds the lock of a run directory now."""
    try:
        lock = os.open(
            directory / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for no longer than it takes to ask
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        pass
    finally:
        os.close(lock)
    return False


def reserve_room(directory: Path) -> None:
    """Set room aside, so that a cell's result can be written on a disk that is full; raises OSError
    if little is left."""
    reserve = os.open(
        directory / RESERVE_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
    )
    try:
        os.posix_fallocate(reserve, 0, _RESERVE_BYTES)
    finally:
        os.close(reserve)
    if is_nearly_full(directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def is_nearly_full(directory: Path) -> bool:
    """Whether so little is left on its disk that a run should end."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize < min(
        _LEAST_FREE_BYTES, _LEAST_FREE_SHARE * disk.f_blocks * disk.f_frsize
    )


def release_reserve(directory: Path) -> None:
    """Free what ``reserve_room`` has set aside."""
    (directory / RESERVE_FILE).unlink(missing_ok=True)


def is_full(directory: Path) -> bool:
    """Whether its disk is so full that a run cannot go on in it."""
    try:
        reserve_room(directory)
    except OSError as error:
        if no_room(error):
            return True
        raise
    return False


def create(spec: Spec, parent: Path, spec_directory: Path) -> Path:
    """A new run directory ``<name>-<UTC time>`` with spec.yaml, environment.json and copies of all
    files that the spec names.

    spec_directory: where the spec lies. With the copies a run can be resumed, and read, after
    script and traces have changed. Folders of data sets are not copied, there are links to them.
    Raises NoPlace; whatever goes wrong, nothing is left of it.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        what = (
            "is a link that leads nowhere"
            if parent.is_symlink()
            else "is no directory, and run directories lie in one"
        )
        raise NoPlace(f"{parent}: {what}; name another place with --out") from None
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    for number in itertools.count(1):
        directory = parent / f"{spec.name}-{stamp}{f'-{number}' if number > 1 else ''}"
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            break
    try:
        _fill(directory, spec, spec_directory)
    except BaseException:
        remove_tree(directory)
        raise
    return directory


def _fill(directory: Path, spec: Spec, spec_directory: Path) -> None:
    (directory / "cells").mkdir()
    if spec.script:
        file = _copy_script(spec.script, spec_directory, directory)
        spec = spec.model_copy(update={"script": spec.script.model_copy(update={"file": file})})
    spec = _with_traces_copied(spec, spec_directory, directory)
    spec = _with_data_linked(spec, spec_directory, directory)
    (directory / SPEC_FILE).write_text(dump_spec(spec), encoding="utf-8")
    (directory / ENVIRONMENT_FILE).write_text(json.dumps(environment(), indent=1))


def note_environment(directory: Path) -> list[str]:
    """Add what this machine is now to environment.json, if that is another; returns what differs,
    one line each."""
    now = environment()
    file = directory / ENVIRONMENT_FILE
    recorded = read_json(file) or {}
    later = [entry for entry in recorded.get("resumed") or [] if isinstance(entry, dict)]
    newest = later[-1] if later else recorded
    # the load is never the same, the memory of containers hardly
    same = {"load_average", "memory_bytes"}
    changed = [key for key in now if key not in same and newest.get(key) != now[key]]
    if changed:
        with replacing(file) as path:
            path.write_text(json.dumps({**recorded, "resumed": [*later, now]}, indent=1))
    return [one_line(f"{key}: {newest.get(key)} before, {now[key]} now") for key in changed]


def _copy_script(script: ScriptSpec, spec_directory: Path, directory: Path) -> str:
    """Copy a script with what it needs into a folder of its own; returns its path in the run
    directory."""
    original = (spec_directory / script.file).resolve()
    for path in script_files(original, script.files):
        target = directory / SCRIPT / path.relative_to(original.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True, ignore=_not_copied(directory))
        else:
            shutil.copy(path, target)
    return f"{SCRIPT}/{original.name}"


def _not_copied(run: Path) -> Callable[[str, list[str]], set[str]]:
    """For copytree: caches, what is neither a file nor a folder, such as a link that leads nowhere
    (editors lock files so), and the folders of runs, which may lie in a folder that is copied into
    one of them."""
    runs = run.parent.resolve()

    def is_left_out(path: Path) -> bool:
        return (
            path.name in ("__pycache__", ".git")
            or path == runs
            or not (is_file(path) or is_directory(path))
        )

    def ignored(folder: str, names: list[str]) -> set[str]:
        place = Path(folder).resolve()
        return {name for name in names if place == runs or is_left_out(place / name)}

    return ignored


def copied_script(directory: Path) -> list[str]:
    """What is in the folder of the script: files, and packages as folders."""
    return sorted(path.name + "/" * path.is_dir() for path in (directory / SCRIPT).glob("*"))


def _with_traces_copied(spec: Spec, spec_directory: Path, directory: Path) -> Spec:
    names: dict[str, str] = {}
    for name in trace_files(spec):
        (directory / TRACES).mkdir(exist_ok=True)
        names[name] = _free_name(Path(TRACES, Path(name).name), names)
        shutil.copy(spec_directory / name, directory / names[name])
    return with_trace_files(spec, names) if names else spec


def _with_data_linked(spec: Spec, spec_directory: Path, directory: Path) -> Spec:
    names: dict[str, str] = {}
    for name in data_folders(spec):
        folder = find_folder(spec_directory, name)
        if folder.is_dir():
            (directory / DATA).mkdir(exist_ok=True)
            names[name] = _free_name(Path(DATA, folder.name or "root"), names)
            (directory / names[name]).symlink_to(folder)
    return with_data_folders(spec, names) if names else spec


def _free_name(wanted: Path, names: Mapping[str, str]) -> str:
    """The wanted name, or one with a number if it is taken."""
    numbered = (wanted.with_stem(f"{wanted.stem}-{number}") for number in itertools.count(2))
    return next(
        str(path) for path in itertools.chain([wanted], numbered) if str(path) not in names.values()
    )


def environment() -> dict[str, object]:
    """What a figure depends on: kernel, processor, memory, TCP, versions."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        **machine(),
        "system": platform.platform(),
        "gpus": gpus.found(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg(),
        "congestion_control": _congestion_control(),
        "python": sys.version.split()[0],
        "packages": versions,
    }


def machine() -> dict[str, object]:
    """Which machine this is, and what decides how fast it is."""
    cores = len(os.sched_getaffinity(0))
    return {
        "machine": platform.node(),
        "kernel": platform.release(),
        "processor": _processor(),
        "cores": cores,
    }


def _congestion_control() -> str | None:
    """What TCP uses unless the spec or a program chooses; cell.json says what the spec chose."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    except OSError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def give_to_owner_of(parent: Path, directory: Path) -> str:
    """Hand a tree made as root to the owner of the directory above it; no effect for anyone but
    root.

    Returns one line if that cannot be done, which takes nothing away from the run.
    """
    if os.geteuid() != 0:
        return ""
    owner = parent.stat()
    for path in everything_in(directory):
        try:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        except OSError as error:
            # root has not every right everywhere: in containers, on file systems of others
            return f"{directory} still belongs to root: {error.strerror}"
    return ""
