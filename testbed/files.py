"""Files of a run directory. Programs of others write beside them, so what lies there need not be what we left."""

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST_BYTES = 64 << 20


def read_text(path: Path) -> str:
    """Text of a regular file; raises OSError, or ValueError if it is too large, for all else, such as a link or a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "is no file", str(path))
        if found.st_size > LARGEST_BYTES:
            raise ValueError(f"{path}: is larger than {LARGEST_BYTES >> 20} MiB")
        return file.read()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if the file is missing, was cut off, or holds something else."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_regular(path: Path) -> bool:
    """Whether there is a file, and not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file that becomes ``path`` at the end of the block, whole and on disk, or not at all.

    Its name cannot be foreseen, and a link that has the name of either is not followed.
    """
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
