"""Files of a run directory. Programs of others write beside them, so what lies there need not be
what we left."""

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_BYTES = 64 << 20
_LEFT_S = 600.0


def exists(path: Path) -> bool:
    """Whether there is something, as far as we may see; like ``is_file`` and ``is_directory``, it
    raises nothing.

    Those of pathlib raise OSError before Python 3.14 where a name is too long or a folder on the
    way is closed to us.
    """
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Whether there is a file, or a link to one."""
    return os.path.isfile(path)  # noqa: PTH113


def is_directory(path: Path) -> bool:
    """Whether there is a directory, or a link to one."""
    return os.path.isdir(path)  # noqa: PTH112


def explained(error: OSError) -> str:
    """What went wrong with which file, as one line."""
    # of copytree: (from, to, why) of each file
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        return str(error.args[0][0][2])
    return (
        f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    )


def no_room(error: OSError) -> bool:
    """Whether a disk was full, or somebody's share of it."""
    # pyarrow says it in words only.
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to be read; raises OSError for all else, such as a link or a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no file", str(path))
    return open(descriptor, "rb")


def read_text(path: Path) -> str:
    """Text of a file, if it is one; raises OSError, or ValueError if it is too large."""
    with open_regular(path) as file:
        data = file.read(LARGEST_BYTES + 1)
    if len(data) > LARGEST_BYTES:
        raise ValueError(f"{path}: is larger than {LARGEST_BYTES >> 20} MiB")
    return data.decode(errors="replace")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if the file is missing, was cut off, or holds something else."""
    try:
        value = json.loads(text := read_text(path))
        if "\\ud" in text.lower():  # maybe half a character, which UTF-8 has no bytes for
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_shallow(value: object, depth: int = 50) -> bool:
    """Whether JSON is nested no deeper than so."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(is_shallow(one, depth - 1) for one in inner)


def is_regular(path: Path) -> bool:
    """Whether there is a file, and not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def everything_in(path: Path) -> Iterator[Path]:
    """A file, or a directory and all that is in it; without following links, and however deeply
    others have nested it."""
    pending = [path]
    while pending:
        yield (found := pending.pop())
        if found.is_dir() and not found.is_symlink():
            with contextlib.suppress(OSError):
                pending += found.iterdir()


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, as far as that can be had."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    except RecursionError:
        subprocess.run(["rm", "-rf", "--", path], capture_output=True, check=False)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file that becomes ``path`` at the end of the block, whole and on disk, or not at all.

    Its name cannot be foreseen, and a link that has the name of either is not followed.
    """
    for left in path.parent.glob(f".{path.name}-*"):  # of a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > _LEFT_S:
                left.unlink()
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    temporary = Path(name)
    try:
        os.fchmod(descriptor, 0o644)
        yield temporary
        os.fsync(descriptor)
        temporary.replace(path)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
