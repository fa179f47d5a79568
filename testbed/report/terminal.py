"""The result on a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from testbed.protocol import one_line
from testbed.report import text
from testbed.results.run_comparison import MethodComparison


def terminal_table(summary: Mapping[str, Any]) -> RenderableType:
    """Headline, one table a set of overrides, and every problem; fits 80 columns. Print it with a
    rich Console."""
    rows = text.rows(summary)
    parts: list[RenderableType] = [
        Text(text.headline(summary), style="bold" if summary["valid"] else "bold red"),
        "",
    ]
    for name in dict.fromkeys(row.scenario for row in rows):
        parts += [_table(name, [row for row in rows if row.scenario == name]), ""]
    if summary["problems"]:
        parts += [
            Text("Not valid, because", style="red"),
            *(Text(f"  {line}") for line in summary["problems"]),
            "",
        ]
    if summary["notes"]:
        parts += [*(Text(f"Note: {note}.", style="dim") for note in summary["notes"]), ""]
    return Group(*parts[:-1])


def _table(name: str, rows: list[text.Row]) -> Table:
    baseline = next(row.method for row in rows if row.is_baseline)
    # Names from the spec are Text: square brackets in them are not markup.
    table = Table(
        title=Text(one_line(name, 1000), style="bold") if name else None,
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    # intervals need the room
    table.padding = (0, 1) if all(row.ci95[0] is None for row in rows) else (0, 1, 0, 0)
    table.add_column("method", overflow="fold")
    for heading in ("samples/s", Text(f"× {baseline}"), "bytes/step", "accuracy", "target"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        ratio = "1×" if row.is_baseline else text.times(row.ratio)
        table.add_row(
            Text(row.method),
            text.number(row.means["throughput_samples_per_s"]),
            ratio + text.interval(row.ci95, prefix=" (", suffix=")"),
            text.si(row.means["payload_bytes_per_step"], "B"),
            text.percent(row.means["final_accuracy"]),
            text.si(row.means["time_to_target_s"], "s"),
            Text("valid", style="green") if row.valid else Text("invalid", style="red"),
        )
    return table


def run_comparison_table(comparisons: Sequence[MethodComparison]) -> RenderableType:
    """What ``testbed compare`` found: one row a method and scenario, the worst first, and a
    sentence."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", overflow="fold")
    table.add_column("conditions", overflow="fold")
    for heading in ("step time", "95 % interval", "accuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for found in sorted(comparisons, key=lambda found: -(found.ratio or float("inf"))):
        style = {"slower": "red", "missing": "red", "faster": "green"}.get(found.verdict, "")
        table.add_row(
            Text(found.method),
            Text(found.scenario),
            text.NONE if found.ratio is None else text.times(found.ratio),
            text.NONE if found.ci95 is None else text.interval(found.ci95),
            text.NONE if found.accuracy is None else f"{100 * found.accuracy:+.1f}",
            Text(found.verdict + ("" if found.valid else ", not valid"), style=style),
        )
    worse = [found for found in comparisons if found.verdict in ("slower", "missing")]
    named = ", ".join(
        f"{found.method} ({found.scenario})" if found.scenario else found.method for found in worse
    )
    return Group(
        table,
        "",
        Text(f"Slower or missing: {named}." if worse else "Nothing became slower.", style="bold"),
    )


def calibration_table(result: Mapping[str, Any]) -> RenderableType:
    """What ``testbed calibrate`` found (``testbed.calibrate``): one row a quantity, its deviation
    and the verdict."""
    table = Table(box=None, pad_edge=False)
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in ("expected", "measured", "off"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    before = None
    for row in result["rows"]:
        name, unit = _QUANTITIES[row["quantity"]]
        off = text.NONE
        if row["measured"] is not None and row["expected"]:
            off = f"{100 * (row['measured'] / row['expected'] - 1):+.2f} %"
        tries = f" (try {row['attempts']})" if row["attempts"] > 1 else ""
        verdict = (
            Text(f"good{tries}", style="green") if row["within"] else Text("not good", style="red")
        )
        rate = "" if row["rate_bps"] == before else text.si(row["rate_bps"], "bit/s")
        table.add_row(
            rate, name, _amount(row["expected"], unit), _amount(row["measured"], unit), off, verdict
        )
        before = row["rate_bps"]
    worst = f"The goodput farthest below what TCP can have: {100 * result['worst_goodput']:.2f} %."
    return Group(table, "", Text(worst))


def doctor_table(result: Mapping[str, Any]) -> RenderableType:
    """What ``testbed doctor`` found (``testbed.doctor``): one row a finding, then what fixes it,
    ready to be copied."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    styles = {"ok": "green", "limited": "yellow", "missing": "red"}
    for finding in result["findings"]:
        table.add_row(
            Text(finding["verdict"], style=styles[finding["verdict"]]),
            finding["name"],
            Text(finding["found"]),
        )
    fixes = [
        Text(f"  {finding['name']}: {finding['fix']}")
        for finding in result["findings"]
        if finding["fix"]
    ]
    works = [name for name, good in result["labs"].items() if good]
    verdict = (
        f"Experiments can run here, with --lab {' or '.join(works)}."
        if works
        else "No experiment can run here."
    )
    parts: list[RenderableType] = [table, ""]
    if fixes:
        parts += [Text("What would fix it", style="bold"), *fixes, ""]
    if works:
        verdict += f" {_ENGINES[result['engine']]}"
    return Group(*parts, Text(verdict, style="bold" if works else "bold red"))


_ENGINES = {
    "netem": "The kernel's netem makes delay, jitter and loss.",
    "userspace": (
        "The delay line, a program, makes delay, jitter and loss: the kernel has no netem."
    ),
    None: "Delay, jitter and loss cannot be had.",
}
_QUANTITIES = {
    "goodput_one": ("TCP, one flow", "bit/s"),
    "goodput_ring": ("TCP, ring, slowest", "bit/s"),
    "goodput_streams": ("TCP, streams", "bit/s"),
    "burst": ("burst of losses", "packets"),
    "rtt_min": ("RTT, least", "s"),
    "rtt_median": ("RTT, median", "s"),
    "jitter": ("jitter (σ)", "s"),
    "loss": ("loss", "%"),
}


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return text.NONE
    if unit == "s":
        return f"{1e3 * value:.3f} ms"
    if unit == "packets":
        return f"{value:.2f} packets"
    return f"{100 * value:.3f} %" if unit == "%" else f"{value / 1e6:.4g} Mbit/s"


def links_table(links: Mapping[str, Any]) -> RenderableType:
    """Links of a live run, as the run's link server tells them: limit, carried rate, queue, drops,
    impairments."""
    table = Table(box=None, pad_edge=False)
    table.add_column("link")
    for heading in ("", "limit", "carried", "queued", "drops"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("also", overflow="fold")
    for name, link in links.items():
        for direction in ("up", "down"):
            parameters, now = link["state"][direction], link[direction]
            table.add_row(
                Text(name if direction == "up" else ""),
                direction,
                (
                    "unlimited"
                    if parameters["rate_bps"] is None
                    else text.si(parameters["rate_bps"], "bit/s")
                ),
                text.si(now["carried_bps"], "bit/s"),
                text.si(now["backlog_bytes"], "B"),
                str(now["drops"]),
                (
                    _impairments(parameters)
                    if link["state"]["connected"]
                    else Text("cut off", style="red")
                ),
            )
    return table


def _impairments(parameters: Mapping[str, Any]) -> str:
    words = [
        f"{name} {1e3 * parameters[f'{name}_s']:g} ms"
        for name in ("delay", "jitter")
        if parameters[f"{name}_s"]
    ]
    shares = {"loss": parameters["loss"]["share"]} | {
        name: parameters[name] for name in ("duplicate", "corrupt", "reorder")
    }
    return ", ".join(
        words + [f"{name} {100 * share:g} %" for name, share in shares.items() if share]
    )
