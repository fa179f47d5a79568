"""Files and folders that a spec names, relative to the directory in which it lies itself."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from netsenseml.agent.catalog import check_folder
from testbed.spec.errors import SpecError, did_you_mean
from testbed.spec.load import validate
from testbed.spec.models import Spec

MAX_BYTES = 32 << 20
_TRACE = re.compile(r"(schedule\.\d+\.)?trace")
_FOLDER = re.compile(r"(workload\.data\.(options\.)?)?folder")


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
        _renamed_in(raw[key], _TRACE, note)
    return list(found)


def with_trace_files(spec: Spec, names: Mapping[str, str]) -> Spec:
    """The same spec with its trace files under new names."""
    raw = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    return validate({**raw, **{key: _renamed_in(raw[key], _TRACE, names.__getitem__) for key in ("schedule", "matrix")}})


def with_absolute_folders(spec: Spec, directory: Path) -> Spec:
    """The same spec with the folders of its data sets absolute; ``directory`` is that of the spec."""
    raw = spec.model_dump(mode="json", exclude_none=True, by_alias=True)

    def absolute(name: str) -> str:
        return str(directory.absolute() / name)

    varied = {key: value for key, value in raw["matrix"].items() if key.startswith("workload.data")}
    raw["matrix"] |= _renamed_in(varied, _FOLDER, absolute)
    if "workload" in raw:
        raw["workload"]["data"] = _renamed_in(raw["workload"]["data"], _FOLDER, absolute)
    return validate(raw)


def data_folder(spec: Spec) -> Path | None:
    """Folder of the data set that the workers of a spec read, if it has one.

    Raises SpecError with the way to get the files that are not there.
    """
    if spec.workload is None or spec.workload.compute.emulate is not None:
        return None
    data = spec.workload.data
    named = data.options.get("folder")
    folder = Path(named) if isinstance(named, str) else None
    try:
        check_folder(data.name, folder)
    except (ValueError, OSError) as error:
        raise SpecError([("workload.data.folder", str(error))]) from None
    return folder


def _renamed_in(node: Any, named: re.Pattern[str], rename: Callable[[str], str]) -> Any:
    """A copy of a part of a raw spec with other names under the keys that match, wherever a matrix may have put them."""
    if isinstance(node, dict):
        return {
            key: _renamed(value, rename) if named.fullmatch(str(key)) else _renamed_in(value, named, rename)
            for key, value in node.items()
        }
    return [_renamed_in(value, named, rename) for value in node] if isinstance(node, list) else node


def _renamed(value: Any, rename: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_renamed(part, rename) for part in value]
    return rename(value) if isinstance(value, str) else value
