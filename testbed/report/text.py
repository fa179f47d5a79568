"""Numbers and verdicts as people read them; shared by the page and the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from testbed.results.names import method_order, scenario

NONE = "–"
SPACE = "\u00a0"
"""Between a number and its unit, where no line may break."""
_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T"}


@dataclass(frozen=True, slots=True)
class Row:
    """One method under one set of overrides; numbers are means over its seeds, units as in
    summary.json."""

    scenario: str
    method: str
    seeds: int
    valid: bool
    is_baseline: bool
    ratio: float | None
    ci95: Sequence[float | None]
    time_to_target_ratio: float | None
    means: Mapping[str, float | None]


_MEANS = (
    "throughput_samples_per_s",
    "step_s_median",
    "encode_s_median",
    "payload_bytes_per_step",
    "lost_energy",
    "final_accuracy",
    "final_loss",
    "time_to_target_s",
)


def rows(summary: Mapping[str, Any]) -> list[Row]:
    """The cells of a summary gathered by overrides and method, with how each method compares to the
    baseline."""
    compared = {(scenario(c["overrides"]), c["method"]): c for c in summary["comparisons"]}
    found = []
    for name in dict.fromkeys(scenario(cell["overrides"]) for cell in summary["cells"]):
        group = [cell for cell in summary["cells"] if scenario(cell["overrides"]) == name]
        for method in method_order(cell["method"] for cell in group):
            cells = [cell for cell in group if cell["method"] == method]
            comparison = compared.get((name, method), {})
            found.append(
                Row(
                    scenario=name,
                    method=method,
                    seeds=len(cells),
                    valid=all(cell["valid"] for cell in cells),
                    is_baseline=(name, method) not in compared,
                    ratio=comparison.get("throughput_ratio"),
                    ci95=comparison.get("ci95", [None, None]),
                    time_to_target_ratio=comparison.get("time_to_target_ratio"),
                    means={key: _mean(cell[key] for cell in cells) for key in _MEANS},
                )
            )
    return found


def headline(summary: Mapping[str, Any]) -> str:
    """The result in one sentence: the method that trained the most samples/s, against the
    baseline."""
    comparisons = [c for c in summary["comparisons"] if c["throughput_ratio"]]
    if not comparisons:
        return _caution(summary) + _single(rows(summary))
    by_method = {
        method: [c for c in comparisons if c["method"] == method]
        for method in {c["method"]: None for c in comparisons}
    }
    best = max(
        by_method,
        key=lambda method: geometric_mean(c["throughput_ratio"] for c in by_method[method]),
    )
    baseline, ratios = (
        comparisons[0]["baseline"],
        sorted(c["throughput_ratio"] for c in by_method[best]),
    )
    if len(ratios) == 1:
        amount = f"{times(ratios[0])} as many samples per second as {baseline}"
        amount += interval(by_method[best][0]["ci95"], prefix=f" (95{SPACE}% interval ", suffix=")")
    else:
        amount = (
            f"{times(ratios[0])} to {times(ratios[-1])} as many samples per second as {baseline}"
        )
        amount += f" under {len(ratios)} sets of conditions"
    subject = (
        f"{best} trained"
        if ratios[-1] >= 1
        else f"No method beat {baseline}: the nearest, {best}, trained"
    )
    return f"{_caution(summary)}{subject} {amount}{_accuracies(summary, best, baseline)}."


def times(ratio: float | None) -> str:
    """4.0712 → "4.07×"."""
    if ratio is None:
        return NONE
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}×"


def interval(ci95: Sequence[float | None], prefix: str = "", suffix: str = "") -> str:
    """[3.9, 4.3] → "3.9–4.3×" between prefix and suffix; "" if there is none."""
    low, high = ci95
    return (
        ""
        if low is None or high is None
        else f"{prefix}{times(low).rstrip('×')}–{times(high)}{suffix}"
    )


def percent(share: float | None) -> str:
    """0.9731 → "97.3 %"."""
    return NONE if share is None else f"{share * 100:.1f}{SPACE}%"


def number(value: float | None) -> str:
    """Three significant digits, no exponent for everyday sizes."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def si(value: float | None, unit: str) -> str:
    """Three significant digits with an SI prefix: (4.8e5, "B") → "480 kB"."""
    if value is None:
        return NONE
    power = min(max(3 * math.floor(math.log10(abs(value)) / 3), -9), 12) if value else 0
    return f"{value / 10**power:.3g}{SPACE}{_PREFIXES[power]}{unit}"


def _caution(summary: Mapping[str, Any]) -> str:
    return "" if summary["valid"] else "Not a valid run, so not a result: "


def _single(found: Sequence[Row]) -> str:
    rates: dict[str, list[float]] = {}
    for row in found:
        if (rate := row.means["throughput_samples_per_s"]) is not None:
            rates.setdefault(row.method, []).append(rate)
    trained = ", ".join(f"{method} trained {_span(some)}" for method, some in rates.items())
    return f"{trained}." if trained else "no throughput was measured."


def _span(rates: Sequence[float]) -> str:
    ends = dict.fromkeys(number(rate) for rate in (min(rates), max(rates)))
    under = f" under {len(rates)} sets of conditions" if len(rates) > 1 else ""
    return f"{' to '.join(ends)} samples/s{under}"


def _accuracies(summary: Mapping[str, Any], method: str, baseline: str) -> str:
    """How the accuracies compare; "" unless both were evaluated."""
    ours, theirs = (
        _mean(c["final_accuracy"] for c in summary["cells"] if c["method"] == m)
        for m in (method, baseline)
    )
    if ours is None or theirs is None:
        return ""
    if percent(ours) == percent(theirs):
        return f" and reached the same {percent(ours)} accuracy"
    return f" and reached {percent(ours)} accuracy against {percent(theirs)}"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
