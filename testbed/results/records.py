"""Tables of one cell: record files while it runs, Parquet from its end on."""

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json, to_json

from netsenseml.records import read_records
from testbed.files import is_regular, read_json, remove_tree, replacing
from testbed.protocol import (
    CELL_FILE,
    CHECKPOINTS,
    RESULT_FILE,
    SHARED,
    MethodConfig,
    one_line,
    rank_name,
    ranks_per_worker,
    read_cell,
)
from testbed.results.columns import IDENTITY_COLUMNS, TABLES, Table

UNKNOWN = "unknown"
MOST_ROWS = 50_000_000
"""Of one table; steps of 64 ranks for nine days at a step a second."""
MOST_NAMES = 4096
"""Of links, flows, ranks …: each is looked at by itself."""
_NAMES = ["rank", "link", "direction", "flow", "from", "to", "worker", "node", "machine"]
_BATCH = 20_000
"""So many rows are Python objects at once: as such they take ten times the memory of a table."""


def method_label(method: MethodConfig) -> str:
    """What a method is called in every table and figure unless the cell names it: name and options,
    "topk-0.1"."""
    return "-".join(
        [method["name"].replace(":", "."), *map(str, (method.get("options") or {}).values())]
    )


def identity(cell_dir: Path) -> dict[str, Any]:
    """The values of ``IDENTITY_COLUMNS``. A cell whose ``cell.json`` is missing or damaged is
    "unknown", seed -1."""
    # It may be in no encoding, or do something to a terminal.
    name = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in cell_dir.name
    )
    try:
        config: Mapping[str, Any] = read_cell(cell_dir)
        label = config.get("label") or method_label(config["method"])
        if type(seed := config["seed"]) is not int or abs(seed) >= 2**63:
            raise ValueError("no seed")
        return {"cell": name, "method": one_line(str(label)), "seed": seed}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return {"cell": name, "method": UNKNOWN, "seed": -1}


def to_frame(
    rows: Iterable[Mapping[str, Any]], table: Table, identity: Mapping[str, Any]
) -> pd.DataFrame:
    """Rows of records → a table with all of its columns in their order and types, the identity
    first."""
    return _identified(pd.concat(_frames(rows, table), ignore_index=True), identity)


def _frames(rows: Iterable[Mapping[str, Any]], table: Table) -> Iterator[pd.DataFrame]:
    """The same in parts without the identity; the first has no rows."""
    yield _typed(pd.DataFrame(columns=list(table.columns)), table)
    rows = iter(rows)
    while batch := list(itertools.islice(rows, _BATCH)):
        values = {column: [row.get(column) for row in batch] for column in table.columns}
        for column in table.columns:
            if table.dtype(column) == "json":
                values[column] = _json_texts(values[column])
        yield _typed(pd.DataFrame(values), table)


def _json_texts(values: list[Any]) -> list[Any]:
    """With sorted keys, as validity reads them. Most of many are alike, and to see that takes a
    fifth of the time."""
    alike = [to_json(value) for value in values]
    unlike = dict(zip(alike, values, strict=True))
    texts = {key: json.dumps(value, sort_keys=True) for key, value in unlike.items()}
    return [texts[key] for key in alike]


def _typed(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """A frame with the types of a table; what cannot have them, which we never write, is missing,
    or its row is."""
    for column in table.columns:
        match table.dtype(column):
            case "bool":  # what was not said to be true is not
                frame[column] = (
                    frame[column]
                    .map(lambda value: isinstance(value, bool | np.bool) and bool(value))
                    .astype("bool")
                )
            case "json" | "str":
                frame[column] = _texts(frame[column])
            case "int64":
                numbers = _numbers(frame[column])
                good = numbers.abs() < 2**53
                frame = frame.assign(**{column: numbers})[good] if not good.all() else frame
                frame[column] = frame[column].astype("int64")
            case _:
                frame[column] = _numbers(frame[column])
    return frame


def _numbers(values: "pd.Series[Any]") -> "pd.Series[float]":
    """NaN where there is none that can be reckoned with."""
    try:
        numbers = values.astype("float64")
    except (ValueError, TypeError, OverflowError):
        numbers = values.map(_number).astype("float64")
    return numbers.where(numbers.abs() < _LARGEST)


_LARGEST = 1e150
"""The square of it is a number, too."""


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _texts(values: "pd.Series[Any]") -> "pd.Series[str]":
    """Empty where there is none, as in a run of an older version."""
    try:
        return values.astype("str").fillna("")
    except (ValueError, TypeError, RecursionError):  # half a character
        return values.map(lambda value: str(value).encode(errors="replace").decode()).astype("str")


def _identified(frame: pd.DataFrame, identity: Mapping[str, Any]) -> pd.DataFrame:
    for place, column in enumerate(IDENTITY_COLUMNS):
        dtype = "int64" if column == "seed" else "str"
        frame.insert(place, column, pd.Series(identity[column], index=frame.index, dtype=dtype))
    return frame


def record_files(cell_dir: Path, name: str) -> list[Path]:
    """The record files of a table that are still there."""
    return _files(cell_dir, *TABLES[name].records)


def _files(cell_dir: Path, *globs: str) -> list[Path]:
    """Files of a cell to which no link leads."""
    found = (path for glob in globs for path in cell_dir.glob(glob) if is_regular(path))
    root = cell_dir.resolve()
    return sorted(path for path in found if path.resolve() == root / path.relative_to(cell_dir))


def _recorded(cell_dir: Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a table's record files; of those that a host wrote only what is its own to
    say."""
    config = read_json(cell_dir / CELL_FILE) or {}
    flows, per_host = config.get("flows"), ranks_per_worker(config)
    ends = (
        {name: tuple(two) for name, two in flows.items() if isinstance(two, list) and len(two) == 2}
        if isinstance(flows, dict)
        else {}
    )
    parse = functools.partial(from_json, cache_strings="keys")  # four times as fast as json.loads
    for path in record_files(cell_dir, name):
        host = None if path.parent == cell_dir else path.parent.name
        with contextlib.suppress(OSError):  # whoever wrote it may have forbidden to read it
            for row in read_records(path, parse):
                if isinstance(row, dict) and (
                    host is None or _is_of_host(host, name, row, ends, per_host)
                ):
                    yield row


def _is_of_host(
    host: str,
    table: str,
    row: Mapping[str, Any],
    flows: Mapping[str, tuple[str, ...]],
    per_host: int,
) -> bool:
    """Whether a row of a table is for a host, or a rank of its own directory, to write. flows: from
    where to where."""
    match table, row:
        case "steps", {"rank": int(rank)}:
            return rank_name(rank, per_host) == host
        case "traffic", {"flow": str(flow), "from": source, "to": target}:
            return flows.get(flow) == (source, target) and target == host
        case "events", {"kind": "traffic", "link": str(flow)}:
            return flows.get(flow, ("",))[0] == host
    return table == "evals"


def read_table(cell_dir: Path, name: str) -> pd.DataFrame:
    """One table of a cell at any time: from Parquet if it has ended, else what its record files
    hold so far.

    Raises ValueError, one line, if the Parquet file cannot be read, or names more hosts than a lab
    can have.
    """
    frame = _read(cell_dir, name)
    for column in frame.columns.intersection(_NAMES):
        if (names := frame[column].nunique()) > MOST_NAMES:
            raise ValueError(
                f"{cell_dir / name}: has {names} values of {column}, more than {MOST_NAMES}"
            )
    return frame


def _read(cell_dir: Path, name: str) -> pd.DataFrame:
    parquet = cell_dir / f"{name}.parquet"
    if is_regular(parquet):
        try:
            # Arrow opens no file whose path is in no encoding.
            with open(parquet, "rb") as file, pq.ParquetFile(file) as table:
                if (rows := table.metadata.num_rows) > MOST_ROWS:
                    raise ValueError(f"has {rows} rows, more than {MOST_ROWS}")
                names = set(table.schema_arrow.names)
                read = table.read([one for one in TABLES[name].columns if one in names])
                read.validate(full=True)  # whether texts are UTF-8
                # What pandas noted of types beside the columns is not needed, nor to be trusted.
                frame = read.to_pandas(ignore_metadata=True)
            # A run of an older version knows nothing of newer columns, which are all measured ones.
            frame = frame.reindex(columns=list(TABLES[name].columns))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(one_line(f"{parquet}: cannot be read: {error}", 400)) from None
        return _identified(_typed(frame, TABLES[name]), identity(cell_dir))
    return to_frame(_recorded(cell_dir, name), TABLES[name], identity(cell_dir))


def _write_parquet(cell_dir: Path, name: str, path: Path) -> None:
    """Part by part: a run of hours has tables of many gigabytes."""
    known, writer = identity(cell_dir), None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "wb"))
        for frame in _frames(_recorded(cell_dir, name), TABLES[name]):
            part = pa.Table.from_pandas(_identified(frame, known), preserve_index=False)
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(file, part.schema))
            writer.write_table(part)


def finish_cell(cell_dir: Path) -> None:
    """Turn the record files of an ended cell into Parquet; a cell without ``result.json`` is left
    as it is.

    Safe to repeat, and to be killed at any point: a Parquet file is there only if it is whole, and
    the records
    go only after it. Record files found beside a Parquet file are therefore leftovers, of which
    some may be gone.
    """
    if not (cell_dir / RESULT_FILE).exists():
        return  # still being written to, or killed; its records can be read where they are
    for name in TABLES:
        parquet = cell_dir / f"{name}.parquet"
        if not is_regular(parquet):
            with replacing(parquet) as temporary:
                _write_parquet(cell_dir, name, temporary)
        for records in record_files(cell_dir, name):
            records.unlink()
    remove_tree(cell_dir / SHARED)
    for checkpoint in _files(cell_dir, f"hosts/*/{CHECKPOINTS}"):
        checkpoint.unlink()
    hosts = cell_dir / "hosts"
    for directory in () if hosts.is_symlink() else (*hosts.glob("*"), hosts):
        with contextlib.suppress(OSError):  # what programs of the user's have left there stays
            directory.rmdir()
