"""The run directory: made before anything starts, owned by the caller at the end."""

import itertools
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import psutil

from testbed.spec.files import data_folders, find_folder, trace_files, with_data_folders, with_trace_files
from testbed.spec.load import dump_spec
from testbed.spec.models import Spec

SPEC_FILE = "spec.yaml"
TRACES = "traces"
DATA = "data"
_PACKAGES = ("netsenseml", "torch", "numpy", "pyroute2", "docker", "pandas", "pydantic")


def create(spec: Spec, parent: Path, spec_directory: Path) -> Path:
    """A new run directory ``<name>-<UTC time>`` with spec.yaml, environment.json and copies of all files that the spec names.

    spec_directory: where the spec lies. With the copies a run can be resumed, and read, after script and traces have changed.
    Folders of data sets are not copied, there are links to them.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        directory = parent / f"{spec.name}-{stamp}{suffix}"
        try:
            directory.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    (directory / "cells").mkdir()
    if spec.script:
        copied = shutil.copy(spec_directory / spec.script.file, directory)
        spec = spec.model_copy(update={"script": spec.script.model_copy(update={"file": Path(copied).name})})
    spec = _with_traces_copied(spec, spec_directory, directory)
    spec = _with_data_linked(spec, spec_directory, directory)
    (directory / SPEC_FILE).write_text(dump_spec(spec))
    (directory / "environment.json").write_text(json.dumps(environment(), indent=1))
    return directory


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
    return next(str(path) for path in itertools.chain([wanted], numbered) if str(path) not in names.values())


def environment() -> dict[str, object]:
    """What a figure depends on: kernel, processor, memory, TCP, versions."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "kernel": platform.release(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg(),
        "congestion_control": _congestion_control(),
        "python": sys.version.split()[0],
        "packages": versions,
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
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def give_to_owner_of(parent: Path, directory: Path) -> None:
    """Hand a tree made as root to the owner of the directory above it; no effect for anyone but root."""
    if os.geteuid() != 0:
        return
    owner = parent.stat()
    for root, _, files in os.walk(directory):
        for path in (Path(root), *(Path(root, name) for name in files)):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
