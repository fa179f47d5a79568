"""A run directory → pandas. Works while the run is going on, after it, and on what a killed run has
left."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from testbed.files import is_directory, is_file, read_json, read_text
from testbed.protocol import CELL_FILE, RESULT_FILE, one_line
from testbed.results.columns import IDENTITY_COLUMNS, TABLES
from testbed.results.dilation import undilated
from testbed.results.records import identity, read_table, to_frame

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
    summary: content of ``summary.json``; None until the run has ended (``summarize(run)`` makes one
    at any time).
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
    cell_dirs = sorted(
        (d for d in (path / "cells").glob("*") if not d.is_symlink() and is_directory(d)),
        key=_natural,
    )
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
    config = read_json(cell_dir / CELL_FILE) or {"problems": [f"{CELL_FILE} is missing or damaged"]}
    result = read_json(cell_dir / RESULT_FILE) or {}
    known = {
        key: value
        for key, value in {**config, **result}.items()
        if key in _CELL_DEFAULTS and value is not None
    }
    known = {key: value for key, value in known.items() if key not in IDENTITY_COLUMNS}
    if odd := [key for key, value in known.items() if not _fits(key, value)]:
        known = {key: value for key, value in known.items() if key not in odd}
        known["problems"] = [*known.get("problems", []), f"its files are damaged: {', '.join(odd)}"]
    return {**_CELL_DEFAULTS, **known, **identity(cell_dir)}


def _fits(key: str, value: Any) -> bool:
    """Whether a value has the type of its column."""
    match _CELL_DEFAULTS[key]:
        case bool():
            return isinstance(value, bool)
        case list():
            return isinstance(value, list) and all(isinstance(line, str) for line in value)
        case dict():
            return isinstance(value, dict)
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


def _natural(path: Path) -> list[int | str]:
    """Sort key under which "w10" follows "w9"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        spec = yaml.safe_load(read_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {one_line(str(error))}") from error
    spec = spec if isinstance(spec, dict) else {}
    for place, kind in _READ_OF_SPEC.items():
        value: Any = spec
        for key in place.split("."):
            value = value.get(key) if value is not None else None
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
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
