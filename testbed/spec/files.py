"""Files that a spec names, relative to the directory in which it lies itself."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from testbed.spec.errors import did_you_mean
from testbed.spec.load import validate
from testbed.spec.models import Spec

MAX_BYTES = 32 << 20
_TRACE_OF_ENTRY = re.compile(r"schedule\.\d+\.trace")


def reader(directory: Path) -> Callable[[str], str]:
    """A function from file names to texts, which reads each file once and raises ValueError with what is wrong."""

    @cache
    def read(name: str) -> str:
        path = directory / name
        try:
            if path.is_dir():
                raise ValueError("is a directory; name the file in it")
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"is larger than {MAX_BYTES >> 20} MiB; cut it, or thin it out")
            return path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise ValueError(f"does not exist beside the spec; {_choices(path)}") from None
        except UnicodeDecodeError:
            raise ValueError("cannot be read: it is not UTF-8 text") from None
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None

    return read


def _choices(path: Path) -> str:
    names = sorted(other.name for other in path.parent.iterdir() if other.is_file()) if path.parent.is_dir() else []
    return did_you_mean(path.name, names) if names else f"there is no file in {path.parent}"


def trace_files(spec: Spec) -> list[str]:
    """Names of all trace files in the schedule and the matrix of a spec, each once."""
    raw = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    found: dict[str, None] = {}

    def note(name: str) -> str:
        found[name] = None
        return name

    for key in ("schedule", "matrix"):
        _with_traces(raw[key], note)
    return list(found)


def with_trace_files(spec: Spec, names: Mapping[str, str]) -> Spec:
    """The same spec with its trace files under new names."""
    raw = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    return validate({**raw, **{key: _with_traces(raw[key], names.__getitem__) for key in ("schedule", "matrix")}})


def _with_traces(node: Any, rename: Callable[[str], str]) -> Any:
    """A copy of a part of a raw spec in which each name of a trace file is replaced, wherever a matrix may have put it."""
    if isinstance(node, dict):
        return {key: (_renamed if _names_trace(key) else _with_traces)(value, rename) for key, value in node.items()}
    return [_with_traces(value, rename) for value in node] if isinstance(node, list) else node


def _names_trace(key: object) -> bool:
    return key == "trace" or bool(_TRACE_OF_ENTRY.fullmatch(str(key)))


def _renamed(value: Any, rename: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_renamed(part, rename) for part in value]
    return rename(value) if isinstance(value, str) else value
