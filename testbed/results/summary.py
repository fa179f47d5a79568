"""Who won, by how much, and whether it can be believed: the content of ``summary.json``.

    {"name", "valid", "problems": ["<cell>: <problem>"],
     "cells": [{"cell", "method", "seed", "overrides", "workers", "ranks_per_worker", "steps",
                "throughput_samples_per_s", "step_s_median", "encode_s_median",
                "payload_bytes_per_step", "lost_energy", "phases", "final_loss", "final_accuracy",
                "best_accuracy", "time_to_target_s", "bytes_to_target", "restarts", "lost_steps",
                "valid", "problems", "earlier_failures", "replicas_identical", "calibrated"}],
     "comparisons": [{"baseline", "method", "overrides", "throughput_ratio", "ci95": [lo, hi],
                      "time_to_target_ratio", "seeds", "valid"}],
     "regrets": [{"method", "overrides", "best", "regret", "oracle", "valid"}],
     "target_accuracy": the spec's, or null,
     "notes": ["what a reader of the figures should know"]}

A number that is not known is null. ``METRICS`` gives the meaning and unit of each number.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from testbed.files import replacing
from testbed.protocol import one_line
from testbed.results.columns import TABLES
from testbed.results.dilation import undilated
from testbed.results.load import SUMMARY_FILE, Run
from testbed.results.names import method_order, scenario
from testbed.results.phases import oracle, phases
from testbed.results.validity import WHEN, cell_problems, replicas_identical
from testbed.spec.load import MAX_CELLS

ADAPTIVE = "netsense"
"""How the labels of methods begin that choose for themselves."""
ROUNDING: Mapping[str, float] = {"allreduce": 0.0, "float16": 2.0**-22, "bfloat16": 2.0**-16}
"""Energy that is lost at most where values are only rounded, by scheme: the square of half a unit
in the last place."""
CSV_FILE = "summary.csv"
RESAMPLES = 10_000

METRICS: Mapping[str, str] = {
    "throughput_samples_per_s": (
        "samples of all ranks ÷ time until the last step's end; everything after t = 0 counts, but"
        " for the steps of the spec's workload.warmup, which all numbers of steps leave out"
    ),
    "step_s_median": "median wall time of a step, over all steps and ranks",
    "encode_s_median": (
        "median time that a rank spent on encoding and decoding in a step, beside or after backward"
    ),
    "lost_energy": (
        "share of the gradients' energy (sum of squares) that a step did not send, mean over steps"
        " and ranks"
    ),
    "payload_bytes_per_step": (
        "bytes that one rank sent for one step's exchange, mean over steps and ranks"
    ),
    "final_loss": "loss over the test set at the end",
    "final_accuracy": "share of the test set classified correctly at the end",
    "best_accuracy": "the best accuracy of any evaluation",
    "time_to_target_s": "time of the first evaluation that reached the spec's target accuracy",
    "bytes_to_target": "bytes that all ranks together had sent by then",
    "restarts": "how often all workers were started again because one had died",
    "lost_steps": (
        "steps that were done twice, since the checkpoint that the workers went on from was older;"
        " their first try does not count for throughput"
    ),
    "earlier_failures": (
        "why a try of the cell before this one failed; its numbers are those of the second"
    ),
    "replicas_identical": "whether all ranks ended with bit-identical parameters",
    "calibrated": (
        "whether the links were measured before t = 0; not if the spec says calibrate: false, or"
        " limits nothing"
    ),
    "throughput_ratio": "method ÷ baseline, geometric mean over the seeds that both ran",
    "ci95": "95 % bootstrap interval of throughput_ratio over seeds; null below three seeds",
    "time_to_target_ratio": (
        "method ÷ baseline: below 1 the method was sooner; geometric mean over seeds"
    ),
    "seeds": "number of seeds that both ran",
    "regret": (
        "throughput of the best other method that lost no more of the gradients' energy ÷ that of"
        " netsense: above 1, netsense chose too cautiously or too slowly; geometric mean over the"
        " seeds that both ran"
    ),
    "phases": (
        "what was reached between two changes of the schedule, where there are not too many:"
        " from_s, to_s, samples_per_s, lost_energy"
    ),
    "oracle": (
        "as regret, against one who chose the best of these methods anew in every phase; null"
        " without phases"
    ),
}


def summarize(run: Run) -> dict[str, Any]:
    """Summary of a run at any time; a cell that has not ended is counted as it stands, and is not
    valid."""
    cells = [summarize_cell(cell, run) for cell in run.cells.to_dict("records")]
    planned = dict.fromkeys(note for cell in run.cells["notes"] for note in cell)
    problems = [f"{cell['cell']}: {problem}" for cell in cells for problem in cell["problems"]]
    problems += _missing_cells(run) if cells else ["no cell was run"]
    return {
        "name": run.name,
        "valid": not problems,
        "problems": problems,
        "cells": cells,
        "comparisons": compare(cells),
        "regrets": regrets(cells),
        "target_accuracy": target_accuracy(run.spec),
        "notes": [*planned, *_machines(run), *_restarts(run), *_delay_line(run), *_processors(run)],
    }


def _missing_cells(run: Run) -> list[str]:
    """Whether there are as many cells as the spec makes."""
    axes: list[Any] = [run.spec.get("methods"), run.spec.get("seeds")]
    matrix = run.spec.get("matrix")
    axes += matrix.values() if isinstance(matrix, dict) else ()
    if not all(isinstance(axis, list) for axis in axes):
        return []  # an old run, or a damaged spec
    if (made := math.prod(map(len, axes))) > MAX_CELLS:
        return [f"its spec makes more than {MAX_CELLS:,} cells"]
    missing = made - len(run.cells)
    return (
        [f"{missing} of the {made} cells of its spec are not there, or not yet"]
        if missing > 0
        else []
    )


def _unlike_spec(cell: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    """Whether a cell was run with what the spec says, where its figures depend on that."""
    asked = {**spec, **cell["overrides"]}
    return [
        f"its cell.json has {key} {cell[key]:g}, and the spec"
        f" {asked[key] if isinstance(asked[key], int | float) else 'no number'}"
        for key in ("workers", "dilation")
        if asked.get(key) is not None and asked[key] != cell[key]
    ]


def _machines(run: Run) -> list[str]:
    """Conditions under which methods are compared that ran on machines of different kinds."""
    kinds: dict[str, dict[str, str]] = {}
    for cell in run.cells.to_dict("records"):
        if cell["machine"]:
            kind = ", ".join(
                f"{cell['machine'].get(key)}" for key in ("processor", "cores", "kernel")
            )
            kinds.setdefault(scenario(cell["overrides"]), {})[kind] = str(
                cell["machine"].get("machine")
            )
    return [
        f"{f'with {name} ' if name else ''}methods ran on different machines:"
        f" {'; '.join(map(one_line, machines.values()))}"
        for name, machines in kinds.items()
        if len(machines) > 1
    ]


def _restarts(run: Run) -> list[str]:
    """When all workers of a cell were started again, why, and how long nothing was trained."""
    notes = []
    for failure, to_s in outages(run.failures):
        what = one_line(f"{failure['worker']} {failure['text'].partition(';')[0]}")
        again = f"all were started again, which took {to_s - failure['t_s']:.1f} s"
        notes.append(f"{failure['cell']}: at {failure['t_s']:.1f} s {what}; {again}")
    return notes


def outages(failures: pd.DataFrame) -> Iterator[tuple[dict[str, Any], float]]:
    """The first failure, as a row, of every time in which the workers of a cell were not all there,
    and when that ended."""
    for _, rows in failures.groupby("cell"):
        first: dict[str, Any] | None = None
        for row in rows.sort_values("t_s").to_dict("records"):
            if row["kind"] == "failure" and first is None:
                first = row
            elif row["kind"] == "restart" and first is not None:
                yield first, row["t_s"]
                first = None


def _delay_line(run: Run) -> list[str]:
    """What the delay line of a run has used and how late it was, at most in any cell."""
    if run.delayline.empty:
        return []
    by_cell = run.delayline.sort_values("t_s").groupby("cell")
    begin, end = by_cell.first(), by_cell.last()
    core = ((end["cpu_s"] - begin["cpu_s"]) / (end["t_s"] - begin["t_s"])).max()
    late = ((end["late"] - begin["late"]) / (end["frames"] - begin["frames"]).clip(lower=1)).max()
    return [
        f"the delay line used at most {core:.0%} of a processor; at most {late:.2%} of its frames"
        " left late"
    ]


def _processors(run: Run) -> list[str]:
    """Cells whose compute is paced or emulated, so that the processors should not matter, but that
    kept them busy."""
    paced = [
        cell["cell"]
        for cell in run.cells.to_dict("records")
        if isinstance(cell["workload"].get("compute"), dict)
    ]
    shares = (run.host["cpu_busy_share"] > _BUSY_SHARE).groupby(run.host["cell"]).mean()
    busy = shares[shares.index.isin(paced) & (shares > _BUSY_TIME)]
    if busy.empty:
        return []
    more = (
        f", and in {len(busy) - 1} other cells for more than {_BUSY_TIME:.0%}"
        if len(busy) > 1
        else ""
    )
    where = f"{busy.max():.0%} of the time in {busy.idxmax()}{more}"
    return [
        f"hardly a processor was idle for {where}: there this machine decided, too; a larger"
        " dilation takes that away"
    ]


_BUSY_SHARE, _BUSY_TIME = 0.9, 0.2


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # of damaged records
def summarize_cell(cell: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Metrics and verdict of one cell. ``cell`` is a row of ``Run.cells``.

    Records that no cell leaves are the problem of their cell alone, whatever they are.
    """
    try:
        return _finite(_summary_of(cell, run))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        return _damaged(
            cell, f"its records are damaged: {one_line(f'{type(error).__name__}: {error}')}"
        )


def _finite(value: Any) -> Any:
    """The same without numbers that JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _damaged(cell: Mapping[str, Any], problem: str) -> dict[str, Any]:
    known = {key: cell[key] for key in ("cell", "method", "seed", "workers", "ranks_per_worker")}
    return {
        **known,
        "overrides": {},
        "steps": 0,
        **dict.fromkeys(_METRICS),
        "phases": [],
        "restarts": 0,
        "lost_steps": 0,
        "valid": False,
        "problems": [problem],
        "earlier_failures": [],
        "replicas_identical": False,
        "calibrated": False,
    }


_METRICS = (
    "throughput_samples_per_s",
    "step_s_median",
    "encode_s_median",
    "lost_energy",
    "payload_bytes_per_step",
    "final_loss",
    "final_accuracy",
    "best_accuracy",
    "time_to_target_s",
    "bytes_to_target",
)


def _summary_of(cell: Mapping[str, Any], run: Run) -> dict[str, Any]:
    tables = {name: (table := getattr(run, name))[table["cell"] == cell["cell"]] for name in TABLES}
    all_steps, evals = tables["steps"], tables["evals"]
    lost = lost_work(all_steps, tables["failures"])
    steps = all_steps[~lost]
    warmup = (run.spec.get("workload") or {}).get("warmup") or 0
    warm = steps[steps["step"] >= warmup]
    warm_from_s = steps.loc[steps["step"] < warmup, "t_s"].max() if warmup else 0.0
    problems = cell_problems(*_as_clocked(cell, tables), warmup)
    if cell["dilation"] > 1:
        problems = [
            f"{problem} (in this machine's time, dilation {cell['dilation']:g})"
            for problem in problems
        ]
    problems += _unlike_spec(cell, run.spec)
    last = evals.iloc[-1] if len(evals) else {"accuracy": None, "loss": None}
    final_accuracy = _number(cell["final_accuracy"], last["accuracy"])
    return {
        "cell": cell["cell"],
        "method": cell["method"],
        "seed": cell["seed"],
        "overrides": cell["overrides"],
        "workers": cell["workers"],
        "ranks_per_worker": cell["ranks_per_worker"],
        "steps": int(_number(cell["steps"], steps["step"].max() + 1) or 0),
        "throughput_samples_per_s": _number(
            warm["samples"].sum(min_count=1) / (warm["t_s"].max() - warm_from_s)
        ),
        "step_s_median": _number(warm["step_s"].median()),
        "encode_s_median": _number(warm["encode_s"].median()),
        "lost_energy": lost_energy(warm),
        "payload_bytes_per_step": _number(warm["payload_bytes"].mean()),
        "phases": phases(warm, _lost(warm), tables["events"]),
        "final_loss": _number(cell["final_loss"], last["loss"]),
        "final_accuracy": final_accuracy,
        "best_accuracy": _number(
            pd.Series([*evals["accuracy"], final_accuracy], dtype="float64").max()
        ),
        "time_to_target_s": time_to_target(evals, target_accuracy(run.spec)),
        "bytes_to_target": bytes_to_target(evals, all_steps, target_accuracy(run.spec)),
        "restarts": int((tables["failures"]["kind"] == "restart").sum()),
        "lost_steps": int(all_steps.loc[lost, "step"].nunique()),
        "valid": not problems,
        "problems": problems,
        "earlier_failures": list(cell["earlier"]),
        "replicas_identical": replicas_identical(cell),
        "calibrated": len(tables["calibration"]) > 0,
    }


def _as_clocked(
    cell: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]
) -> tuple[Mapping[str, Any], Mapping[str, pd.DataFrame]]:
    """Whether the machine kept up is judged in its own time."""
    factors = {cell["cell"]: cell["dilation"]}
    if cell["dilation"] == 1:
        return cell, tables
    own = {**cell, "t_end_s": cell["t_end_s"] and cell["t_end_s"] * cell["dilation"]}
    return own, {name: undilated(table, factors, inverse=True) for name, table in tables.items()}


def target_accuracy(spec: Mapping[str, Any]) -> float | None:
    """The accuracy that the spec's workload is to reach, or else at which it stops; None if there
    is neither."""
    workload = spec.get("workload") or {}
    target: float | None = workload.get("target") or (workload.get("stop") or {}).get("accuracy")
    return target


def time_to_target(evals: pd.DataFrame, target: float | None) -> float | None:
    """Time in s of the first evaluation that reached the target accuracy; None if none did."""
    return None if target is None else _number(evals.loc[evals["accuracy"] >= target, "t_s"].min())


def bytes_to_target(evals: pd.DataFrame, steps: pd.DataFrame, target: float | None) -> float | None:
    """Bytes that all ranks together had sent at the first evaluation that reached the target
    accuracy; None if none did."""
    reached_s = time_to_target(evals, target)
    return (
        None
        if reached_s is None
        else _number(steps.loc[steps["t_s"] <= reached_s, "payload_bytes"].sum())
    )


def lost_work(steps: pd.DataFrame, failures: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows of steps of a cell were done in vain: the workers were started again, and went on
    from an earlier step."""
    lost = pd.Series(False, index=steps.index)
    for restart_s in failures.loc[failures["kind"] == "restart", "t_s"]:
        later = steps["t_s"] > restart_s
        lost |= ~later & (steps["step"] >= steps.loc[later, "step"].min())
    return lost


def lost_energy(steps: pd.DataFrame) -> float | None:
    """Mean share of the gradients' energy that was not sent; where values are only rounded, its
    bound. None if not known."""
    return _number(_lost(steps).mean())


def _lost(steps: pd.DataFrame) -> pd.Series:
    return (
        steps["lost_energy"]
        .astype(float)
        .fillna(steps["scheme"].str.replace(WHEN, "", regex=True).map(ROUNDING))
    )


def regrets(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How much the methods that choose for themselves lose to the best fixed choice in hindsight,
    in every set of overrides.

    Only what loses no more energy counts: sending less is always faster.
    """
    found = []
    for name in dict.fromkeys(scenario(cell["overrides"]) for cell in cells):
        group = [cell for cell in cells if scenario(cell["overrides"]) == name]
        by_method = {
            method: [cell for cell in group if cell["method"] == method]
            for method in method_order(c["method"] for c in group)
        }
        fixed = [method for method in by_method if not method.startswith(ADAPTIVE)]
        for method in (method for method in by_method if method not in fixed):
            lost = _mean_of(by_method[method], "lost_energy")
            rivals = {}
            for other in fixed:
                theirs, other_lost = by_method[other], _mean_of(by_method[other], "lost_energy")
                if lost is None or other_lost is None or other_lost > lost:
                    continue
                by_seed = {cell["seed"]: cell for cell in by_method[method]}
                pairs = [
                    (cell, by_seed[cell["seed"]]) for cell in theirs if cell["seed"] in by_seed
                ]
                ratio = geometric_mean(_ratios(pairs, "throughput_samples_per_s"))
                if ratio is not None:
                    rivals[other] = ratio, all(a["valid"] and b["valid"] for a, b in pairs)
            if rivals:
                best = max(rivals, key=lambda other: rivals[other][0])
                regret, valid = rivals[best]
                overrides = group[0]["overrides"]
                chosen_anew = _oracle(by_method[method], [by_method[other] for other in rivals])
                valid = valid and (chosen_anew is None or all(fine for _, fine in rivals.values()))
                numbers = {"best": best, "regret": regret, "oracle": chosen_anew, "valid": valid}
                found.append({"method": method, "overrides": overrides, **numbers})
    return found


def _oracle(
    cells: Sequence[Mapping[str, Any]], rivals: Sequence[Sequence[Mapping[str, Any]]]
) -> float | None:
    ratios = [
        oracle(
            cell["phases"],
            [
                their["phases"]
                for theirs in rivals
                for their in theirs
                if their["seed"] == cell["seed"]
            ],
        )
        for cell in cells
    ]
    return geometric_mean([ratio for ratio in ratios if ratio])


def _mean_of(cells: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    known = [cell[metric] for cell in cells if cell[metric] is not None]
    return float(np.mean(known)) if known else None


def compare(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every method against the baseline under the same overrides, paired over seeds.

    A comparison is valid if all cells in it are. Cells are the dicts of ``summarize_cell``.
    """
    comparisons = []
    for name in dict.fromkeys(scenario(cell["overrides"]) for cell in cells):
        group = [cell for cell in cells if scenario(cell["overrides"]) == name]
        baseline, *others = method_order(cell["method"] for cell in group)
        base = {cell["seed"]: cell for cell in group if cell["method"] == baseline}
        for method in others:
            pairs = [
                (c, base[c["seed"]]) for c in group if c["method"] == method and c["seed"] in base
            ]
            throughput = _ratios(pairs, "throughput_samples_per_s")
            comparisons.append(
                {
                    "baseline": baseline,
                    "method": method,
                    "overrides": group[0]["overrides"],
                    "throughput_ratio": geometric_mean(throughput),
                    "ci95": bootstrap_ci95(throughput),
                    "time_to_target_ratio": geometric_mean(_ratios(pairs, "time_to_target_s")),
                    "seeds": len(throughput),
                    "valid": (
                        bool(pairs)
                        and all(ours["valid"] and theirs["valid"] for ours, theirs in pairs)
                    ),
                }
            )
    return comparisons


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """The mean that treats 2 and ½ as opposites; None of nothing."""
    return float(np.exp(np.mean(np.log(ratios)))) if len(ratios) else None


def bootstrap_ci95(ratios: Sequence[float]) -> list[float | None]:
    """95 % percentile bootstrap interval of the geometric mean; [None, None] below three ratios.

    The unit is the seed. The steps of one run share its start, its links and its host, so one run
    gives no interval however long it is. With few seeds the interval is too narrow (three seeds
    cover nearer 75 % than 95 %).
    The generator is seeded: equal ratios give equal intervals.
    """
    if len(ratios) < 3:
        return [None, None]
    drawn = np.random.default_rng(0).choice(np.log(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.exp(np.quantile(drawn.mean(axis=1), [0.025, 0.975]))
    return [float(low), float(high)]


def write_summary(summary: Mapping[str, Any], directory: Path) -> None:
    """Write ``summary.json``, and ``summary.csv`` with one row a cell and one column an
    override."""
    with replacing(directory / SUMMARY_FILE) as path:
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    rows = [
        {
            **{key: value for key, value in cell.items() if key != "phases"},
            **{key: value for key, value in cell["overrides"].items() if key not in cell},
            "overrides": scenario(cell["overrides"]),
            "problems": "; ".join(cell["problems"]),
        }
        for cell in summary["cells"]
    ]
    with replacing(directory / CSV_FILE) as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(
            file, fieldnames=list(dict.fromkeys(key for row in rows for key in row))
        )
        writer.writeheader()
        writer.writerows(rows)


def _ratios(
    pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], metric: str
) -> list[float]:
    """Of what is positive in both, as it is in all cells whose records are whole."""
    return [
        ours[metric] / theirs[metric]
        for ours, theirs in pairs
        if (ours[metric] or 0) > 0 and (theirs[metric] or 0) > 0
    ]


def _number(*candidates: Any) -> float | None:
    """The first that is a finite number."""
    return next(
        (float(value) for value in candidates if pd.notna(value) and np.isfinite(value)), None
    )
