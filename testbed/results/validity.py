"""Can the emulation of a cell be believed? Each check is a function from tables to problems, one
line of text each.

No problem, valid cell. A check that cannot be made (nothing was recorded) is a problem, never a
pass.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd

from testbed.protocol import ranks_per_worker, worker_name
from testbed.results.tolerances import LATE_S, STOPPED_SHARE, TAKEN_SHARE, taken_share

GAP_S = 1.0
"""The longest time without a sample of a link; samples are due every 0.1 s, so a gap means a
starved host."""
UNKNOWN_SHARE = 0.1
"""For so much of a cell the load of a machine may be unknown."""
WINDOW_S = 1.0
"""What a link carries is judged over every window of this length, and over longer ones."""
PACE_EXCESS = 0.1
LOST_SHARE = 1e-3
"""Of the packets that links carried, so many may have been lost between them; TCP slows down for
every one."""
EXCESS = 0.02
"""A link may carry one bucket of its shaper plus this share more than its limit over any window."""
SHORTFALL = 0.05
"""A link in whose queue packets wait may carry one bucket plus this share less than its limit over
any window."""
CHANCE = 1e-6
"""An honest link is blamed for a shortfall in fewer than so many windows: its queue may have been
empty between the samples."""
CLAIMED, UNCLAIMED = 0.02, 0.1
"""What a rank says it sent may be so much more than what its link carried, or so much less."""
WHEN = r"(?:/\d+)?(?:\+\d+)?$"
"""End of a scheme of netsense: steps from one exchange to the next, and the delay after which its
mean is applied."""
FEW_SAMPLES = 10
"""So many samples of a link may be of an uncertain time: a second of them."""
LATE_FRAMES = 0.01
"""So many frames of the delay line may leave late."""


def cell_problems(
    cell: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], warmup: int = 0
) -> list[str]:
    """All that speaks against a cell. ``cell`` is a row of ``Run.cells``; the tables, by name, hold
    the rows of that cell.

    warmup: so many steps may take any time, as nothing is told of them.
    """
    steps, links, events = tables["steps"], tables["links"], tables["events"]
    ended = end_problems(cell)
    if ended and steps.empty and links.empty:
        return ended  # it ended before it began: that nothing was recorded says nothing more
    sides = directions(links, events)
    t_end_s = (
        cell["t_end_s"] if pd.notna(cell["t_end_s"]) else steps["t_s"].max() if len(steps) else 0.0
    )
    return [
        *ended,
        *([] if len(steps) else ["no step was recorded"]),
        *damaged_steps(steps, float(t_end_s)),
        *(missing_steps(cell, steps) if tables["failures"].empty else []),
        *(
            [f"none of its steps came after the warm-up of {warmup}"]
            if steps["step"].max() < warmup
            else []
        ),
        *(uncalibrated_links(tables["calibration"], tables["host"]) if cell["calibrate"] else []),
        *manual_changes(events),
        *late_changes(events),
        *unplaced_changes(events),
        *unplaced_samples(links, tables["host"]),
        *late_kills(tables["failures"]),
        *unverified_changes(events),
        *unrecorded_changes(sides),
        *telemetry_gaps(links, events, float(t_end_s)),
        *excesses(sides),
        *shortfalls(sides),
        *early_drops(sides),
        *busy_host(tables["host"]),
        *unknown_load(tables["host"], float(t_end_s)),
        *lost_between_links(tables["host"], links, events),
        *delay_line(tables["delayline"]),
        *missed_pace(steps[steps["step"] >= warmup], (cell["workload"].get("compute") or {})),
        # What was sent in a step that a failure cut short, nobody has recorded.
        *(
            misstated_payloads(cell, steps, links, tables["traffic"])
            if tables["failures"].empty
            else []
        ),
    ]


def busy_host(host: pd.DataFrame) -> list[str]:
    """Whether other programs took more than ``TAKEN_SHARE`` of the time of a process of the cell
    (``taken_share``), or one of these was stopped.

    A cell whose own computing fills the processors is slow, but honestly so; and what others use of
    a machine that has processors to spare takes nothing away.
    """
    if host.empty:
        return ["the load of this machine was not recorded"]
    problems = []
    for node, rows in _loads(host):
        if rows.empty:
            problems.append(
                f"the load of the machine of {node} was not recorded by all of them together"
            )
            continue
        where = f"node {node}" if node else "this machine"
        if rows[["cpu_busy_share", "cpu_foreign_share"]].isna().all().any():
            problems.append(f"the load of {where} was not recorded")
            continue
        share = float(np.mean([taken_share(row) for row in rows.to_dict("records")]))
        if share > TAKEN_SHARE:
            problems.append(
                f"{where} was too busy: other programs took {100 * share:.0f} % of the time of a"
                f" process of the cell, and {100 * rows['cpu_foreign_share'].mean():.0f} % of the"
                " processors"
            )
        if (share := rows["stopped"].mean()) > STOPPED_SHARE:
            problems.append(
                f"on {where} a process of the cell stood still for {100 * share:.0f} % of the time,"
                " stopped by a signal"
            )
    return problems


def unknown_load(host: pd.DataFrame, t_end_s: float) -> list[str]:
    """Whether the load of a node is known for less of 0…``t_end_s`` than can be judged by."""
    problems = []
    for node, rows in host.groupby("node"):
        _, gaps_s = _gaps(rows["t_s"], t_end_s)
        unknown_s = gaps_s[gaps_s > GAP_S].sum()
        if unknown_s > UNKNOWN_SHARE * t_end_s:
            where = f"node {node}" if node else "this machine"
            problems.append(
                f"the load of {where} was not recorded for {unknown_s:.2g} s of {t_end_s:.4g} s"
            )
    return problems


def _gaps(t_s: "pd.Series[float]", t_end_s: float) -> tuple[np.ndarray, np.ndarray]:
    """From when on there was no sample in 0…``t_end_s``, and for how long."""
    times_s = np.sort(np.concatenate([[0.0, t_end_s], t_s]))
    return times_s[:-1], np.diff(times_s)


def _loads(host: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The load of each machine, with the names of its nodes. What one of these has started is not
    foreign to the others."""
    for _, rows in host.groupby("machine"):
        nodes = rows["node"].to_numpy()
        names = sorted(set(nodes))
        yield ", ".join(names), rows if len(names) < 2 else _together(rows, nodes)


def _together(rows: pd.DataFrame, nodes: np.ndarray) -> pd.DataFrame:
    """The load of one machine at the times of which all of its nodes tell."""
    slot = (rows["t_s"] // _SLOT_S).to_numpy()
    slots = rows.groupby([slot, nodes])[_SHARES].mean().groupby(level=0)
    load = slots.mean()[slots.size() == len(set(nodes))]
    others = (slots["cpu_own_share"].sum() - slots["cpu_own_share"].mean())[load.index]
    return load.assign(
        cpu_foreign_share=(load["cpu_foreign_share"] - others).clip(lower=0.0),
        # of any process, whichever node has started it
        **rows.groupby(slot)[["cpu_waited_share", "stopped"]].max(),
    )


_SHARES = ["cpu_some_share", "cpu_busy_share", "cpu_foreign_share", "cpu_own_share", "processors"]
_SLOT_S = 0.5
"""So close in time are samples of two nodes that are taken together; each is of the second before
it."""


def lost_between_links(host: pd.DataFrame, links: pd.DataFrame, events: pd.DataFrame) -> list[str]:
    """Whether packets were lost on their way from one link to the next, which no link was asked to
    do."""
    if host.empty or links.empty:
        return []  # that they are missing is a problem already
    lost = host.groupby(machines := host["machine"])["softnet_drops"].max().sum()
    carried = (
        links.groupby(["link", "direction"])["packets"].agg(["min", "max"]).diff(axis=1)["max"]
    ).sum()
    if lost > LOST_SHARE * carried:
        where, longer = (
            ("this machine", "it") if len(set(machines)) < 2 else ("the machines", "them")
        )
        return [
            f"{where} dropped {lost:.0f} packets between links, of {carried:.0f} that they carried;"
            f" give {longer} longer queues: sysctl -w net.core.netdev_max_backlog=10000"
        ]
    missing, sent = missing_bytes(links, events)
    if missing <= LOST_SHARE * sent + links["burst_bytes"].fillna(_LARGEST_PACKET_BYTES).max():
        return []
    return [
        f"at least {missing / 1e6:.3g} MB that hosts sent came to no other link, of"
        f" {sent / 1e6:.4g} MB"
    ]


def missing_bytes(links: pd.DataFrame, events: pd.DataFrame) -> tuple[float, float]:
    """(bytes that left hosts and then were lost between the links, at least; bytes that left
    hosts).

    What a host's up has carried must come to the down of a host: it was carried, waits, or was
    dropped or lost there or on a trunk, each as large as a packet can be. From some sample to
    another; what may have been under way at either is not missing. Frames that go to all hosts hide
    losses, but make none.
    """
    states = events.loc[events["kind"] != "traffic", "state"].unique().tolist()
    if links.empty or any('"connected": false' in state for state in states):
        return 0.0, 0.0  # a partition is asked to lose packets
    if links["lost"].isna().all() and any(
        share > 0 for state in states for share in _numbers(state, "share")
    ):
        return 0.0, 0.0  # an old run, of which it is not known how many were lost as asked
    delayed = [state for state in states if state.count('"delay_s": 0.0,') < len(("down", "up"))]
    delays_s = [
        sum(_numbers(state, "delay_s")) + 4 * sum(_numbers(state, "jitter_s")) for state in delayed
    ]
    under_way_s = 2 * max(delays_s, default=0.0)  # over a trunk and a link
    is_host = links["link"].str.fullmatch(r"(w|bg)\d+")
    up, down = (links["direction"] == way for way in ("up", "down"))
    # No packet that comes to a queue is larger than the bucket.
    largest = (
        links.groupby(["link", "direction"])["burst_bytes"]
        .transform("max")
        .fillna(_LARGEST_PACKET_BYTES)
    )
    amounts = pd.DataFrame(
        {
            "t_s": links["t_s"],
            "sent": links["bytes"].where(is_host & up, 0.0),
            "arrived": (
                links["bytes"].where(is_host & down, 0.0)
                + links["backlog_bytes"].where(~(is_host & up), 0.0)
            ),
            "spoilt": (
                largest * (links["drops"].where(~(is_host & up), 0.0) + links["lost"].fillna(0.0))
            ),
        }
    )
    # each reads all of its links at the same times
    machine = links.groupby("link")["t_s"].transform("min")
    if machine.nunique() > 1:
        return _missing_between_machines(amounts, machine, under_way_s)
    samples = amounts.groupby("t_s")
    # the last one of a killed cell may lack links
    total = samples.sum()[samples.size() == samples.size().max()]
    t_s, sent = total.index.to_numpy(), total["sent"].to_numpy()
    accounted = (total["arrived"] + total["spoilt"]).to_numpy()
    at_first = np.minimum.accumulate(np.interp(t_s + _READING_S, t_s, sent) - accounted)
    at_last = np.interp(t_s - under_way_s - _READING_S, t_s, sent) - accounted
    return float((_lasting(at_last, t_s) - at_first).max()), float(sent[-1] - sent[0])


def _lasting(missing: np.ndarray, t_s: np.ndarray) -> np.ndarray:
    """What is still missing so much later, or at the end: a processor that stands still keeps
    packets between two links."""
    until = np.searchsorted(t_s, t_s + _STANDSTILL_S, side="right")
    return np.array([missing[first:last].min() for first, last in enumerate(until)])


def _missing_between_machines(
    amounts: pd.DataFrame, machine: "pd.Series[float]", under_way_s: float
) -> tuple[float, float]:
    """As ``missing_bytes``, where machines read their links at times of their own.

    What has been sent and what has come only grows, so at any time it lies between the sample
    before and the one after.
    """
    grid_s = np.unique(amounts["t_s"].to_numpy())
    at_first, at_last, sent = np.zeros(len(grid_s)), np.zeros(len(grid_s)), 0.0
    for _, rows in amounts.groupby(machine):
        samples = rows.groupby("t_s")
        total = samples.sum()[samples.size() == samples.size().max()]
        t_s, left = total.index.to_numpy(), total["sent"].to_numpy()
        accounted = (total["arrived"] + total["spoilt"]).to_numpy()
        low, high = np.concatenate([[-np.inf], left]), np.concatenate([left, [np.inf]])
        came_low, came_high = (
            np.concatenate([[-np.inf], accounted]),
            np.concatenate([accounted, [np.inf]]),
        )
        at_first += (
            high[np.searchsorted(t_s, grid_s + _READING_S)]
            - came_low[np.searchsorted(t_s, grid_s, side="right")]
        )
        before_s = grid_s - under_way_s - _READING_S
        at_last += (
            low[np.searchsorted(t_s, before_s, side="right")]
            - came_high[np.searchsorted(t_s, grid_s)]
        )
        sent += float(left[-1] - left[0])
    lasting = _lasting(at_last, grid_s)
    return float(np.nan_to_num((lasting - np.minimum.accumulate(at_first)).max(), neginf=0.0)), sent


_STANDSTILL_S = 1.0
"""A processor may stand still for so long, as in a virtual machine whose host is busy."""
_READING_S = 0.05
"""Reading the counters of all links takes some milliseconds, on a busy machine more."""
_LARGEST_PACKET_BYTES = 1 << 16


def delay_line(samples: pd.DataFrame) -> list[str]:
    """Whether the program that delays packets where the kernel cannot kept up."""
    if samples.empty:
        return []
    # What was counted before the first sample was calibration.
    total = samples.sort_values("t_s")[["frames", "late", "overflowed"]]
    last = total.iloc[-1] - total.iloc[0]
    worst = f"by up to {1e3 * samples['latest_s'].max():.3g} ms"
    problems = []
    if last["late"] > LATE_FRAMES * last["frames"]:
        share = 100 * last["late"] / last["frames"]
        problems.append(
            f"{last['late']:.0f} of {last['frames']:.0f} frames ({share:.2g} %) left the delay line"
            f" late, {worst}"
        )
    if last["overflowed"]:
        problems.append(
            f"the delay line had no room for {last['overflowed']:.0f} frames, and was late {worst}"
        )
    return problems


def missed_pace(steps: pd.DataFrame, compute: Mapping[str, Any] | str) -> list[str]:
    """Whether a rank took longer to compute than the pace that was to hide this machine's speed, by
    so much that its steps took ``PACE_EXCESS`` longer; half of them may.

    compute: as in cell.json: "real", or {"pace_s": seconds, "factors": [of each rank], "slow":
    [[rank, from_s, to_s, factor]]}, or the same with "emulate_s".
    """
    if not isinstance(compute, Mapping):
        return []
    pace_s, factors = (
        compute.get("pace_s") or compute.get("emulate_s"),
        compute.get("factors") or [],
    )
    own_s = (
        pace_s * steps["rank"].map(dict(enumerate(factors))).fillna(1.0).astype(float)
        if pace_s
        else steps["compute_s"]
    )
    began_s = steps["t_s"] - steps["step_s"]
    for rank, from_s, to_s, factor in compute.get("slow") or []:
        slow = (
            (steps["rank"] == rank)
            & (began_s >= from_s)
            & (began_s < (math.inf if to_s is None else to_s))
        )
        own_s = own_s.where(~slow, factor * own_s)
    rows = steps[["rank", "compute_s", "step_s"]].assign(
        own_s=own_s, excess_s=steps["compute_s"] - own_s
    )
    medians = rows.groupby("rank").median().dropna()
    if not pace_s or medians.empty:
        return []
    compute_s, own_s, excess_s = medians["compute_s"], medians["own_s"], medians["excess_s"]
    step_s = medians[["compute_s", "step_s"]].max(axis=1)
    longer = excess_s / (step_s - excess_s)  # where most of a step is exchange, it hardly matters
    rank = longer.idxmax()
    if longer[rank] <= PACE_EXCESS:
        return []
    return [
        f"the pace of {1e3 * own_s[rank]:g} ms was not held: half of the steps of rank {rank}"
        f" computed for {1e3 * compute_s[rank]:.0f} ms and more; this machine is too slow for it,"
        " or too busy"
    ]


def misstated_payloads(
    cell: Mapping[str, Any], steps: pd.DataFrame, links: pd.DataFrame, traffic: pd.DataFrame
) -> list[str]:
    """Ranks that say they sent more than the link of their host carried, or much less, over the
    steps that are done.

    A rank says what its collectives send by their cost formulas; what TCP carried is known from the
    counters. Formulas are means over the ranks, a collective has headers of its own, and DDP sends
    the buffers of a model, too, from rank 0; for all of which there is an allowance. What several
    ranks of a host say is added up, as far as it leaves the host. That a link carried too much is
    said only of hosts without a competing flow, and not of a user's script, which may exchange what
    it likes.
    """
    per_host = ranks_per_worker(cell)
    ranks = cell["workers"] * per_host
    more: dict[str, tuple[float, float]] = {}
    less: dict[str, tuple[float, float]] = {}
    ups = links[links["direction"] == "up"].sort_values("t_s").groupby("link")
    for number, rows in steps.groupby(steps["rank"] // per_host):
        host = worker_name(number)
        if host not in ups.groups:
            continue
        up = ups.get_group(host)
        t_s, carried = (
            up["t_s"].to_numpy(),
            (up["bytes"] - _HEADERS_BYTES * up["packets"]).to_numpy(),
        )
        done = rows[rows["t_s"] <= t_s[-1]]
        # Of a step that began before the first sample, some may have been sent before it, too.
        whole = done[done["t_s"] - done["step_s"] >= t_s[0]]
        after = int(np.searchsorted(t_s, done["t_s"].max())) if len(done) else 0
        # When a rank's step ends, its sockets may still hold some of what it has sent, up to
        # megabytes.
        claimed, sent = _leaving(whole, cell["workers"], per_host)[0], carried[-1] - carried[0]
        if claimed > (1 + CLAIMED) * sent + _STEP_BYTES * ranks * len(whole):
            more[host] = claimed, sent
        if (
            host in {*traffic["from"], *traffic["to"]}
            or not cell["workload"]
            or done["retransmits"].isna().all()
        ):
            continue
        # What was sent after the last step was none of these steps.
        sent = (
            carried[max(after - 1, 0)]
            - carried[0]
            - _SEGMENT_BYTES * done.groupby("rank")["retransmits"].max().sum()
        )
        claimed = _leaving(done, cell["workers"], per_host)[1]
        allowance = _STEP_BYTES * ranks * len(done) + BUFFERS * done["dense_bytes"].sum()
        if sent > (1 + UNCLAIMED) * claimed + allowance:
            less[host] = claimed, sent

    def who(hosts: int) -> str:
        return (
            f"{hosts} of {ranks} ranks"
            if per_host == 1
            else f"the ranks of {hosts} of {cell['workers']} hosts"
        )

    problems = []
    for found, words in ((more, "more"), (less, "much less")):
        if found:
            host = max(found, key=lambda one: abs(found[one][0] - found[one][1]))
            claimed, sent = found[host]
            problems.append(
                f"{who(len(found))} say they sent {words} than their links carried"
                f" (the worst: {host}, {claimed / 1e6:.4g} MB instead of {sent / 1e6:.4g} MB)"
            )
    return problems


def _leaving(steps: pd.DataFrame, hosts: int, per_host: int) -> tuple[float, float]:
    """(least, most) bytes that leave a host, of those that its ranks say they have sent.

    Of a ring only one of its ranks sends to another host, of other collectives at least as much
    leaves it. Where the ranks of a host add up among themselves ("host-"), that is not said, and
    all else leaves it.
    """
    said = steps["payload_bytes"]
    if per_host == 1:
        return said.sum(), said.sum()
    if hosts == 1:
        return 0.0, 0.0
    plan = steps["scheme"].str.replace(WHEN, "", regex=True)
    by_host = plan.str.startswith("host-")
    ring = ~by_host & (plan.str.endswith("-ring") | (plan == "allreduce"))
    return said.where(by_host, said / per_host).sum(), said.where(~ring, said / per_host).sum()


_HEADERS_BYTES, _SEGMENT_BYTES = 66, 1448
"""Ethernet, IP and TCP with timestamps; and what else fits into a frame."""
_STEP_BYTES = 4096
"""For every rank and step: headers of collectives (of 4 ranks each sent 3.3 kB, with PowerSGD 10),
and uneven chunks."""
BUFFERS = 0.02
"""Of what all gradients would take, as much may go into buffers (running statistics of ResNet-18
from rank 0: 0.1 %)."""


def replicas_identical(cell: Mapping[str, Any]) -> bool | None:
    """Whether all ranks ended with the same parameters; None if not all of them reported theirs."""
    hashes = cell["parameters"]
    ranks = cell["workers"] * ranks_per_worker(cell)
    return len(set(hashes.values())) == 1 if hashes and len(hashes) == ranks else None


def end_problems(cell: Mapping[str, Any]) -> list[str]:
    """How the cell ended: what the orchestrator noted, an end that was none, replicas that
    differ."""
    problems = list(cell["problems"])
    match cell["status"]:
        case "done":
            if replicas_identical(cell) is None:
                problems.append("not every rank reported its final parameters")
        case "unfinished":
            problems.append("did not finish: it has not begun, is still running or was killed")
        case status:
            problems = problems or [
                f"the cell {'was interrupted' if status == 'interrupted' else status}"
            ]
    if replicas_identical(cell) is False:
        problems.append("the replicas ended with different parameters")
    return problems


def uncalibrated_links(calibration: pd.DataFrame, host: pd.DataFrame) -> list[str]:
    """What missed its tolerance before t = 0 in every attempt; of several attempts the best counts.

    Where a flow left a host as it should and less came to another one, something between them is
    the reason: over several nodes their network.
    """
    if calibration.empty:
        return ["the links were not calibrated before the start"]
    error = (
        (calibration["measured"] - calibration["expected"]).abs() / calibration["tolerance"]
    ).fillna(np.inf)
    subjects = [
        calibration[column] for column in ("quantity", "link", "direction", "source", "target")
    ]
    best = calibration.loc[error.groupby(subjects).idxmin()]
    missed = best[~best["within"]]
    if missed.empty:
        return []
    worst = missed.loc[error[missed.index].idxmax()]
    if worst["quantity"] == "rate":
        what, unit, scale = f"{worst['link']} {worst['direction']} carried", "Mbit/s", 1e-6
    else:
        what, unit, scale = f"the RTT from {worst['source']} to {worst['target']} was", "ms", 1e3
    found = (
        f"{worst['measured'] * scale:.4g}"
        if pd.notna(worst["measured"])
        else "nothing that could be measured"
    )
    reason = ""
    left = best[(best["link"] == worst["source"]) & (best["direction"] == "up") & best["within"]]
    less = worst["quantity"] == "rate" and worst["measured"] < worst["expected"]
    if less and len(left) and len(set(host["node"])) > 1:
        reason = (
            f"; {worst['source']} had sent as much as it may, so if they are on two nodes, the"
            " network between these is the limit, and not the shaper"
        )
    return [
        f"{len(missed)} of {len(best)} calibrated rates and delays are off"
        f" (the worst: {what} {found} instead of {worst['expected'] * scale:.4g} {unit}{reason})"
    ]


def manual_changes(events: pd.DataFrame) -> list[str]:
    """Changes by hand: what the cell shows is no evidence for its spec."""
    manual = events[events["kind"] == "manual"]
    if manual.empty:
        return []
    first = manual.loc[manual["applied_s"].idxmin()]
    times = manual["planned_s"].nunique()
    return [
        f"its links were changed by hand: {times} {'time' if times == 1 else 'times'},"
        f" first {first['link']} at {first['applied_s']:.4g} s"
    ]


def late_changes(events: pd.DataFrame) -> list[str]:
    """Scheduled changes and flows that came more than ``LATE_S`` after their time, or not at
    all."""
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


def unplaced_changes(events: pd.DataFrame) -> list[str]:
    """Changes and flows of which their machine's clock leaves open whether they came within
    ``LATE_S`` of their time."""
    due = events[events["kind"].isin(["initial", "schedule", "traffic"])]
    unsure_s = due["unsure_s"].astype("float64").fillna(0.0)
    off_s = (due["applied_s"] - due["planned_s"]).abs()
    unplaced = (unsure_s > 0) & (off_s <= LATE_S) & (off_s + unsure_s > LATE_S)
    if not unplaced.any():
        return []
    worst = unsure_s[unplaced].idxmax()
    return [
        f"{unplaced.sum()} of {len(due)} states of links and flows cannot be placed within"
        f" {1e3 * LATE_S:.0f} ms of their time: the clock of the machine of"
        f" {due.loc[worst, 'link']} was known only to {1e3 * unsure_s[worst]:.0f} ms"
    ]


def unplaced_samples(links: pd.DataFrame, host: pd.DataFrame) -> list[str]:
    """In a lab over several machines: links of which more than a few samples cannot be placed
    within ``LATE_S``.

    What a clock leaves unsure is in ``reading_s``, on both sides, and would widen what is tolerated
    of the link.
    """
    if not host["node"].ne("").any():
        return []
    wide = links[links["reading_s"].astype("float64") > 2 * LATE_S]
    samples = wide.groupby("link")["t_s"].nunique()
    if samples.empty or samples.max() <= FEW_SAMPLES:
        return []
    link = samples.idxmax()
    return [
        f"{samples[link]} samples of {link} cannot be placed within {1e3 * LATE_S:.0f} ms:"
        " the clock of its machine was not known well enough, or reading them took too long"
    ]


def late_kills(failures: pd.DataFrame) -> list[str]:
    """Workers that the schedule killed more than ``LATE_S`` after their time."""
    late_s = (failures["t_s"] - failures["planned_s"]).dropna()
    if late_s.empty or late_s.max() <= LATE_S:
        return []
    worst = failures.loc[late_s.idxmax()]
    return [
        f"{worst['worker']} was killed {late_s.max() * 1e3:.0f} ms after its time,"
        f" {worst['planned_s']:.4g} s"
    ]


def unrecorded_changes(sides: list["Direction"]) -> list[str]:
    """Links that had other limits than the recorded changes have set, for a second or more: some
    are missing."""
    unlike = [one for one in sides if one.unexplained > FEW_SAMPLES]
    if not unlike:
        return []
    worst = max(unlike, key=lambda one: one.unexplained)
    others = f", as did {len(unlike) - 1} other directions" if len(unlike) > 1 else ""
    return [
        f"changes of links are missing: {worst.unexplained} samples of {worst.name} found another"
        f" limit than the recorded ones have set{others}"
    ]


def unverified_changes(events: pd.DataFrame) -> list[str]:
    """Changes after which the kernel did not report the state that was asked for."""
    unverified = events[~events["verified"]]
    found = unverified[unverified["kind"] == "readback"]
    problems = [
        f"{link} was not as it had been set, from {rows['applied_s'].min():.4g} s on: something"
        " else changed it"
        for link, rows in found.groupby("link")
    ]
    changes, unverified = (
        events[events["kind"] != "readback"],
        unverified[unverified["kind"] != "readback"],
    )
    if len(unverified):
        links = ", ".join(dict.fromkeys(unverified["link"]))
        problems.append(
            f"the kernel did not confirm {len(unverified)} of {len(changes)} link changes ({links})"
        )
    return problems


def damaged_steps(steps: pd.DataFrame, t_end_s: float) -> list[str]:
    """Rows that no worker writes."""
    measured = steps[["t_s", "step_s", "samples", "payload_bytes"]]
    odd = (measured < 0).any(axis=1) | steps["t_s"].isna() | (steps["t_s"] > t_end_s + GAP_S)
    if not odd.any():
        return []
    return [f"{odd.sum()} records of steps are damaged: below 0, at no time, or after the end"]


def missing_steps(cell: Mapping[str, Any], steps: pd.DataFrame) -> list[str]:
    """Whether ranks or steps are missing in the records of a cell that was done, or are there
    twice.

    One step is allowed for at the end, as a row may be torn there, or be that of an exchange of
    local updates after the last step.
    """
    ranks = range(cell["workers"] * ranks_per_worker(cell))
    if cell["status"] != "done" or steps.empty or not len(ranks):
        return []
    by_rank = steps.groupby("rank")["step"].agg(["min", "max", "count", "nunique"])
    if set(by_rank.index) != set(ranks):
        found = ", ".join(map(str, by_rank.index))
        return [f"steps of ranks 0 to {ranks[-1]} should be recorded, and are of {found}"]
    first, last = by_rank["min"].min(), cell["steps"] or by_rank["max"].max() + 1
    wrong = by_rank[
        (by_rank["count"] != by_rank["nunique"])
        | (by_rank["nunique"] != by_rank["max"] - by_rank["min"] + 1)
        | (by_rank["min"] != first)
        | ((by_rank["max"] + 1 - last).abs() > 1)
    ]
    return [
        f"steps {first} to {last - 1:.0f} of rank {rank} should be recorded once each, and"
        f" {row['count']} rows are, of {row['nunique']} steps up to {row['max']}"
        for rank, row in wrong.head(1).iterrows()
    ]


def telemetry_gaps(links: pd.DataFrame, events: pd.DataFrame, t_end_s: float) -> list[str]:
    """The longest gap between samples of each direction of each link over 0…``t_end_s``, if above
    ``GAP_S``; samples without a time or a count, and links without samples or a first state."""
    if links.empty:
        return ["no telemetry of any link was recorded"]
    sampled = links.groupby(["link", "direction"])
    begun = events.loc[events["kind"] == "initial", "link"].unique()
    damaged = links[["t_s", "bytes", "packets"]].isna().any(axis=1).sum()
    problems = [
        *([f"{damaged} samples of links are damaged: no time, or no count"] if damaged else []),
        *([] if len(begun) else ["the state of links before t = 0 was not recorded"]),
    ]
    problems += [
        f"{link} {direction}: no telemetry was recorded"
        for link in begun
        for direction in ("up", "down")
        if (link, direction) not in sampled.groups
    ]
    for (link, direction), samples in sampled:
        begins_s, gaps_s = _gaps(samples["t_s"], t_end_s)
        widest = int(np.argmax(gaps_s))
        if gaps_s[widest] > GAP_S:
            gap = f"no telemetry for {gaps_s[widest]:.2g} s from {begins_s[widest]:.4g} s on"
            problems.append(f"{link} {direction}: {gap}")
    return problems


_PACKET_S = 1e-3
"""The longest packet of a link, where a frame is not longer."""


class Unsure(NamedTuple):
    """What is not known of some windows, as the instants of changes are not: by how many bits the
    limit may have let pass more or less than its integral says, and whether there was none at some
    time."""

    more: np.ndarray
    less: np.ndarray
    unlimited: np.ndarray


@dataclass(frozen=True, eq=False)
class Limits:
    """The limit of one direction of a link over time: ``rate_bps[i]``, NaN for none, from change i
    on; for frames of a size.

    A change came into force between ``since_s[i]`` and ``until_s[i]``: no change is made before it
    is due, nor after the kernel has acknowledged it, as far as the clock can tell. Both are
    ascending.
    """

    since_s: np.ndarray
    until_s: np.ndarray
    rate_bps: np.ndarray
    frame_bits: float = 8 * 1514

    @classmethod
    def by_samples(cls, t_s: np.ndarray, rate_bps: np.ndarray) -> Self:
        """Of a link whose changes were not recorded: somewhere between two samples."""
        changed = np.flatnonzero(~np.isclose(rate_bps[1:], rate_bps[:-1], equal_nan=True))
        since_s, until_s = (np.append(t_s[:1], t_s[changed + late]) for late in (0, 1))
        return cls(since_s, until_s, np.append(rate_bps[:1], rate_bps[changed + 1]))

    def integral(self, t_s: np.ndarray) -> np.ndarray:
        """Bits that may have passed since the first change, if each came into force when it was
        acknowledged."""
        rate_bps, number = np.nan_to_num(self.rate_bps), self._number(t_s)
        passed = np.append(0.0, np.cumsum(rate_bps[:-1] * np.diff(self.until_s)))
        return passed[number] + (t_s - self.until_s[number]) * rate_bps[number]

    def unsure(self, from_s: np.ndarray, to_s: np.ndarray) -> Unsure:
        """Of windows: what every change makes unsure that came into force inside them, or may
        have."""
        first = np.searchsorted(self.until_s, from_s, side="right")
        last = np.maximum(np.searchsorted(self.since_s, to_s), first)
        more, less, never = (total[last] - total[first] for total in self._unsure)
        return Unsure(more, less, np.isnan(self.rate_bps[self._number(from_s)]) | (never > 0))

    def fastest(self, from_s: np.ndarray, to_s: np.ndarray) -> np.ndarray:
        """The highest limit that may have been in force in windows, in bits/s."""
        last = np.searchsorted(self.since_s, to_s, side="right") - 1
        return _most(self.rate_bps, self._number(from_s), np.maximum(last, self._number(to_s)))

    def differ_from(self, rate_bps: np.ndarray, t_s: np.ndarray, half_s: np.ndarray) -> int:
        """How many samples, each read within ``half_s`` of its time, found another limit than the
        one that alone can have been in force."""
        first = self._number(t_s - half_s)
        last = np.searchsorted(self.since_s, t_s + half_s, side="right") - 1
        unlike = ~np.isclose(rate_bps, self.rate_bps[first], equal_nan=True)
        return int(np.count_nonzero(unlike & (last <= first)))

    def _number(self, t_s: np.ndarray) -> np.ndarray:
        """Of the change in force."""
        return np.maximum(np.searchsorted(self.until_s, t_s, side="right") - 1, 0)

    @cached_property
    def _unsure(self) -> list[np.ndarray]:
        """Of all changes before each one: bits they may have let pass early; or held back early;
        how many have no limit."""
        before_bps = np.append(self.rate_bps[:1], self.rate_bps[:-1])
        rises = self.rate_bps - before_bps
        early = np.nan_to_num(rises) * (self.until_s - self.since_s)
        # A packet that has begun keeps its rate (``links.qdiscs``): after a rise the next one waits
        # for it.
        packet_s = np.maximum(_PACKET_S, self.frame_bits / np.maximum(before_bps, 1.0)) * (
            before_bps > 0
        )
        kept = np.nan_to_num(np.maximum(rises, 0.0) * packet_s)
        amounts = np.maximum(early, 0.0), np.maximum(-early, 0.0) + kept, np.isnan(rises)
        return [np.append(0.0, np.cumsum(amount)) for amount in amounts]


def _limits(events: pd.DataFrame, frame_bits: float) -> dict[tuple[str, str], Limits]:
    """The limits of every direction of every link whose changes were recorded."""
    changes = events[(events["kind"] != "traffic") & events["applied_s"].notna()].sort_values(
        "applied_s", kind="stable"
    )
    codes, states = pd.factorize(changes["state"])
    unknown = [float("nan")] * 2
    rates_bps = np.array(
        [(_numbers(state, "rate_bps") + unknown)[:2] for state in states.tolist()]
    ).reshape(-1, 2)[codes]
    found = {}
    for link, rows in changes.reset_index(drop=True).groupby("link"):
        planned_s, applied_s = rows["planned_s"].to_numpy(), rows["applied_s"].to_numpy()
        unsure_s = rows["unsure_s"].astype("float64").fillna(0.0).to_numpy()
        until_s = np.maximum.accumulate(applied_s + unsure_s)
        since_s = np.maximum.accumulate(np.minimum(planned_s, applied_s) - unsure_s)
        for place, direction in enumerate(("down", "up")):  # the order of the keys in the text
            found[str(link), direction] = Limits(
                since_s, until_s, rates_bps[rows.index, place], frame_bits
            )
    return found


def _numbers(state: str, key: str) -> list[float]:
    """Values of a key in a state, of down and up. Cut out of the text: a long run has a hundred
    thousand states."""
    words = [rest.split(",", 1)[0].rstrip("}") for rest in state.split(f'"{key}": ')[1:]]
    return [float("nan" if word == "null" else word) for word in words]


_ANYTHING = 1e15
"""Bits that no link carries in an instant: where it may have had no limit."""


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """One direction of a link at its samples; amounts in bits.

    carried, allowed: since the first sample, the latter by the limits in force. blur: what may have
    passed between the moment of a sample and that in which it was read. bucket: what may pass at
    once. waiting: in the queue, which has room for ``room`` (NaN if that is not known). drops:
    packets so far. unexplained: samples that found another limit than the recorded changes set.
    """

    name: str
    limits: Limits
    t_s: np.ndarray
    carried: np.ndarray
    allowed: np.ndarray
    blur: np.ndarray
    bucket: np.ndarray
    waiting: np.ndarray
    room: np.ndarray
    drops: np.ndarray
    unexplained: int

    @classmethod
    def of(cls, name: str, samples: pd.DataFrame, limits: Limits | None) -> Self:
        """From the rows of links of one direction of one link, in order of time."""
        t_s, rate_bps, sent = (
            samples[column].to_numpy(dtype=float) for column in ("t_s", "rate_bps", "bytes")
        )
        limits = limits or Limits.by_samples(t_s, rate_bps)
        burst = samples["burst_bytes"].to_numpy(dtype=float)
        allowed = limits.integral(t_s)
        half_s = np.nan_to_num(samples["reading_s"].to_numpy(dtype=float)) / 2
        return cls(
            name=name,
            limits=limits,
            t_s=t_s,
            carried=8 * (sent - sent[0]),
            allowed=allowed - allowed[0],
            blur=np.nan_to_num(
                half_s * limits.fastest(t_s - half_s, t_s + half_s), nan=_ANYTHING, posinf=0.0
            ),
            # What the bucket holds, and a packet more, no larger, for which htb goes into debt.
            bucket=8
            * np.nan_to_num(np.where(np.isnan(burst), _old_burst_bytes(rate_bps), 2 * burst)),
            waiting=8 * samples["backlog_bytes"].to_numpy(dtype=float),
            room=8 * samples["queue_bytes"].to_numpy(dtype=float),
            drops=samples["drops"].to_numpy(dtype=float),
            unexplained=limits.differ_from(rate_bps, t_s, half_s),
        )

    def windows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of the first and the last samples of windows of 1, 1.4, 2, 2.8, 4, … times
        ``WINDOW_S``.

        Those of so many ``WINDOW_S`` begin with every so-manyth sample.
        """
        for double in itertools.count():
            length_s = WINDOW_S * 2 ** (double / 2)
            first = np.arange(0, len(self.t_s), int(length_s / WINDOW_S))
            last = np.searchsorted(self.t_s, self.t_s[first] + length_s)
            inside = last < len(self.t_s)
            if not inside.any():
                return
            yield first[inside], last[inside]


def _old_burst_bytes(rate_bps: np.ndarray) -> np.ndarray:
    """Bucket of runs that did not record it: that of the tbf they had."""
    return np.maximum(rate_bps / 8 * 0.004, 8 * 1514)


def directions(links: pd.DataFrame, events: pd.DataFrame) -> list[Direction]:
    """All directions of all links that were sampled."""
    # No bucket is smaller than a frame.
    smallest = links["burst_bytes"].min()
    limits = _limits(events, 8 * (1514 if pd.isna(smallest) else smallest))
    return [
        Direction.of(f"{link} {direction}", samples, limits.get((str(link), str(direction))))
        for (link, direction), samples in links.sort_values("t_s").groupby(["link", "direction"])
    ]


class Window(NamedTuple):
    """What a direction did over some time: when that began and ended, in s, and the means of what
    it carried and its limit."""

    from_s: float
    to_s: float
    carried_bps: float
    limit_bps: float

    @classmethod
    def between(cls, one: Direction, first: int, last: int) -> Self:
        span_s = one.t_s[last] - one.t_s[first]
        carried, allowed = (
            (amount[last] - amount[first]) / span_s for amount in (one.carried, one.allowed)
        )
        return cls(float(one.t_s[first]), float(one.t_s[last]), float(carried), float(allowed))

    def __str__(self) -> str:
        over = f"over {self.to_s - self.from_s:.2g} s from {self.from_s:.4g} s on"
        return f"{self.carried_bps / 1e6:.4g} Mbit/s {over}"


def excesses(sides: list[Direction]) -> list[str]:
    """Directions that carried more than their limit over some window."""
    return [
        f"{one.name}: carried {worst}, above its limit of {worst.limit_bps / 1e6:.4g} Mbit/s"
        for one in sides
        if (worst := worst_excess(one))
    ]


def worst_excess(one: Direction) -> Window | None:
    """The window that breaks the limit most; None if none does.

    carried <= integral of the limit + one bucket + what changes may have let pass before they were
        acknowledged + ``EXCESS`` + what may have passed while either end was read
    """
    worst, found = 0.0, None
    for first, last in one.windows():
        allowed = one.allowed[last] - one.allowed[first]
        unsure = one.limits.unsure(one.t_s[first], one.t_s[last])
        over = (
            one.carried[last]
            - one.carried[first]
            - allowed * (1 + EXCESS)
            - unsure.more
            - _most(one.bucket, first, last)
        )
        over -= one.blur[first] + one.blur[last]
        # a bit: sums are not exact
        share = np.where(unsure.unlimited, 0.0, (over - 1.0) / np.maximum(allowed, 1.0))
        most = int(np.argmax(share))
        if share[most] > worst:
            worst, found = share[most], Window.between(one, first[most], last[most])
    return found


def shortfalls(sides: list[Direction]) -> list[str]:
    """Directions that carried less than their limit over some window although packets waited: too
    slow, or stuck."""
    return [
        f"{one.name}: carried only {worst} with packets in its queue, below its limit of"
        f" {worst.limit_bps / 1e6:.4g} Mbit/s"
        for one in sides
        if (worst := worst_shortfall(one))
    ]


def worst_shortfall(one: Direction) -> Window | None:
    """The window in which a direction fell short of its limit most, beyond doubt; None if there is
    none.

    Only windows count in which packets waited at every sample. Even then the queue may have been
    empty in between, as between two steps of a training, and an honest link idle. Two things are
    beyond doubt, both after one bucket (a packet that has just left is paid for afterwards),
    ``SHORTFALL`` and what changes may have taken earlier than they were acknowledged:

    1. What waits at a sample leaves before the next one, or as much of it as the limit lets pass. A
       link that carried less than the sum of these was stuck or slow.
    2. A link that was idle for a share q of the time, though never at one of n samples at random
       moments, has a likelihood of (1 - q)^n. Less, as no idle time lies where what waits is still
       leaving: if that takes at least ``least_s`` after every sample, and ``widest_s`` is left
       until the next one, then every idle time also costs ``least_s`` in which a sample would have
       found less, and q counts 1 + least_s / widest_s times. Below ``CHANCE`` no chance is left.
       All this is counted at the highest limit in the window, as an idle link may have missed just
       that.
    """
    step, gap_s = np.diff(one.allowed), np.diff(one.t_s)
    waiting = np.where(np.isnan(one.room), 0.0, one.waiting)  # an AQM may drop what waits instead
    leaving = np.minimum(waiting[:-1], step)
    idle = np.append(0, np.cumsum(one.waiting <= 0))
    left = np.append(0.0, np.cumsum(leaving))
    worst, found = 0.0, None
    for starts, ends in one.windows():
        busy = idle[ends + 1] == idle[starts]
        if not busy.any():
            continue
        first, last = starts[busy], ends[busy]
        from_s, to_s = one.t_s[first], one.t_s[last]
        unsure, fastest_bps = (
            one.limits.unsure(from_s, to_s),
            np.maximum(one.limits.fastest(from_s, to_s), 1.0),
        )
        allowed = one.allowed[last] - one.allowed[first]
        enough = (
            one.carried[last] - one.carried[first] + _most(one.bucket, first, last) + unsure.less
        )
        enough += one.blur[first] + one.blur[last]
        proven = enough < (1 - SHORTFALL) * (left[last] - left[first]) - 1.0  # a bit, as above
        least_s = _least(waiting, first, last) / fastest_bps
        widest_s = np.maximum(_most(gap_s, first, last - 1) - least_s, 1e-3)
        idle_share = (allowed - enough) / fastest_bps / (to_s - from_s)
        seen = np.clip(idle_share * (1 + least_s / widest_s), 0.0, _MOST_TOLD)
        unlikely = (last - first + 1) * np.log1p(-seen) < math.log(CHANCE)
        short = np.where(
            (proven | unlikely) & ~unsure.unlimited, 1 - enough / np.maximum(allowed, 1.0), 0.0
        )
        most = int(np.argmax(short))
        if short[most] > max(SHORTFALL, worst):
            worst, found = short[most], Window.between(one, first[most], last[most])
    return found


_MOST_TOLD = 0.9
"""No single sample says more than this, as it is not quite taken at random: a busy machine takes it
when others wait."""


def _most(amounts: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The largest of the amounts from ``first`` to ``last``, both included, of each window."""
    ends = np.column_stack([first, last + 1]).ravel()
    return np.maximum.reduceat(np.append(amounts, 0.0), ends)[::2]


def _least(amounts: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    return -_most(-amounts, first, last)


def early_drops(sides: list[Direction]) -> list[str]:
    """Directions that dropped packets although their queue had room.

    A queue that was full between two samples has since sent what it held, or holds it still.
    """
    problems = []
    for one in sides:
        held = np.diff(one.carried) + one.waiting[1:] + np.maximum(one.bucket[:-1], one.bucket[1:])
        room, dropped = np.minimum(one.room[:-1], one.room[1:]), np.diff(one.drops)
        changed = np.searchsorted(one.limits.until_s, one.t_s[:-1], side="right") < np.searchsorted(
            one.limits.since_s, one.t_s[1:]
        )
        early = (dropped > 0) & (held < room) & ~changed
        if early.any():
            most = int(np.argmax(np.where(early, held / room, 0.0)))
            problems.append(
                f"{one.name}: dropped {dropped[early].sum():.0f} packets from"
                f" {one.t_s[:-1][early][0]:.4g} s on while its queue held at most"
                f" {held[most] / 8e3:.4g} of {room[most] / 8e3:.4g} kB"
            )
    return problems
