"""Files and folders that a spec names, relative to the directory in which it lies itself."""

import ast
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from netsenseml.catalog import is_import_path
from testbed.catalog import check_folder
from testbed.files import is_file
from testbed.spec.errors import SpecError, did_you_mean
from testbed.spec.load import validate
from testbed.spec.models import Spec

MAX_BYTES = 32 << 20
_TRACE = re.compile(r"(schedule\.\d+\.)?trace")


def reader(directory: Path) -> Callable[[str], str]:
    """A function from file names to texts, which reads each file once and raises ValueError with
    what is wrong."""

    @cache
    def read(name: str) -> str:
        path = directory / name
        try:
            found = path.stat()
            if stat.S_ISDIR(found.st_mode):
                raise ValueError("is a directory; name the file in it")
            if not stat.S_ISREG(found.st_mode):  # a pipe would keep us waiting
                raise ValueError("is no file")
            if found.st_size > MAX_BYTES:
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
    try:
        names = sorted(other.name for other in path.parent.iterdir() if is_file(other))
    except OSError:
        names = []
    return did_you_mean(path.name, names) if names else f"there is no file in {path.parent}"


def script_files(script: Path, named: Iterable[str] = ()) -> list[Path]:
    """A script and what it needs of its own folder: the modules that it imports, whole packages,
    and the files ``named``.

    As far as import statements say, anywhere in the code, which is read and not run. A folder is a
    package if it has modules.
    """
    folder, found = script.parent, {script: None}
    pending = [script]
    while pending:
        for name in sorted(_imported(pending.pop())):
            module, package = folder / f"{name}.py", folder / name
            inside = _modules(package)
            place = package if inside else module
            if place not in found and (inside or is_file(module)):
                found[place] = None
                pending += inside or [module]
    return list(dict.fromkeys([*found, *(folder / name for name in named)]))


def _modules(package: Path) -> list[Path]:
    """All modules in a folder and below it, as far as it can be read; none if there is none in the
    folder itself."""
    found: list[Path] = []
    for folder, _, names in os.walk(package):
        found += [
            path for name in names if (path := Path(folder, name)).suffix == ".py" and is_file(path)
        ]
        if not found:
            break
    return sorted(found)


def _imported(file: Path) -> set[str]:
    """First parts of the names of all modules that a file imports."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError, RecursionError, OSError, MemoryError):
        return set()  # the worker will tell
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [
        node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]
    return {name.partition(".")[0] for name in names}


def trace_files(spec: Spec) -> list[str]:
    """Names of all trace files in the schedule and the matrix of a spec, each once."""
    raw = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    return _names(lambda note: [_with_traces(raw[key], note) for key in ("schedule", "matrix")])


def _names(rename_all: Callable[[Callable[[str], str]], object]) -> list[str]:
    """The names that a renaming comes across, each once."""
    found: dict[str, None] = {}

    def note(name: str) -> str:
        found[name] = None
        return name

    rename_all(note)
    return list(found)


def with_trace_files(spec: Spec, names: Mapping[str, str]) -> Spec:
    """The same spec with its trace files under new names."""
    raw = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    return validate(
        {
            **raw,
            **{key: _with_traces(raw[key], names.__getitem__) for key in ("schedule", "matrix")},
        }
    )


def data_folders(spec: Spec) -> list[str]:
    """Names of all folders of data sets in the workload and the matrix of a spec, each once."""
    return _names(
        partial(_with_folders, spec.model_dump(mode="json", exclude_none=True, by_alias=True))
    )


def with_data_folders(spec: Spec, names: Mapping[str, str]) -> Spec:
    """The same spec with some folders of data sets under new names."""
    raw = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    return validate(_with_folders(raw, lambda name: names.get(name, name)))


def find_folder(directory: Path, name: str) -> Path:
    """Where a folder lies that a spec in ``directory`` names; it need not be there."""
    return (directory / Path(name).expanduser()).resolve()


def data_folder(spec: Spec, directory: Path) -> Path | None:
    """Folder of the data set that the workers of a spec read, if it has one; ``directory`` is that
    of the spec.

    Raises SpecError with the way to get the files that are not there. What a data set of the user's
    own calls a folder counts if there is such a directory.
    """
    if spec.workload is None:
        return None
    data = spec.workload.data
    named = data.options.get("folder")
    try:
        folder = find_folder(directory, named) if isinstance(named, str) else None
        if spec.workload.compute.emulate is not None:  # reads no data
            return None
        if is_import_path(data.name):
            return folder if folder and folder.is_dir() else None
        check_folder(data.name, folder)
    except (ValueError, OSError, RuntimeError) as error:
        raise SpecError([("workload.data.folder", str(error))]) from None
    return folder


def _with_folders(raw: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """A copy of a raw spec with other names for the folders of data sets, wherever a matrix may
    have put them."""

    def in_data(data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        renamed = (
            {**data, "folder": _renamed(data["folder"], rename)}
            if isinstance(data.get("folder"), str)
            else data
        )
        return {**renamed, "options": in_data(data["options"])} if "options" in data else renamed

    out = {**raw, "matrix": dict(raw["matrix"])}
    for key, values in raw["matrix"].items():
        if key in ("workload.data", "workload.data.options"):
            out["matrix"][key] = [in_data(value) for value in values]
        elif key in ("workload.data.folder", "workload.data.options.folder"):
            out["matrix"][key] = _renamed(values, rename)
    if "workload" in raw:
        out["workload"] = {**raw["workload"], "data": in_data(raw["workload"]["data"])}
    return out


def _with_traces(node: Any, rename: Callable[[str], str]) -> Any:
    """A copy of a part of a raw spec in which each name of a trace file is replaced, wherever a
    matrix may have put it."""
    if isinstance(node, dict):
        return {
            key: (_renamed if _TRACE.fullmatch(str(key)) else _with_traces)(value, rename)
            for key, value in node.items()
        }
    return [_with_traces(value, rename) for value in node] if isinstance(node, list) else node


def _renamed(value: Any, rename: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_renamed(part, rename) for part in value]
    return rename(value) if isinstance(value, str) else value
