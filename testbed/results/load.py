"""A run directory → pandas. Works while the run is going on, after it, and on what a killed run has
left."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from testbed.files import is_directory, is_file, is_shallow, read_json, read_text
from testbed.protocol import CELL_FILE, RESULT_FILE, cell_directories, one_line
from testbed.results.columns import IDENTITY_COLUMNS, TABLES
from testbed.results.dilation import undilated
from testbed.results.records import UNKNOWN, identity, read_table, to_frame
from testbed.spec.load import MAX_BYTES, parse_yaml

SUMMARY_FILE = "summary.json"


class NotARun(FileNotFoundError):
    """The directory holds no run. The message is one line."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """One run. Every table holds the rows of all cells and starts with the columns cell, method,
    seed.

    path, name: its directory and the name in its spec.
    spec, environment: what was asked for, and the machine that did it; {} if not recorded.
    summary: content of ``summary.json``; None before the run has ended once, or was reported
        (``summarize(run)`` makes one at any time).
    cells: one row a cell: cell, method, seed, workers, ranks_per_worker, overrides ({dotted key:
        value}), status ("done", "failed", "interrupted", or "unfinished" if it is running or was
        killed), problems ([text]), earlier ([text], of a failed try before this one), steps,
        t_end_s, final_accuracy, final_loss, parameters ({rank: hash}), workload (as in cell.json;
        {} of a script), machine (where it ran: machine, kernel, processor, cores), tcp (as in
        cell.json), notes ([text], what its links have otherwise than the spec says), calibrate (if
        its links were to be measured before t = 0), dilation (by which all times are divided and
        rates multiplied here, but those of workload, calibration and events.state, which are as the
        kernel had them).
    steps, links, events, evals, traffic, failures, calibration, host, delayline: columns and units
        in ``testbed.results.columns``.
    """

    path: Path
    name: str
    spec: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    cells: pd.DataFrame
    steps: pd.DataFrame
    links: pd.DataFrame
    events: pd.DataFrame
    evals: pd.DataFrame
    traffic: pd.DataFrame
    failures: pd.DataFrame
    calibration: pd.DataFrame
    host: pd.DataFrame
    delayline: pd.DataFrame

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {len(self.cells)} cells, {len(self.steps)} step rows)"


def require_run(path: Path) -> None:
    """Raise ``NotARun``, one line, if this is no run directory."""
    if not is_directory(path):
        raise NotARun(f"{path}: no such directory")
    if not is_file(path / "spec.yaml") and not is_directory(path / "cells"):
        raise NotARun(f"{path}: not a run directory, it has neither spec.yaml nor cells/")


def load_run(path: str | Path) -> Run:
    """Load a run directory. Raises ``NotARun`` if there is none, ValueError if its spec cannot be
    read."""
    path = Path(path)
    require_run(path)
    spec = _read_spec(path / "spec.yaml")
    cell_dirs = cell_directories(path)
    cells = [cell_row(d) for d in cell_dirs]
    tables = {name: _all_cells(cell_dirs, name, cells) for name in TABLES}
    factors = {cell["cell"]: cell["dilation"] for cell in cells}
    return Run(
        path=path,
        name=one_line(str(spec.get("name", path.name))),
        spec=spec,
        environment=read_json(path / "environment.json") or {},
        summary=read_json(path / SUMMARY_FILE),
        cells=undilated(pd.DataFrame(cells, columns=list(_CELL_DEFAULTS)), factors),
        **{name: undilated(table, factors) for name, table in tables.items()},
    )


def cell_row(cell_dir: Path) -> dict[str, Any]:
    """One row of ``Run.cells``; what is not recorded (yet) has its default."""
    config = read_json(cell_dir / CELL_FILE)
    result = read_json(cell_dir / RESULT_FILE) or {}
    known = {
        key: value
        for key, value in {**(config or {}), **result}.items()
        if key in _CELL_DEFAULTS and value is not None
    }
    own = identity(cell_dir)
    problems = [f"{CELL_FILE} is missing or damaged"] if config is None else []
    if config is not None and own["method"] == UNKNOWN:
        problems.append(f"{CELL_FILE} is damaged: it names no method, or no seed")
    elif config is not None and config.get("cell", cell_dir.name) != cell_dir.name:
        problems.append(f"{CELL_FILE} is that of {one_line(str(config['cell']))}")
    known = {key: value for key, value in known.items() if key not in IDENTITY_COLUMNS}
    if odd := [key for key, value in known.items() if not _fits(key, value)]:
        known = {key: value for key, value in known.items() if key not in odd}
        problems.append(f"its files are damaged: {', '.join(odd)}")
    for key, value in known.items():
        if isinstance(value, list):
            known[key] = [one_line(line, 1000) for line in value]
    known["problems"] = [*known.get("problems", []), *problems]
    return {**_CELL_DEFAULTS, **known, **own}


def _fits(key: str, value: Any) -> bool:
    """Whether a value has the type of its column."""
    match _CELL_DEFAULTS[key]:
        case bool():
            return isinstance(value, bool)
        case list():
            return isinstance(value, list) and all(isinstance(line, str) for line in value)
        case dict():
            return isinstance(value, dict) and is_shallow(value)
        case str():
            return isinstance(value, str)
    if key.startswith("final_") and isinstance(value, float):
        return True  # a model that diverges has no finite loss
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    if not abs(value) <= _LARGEST:  # nor not a number
        return False
    if key == "ranks_per_worker":
        return isinstance(value, int) and value > 0
    return key != "dilation" or value > 0


_LARGEST = 2**53


_CELL_DEFAULTS: Mapping[str, Any] = {
    "cell": "",
    "method": "",
    "seed": -1,
    "workers": 0,
    "ranks_per_worker": 1,
    "overrides": {},
    "workload": {},
    "calibrate": False,
    "dilation": 1.0,
    "machine": {},
    "tcp": {},
    "notes": [],
    "status": "unfinished",
    "problems": [],
    "earlier": [],
    "steps": None,
    "t_end_s": None,
    "final_accuracy": None,
    "final_loss": None,
    "parameters": {},
}


def _all_cells(cell_dirs: list[Path], name: str, cells: list[dict[str, Any]]) -> pd.DataFrame:
    """One table of all cells; what cannot be read is a problem of its cell, which is added to its
    row of ``cells``."""
    tables = []
    for directory, cell in zip(cell_dirs, cells, strict=True):
        try:
            if len(table := read_table(directory, name)):
                tables.append(table)
        except ValueError as error:
            cell["problems"] = [*cell["problems"], str(error)]
    return pd.concat(
        tables or [to_frame([], TABLES[name], dict.fromkeys(IDENTITY_COLUMNS))], ignore_index=True
    )


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        if path.lstat().st_size > 4 * MAX_BYTES:  # what it was left to say is said in it
            raise ValueError(f"is larger than {4 * MAX_BYTES >> 20} MiB")
        spec = parse_yaml(read_text(path), path.name)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {one_line(str(error))}") from error
    for place, kind in _READ_OF_SPEC.items():
        value: Any = spec
        for key in place.split("."):
            value = value.get(key) if value is not None else None
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if isinstance(value, int | float):
            fits &= abs(value) <= _LARGEST  # nor is it not a number
        if value is not None and not fits:
            raise ValueError(f"{path}: {place} cannot be {one_line(repr(value), 40)}")
    return spec


_READ_OF_SPEC: Mapping[str, Any] = {
    "name": str,
    "lab": str,
    "workload": dict,
    "workload.target": int | float,
    "workload.warmup": int,
    "workload.stop": dict,
    "workload.stop.accuracy": int | float,
}
"""What results and report go by; the rest of a run's spec is only shown."""
