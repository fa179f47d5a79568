"""A run → one HTML page that needs nothing else: no network, no server, no second file."""

import base64
import functools
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from plotly.offline import get_plotlyjs

from testbed.dilation import CAVEAT
from testbed.files import replacing
from testbed.report import text
from testbed.report.figures import figures
from testbed.report.palette import palette
from testbed.results.columns import TABLES
from testbed.results.load import Run
from testbed.results.names import scenario
from testbed.results.summary import METRICS
from testbed.spec.load import dump_yaml

CAPTIONS: Mapping[str, tuple[str, str]] = {
    "throughput": (
        "Throughput",
        (
            "Samples trained per second by all ranks together, every step spread evenly over its"
            " duration. The grey area is the tightest limit of any link at that time (right axis)."
            " A line ends where its run ended. In a coloured strip a worker had failed, and all"
            " were being started again."
        ),
    ),
    "compression": (
        "What was sent",
        (
            "Above: the share of the gradient's elements that was sent in a step; 100 % is no"
            " sparsification. Below: the bytes that one rank sent for it, without TCP/IP headers."
            " Both axes are logarithmic; means over ranks."
        ),
    ),
    "loss_over_time": (
        "Training loss over time",
        (
            "Mean over ranks, smoothed over a fortieth of the run. The lower line at a given time"
            " learned faster."
        ),
    ),
    "loss_over_bytes": (
        "Training loss over bytes",
        (
            "The same losses over what all ranks together had sent. The lower line made more of its"
            " bytes."
        ),
    ),
    "accuracy": (
        "Accuracy over time",
        (
            "Share of the test set that is classified correctly, one dot an evaluation. Steeper is"
            " sooner."
        ),
    ),
    "breakdown": (
        "Where a step's time goes",
        (
            "Mean over all steps and ranks. Compute and exposed communication add up to the step."
            " Encoding and decoding is part of either, so it has a bar of its own."
        ),
    ),
    "accuracy_over_bytes": (
        "Accuracy over bytes",
        (
            "The same evaluations over what all ranks together had sent. Steeper made more of its"
            " bytes."
        ),
    ),
    "heat_map": (
        "Method and conditions",
        (
            "Throughput against the baseline's under the same conditions, which is 1; the colour is"
            " its logarithm."
        ),
    ),
    "sensing": (
        "Estimate against truth",
        (
            "The bandwidth that a sensing method reckons with, and what the tightest link can carry"
            " of TCP's payload; competing traffic takes its share of that."
        ),
    ),
    "links": (
        "Were the links full?",
        (
            "What the kernel counted, with Ethernet headers: the line is the mean over all links"
            " and directions, the band goes from the idlest to the busiest. A line at the dotted"
            " limit means that the network was the bottleneck."
        ),
    ),
}
"""Title and caption of each figure: how to read it, and what was measured."""

WIDE = {"throughput", "compression", "sensing", "links", "heat_map"}
"""Figures that take the whole width of a wide page."""


def write_report(run: Run, path: Path, summary: Mapping[str, Any]) -> None:
    """Write the page for a run, finished or not. summary: of the run, as ``summarize`` makes it."""
    with replacing(path) as temporary:
        temporary.write_text(render(run, summary), encoding="utf-8", errors="replace")


def render(run: Run, summary: Mapping[str, Any]) -> str:
    """The page as text. Everything that comes from the run is escaped."""
    rows = text.rows(summary)
    drawn = figures(run, summary)
    ids = {
        (name, key): f"figure-{number}"
        for number, (name, key) in enumerate(
            (name, key) for name, group in drawn.items() for key in group
        )
    }
    plots = {
        ids[name, key]: json.loads(group[key].to_json())
        for name, group in drawn.items()
        for key in group
    }
    return _template().render(
        run=run,
        summary=summary,
        headline=text.headline(summary),
        scenarios={
            name: [row for row in rows if row.scenario == name]
            for name in dict.fromkeys(r.scenario for r in rows)
        },
        widest=max((row.ratio for row in rows if row.ratio), default=1.0),
        colours={method: style["color"] for method, style in palette(run.cells["method"]).items()},
        interval=text.interval,
        changes={
            cell: changes(run.events[run.events["cell"] == cell], dilation)
            for cell, dilation in zip(run.cells["cell"], run.cells["dilation"], strict=True)
        },
        drawn={name: {key: ids[name, key] for key in group} for name, group in drawn.items()},
        captions=CAPTIONS,
        wide=WIDE,
        metrics=METRICS,
        tables={
            name: TABLES[name].columns
            for name in ("steps", "links", "events", "traffic", "failures")
        },
        environment=dict(flat(run.environment)),
        spec=dump_yaml(run.spec),
        facts=facts(run),
        caveat=(
            "Under dilation all runs slower by its factor, and is reported as if it did not."
            f" {CAVEAT}."
            if _dilation(run)
            else ""
        ),
        plotly=_plotly(),
        plots=packed(json.dumps(plots)),
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("testbed.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        si=text.si, number=text.number, times=text.times, percent=text.percent, scenario=scenario
    )
    return environment.get_template("report.html.j2")


@functools.cache
def _plotly() -> str:
    return packed(get_plotlyjs())


def packed(content: str) -> str:
    """Text as base64 of gzip, a third of the size of plotly.js; and nothing in it can end a script
    element."""
    return base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode()


def facts(run: Run) -> list[str]:
    """What was run, in a few words each."""
    workload = run.spec.get("workload") or {}
    model, data = (_name(workload.get(key)) for key in ("model", "data"))
    emulated = (
        isinstance(compute := workload.get("compute"), Mapping)
        and compute.get("emulate") is not None
    )
    workers = sorted({int(count) for count in run.cells["workers"] if count})
    ranks = sorted(set(run.cells["ranks_per_worker"]))
    several = f" of {'/'.join(map(str, ranks))} ranks" if ranks and ranks[-1] > 1 else ""
    wanted = (
        f"{'/'.join(map(str, workers))} workers{several}" if workers else "",
        f"{run.spec['lab']} lab" if run.spec.get("lab") else "",
        (f"{model}, emulated" if emulated else f"{model} on {data}") if model and data else "",
        f"dilation {factors}" if (factors := _dilation(run)) else "",
        *sorted({f"TCP {tcp['congestion']}" for tcp in run.cells["tcp"] if tcp.get("congestion")}),
        f"{len(run.cells)} cell{'s' if len(run.cells) != 1 else ''}",
        run.path.name,
    )
    return [fact for fact in wanted if fact]


def _dilation(run: Run) -> str:
    """The factors other than 1, "4" or "1/4"; "" if nothing was slowed down."""
    factors = sorted(set(run.cells["dilation"]))
    return "/".join(f"{factor:g}" for factor in factors) if factors and factors[-1] > 1 else ""


def _name(choice: Any) -> str:
    """The name in "mlp" or {"name": "mlp", …}; "" if there is none."""
    return str((choice.get("name") if isinstance(choice, Mapping) else choice) or "")


def changes(events: pd.DataFrame, dilation: float = 1.0) -> str:
    """How the scheduled changes of one cell's links went, in the machine's time: "6 changes, at
    most 2 ms late"."""
    due = events[~events["kind"].isin(["initial", "readback"])]
    if due.empty:
        return "none"
    late_s = (due["applied_s"] - due["planned_s"]).max() * dilation
    count = f"{len(due)} change{'s' if len(due) != 1 else ''}"
    return (
        f"{count}, at most {max(late_s, 0) * 1e3:.1f} ms late"
        if pd.notna(late_s)
        else f"{count}, never applied"
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as (dotted key, text)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                (", ".join(map(str, value)) if isinstance(value, list) else str(value)),
            )
