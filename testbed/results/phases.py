"""What a cell reached between the changes of its schedule, against one who had chosen anew after each of them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

_MOST = 32
"""A schedule with more changes has no phases, as in a ramp or a trace."""


def phases(steps: pd.DataFrame, lost: pd.Series, events: pd.DataFrame) -> list[dict[str, float | None]]:
    """{"from_s", "to_s", "samples_per_s", "lost_energy"} of each; none without a schedule. A step counts where its time falls.

    lost: share of the gradients' energy that each of the ``steps`` did not send.
    """
    changes = events.loc[events["kind"] == "schedule", "planned_s"]
    end_s = steps["t_s"].max()
    inner = sorted(set(changes[(changes > 0) & (changes < end_s)]))
    if not 0 < len(inner) <= _MOST:
        return []
    found: list[dict[str, float | None]] = []
    for from_s, to_s in itertools.pairwise([0.0, *inner, end_s]):
        inside_s = steps["t_s"].clip(upper=to_s) - (steps["t_s"] - steps["step_s"]).clip(lower=from_s)
        weight = (inside_s / steps["step_s"]).clip(lower=0)
        known = weight.where(lost.notna(), 0)
        found.append(
            {
                "from_s": float(from_s),
                "to_s": float(to_s),
                "samples_per_s": float((weight * steps["samples"]).sum() / (to_s - from_s)),
                "lost_energy": float((known * lost.fillna(0)).sum() / known.sum()) if known.sum() else None,
            }
        )
    return found


def oracle(own: Sequence[Mapping[str, Any]], rivals: Sequence[Sequence[Mapping[str, Any]]]) -> float | None:
    """Samples of the best rival of each phase, if it lost no more energy there, else the own ones, divided by the own ones."""
    ours = best = 0.0
    for number, phase in enumerate(own):
        length_s, most = phase["to_s"] - phase["from_s"], phase["samples_per_s"]
        ours += length_s * most
        for rival in (their[number] for their in rivals if number < len(their)):
            if None not in (rival["lost_energy"], phase["lost_energy"]) and rival["lost_energy"] <= phase["lost_energy"]:
                most = max(most, rival["samples_per_s"])
        best += length_s * most
    return best / ours if ours else None
