"""Is netsense as good as the best fixed scheme in hindsight, at every bandwidth?

    python experiments/bench/regret.py [RUN | SPEC]

RUN: a run directory of regret.yaml or regret-wan.yaml. SPEC: which of the two is run first (15 to
20 minutes); regret.yaml if nothing is named. Prints the median step time of every method at every
rate or delay, over the second half of its steps, the share of the gradients' energy that it did not
send, and the regret of netsense: its step time against that of the best method that loses no more
energy than netsense did. Of cells that all train for the same time also the accuracy at their end,
which says who made most progress, without a model of what lost energy costs.

Plain all-reduce loses none; what bfloat16 loses by rounding is not recorded, and taken for its
bound, 2**-16.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

import testbed
from testbed.results.summary import lost_energy


def run_it(spec: Path, parent: Path) -> Path:
    """Run the spec; returns the run directory."""
    subprocess.run(
        [sys.executable, "-m", "testbed.cli", "run", str(spec), "--out", str(parent)], check=False
    )
    return max(parent.glob("regret-*"), key=lambda path: path.stat().st_mtime)


def measured(run: testbed.Run) -> pd.DataFrame:
    """Means over all seeds, by condition (the value of the matrix) and method: step_s, lost,
    scheme, valid, accuracy."""
    valid = {cell["cell"]: cell["valid"] for cell in run.summary["cells"]}
    rows = []
    for cell in run.cells.to_dict("records"):
        steps = run.steps[run.steps["cell"] == cell["cell"]]
        steps = steps[steps["step"] >= steps["step"].max() // 2]
        rows.append(
            {
                "condition": next(iter(cell["overrides"].values())),
                "method": cell["method"],
                # The ranks leave a step together, but for the last hop: what counts is the time of
                # all.
                "step_s": steps.groupby("step")["step_s"].mean().median(),
                "lost": lost_energy(steps),
                "scheme": steps["scheme"].mode().get(0, ""),
                "valid": valid[cell["cell"]],
                "accuracy": cell["final_accuracy"],
            }
        )
    means = {
        "step_s": "mean",
        "lost": "mean",
        "scheme": lambda names: names.mode()[0],
        "valid": "all",
        "accuracy": "mean",
    }
    return (
        pd.DataFrame(rows).groupby(["condition", "method"], sort=False, as_index=False).agg(means)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path(__file__).with_suffix(".yaml"))
    given = parser.parse_args().run
    directory = given if given.is_dir() else run_it(given, Path("runs"))
    run = testbed.load_run(directory)
    if run.summary is None:
        sys.exit(f"{directory} has no results yet; finish it: testbed run --resume {directory}")
    cells = measured(run)
    rates = list(dict.fromkeys(cells["condition"]))
    table = Table("ms a step (energy lost)", *map(str, rates))
    for method, mine in cells.groupby("method", sort=False):
        by_rate = mine.set_index("condition")
        table.add_row(
            method,
            *(
                f"{1e3 * by_rate.at[rate, 'step_s']:.0f} ({by_rate.at[rate, 'lost']:.2g})"
                + ("" if by_rate.at[rate, "valid"] else " invalid")
                for rate in rates
            ),
        )
    worst = 0.0
    regrets, choices = [], []
    for rate in rates:
        here = cells[cells["condition"] == rate]
        netsense = here[here["method"] == "netsense"].iloc[0]
        others = here[(here["method"] != "netsense") & (here["lost"] <= netsense["lost"])]
        best = others.loc[others["step_s"].idxmin()]
        regret = netsense["step_s"] / best["step_s"]
        worst = max(worst, regret)
        regrets.append(f"{regret:.3f} ({best['method']})")
        choices.append(netsense["scheme"])
    table.add_section()
    table.add_row("netsense chose", *choices)
    table.add_row("regret (best other)", *regrets)
    Console(width=200).print(table)
    if set(run.spec["workload"]["stop"]) == {"seconds"}:
        means = cells.pivot(index="method", columns="condition", values="accuracy")
        table = Table(f"accuracy after {run.spec['workload']['stop']['seconds']}", *map(str, rates))
        for method, row in means.iterrows():
            table.add_row(str(method), *(f"{row[rate]:.1%}" for rate in rates))
        Console(width=200).print(table)
    print(f"worst regret {worst:.3f}")


if __name__ == "__main__":
    main()
