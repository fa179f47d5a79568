"""The tables of a cell: which record files they come from, and the meaning and type of every column.

Identifiers are integers, everything measured is float64 with NaN for "not known": one missing value then never
changes the type of a column. Imports no pandas, so that whoever writes the records can use the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from netsenseml.agent.protocol import EVAL_COLUMNS, STEP_COLUMNS

IDENTITY_COLUMNS: Mapping[str, str] = {
    "cell": "name of the cell, as its directory",
    "method": "label of the method, for example 'topk-0.1'",
    "seed": "seed of the cell",
}
"""The first columns of every table."""

LINK_COLUMNS: Mapping[str, str] = {
    "t_s": "time of the sample, seconds after t = 0",
    "link": "name of the link",
    "direction": "'up' (egress of the worker) or 'down' (egress of the switch port that faces it)",
    "rate_bps": "limit in force, bits/s with Ethernet headers; null = not limited",
    "bytes": "bytes sent since the link was made, with Ethernet headers (cumulative, kernel)",
    "packets": "packets sent since the link was made (cumulative, kernel)",
    "drops": "packets dropped since the link was made (cumulative, kernel)",
    "overlimits": "times that a packet had to wait for the limiter (cumulative, kernel)",
    "backlog_bytes": "bytes waiting in the queue",
    "qlen": "packets waiting in the queue",
}
"""Columns of one row of links: one sample of one direction of one link, ten a second."""

EVENT_COLUMNS: Mapping[str, str] = {
    "planned_s": "when the change was due, seconds after t = 0",
    "applied_s": "when the kernel had acknowledged it, seconds after t = 0",
    "link": "name of the link",
    "state": "the new state of both directions, as JSON text",
    "kind": "'initial' (before t = 0), 'schedule' (from the spec) or 'manual' (by hand on the live run)",
    "verified": "true if the kernel reported the state that was asked for",
}
"""Columns of one row of events: one change of one link."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a cell.

    records: glob of its record files in the cell's directory.
    columns: name → meaning and unit.
    dtypes: pandas type of each column that is not float64; "json" is text that holds any JSON value.
    """

    records: str
    columns: Mapping[str, str]
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def dtype(self, column: str) -> str:
        """Type of a column: "float64" unless said otherwise."""
        return self.dtypes.get(column, "float64")


TABLES: Mapping[str, Table] = {
    "steps": Table("steps-r*.jsonl", STEP_COLUMNS, {"rank": "int64", "step": "int64", "scheme": "str"}),
    "evals": Table("evals.jsonl", EVAL_COLUMNS, {"step": "int64"}),
    "links": Table("links.jsonl", LINK_COLUMNS, {"link": "str", "direction": "str"}),
    "events": Table("events.jsonl", EVENT_COLUMNS, {"link": "str", "state": "json", "kind": "str", "verified": "bool"}),
}
"""All tables of a cell. ``<name>.parquet`` replaces the record files when the cell has ended."""
