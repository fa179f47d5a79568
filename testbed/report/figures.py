"""Figures of a run: tables → plotly. Each function draws the cells it is given, which share one set
of overrides.

A method has one colour in all figures (``palette``). Seeds of a method are lines of the same
colour.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from testbed.report import series
from testbed.report.palette import Palette, palette
from testbed.results.load import Run
from testbed.results.names import method_order, scenario
from testbed.results.summary import outages

INK, FAINT, GRID, SCHEDULE = "#1f2933", "#616e7c", "rgba(31, 41, 51, 0.09)", "#e4eaf1"

PAYLOAD_SHARE = 1448 / 1514 * 0.98
"""TCP payload of a full Ethernet frame, less what the acknowledgements of the opposite direction
take."""


def figures(run: Run, summary: Mapping[str, Any]) -> dict[str, dict[str, go.Figure]]:
    """All figures of a run: {text of the overrides ("" for none): {name of the figure: figure}}.

    If there are several sets of overrides the first group, "Overview", compares them. summary: of
    the run, as ``summarize`` makes it.
    """
    styles = palette(run.cells["method"])
    names = run.cells["overrides"].map(scenario)
    target = summary["target_accuracy"]
    drawn = {
        name: _of_scenario(run, set(run.cells.loc[names == name, "cell"]), target, styles)
        for name in dict.fromkeys(names)
    }
    if len(drawn) < 2 or run.cells["method"].nunique() < 2:
        return drawn
    return {"Overview": {"heat_map": heat_map(summary)}, **drawn}


def heat_map(summary: Mapping[str, Any]) -> go.Figure:
    """Throughput of every method against the baseline's, under every set of overrides. summary: as
    ``summarize`` makes it."""
    names = list(dict.fromkeys(scenario(cell["overrides"]) for cell in summary["cells"]))
    compared = {
        (c["method"], scenario(c["overrides"])): c
        for c in summary["comparisons"]
        if c["throughput_ratio"]
    }
    methods = method_order(method for method, _ in compared)
    ratios = [
        [compared[m, n]["throughput_ratio"] if (m, n) in compared else None for n in names]
        for m in methods
    ]
    figure = go.Figure(
        go.Heatmap(
            x=[escape(_short(name)) for name in names],
            y=[escape(method) for method in methods],
            z=[[None if ratio is None else math.log10(ratio) for ratio in row] for row in ratios],
            text=[
                [
                    (
                        ""
                        if r is None
                        else f"{r:.3g}×" + ("" if compared[m, n]["valid"] else " (not valid)")
                    )
                    for n, r in zip(names, row, strict=True)
                ]
                for m, row in zip(methods, ratios, strict=True)
            ],
            texttemplate="%{text}",
            hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
            colorscale="PuOr_r",
            zmid=0,
            showscale=False,
            xgap=2,
            ygap=2,
        )
    )
    return _finish(
        figure,
        100 + 42 * len(methods),
        hovermode="closest",
        xaxis=_axis("", showgrid=False, type="category"),
        yaxis=_axis("", showgrid=False, autorange="reversed", type="category"),
    )


def _short(name: str) -> str:
    """ "network.link.rate=1.5gbit" → "rate=1.5gbit"; whole where two keys end alike."""
    pairs = [pair.split("=", 1) for pair in name.split(", ")]
    ends = [key.rsplit(".", 1)[-1] for key, *_ in pairs]
    if len(set(ends)) < len(ends) or not all(len(pair) == 2 for pair in pairs):
        return name
    return ", ".join(f"{end}={value}" for end, (_, value) in zip(ends, pairs, strict=True))


def _of_scenario(
    run: Run, cells: set[str], target: float | None, styles: Palette
) -> dict[str, go.Figure]:
    tables = (run.steps, run.links, run.evals, run.failures)
    steps, links, evals, failures = (table[table["cell"].isin(cells)] for table in tables)
    drawn: dict[str, go.Figure | None] = {
        "throughput": throughput(steps, links, failures, styles),
        "compression": compression(steps, styles),
        "loss_over_time": loss(steps, styles, over="t_s"),
        "loss_over_bytes": loss(steps, styles, over="sent_bytes"),
        "accuracy": accuracy(evals, styles, target),
        "accuracy_over_bytes": accuracy_over_bytes(evals, steps, styles, target),
        "breakdown": breakdown(steps),
        "sensing": sensing(steps, links, styles),
        "links": utilisation(links, styles),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def throughput(
    steps: pd.DataFrame, links: pd.DataFrame, failures: pd.DataFrame, styles: Palette
) -> go.Figure | None:
    """Samples/s over time; behind it the tightest limit of any link, and the times in which failed
    workers were replaced."""
    figure = go.Figure()
    longest = (
        links.loc[links["cell"] == links.loc[links["t_s"].idxmax(), "cell"]]
        if len(links)
        else links
    )
    schedule = series.limits(longest)
    if len(schedule):
        figure.add_scatter(
            x=schedule["t_s"],
            y=schedule["rate_bps"],
            name="link limit",
            mode="lines",
            line={"shape": "hv", "color": "#b8c4d2", "width": 1},
            fill="tozeroy",
            fillcolor=SCHEDULE,
            hovertemplate="link limit %{y:~s}bit/s<extra></extra>",
        )
    if not _lines(
        figure, steps, styles, series.throughput, "samples_per_s", "%{y:.4~s} samples/s", yaxis="y2"
    ):
        return None
    for failure, to_s in outages(failures):
        colour = styles[failure["method"]]["color"]
        line = {"width": 1, "color": colour, "dash": "dot"}
        figure.add_vrect(failure["t_s"], to_s, fillcolor=colour, opacity=0.15, line=line)
    # The first axis lies behind the second: the schedule has to be the one on y.
    return _finish(
        figure,
        380,
        xaxis=_time_axis(),
        yaxis=_axis(
            "link limit (bit/s)", side="right", showgrid=False, rangemode="tozero", tickformat="~s"
        ),
        yaxis2=_axis(
            "samples/s",
            overlaying="y",
            side="left",
            rangemode="tozero",
            gridcolor=GRID,
            tickmode="auto",
        ),
    )


def compression(steps: pd.DataFrame, styles: Palette) -> go.Figure | None:
    """Share of the gradient elements sent, and bytes sent per step and rank, over time."""
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08)
    panels = (
        ("ratio", "%{y:.2~%} of the gradient sent"),
        ("payload_bytes", "%{y:.4~s}B per step and rank"),
    )
    drawn = [
        _lines(
            figure,
            steps,
            styles,
            series.by_step,
            column,
            hover,
            xaxis=f"x{row or ''}",
            yaxis=f"y{row or ''}",
        )
        for row, (column, hover) in zip((None, 2), panels, strict=True)
    ]
    if not any(drawn):
        return None
    return _finish(
        figure,
        440,
        xaxis=_axis(""),
        xaxis2=_time_axis(),
        yaxis=_log_axis("share sent", tickformat=".1~%"),
        yaxis2=_log_axis("bytes per step", tickformat="~s"),
    )


def loss(steps: pd.DataFrame, styles: Palette, over: str) -> go.Figure | None:
    """Training loss over time (``over="t_s"``) or over the bytes that all ranks had sent
    (``over="sent_bytes"``)."""
    figure = go.Figure()
    if not _lines(figure, steps, styles, _smooth_loss, "loss", "loss %{y:.3~f}", x=over):
        return None
    axis = (
        _time_axis()
        if over == "t_s"
        else _axis("bytes sent by all ranks", rangemode="tozero", tickformat="~s")
    )
    return _finish(figure, 340, xaxis=axis, yaxis=_log_axis("training loss", tickformat="~g"))


def accuracy(evals: pd.DataFrame, styles: Palette, target: float | None) -> go.Figure | None:
    """Accuracy on the test set over time, with the target accuracy."""
    figure = go.Figure()
    hover = "%{y:.1%} correct"
    if not _lines(
        figure,
        evals,
        styles,
        lambda cell: cell,
        "accuracy",
        hover,
        mode="lines+markers",
        marker={"size": 4},
    ):
        return None
    if target is not None:
        figure.add_hline(
            target, line={"color": FAINT, "width": 1, "dash": "dot"}, annotation_text="target"
        )
    return _finish(figure, 340, xaxis=_time_axis(), yaxis=_axis("test accuracy", tickformat=".0%"))


def accuracy_over_bytes(
    evals: pd.DataFrame, steps: pd.DataFrame, styles: Palette, target: float | None
) -> go.Figure | None:
    """Accuracy on the test set over the bytes that all ranks had sent."""

    def over_bytes(cell: pd.DataFrame) -> pd.DataFrame:
        own = steps[steps["cell"] == cell["cell"].iloc[0]]
        sent_bytes = own.groupby("step")["payload_bytes"].sum().cumsum()
        return cell.assign(sent_bytes=sent_bytes.reindex(cell["step"].astype(int) - 1).to_numpy())

    figure = go.Figure()
    options: dict[str, Any] = {"x": "sent_bytes", "mode": "lines+markers", "marker": {"size": 4}}
    if not _lines(figure, evals, styles, over_bytes, "accuracy", "%{y:.1%} correct", **options):
        return None
    if target is not None:
        figure.add_hline(
            target, line={"color": FAINT, "width": 1, "dash": "dot"}, annotation_text="target"
        )
    return _finish(
        figure,
        340,
        xaxis=_axis("bytes sent by all ranks", type="log", tickformat="~s"),
        yaxis=_axis("test accuracy", tickformat=".0%"),
    )


def breakdown(steps: pd.DataFrame) -> go.Figure | None:
    """Where the time of a step goes, mean over steps and ranks: compute + exposed communication,
    and encoding in it."""
    parts = ["compute_s", "comm_s", "encode_s"]
    means = steps.groupby("method")[parts].mean()
    if means.dropna(how="all").empty:
        return None
    means = means.loc[method_order(means.index)]
    figure = go.Figure()
    looks = (
        ("compute", "#9fb3c8", "step"),
        ("exposed communication", "#334e68", "step"),
        ("of which encoding", "#e69f00", "encoding"),
    )
    for part, (name, colour, group) in zip(parts, looks, strict=True):
        figure.add_bar(
            y=[escape(str(method)) for method in means.index],
            x=means[part] * 1e3,
            name=name,
            orientation="h",
            offsetgroup=group,
            marker={"color": colour},
            hovertemplate=f"{name} %{{x:.3~f}} ms<extra>%{{y}}</extra>",
        )
    return _finish(
        figure,
        150 + 56 * len(means),
        hovermode="closest",
        barmode="stack",
        bargap=0.3,
        xaxis=_axis("mean time of a step (ms)"),
        yaxis=_axis("", showgrid=False, autorange="reversed"),
    )


def sensing(steps: pd.DataFrame, links: pd.DataFrame, styles: Palette) -> go.Figure | None:
    """What methods that sense took for the bandwidth, and what the tightest link leaves for the
    payload."""
    sensed = steps.dropna(subset=["bandwidth_bps"])
    if sensed.empty:
        return None
    figure = go.Figure()
    limit = series.limits(links[links["cell"] == sensed["cell"].iloc[-1]])
    if len(limit):
        figure.add_scatter(
            x=limit["t_s"],
            y=limit["rate_bps"] * PAYLOAD_SHARE,
            name="payload that the tightest link can carry",
            mode="lines",
            line={"shape": "hv", "color": INK, "width": 1, "dash": "dot"},
            hovertemplate="truth %{y:.3~s}bit/s<extra></extra>",
        )
    _lines(figure, sensed, styles, series.by_step, "bandwidth_bps", "estimate %{y:.3~s}bit/s")
    return _finish(
        figure,
        340,
        xaxis=_time_axis(),
        yaxis=_axis("payload bandwidth (bit/s)", rangemode="tozero", tickformat="~s"),
    )


def utilisation(links: pd.DataFrame, styles: Palette) -> go.Figure | None:
    """What the links carried against their limit, one panel a method; of its cells, the one with
    the first seed."""
    methods = method_order(links["method"])
    if not methods:
        return None
    figure = make_subplots(
        rows=len(methods),
        shared_xaxes=True,
        vertical_spacing=0.3 / (len(methods) + 2),
        subplot_titles=[escape(m) for m in methods],
    )
    for row, method in enumerate(methods, start=1):
        own = links[links["method"] == method]
        cell = own[own["cell"] == own.loc[own["seed"].idxmin(), "cell"]]
        rates, limit, colour = series.carried(cell), series.limits(cell), styles[method]["color"]
        band = {
            "x": rates["t_s"],
            "mode": "lines",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
        }
        figure.add_scatter(**band, y=rates["min_bps"], row=row, col=1)
        figure.add_scatter(
            **band, y=rates["max_bps"], fill="tonexty", fillcolor=f"{colour}40", row=row, col=1
        )
        figure.add_scatter(
            x=rates["t_s"],
            y=rates["mean_bps"],
            name="carried (mean and range over links)",
            mode="lines",
            line={"color": colour, "width": 1.5},
            hovertemplate="carried %{y:.3~s}bit/s<extra></extra>",
            showlegend=row == 1,
            row=row,
            col=1,
        )
        figure.add_scatter(
            x=limit["t_s"],
            y=limit["rate_bps"],
            name="tightest limit",
            mode="lines",
            line={"shape": "hv", "color": INK, "width": 1, "dash": "dot"},
            hovertemplate="limit %{y:.3~s}bit/s<extra></extra>",
            showlegend=row == 1,
            row=row,
            col=1,
        )
    height = 110 + 140 * len(methods)
    # above the title of the first panel
    _finish(figure, height).update_layout(legend_y=1 + 26 / height)
    figure.update_annotations(x=0, xanchor="left", font={"size": 13, "color": INK})
    figure.update_yaxes(_axis("bit/s", rangemode="tozero", nticks=4, tickformat="~s")).update_xaxes(
        _axis("")
    )
    return figure.update_xaxes(_time_axis(), row=len(methods), col=1)


def _lines(
    figure: go.Figure,
    table: pd.DataFrame,
    styles: Palette,
    transform: Callable[[pd.DataFrame], pd.DataFrame],
    y: str,
    hover: str,
    x: str = "t_s",
    **options: object,
) -> int:
    """One line a cell, one entry of the legend a method; returns the number of lines that have a
    point."""
    named = {trace.name for trace in figure.data}
    drawn = 0
    for method, cell in _cells(table):
        line = transform(cell).dropna(subset=[x, y])
        if line.empty:
            continue
        drawn += 1
        figure.add_scatter(
            x=line[x],
            y=line[y],
            name=escape(method),
            legendgroup=method,
            showlegend=escape(method) not in named,
            line={"width": 1.8, **styles[method]},
            hovertemplate=f"{escape(method)}: {hover}<extra></extra>",
            **{"mode": "lines", **options},
        )
        named.add(escape(method))
    return drawn


def _cells(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(method, rows) of each cell, in the order of methods."""
    for method in method_order(table["method"]):
        own = table[table["method"] == method]
        for _, cell in own.groupby("cell"):
            yield method, cell


def _smooth_loss(cell: pd.DataFrame) -> pd.DataFrame:
    # The loss of one batch is noise; a mean over a fortieth of the run shows where it goes.
    per_step = series.by_step(cell)
    per_step["loss"] = (
        per_step["loss"].rolling(max(1, len(per_step) // 40), min_periods=1, center=True).mean()
    )
    return per_step


def _axis(title: str, **options: object) -> dict[str, object]:
    text = {"text": title, "standoff": 8, "font": {"size": 13, "color": FAINT}}
    return {
        "title": text,
        "gridcolor": GRID,
        "zeroline": False,
        "automargin": True,
        "ticklabelstandoff": 4,
        **options,
    }


def _log_axis(title: str, **options: object) -> dict[str, object]:
    # plotly labels the ticks within a decade by their first digit alone; ours have to be named.
    ticks = [factor * 10.0**power for power in range(-6, 12) for factor in (1, 2, 5)]
    return _axis(title, type="log", tickvals=ticks, **options)


def _time_axis() -> dict[str, object]:
    return _axis("time since every worker was ready", ticksuffix=" s", rangemode="tozero")


def _finish(
    figure: go.Figure, height: int, hovermode: str = "x unified", **layout: object
) -> go.Figure:
    """All of the layout at once: to change it takes longer than to draw."""
    return figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        legend={
            "orientation": "h",
            "traceorder": "normal",
            "y": 1,
            "yanchor": "bottom",
            "x": 0,
            "font": {"size": 13},
        },
        hovermode=hovermode,
        hoverlabel={"font": {"size": 12}},
        paper_bgcolor="white",
        plot_bgcolor="white",
        **layout,
    )
