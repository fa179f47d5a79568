"""What became slower or faster from one run to another, for a CI that guards a method or the
testbed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from testbed.protocol import one_line
from testbed.results.load import Run
from testbed.results.names import scenario
from testbed.results.summary import RESAMPLES, bootstrap_ci95, geometric_mean, summarize

WINDOWS = 20
"""Into so many a run is cut. The links of both runs did the same in the same window, so the windows
are compared in pairs."""


@dataclass(frozen=True, slots=True)
class MethodComparison:
    """One method under one set of overrides, in both runs.

    ratio: time of a step in the second run ÷ in the first, as long as both ran; geometric mean over
    the seeds that both have. ci95: of that, over seeds if there are three, else over ``WINDOWS``,
    which knows nothing of what differs from run to run. verdict: "slower", "faster", "same", or
    "missing" if the second run lacks a cell of the first, or a cell of either does not tell when
    all of its steps ended. valid: all cells are.
    """

    method: str
    scenario: str
    seeds: int
    ratio: float | None
    ci95: tuple[float, float] | None
    accuracy: float | None
    valid: bool
    verdict: str


def compare_runs(before: Run, after: Run, tolerance: float) -> list[MethodComparison]:
    """Every method and scenario of the first run. Slower, or faster: by more than ``tolerance``,
    and the interval agrees."""
    return list(_compare_runs(before, after, tolerance))


def _compare_runs(before: Run, after: Run, tolerance: float) -> Iterator[MethodComparison]:
    first, second = (_cells(run) for run in (before, after))
    for method, name in dict.fromkeys((method, name) for method, name, _ in first):
        seeds = [seed for m, n, seed in first if (m, n) == (method, name)]
        shared = [seed for seed in seeds if (method, name, seed) in second]
        pairs = [(first[method, name, seed], second[method, name, seed]) for seed in shared]
        windows = [
            counts
            for a, b in pairs
            if (counts := _steps_by_window(before, a["cell"], after, b["cell"]))
        ]
        accuracies = [
            b["final_accuracy"] - a["final_accuracy"]
            for a, b in pairs
            if _both(a, b, "final_accuracy")
        ]
        ratio = geometric_mean([a.sum() / b.sum() for a, b in windows])
        ci95 = _interval(windows)
        yield MethodComparison(
            method=method,
            scenario=name,
            seeds=len(shared),
            ratio=ratio,
            ci95=ci95,
            accuracy=float(np.mean(accuracies)) if accuracies else None,
            valid=all(cell["valid"] for pair in pairs for cell in pair),
            verdict="missing" if len(windows) < len(seeds) else _verdict(ratio, ci95, tolerance),
        )


def differing_keys(before: Run, after: Run) -> list[str]:
    """Keys of the specs at the top that differ, but for the name, as lines: what is compared then
    is not the same experiment."""
    keys = {*before.spec, *after.spec} - {"name"}
    # YAML has keys that are no text: numbers, dates, null.
    return sorted(one_line(str(key)) for key in keys if before.spec.get(key) != after.spec.get(key))


def _cells(run: Run) -> dict[tuple[str, str, int], Mapping[str, Any]]:
    return {
        (cell["method"], scenario(cell["overrides"]), cell["seed"]): cell
        for cell in summarize(run)["cells"]
    }


def _both(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> bool:
    return a[key] is not None and b[key] is not None


def _steps_by_window(
    before: Run, first: str, after: Run, second: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps in every window, of either run; None if one of them has no step, or one whose end is
    not known: without it the run would seem to have done less."""
    ends = [
        np.sort(run.steps.loc[run.steps["cell"] == cell, "t_s"])
        for run, cell in ((before, first), (after, second))
    ]
    # NaN is sorted to the end.
    if not all(len(end) and end[0] >= 0 and np.isfinite(end[-1]) for end in ends):
        return None
    ranks = [
        run.steps.loc[run.steps["cell"] == cell, "rank"].nunique()
        for run, cell in ((before, first), (after, second))
    ]
    if not all(ranks):
        return None
    edges_s = np.linspace(0, min(end[-1] for end in ends), WINDOWS + 1)
    # Every rank has a row of every step; a step is spread over its duration.
    a, b = (
        np.diff(np.interp(edges_s, [0.0, *end], np.arange(len(end) + 1))) / count
        for end, count in zip(ends, ranks, strict=True)
    )
    # Every step takes some time, and so every window has a part of one.
    return (a, b) if min(a.min(), b.min()) > 0 else None


def _interval(windows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float] | None:
    if not windows:
        return None
    low, high = bootstrap_ci95([a.sum() / b.sum() for a, b in windows])
    if low is not None and high is not None:
        return low, high
    drawn = np.random.default_rng(0).integers(WINDOWS, size=(RESAMPLES, WINDOWS))
    logs = sum(np.log(a[drawn].sum(axis=1) / b[drawn].sum(axis=1)) for a, b in windows) / len(
        windows
    )
    low, high = np.exp(np.quantile(logs, [0.025, 0.975])).tolist()
    return low, high


def _verdict(ratio: float | None, ci95: tuple[float, float] | None, tolerance: float) -> str:
    if ratio is None or ci95 is None:
        return "missing"
    if ratio > 1 + tolerance and ci95[0] > 1:
        return "slower"
    return "faster" if ratio < 1 / (1 + tolerance) and ci95[1] < 1 else "same"
