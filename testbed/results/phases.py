"""What a cell reached between the changes of its schedule, against one who had chosen anew after
each of them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

_MOST = 32
"""A schedule with more changes has no phases, as in a ramp or a trace."""


def phases(
    steps: pd.DataFrame, lost: pd.Series, events: pd.DataFrame
) -> list[dict[str, float | None]]:
    """{"from_s", "to_s", "samples_per_s", "lost_energy"} of each; none without a schedule. A step
    counts where its time falls.

    steps: without those of the warm-up. lost: share of the gradients' energy that each of them did
    not send.
    """
    changes = events.loc[events["kind"] == "schedule", "planned_s"]
    began_s, end_s = steps["t_s"] - steps["step_s"], steps["t_s"].max()
    inner = sorted(set(changes[(changes > began_s.min()) & (changes < end_s)]))
    if not 0 < len(inner) <= _MOST:
        return []
    found: list[dict[str, float | None]] = []
    for from_s, to_s in itertools.pairwise([began_s.min(), *inner, end_s]):
        inside_s = steps["t_s"].clip(upper=to_s) - began_s.clip(lower=from_s)
        weight = (inside_s / steps["step_s"]).clip(lower=0)
        known = weight.where(lost.notna(), 0)
        samples = (weight * steps["samples"]).sum(min_count=1)
        found.append(
            {
                "from_s": float(from_s),
                "to_s": float(to_s),
                "samples_per_s": float(samples / (to_s - from_s)) if pd.notna(samples) else None,
                "lost_energy": (
                    float((known * lost.fillna(0)).sum() / known.sum()) if known.sum() else None
                ),
            }
        )
    return found


def oracle(
    own: Sequence[Mapping[str, Any]], rivals: Sequence[Sequence[Mapping[str, Any]]]
) -> float | None:
    """Samples of the best rival of each phase, in which each had the same time, divided by the own
    ones; None if not known."""
    ours = best = 0.0
    for number, phase in enumerate(own):
        theirs = [rival[number]["samples_per_s"] for rival in rivals if number < len(rival)]
        if not theirs or None in (*theirs, phase["samples_per_s"]):
            return None
        ours += (phase["to_s"] - phase["from_s"]) * phase["samples_per_s"]
        best += (phase["to_s"] - phase["from_s"]) * max(theirs)
    return best / ours if ours else None
