"""Can the emulation of a cell be believed? Each check is a function from tables to problems, one line of text each.

No problem, valid cell. A check that cannot be made (nothing was recorded) is a problem, never a pass.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from testbed.links.qdiscs import burst_bytes

LATE_S = 0.05
"""A change of a link may be applied this much after its time."""
GAP_S = 1.0
"""The longest time without a sample of a link; samples are due every 0.1 s, so a gap means a starved host."""
STALL_S = 1.0
"""The longest time in which a link may send nothing while packets wait in its queue."""
WINDOW_S = 1.0
FOREIGN_SHARE = 0.25
"""Of all processors' time. It then takes up to 1 / (1 - 0.25) times as long to compute."""
BUSY_SHARE = 0.95
"""From this share on no processor counts as idle."""
PACE_EXCESS = 0.1
LOST_SHARE = 1e-3
"""Of the packets that links carried, so many may have been lost between them; TCP slows down for every one."""
EXCESS = 0.05
"""A link may carry one bucket of its shaper plus this share more than its limit over any ``WINDOW_S``."""


def cell_problems(cell: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], warmup: int = 0) -> list[str]:
    """All that speaks against a cell. ``cell`` is a row of ``Run.cells``; the tables, by name, hold the rows of that cell.

    warmup: so many steps may take any time, as nothing is told of them.
    """
    steps, links, events = tables["steps"], tables["links"], tables["events"]
    t_end_s = cell["t_end_s"] if pd.notna(cell["t_end_s"]) else steps["t_s"].max() if len(steps) else 0.0
    return [
        *end_problems(cell),
        *([] if len(steps) else ["no step was recorded"]),
        *([f"none of its steps came after the warm-up of {warmup}"] if steps["step"].max() < warmup else []),
        *(uncalibrated_links(tables["calibration"]) if cell["calibrate"] else []),
        *late_changes(events),
        *unverified_changes(events),
        *telemetry_gaps(links, float(t_end_s)),
        *stalls(links),
        *excess_rates(links, events),
        *busy_host(tables["host"]),
        *lost_between_links(tables["host"], links),
        *missed_pace(steps[steps["step"] >= warmup], (cell["workload"].get("compute") or {})),
    ]


def busy_host(host: pd.DataFrame) -> list[str]:
    """Whether other programs took more than ``FOREIGN_SHARE`` of the machine, counting only times when nothing was idle.

    A cell whose own computing fills the processors is slow, but honestly so; and what others use of a machine that has
    processors to spare takes nothing away.
    """
    if host.empty:
        return ["the load of this machine was not recorded"]
    taken = host["cpu_foreign_share"].where(host["cpu_busy_share"] >= BUSY_SHARE, 0.0).mean()
    if taken <= FOREIGN_SHARE:
        return []
    waited = host["cpu_some_share"].mean()
    pressure = f" (programs waited for one in {100 * waited:.0f} % of the time)" if pd.notna(waited) else ""
    return [
        f"this machine was too busy: other programs took {100 * taken:.0f} % of its processors while none was idle{pressure}"
    ]


def lost_between_links(host: pd.DataFrame, links: pd.DataFrame) -> list[str]:
    """Whether the kernel dropped packets on their way from one link to the next, which no link was asked to do."""
    if host.empty or links.empty:
        return []  # that they are missing is a problem already
    lost = host["softnet_drops"].max()
    carried = (links.groupby(["link", "direction"])["packets"].agg(["min", "max"]).diff(axis=1)["max"]).sum()
    if not lost > LOST_SHARE * carried:
        return []
    return [
        f"this machine dropped {lost:.0f} packets between links, of {carried:.0f} that they carried;"
        " give it longer queues: sysctl -w net.core.netdev_max_backlog=10000"
    ]


def missed_pace(steps: pd.DataFrame, compute: Mapping[str, Any] | str) -> list[str]:
    """Whether steps took longer to compute than the pace that was to hide this machine's speed; half of them may.

    compute: as in cell.json, "real", {"pace_s": seconds, "factors": [of each rank]} or the same with "emulate_s".
    """
    if steps.empty or not isinstance(compute, Mapping):
        return []
    pace_s = compute.get("pace_s") or compute.get("emulate_s")
    factors = compute.get("factors") or []
    slower = steps["rank"].map(dict(enumerate(factors))).fillna(1.0).astype(float)
    compute_s = (steps["compute_s"] / slower).median()
    if not pace_s or compute_s <= pace_s * (1 + PACE_EXCESS):
        return []
    return [
        f"the pace of {1e3 * pace_s:g} ms was not held: half of the steps computed for {1e3 * compute_s:.0f} ms and more;"
        " this machine is too slow for it, or too busy"
    ]


def replicas_identical(cell: Mapping[str, Any]) -> bool | None:
    """Whether all ranks ended with the same parameters; None if not all of them reported theirs."""
    hashes = cell["parameters"]
    return len(set(hashes.values())) == 1 if hashes and len(hashes) == cell["workers"] else None


def end_problems(cell: Mapping[str, Any]) -> list[str]:
    """How the cell ended: what the orchestrator noted, an end that was none, replicas that differ."""
    problems = list(cell["problems"])
    match cell["status"]:
        case "done":
            if replicas_identical(cell) is None:
                problems.append("not every rank reported its final parameters")
        case "unfinished":
            problems.append("did not finish: it is still running or was killed")
        case status:
            problems = problems or [f"the cell {'was interrupted' if status == 'interrupted' else status}"]
    if replicas_identical(cell) is False:
        problems.append("the replicas ended with different parameters")
    return problems


def uncalibrated_links(calibration: pd.DataFrame) -> list[str]:
    """What missed its tolerance before t = 0 in every attempt; of several attempts the best counts."""
    if calibration.empty:
        return ["the links were not calibrated before the start"]
    error = ((calibration["measured"] - calibration["expected"]).abs() / calibration["tolerance"]).fillna(np.inf)
    subjects = [calibration[column] for column in ("quantity", "link", "direction", "source", "target")]
    best = calibration.loc[error.groupby(subjects).idxmin()]
    missed = best[~best["within"]]
    if missed.empty:
        return []
    worst = missed.loc[error[missed.index].idxmax()]
    if worst["quantity"] == "rate":
        what, unit, scale = f"{worst['link']} {worst['direction']} carried", "Mbit/s", 1e-6
    else:
        what, unit, scale = f"the RTT from {worst['source']} to {worst['target']} was", "ms", 1e3
    found = f"{worst['measured'] * scale:.4g}" if pd.notna(worst["measured"]) else "nothing that could be measured"
    return [
        f"{len(missed)} of {len(best)} calibrated rates and delays are off"
        f" (the worst: {what} {found} instead of {worst['expected'] * scale:.4g} {unit})"
    ]


def late_changes(events: pd.DataFrame) -> list[str]:
    """Scheduled changes and flows that came more than ``LATE_S`` after their time, or not at all."""
    due = events[events["kind"].isin(["schedule", "traffic"])]
    late_s = (due["applied_s"] - due["planned_s"]).fillna(np.inf)
    late = late_s > LATE_S
    if not late.any():
        return []
    worst = due.loc[late_s.idxmax()]
    by = "never applied" if np.isinf(late_s.max()) else f"{late_s.max() * 1e3:.0f} ms late"
    return [
        f"{late.sum()} of {len(due)} scheduled changes came late"
        f" (the worst: {worst['link']} at {worst['planned_s']:.4g} s, {by})"
    ]


def unverified_changes(events: pd.DataFrame) -> list[str]:
    """Changes after which the kernel did not report the state that was asked for."""
    unverified = events[~events["verified"]]
    if unverified.empty:
        return []
    links = ", ".join(dict.fromkeys(unverified["link"]))
    return [f"the kernel did not confirm {len(unverified)} of {len(events)} link changes ({links})"]


def telemetry_gaps(links: pd.DataFrame, t_end_s: float) -> list[str]:
    """The longest gap between samples of each direction of each link over 0…``t_end_s``, if above ``GAP_S``."""
    if links.empty:
        return ["no telemetry of any link was recorded"]
    problems = []
    for (link, direction), samples in links.groupby(["link", "direction"]):
        times_s = np.sort(np.concatenate([[0.0, t_end_s], samples["t_s"]]))
        gaps_s = np.diff(times_s)
        widest = int(np.argmax(gaps_s))
        if gaps_s[widest] > GAP_S:
            gap = f"no telemetry for {gaps_s[widest]:.2g} s from {times_s[widest]:.4g} s on"
            problems.append(f"{link} {direction}: {gap}")
    return problems


def stalls(links: pd.DataFrame) -> list[str]:
    """Directions that sent nothing although their queue was never empty: a shaper that is stuck.

    For longer than ``STALL_S`` and the time that one bucket, the largest packet there can be, takes at the rate in force: at
    8 kbit/s that alone is 12 s.
    """
    problems = []
    for (link, direction), samples in links.sort_values("t_s").groupby(["link", "direction"]):
        waiting = (samples["backlog_bytes"] > 0) & (samples["bytes"].diff() == 0)
        stuck = samples[waiting].groupby((~waiting).cumsum()[waiting])["t_s"]
        lengths_s = (stuck.max() - stuck.min()) if len(stuck) else pd.Series(dtype=float)
        fastest_bps = samples[waiting].groupby((~waiting).cumsum()[waiting])["rate_bps"].max()
        too_long = lengths_s[lengths_s > STALL_S + fastest_bps.map(bucket_s).reindex(lengths_s.index)]
        if len(too_long):
            start_s = stuck.min()[too_long.idxmax()]
            problems.append(
                f"{link} {direction}: stood still for {too_long.max():.2g} s from {start_s:.4g} s on with packets in its queue"
            )
    return problems


def bucket_s(rate_bps: float) -> float:
    """Seconds that one bucket of the shaper takes at a rate in bits/s; 0 where there is no limit (NaN)."""
    return 0.0 if np.isnan(rate_bps) else 8 * burst_bytes(int(rate_bps)) / rate_bps


def excess_rates(links: pd.DataFrame, events: pd.DataFrame) -> list[str]:
    """Directions that carried more than their limit over a window of ``WINDOW_S`` with a constant limit."""
    problems = []
    for (link, direction), samples in links.groupby(["link", "direction"]):
        changes_s = events.loc[events["link"] == link, "applied_s"].to_numpy()
        if excess := worst_excess(samples, changes_s):
            start_s, carried_bps, limit_bps = excess
            problems.append(
                f"{link} {direction}: carried {carried_bps / 1e6:.4g} Mbit/s from {start_s:.4g} s on,"
                f" above its limit of {limit_bps / 1e6:.4g} Mbit/s"
            )
    return problems


def worst_excess(samples: pd.DataFrame, changes_s: np.ndarray) -> tuple[float, float, float] | None:
    """The window that breaks the limit most: (start in s, carried bits/s, limit in bits/s); None if none does.

    samples: rows of links of one direction of one link. changes_s: when its limit was changed, in s.
    A window with a change inside is left out: what may pass in it depends on the instant of the change.
    """
    samples = samples.sort_values("t_s")
    t_s, rate_bps = samples["t_s"].to_numpy(), samples["rate_bps"].to_numpy()
    last = np.searchsorted(t_s, t_s + WINDOW_S)
    first = np.flatnonzero(last < len(t_s))
    last = last[first]

    limit_of = np.cumsum(np.diff(rate_bps, prepend=rate_bps[:1]) != 0)  # number of the limit in force; NaN ≠ NaN
    changes = np.searchsorted(np.sort(changes_s), t_s, side="right")
    constant = (limit_of[first] == limit_of[last]) & (changes[first] == changes[last])
    first, last = first[constant], last[constant]

    span_s = t_s[last] - t_s[first]
    carried_bits = 8 * (samples["bytes"].to_numpy()[last] - samples["bytes"].to_numpy()[first])
    bucket_bits = 8 * np.array([burst_bytes(int(rate)) for rate in rate_bps[first]])
    excess = (carried_bits - bucket_bits) / (rate_bps[first] * span_s) - 1
    if not len(excess) or not excess.max() > EXCESS:
        return None
    worst = int(np.argmax(excess))
    return float(t_s[first[worst]]), float(carried_bits[worst] / span_s[worst]), float(rate_bps[first[worst]])
