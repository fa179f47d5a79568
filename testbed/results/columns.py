"""The tables of a cell: which record files they come from, and the meaning and type of every
column.

Identifiers are integers, everything measured is float64 with NaN for "not known": one missing value
then never changes the type of a column. Imports no pandas, so that whoever writes the records can
use the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from netsenseml.records import STEP_COLUMNS
from testbed.protocol import EVAL_COLUMNS

IDENTITY_COLUMNS: Mapping[str, str] = {
    "cell": "name of the cell, as its directory",
    "method": "label of the method, for example 'topk-0.1'",
    "seed": "seed of the cell",
}
"""The first columns of every table."""

LINK_COLUMNS: Mapping[str, str] = {
    "t_s": "time of the sample, seconds after t = 0: the middle of reading it",
    "reading_s": "how long it took to read it; null = an old run",
    "link": "name of the link",
    "direction": "'up' (egress of the worker) or 'down' (egress of the switch port that faces it)",
    "rate_bps": "limit in force, bits/s with Ethernet headers; null = not limited",
    "burst_bytes": (
        "bucket of the shaper in force, bytes that may pass at once; null = not limited, or an"
        " old run"
    ),
    "queue_bytes": "limit of the queue in force, bytes; null = not limited in bytes, or an old run",
    "bytes": "bytes sent since the link was made, with Ethernet headers (cumulative, kernel)",
    "packets": "packets sent since the link was made (cumulative, kernel)",
    "drops": "packets dropped since the link was made (cumulative, kernel)",
    "lost": (
        "packets lost since the link was made, by netem or the delay line (cumulative); null = the"
        " link has neither"
    ),
    "overlimits": "times that a packet had to wait for the limiter (cumulative, kernel)",
    "backlog_bytes": "bytes waiting in the queue",
    "qlen": "packets waiting in the queue",
}
"""Columns of one row of links: one sample of one direction of one link, ten a second."""

EVENT_COLUMNS: Mapping[str, str] = {
    "planned_s": "when the change was due, seconds after t = 0",
    "applied_s": "when the kernel had acknowledged it, seconds after t = 0",
    "link": "name of the link; of the flow if kind is 'traffic'",
    "state": (
        "the new state of both directions, as JSON text; of a flow its streams or rate_bps, 0 = off"
    ),
    "kind": (
        "'initial' (before t = 0), 'schedule' (from the spec), 'manual' (by hand on the live run),"
        " 'traffic', or 'readback' (no change: the kernel did not report the state that should be"
        " in force)"
    ),
    "verified": "true if the kernel reported the state that was asked for",
    "unsure_s": (
        "how far these times may be off, as they were taken by another machine's clock; null = an"
        " old run"
    ),
}
"""Columns of one row of events: one change of one link, or a flow that began or stopped."""

TRAFFIC_COLUMNS: Mapping[str, str] = {
    "t_s": "time of the sample, seconds after t = 0",
    "flow": "name of the flow, for example 'bg0-w1'",
    "from": "host that sends",
    "to": "host that receives, where the sample was taken",
    "kind": "'tcp' or 'udp'",
    "streams": "TCP streams open now; null for UDP",
    "bytes": "payload received since t = 0, without headers (cumulative)",
    "packets": "datagrams received since t = 0 (cumulative); null for TCP",
    "lost": "datagrams missing below the highest number received (cumulative); null for TCP",
}
"""Columns of one row of traffic: one sample of one competing flow, ten a second."""


CALIBRATION_COLUMNS: Mapping[str, str] = {
    "quantity": (
        "'rate': bits/s on the wire, of a link and direction; 'rtt': s, from one host to another"
        " and back"
    ),
    "link": "name of the link; empty for an RTT",
    "direction": "'up' or 'down'; empty for an RTT",
    "source": "host that asked, or of a rate that one flow fills, that sent; else empty",
    "target": "host that answered, or that one flow went to; else empty",
    "attempt": "from 1; what misses its tolerance is measured again, and its best result counts",
    "expected": (
        "what the link was set to, or the sum of all delays; less where the flows cannot fill the"
        " link"
    ),
    "measured": "what it did; null if nothing could be measured",
    "tolerance": "how far the measured may be from the expected value",
    "within": "true if it is no farther",
}
"""Columns of one row of calibration: one quantity, measured before t = 0."""


HOST_COLUMNS: Mapping[str, str] = {
    "t_s": "time of the sample, seconds after t = 0",
    "cpu_some_share": (
        "share of the last second in which some program waited for a processor (PSI); null if not"
        " known"
    ),
    "cpu_busy_share": "share of all processors' time in the last second that was not idle",
    "cpu_foreign_share": (
        "share of it that programs used which are not the cell's, or a hypervisor took"
    ),
    "softnet_drops": (
        "packets dropped between interfaces since t = 0, because a processor had no room for them"
    ),
    "cpu_own_share": (
        "share of it that the cell's programs used, as far as this node has started them; null = an"
        " old run"
    ),
    "cpu_waited_share": (
        "share of the last second for which that one of the cell's processes which waited longest"
        " waited for a processor; null = not known (another machine's containers, an old run)"
    ),
    "processors": "how many there are; null = an old run",
    "stopped": "whether one of the cell's processes stood still, stopped by a signal",
    "node": "name of the node; empty if the lab is on one machine",
    "machine": (
        "which machine that is, by its boot_id (random(4)); empty if the lab is on one machine"
    ),
}
"""Columns of one row of host: one sample of the load of one node's machine, ten a second."""


FAILURE_COLUMNS: Mapping[str, str] = {
    "planned_s": "when the schedule wanted it, seconds after t = 0; null = it did not",
    "t_s": "when it happened or was noticed, seconds after t = 0",
    "worker": (
        "name of the worker; where it has several ranks, of a failure that of the rank, such as"
        " 'w1-0'"
    ),
    "kind": (
        "'kill' (by the schedule), 'failure' (after which all are to be started again), or"
        " 'restart' (all train again)"
    ),
    "text": "what was found; empty for a kill",
}
"""Columns of one row of failures: what happened to workers in a cell that went on."""


DELAYLINE_COLUMNS: Mapping[str, str] = {
    "t_s": "time of the sample, seconds after t = 0",
    "cpu_s": "processor time that the delay line has used so far, s",
    "frames": "frames that have left it, over all links (cumulative)",
    "late": (
        "of them, those that left later than 1 ms or 3 % of their delay after their time"
        " (cumulative)"
    ),
    "latest_s": "the worst lateness since the sample before, s",
    "held": "frames under way now",
    "overflowed": "frames it had no room for (cumulative)",
}
"""Columns of one row of delayline: one sample of the delay line, ten a second, where one stands for
the kernel's netem."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a cell.

    records: globs of its record files in the cell's directory; those of the hosts are written there
    (``protocol``). columns: name → meaning and unit.
    dtypes: pandas type of each column that is not float64; "json" is text that holds any JSON
    value.
    """

    records: tuple[str, ...]
    columns: Mapping[str, str]
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def dtype(self, column: str) -> str:
        """Type of a column: "float64" unless said otherwise."""
        return self.dtypes.get(column, "float64")


TABLES: Mapping[str, Table] = {
    "steps": Table(
        ("hosts/*/steps*.jsonl",), STEP_COLUMNS, {"rank": "int64", "step": "int64", "scheme": "str"}
    ),
    "evals": Table(
        ("hosts/w0/evals*.jsonl", "hosts/w0-0/evals*.jsonl"), EVAL_COLUMNS, {"step": "int64"}
    ),
    "links": Table(("links.jsonl",), LINK_COLUMNS, {"link": "str", "direction": "str"}),
    "events": Table(
        ("events.jsonl", "hosts/*/events-*.jsonl"),
        EVENT_COLUMNS,
        {"link": "str", "state": "json", "kind": "str", "verified": "bool"},
    ),
    "traffic": Table(
        ("hosts/*/traffic-*.jsonl",),
        TRAFFIC_COLUMNS,
        {"flow": "str", "from": "str", "to": "str", "kind": "str"},
    ),
    "failures": Table(
        ("failures.jsonl",), FAILURE_COLUMNS, {"worker": "str", "kind": "str", "text": "str"}
    ),
    "host": Table(
        ("host.jsonl",), HOST_COLUMNS, {"node": "str", "machine": "str", "stopped": "bool"}
    ),
    "delayline": Table(("delayline.jsonl",), DELAYLINE_COLUMNS),
    "calibration": Table(
        ("calibration.jsonl",),
        CALIBRATION_COLUMNS,
        {
            "attempt": "int64",
            "within": "bool",
            **dict.fromkeys(("quantity", "link", "direction", "source", "target"), "str"),
        },
    ),
}
"""All tables of a cell. ``<name>.parquet`` replaces the record files when the cell has ended."""
