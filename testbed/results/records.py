"""Tables of one cell: record files while it runs, Parquet from its end on."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from netsenseml.records import read_records
from testbed.protocol import MethodConfig, read_cell
from testbed.results.columns import IDENTITY_COLUMNS, TABLES, Table

RESULT_FILE = "result.json"
UNKNOWN = "unknown"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` at the end of the block, whole and on disk, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def method_label(method: MethodConfig) -> str:
    """What a method is called in every table and figure unless the cell names it: name and options, "topk-0.1"."""
    return "-".join([method["name"].replace(":", "."), *map(str, (method.get("options") or {}).values())])


def identity(cell_dir: Path) -> dict[str, Any]:
    """The values of ``IDENTITY_COLUMNS``. A cell whose ``cell.json`` is missing or damaged is "unknown", seed -1."""
    try:
        config: Mapping[str, Any] = read_cell(cell_dir)
        label = config.get("label") or method_label(config["method"])
        return {"cell": cell_dir.name, "method": str(label), "seed": int(config["seed"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"cell": cell_dir.name, "method": UNKNOWN, "seed": -1}


def to_frame(rows: Iterable[Mapping[str, Any]], table: Table, identity: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of records → a table with all of its columns in their order and types, the identity first."""
    frame = pd.DataFrame(list(rows)).reindex(columns=list(table.columns))
    for column in table.columns:
        match table.dtype(column):
            case "json":
                frame[column] = frame[column].map(lambda value: json.dumps(value, sort_keys=True)).astype("str")
            case "bool":  # what was not said to be true is not
                frame[column] = frame[column].map(lambda value: value is True).astype("bool")
            case dtype:
                frame[column] = frame[column].astype(dtype)
    for place, column in enumerate(IDENTITY_COLUMNS):
        dtype = "int64" if column == "seed" else "str"
        frame.insert(place, column, pd.Series(identity[column], index=frame.index, dtype=dtype))
    return frame


def record_files(cell_dir: Path, name: str) -> list[Path]:
    """The record files of a table that are still there."""
    return sorted(cell_dir.glob(TABLES[name].records))


def read_table(cell_dir: Path, name: str) -> pd.DataFrame:
    """One table of a cell at any time: from Parquet if it has ended, else what its record files hold so far."""
    parquet = cell_dir / f"{name}.parquet"
    if parquet.exists():
        # A run of an older version knows nothing of newer columns, which are all measured ones.
        return pd.read_parquet(parquet).reindex(columns=[*IDENTITY_COLUMNS, *TABLES[name].columns])
    rows = chain.from_iterable(map(read_records, record_files(cell_dir, name)))
    return to_frame((row for row in rows if isinstance(row, dict)), TABLES[name], identity(cell_dir))


def finish_cell(cell_dir: Path) -> None:
    """Turn the record files of an ended cell into Parquet; a cell without ``result.json`` is left as it is.

    Safe to repeat, and to be killed at any point: a Parquet file is there only if it is whole, and the records
    go only after it. Record files found beside a Parquet file are therefore leftovers, of which some may be gone.
    """
    if not (cell_dir / RESULT_FILE).exists():
        return  # still being written to, or killed; its records can be read where they are
    for name in TABLES:
        parquet = cell_dir / f"{name}.parquet"
        if not parquet.exists():
            table = read_table(cell_dir, name)
            with replacing(parquet) as temporary:
                table.to_parquet(temporary, index=False)
        for records in record_files(cell_dir, name):
            records.unlink()
