"""What speaks against a cell: every fault is noticed, and honest links and hosts are never
blamed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from testbed.results import validity
from testbed.results.columns import (
    DELAYLINE_COLUMNS,
    EVENT_COLUMNS,
    LINK_COLUMNS,
    STEP_COLUMNS,
    TABLES,
    TRAFFIC_COLUMNS,
)
from testbed.results.load import load_run
from testbed.results.records import to_frame
from testbed.results.summary import summarize
from tests.testbed.synthetic_run import append, host_rows, steps_file, write_cell, write_run


def problems_of(path: Path, **options: Any) -> list[str]:
    """What a run of one cell is blamed for."""
    found: list[str] = summarize(
        load_run(write_run(path / "run", methods=("allreduce",), **options))
    )["problems"]
    return found


def test_a_sound_cell_has_no_problem(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"killed": True}, "did not finish"),
        (
            {"result": {"status": "failed", "problems": ["w1 exited with code 1"]}},
            "w1 exited with code 1",
        ),
        ({"result": {"status": "failed"}}, "failed"),
        ({"result": {"status": "interrupted"}}, "interrupted"),
        ({"result": {"parameters": {"0": "a", "1": "b"}}}, "different parameters"),
        ({"result": {"parameters": {"0": "a"}}}, "not every rank"),
        ({"result": {"t_end_s": 33.0}}, "no telemetry for 3 s from 30 s on"),
        (
            {"late_s": 0.2},
            "4 of 4 scheduled changes came late (the worst: w0 at 10 s, 200 ms late)",
        ),
        ({"late_s": float("nan")}, "never applied"),
    ],
)
def test_what_spoils_a_cell_is_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    problems = problems_of(tmp_path, **options)
    assert any(words in problem and problem.startswith("allreduce-s0: ") for problem in problems), (
        problems
    )


@pytest.mark.parametrize("status", ["failed", "done"])
def test_of_a_cell_that_ended_before_it_began_only_the_reason_is_told(
    tmp_path: Path, status: str
) -> None:
    why = "w0 failed: there is no module 'own'"
    result = {"status": status, "problems": [why] if status == "failed" else []}
    run = write_run(tmp_path / "run", methods=("allreduce",), result=result)
    for records in run.rglob("*.jsonl"):
        records.unlink()
    problems = summarize(load_run(run))["problems"]
    if status == "failed":
        assert problems == [f"allreduce-s0: {why}"]
    else:  # which cannot be
        assert "allreduce-s0: no step was recorded" in problems


def test_unconfirmed_changes_are_named(tmp_path: Path) -> None:
    events = load_run(write_run(tmp_path / "run")).events
    events.loc[3, "verified"] = False
    assert validity.unverified_changes(events) == [
        "the kernel did not confirm 1 of 18 link changes (w1)"
    ]


def test_no_telemetry_is_a_problem(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    links, events = run.links, run.events
    assert validity.telemetry_gaps(links, events, 30.0) == []
    assert validity.telemetry_gaps(links.iloc[:0], events, 30.0)
    gappy = links[~links["t_s"].between(4.95, 6.45)]
    gap = "w0 down: no telemetry for 1.6 s from 4.9 s on"
    assert gap in validity.telemetry_gaps(gappy, events, 30.0)
    one_less = links[(links["link"] != "w1") | (links["direction"] != "up")]
    missing = ["w1 up: no telemetry was recorded"]
    assert validity.telemetry_gaps(one_less, events, 30.0) == missing


def calibration_rows(*measured_mbps: float | None) -> Any:
    """Attempts at 50 Mbit/s on w1 down, one after the other."""
    for attempt, measured in enumerate(measured_mbps, start=1):
        within = measured is not None and abs(measured - 50) <= 1.5
        place = {
            "quantity": "rate",
            "link": "w1",
            "direction": "down",
            "source": "",
            "target": "",
            "attempt": attempt,
        }
        amounts = {
            "expected": 50e6,
            "measured": None if measured is None else measured * 1e6,
            "tolerance": 1.5e6,
        }
        yield {**place, **amounts, "within": within}


def calibrated(path: Path, rows: Any) -> dict[str, Any]:
    """The summary of a cell whose links were to be calibrated, with these results."""
    cell = write_cell(path / "cells" / "c")
    (cell / "cell.json").write_text(
        json.dumps({**json.loads((cell / "cell.json").read_text()), "calibrate": True})
    )
    append(cell / "calibration.jsonl", rows)
    [found] = summarize(load_run(path))["cells"]
    return dict(found)


def test_the_best_attempt_of_a_calibration_counts(tmp_path: Path) -> None:
    cell = calibrated(tmp_path, calibration_rows(41.0, 49.2))
    assert cell["valid"] and cell["calibrated"]


def test_a_link_off_in_every_attempt_spoils_the_cell(tmp_path: Path) -> None:
    cell = calibrated(tmp_path, [*calibration_rows(41.0, None, 46.0)])
    assert cell["problems"] == [
        "1 of 1 calibrated rates and delays are off (the worst: w1 down carried 46 instead of 50"
        " Mbit/s)"
    ]


@pytest.mark.parametrize(
    ("nodes", "change", "up_mbps", "blamed"),
    [
        (("n1", "n2"), {}, 50.0, True),
        (("n1", "n2"), {}, 30.0, False),  # less had left
        (("n1", "n2"), {"direction": "up", "source": "w1"}, 50.0, False),
        (("n1", "n2"), {"source": ""}, 50.0, False),  # of several flows
        (("n1", "n2"), {"measured": 60e6}, 50.0, False),
        (("n1", "n2"), {"measured": np.nan}, 50.0, False),
        (
            ("n1", "n2"),
            {"quantity": "rtt", "link": "", "direction": "", "expected": 0.01, "measured": 0.005},
            50.0,
            False,
        ),
        (("",), {}, 50.0, False),
    ],
)
def test_the_network_between_nodes_is_blamed_for_what_left_one_and_came_to_no_other(
    nodes: tuple[str, ...], change: dict[str, Any], up_mbps: float, blamed: bool
) -> None:
    row = {
        "quantity": "rate",
        "source": "w0",
        "target": "w1",
        "attempt": 1,
        "expected": 50e6,
        "tolerance": 1.5e6,
    }
    left = {
        **row,
        "link": "w0",
        "direction": "up",
        "measured": up_mbps * 1e6,
        "within": up_mbps > 48.5,
    }
    came = {**row, "link": "w1", "direction": "down", "measured": 20e6, "within": False, **change}
    [problem] = validity.uncalibrated_links(
        pd.DataFrame([left, came]), pd.DataFrame({"node": nodes})
    )
    assert "of 2 calibrated rates and delays are off" in problem
    assert (
        "; w0 had sent as much as it may, so if they are on two nodes, the network between these"
        in problem
    ) == blamed


def test_a_calibration_that_measured_nothing_is_no_pass(tmp_path: Path) -> None:
    assert (
        "nothing that could be measured"
        in calibrated(tmp_path / "a", [*calibration_rows(None)])["problems"][0]
    )
    assert "not calibrated" in calibrated(tmp_path / "b", [])["problems"][0]


def test_calibration_may_be_turned_off_but_not_unseen(tmp_path: Path) -> None:
    [cell] = summarize(load_run(write_run(tmp_path / "run", methods=("allreduce",))))["cells"]
    assert cell["valid"] and not cell["calibrated"]


def host(busy: float, foreign: float, waited: float | None = 0.5, rows: int = 80) -> pd.DataFrame:
    """Of two processors."""
    sampled = host_rows(rows / 10, busy, foreign, waited)
    return to_frame(sampled, TABLES["host"], {"cell": "c", "method": "m", "seed": 0})


def test_a_host_on_which_others_take_the_time_of_a_process_is_blamed() -> None:
    blame = (
        "this machine was too busy: other programs took {} % of the time of a process of the cell"
    )
    for busy, foreign, waited, taken in (
        (1.0, 0.6, 0.5, 50),  # as long as it waited
        (1.0, 0.1, 0.5, 20),  # but no more than they used, of both processors
        (0.7, 0.5, 0.06, 6),  # one processor was idle, but not where it had to wait
        (1.0, 0.6, None, 30),  # not known of the processes: as long as any program waited
    ):
        [problem] = validity.busy_host(host(busy, foreign, waited))
        assert problem.startswith(blame.format(taken)), problem
    mixed = pd.concat([host(1.0, 0.6), host(0.4, 0.0)])
    assert validity.busy_host(mixed)[0].startswith(blame.format(25))
    # nor does the kernel tell this: while no processor was idle
    unknown = host(1.0, 0.35, None).assign(cpu_some_share=float("nan"))
    assert validity.busy_host(unknown)[0].startswith(blame.format(70))
    assert validity.busy_host(unknown.assign(cpu_busy_share=0.9)) == []


@pytest.mark.parametrize(
    ("busy", "foreign", "waited"), [(1.0, 0.015, 0.6), (0.7, 0.5, 0.03), (0.9, 0.8, 0.0)]
)
def test_honest_computing_and_processors_to_spare_are_not_blamed(
    busy: float, foreign: float, waited: float
) -> None:
    assert validity.busy_host(host(busy, foreign, waited)) == []


def test_a_process_that_was_stopped_is_told() -> None:
    rows = host(0.3, 0.0).assign(stopped=[True, False, False, False] * 20)
    [problem] = validity.busy_host(rows)
    assert problem == (
        "on this machine a process of the cell stood still for 25 % of the time, stopped by a signal"
    )
    assert validity.busy_host(rows.assign(stopped=[True] + 79 * [False])) == []


def test_each_machine_of_a_lab_is_judged_by_itself_and_nodes_of_one_together() -> None:
    busy, fine = (
        host(1.0, foreign).assign(node=node, machine=node)
        for node, foreign in (("n1", 0.4), ("n2", 0.0))
    )
    [problem] = validity.busy_host(pd.concat([busy, fine]))
    assert problem.startswith("node n1 was too busy: other programs took 50 %")
    # Of one machine, 45 % are of n1's programs and 54 % of n2's: to each, the other's are foreign.
    shares = {"n1": (0.45, 0.55), "n2": (0.54, 0.46)}
    rows = [
        host(1.0, theirs).assign(cpu_own_share=own, node=node, machine="m")
        for node, (own, theirs) in shares.items()
    ]
    assert validity.busy_host(pd.concat(rows)) == []
    for frame in rows:
        frame[["cpu_own_share", "cpu_foreign_share"]] += [-0.1, 0.1]
    [problem] = validity.busy_host(pd.concat(rows))
    assert problem.startswith("node n1, n2 was too busy: other programs took 42 %")
    rows[1] = rows[1].assign(cpu_foreign_share=0.0, stopped=True)
    assert (
        "on node n1, n2 a process of the cell stood still for 100 %"
        in (validity.busy_host(pd.concat(rows))[-1])
    )


def test_a_load_that_was_not_recorded_is_no_pass() -> None:
    assert validity.busy_host(host(1.0, 0.0, rows=0))


def test_packets_lost_between_links_are_blamed_when_they_matter() -> None:
    links = link_rows(
        {"t_s": t_s, "link": link, "direction": way, "packets": packets}
        for link in ("w0", "w1")
        for way in ("up", "down")
        for t_s, packets in ((0.0, 100), (1.0, 10_100))
    )
    for drops, blamed in ((0, False), (40, False), (41, True)):
        found = validity.lost_between_links(
            host(0.5, 0.0).assign(softnet_drops=drops), links, events_of({})
        )
        assert bool(found) == blamed
    assert (
        "dropped 41 packets between links, of 40000" in found[0]
        and "netdev_max_backlog" in found[0]
    )


def step_rows(compute_s: Sequence[float], exchange_s: float = 0.0) -> pd.DataFrame:
    """Three steps of each rank, which compute and then wait for the exchange for so long."""
    rows = [
        {"rank": rank, "step": step, "compute_s": time_s, "step_s": time_s + exchange_s}
        for rank, time_s in enumerate(compute_s)
        for step in range(3)
    ]
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS))


def test_a_pace_that_was_not_held_is_blamed() -> None:
    [problem] = validity.missed_pace(step_rows([0.02, 0.02]), {"pace_s": 0.015})
    assert problem.startswith(
        "the pace of 15 ms was not held: half of the steps of rank 0 computed for 20 ms and more"
    )
    assert validity.missed_pace(step_rows([0.02, 0.02]), {"pace_s": 0.02}) == []
    assert validity.missed_pace(step_rows([0.02, 0.02]), "real") == []


def test_a_pace_matters_as_much_as_it_makes_steps_longer() -> None:
    """31 ms too many in a step of 13.9 s change no figure; of a step of 0.3 s they are a tenth."""
    assert validity.missed_pace(step_rows([0.131, 0.12], exchange_s=13.8), {"pace_s": 0.1}) == []
    assert validity.missed_pace(step_rows([0.131, 0.12], exchange_s=0.25), {"pace_s": 0.1}) == []
    [problem] = validity.missed_pace(step_rows([0.131, 0.12], exchange_s=0.15), {"pace_s": 0.1})
    assert "rank 0 computed for 131 ms" in problem


def test_the_pace_is_that_of_every_rank_of_its_own() -> None:
    """Most ranks, and most of all steps, hold the pace."""
    [problem] = validity.missed_pace(
        step_rows([0.02, 0.02, 0.03, 0.02]), {"pace_s": 0.02, "factors": [1, 1, 1, 1]}
    )
    assert "half of the steps of rank 2 computed for 30 ms" in problem
    straggler = {"pace_s": 0.02, "factors": [1, 1, 2, 1]}
    assert validity.missed_pace(step_rows([0.02, 0.02, 0.04, 0.02]), straggler) == []
    [problem] = validity.missed_pace(step_rows([0.02, 0.02, 0.05, 0.02]), straggler)
    assert problem.startswith(
        "the pace of 40 ms was not held: half of the steps of rank 2 computed for 50 ms"
    )


def test_the_first_touch_of_memory_in_the_warm_up_is_no_missed_pace(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", methods=("allreduce",), result={"steps": 3})
    cell = path / "cells" / "allreduce-s0"
    config = json.loads((cell / "cell.json").read_text())
    (cell / "cell.json").write_text(
        json.dumps({**config, "workload": {"compute": {"emulate_s": 0.02}}})
    )
    for rank in range(2):
        first = steps_file(cell, rank).read_text().splitlines()[:3]
        slow = [line.replace('"compute_s": 0.02', '"compute_s": 0.5') for line in first[:2]]
        steps_file(cell, rank).write_text("\n".join([*slow, first[2], ""]))
    assert any("pace" in problem for problem in summarize(load_run(path))["problems"])
    spec = yaml.safe_load((path / "spec.yaml").read_text())
    (path / "spec.yaml").write_text(
        yaml.safe_dump({**spec, "workload": {**spec["workload"], "warmup": 2}})
    )
    assert not any("pace" in problem for problem in summarize(load_run(path))["problems"])
    (path / "spec.yaml").write_text(
        yaml.safe_dump({**spec, "workload": {**spec["workload"], "warmup": 3}})
    )
    assert any(
        "none of its steps came after the warm-up of 3" in problem
        for problem in summarize(load_run(path))["problems"]
    )


# Links


def link_rows(rows: Any) -> pd.DataFrame:
    """Rows of links; what they do not say is 0, or not known."""
    unknown = dict.fromkeys(("rate_bps", "burst_bytes", "queue_bytes", "lost"), np.nan)
    frame = pd.DataFrame(
        [{**dict.fromkeys(LINK_COLUMNS, 0.0), **unknown, **row} for row in rows],
        columns=list(LINK_COLUMNS),
    )
    return frame.astype({"link": "str", "direction": "str"})


def events_of(
    changes: dict[str, list[tuple[float, float, float | None]]], **options: Any
) -> pd.DataFrame:
    """Events: of each link its changes, (planned s, applied s, bits/s of both directions)."""
    rows = []
    for link, list_of_changes in changes.items():
        for planned_s, applied_s, rate_bps in list_of_changes:
            parameters = {
                "delay_s": options.get("delay_s", 0.0),
                "jitter_s": 0.0,
                "queue_s": 0.05,
                "rate_bps": rate_bps,
                "reorder": 0.0,
            }
            state = json.dumps(
                {"connected": options.get("connected", True), "down": parameters, "up": parameters}
            )
            kind = options.get("kind", "schedule")
            row = {
                "planned_s": planned_s,
                "applied_s": applied_s,
                "link": link,
                "state": state,
                "kind": kind,
                "verified": True,
            }
            rows.append(row)
    types = {
        "planned_s": "float64",
        "applied_s": "float64",
        "link": "str",
        "state": "str",
        "kind": "str",
    }
    return pd.DataFrame(rows, columns=list(EVENT_COLUMNS)).astype(types)


def moments(number: int, seed: int) -> np.ndarray:
    """Times of samples, each at a random moment of its tenth of a second."""
    return np.arange(number) * 0.1 + np.random.default_rng(seed).uniform(0, 0.1, number)


class Timeline:
    """What the kernel did: a rate from each instant on, and when the driver said so. The first one
    holds from the beginning.

    late_s: how long after it was due each change was acknowledged; share: at which part of that the
    kernel took it.
    """

    def __init__(
        self,
        at_s: Sequence[float],
        rates_bps: Sequence[float],
        late_s: Sequence[float] = (),
        share: float = 0.5,
    ) -> None:
        self.rates_bps = np.array(rates_bps)
        self.planned_s = np.array([0.0, *at_s])
        # No change is made before the one before it was acknowledged.
        self.applied_s = np.maximum.accumulate(
            self.planned_s + np.array([0.0, *(late_s or [0.0] * len(at_s))])
        )
        begun_s = np.append(0.0, np.maximum(self.planned_s[1:], self.applied_s[:-1]))
        self.taken_s = begun_s + share * (self.applied_s - begun_s)

    def allowed(self, t_s: np.ndarray) -> np.ndarray:
        """Bits that the kernel may have let pass."""
        passed = np.append(0.0, np.cumsum(self.rates_bps[:-1] * np.diff(self.taken_s)))
        number = np.searchsorted(self.taken_s, t_s, side="right") - 1
        return passed[number] + (t_s - self.taken_s[number]) * self.rates_bps[number]

    def events(self) -> pd.DataFrame:
        """As the driver recorded them."""
        changes = zip(
            self.planned_s.tolist(), self.applied_s.tolist(), self.rates_bps.tolist(), strict=True
        )
        return events_of({"w0": [*changes]})

    def links(
        self, t_s: np.ndarray, carried: np.ndarray, waiting_bytes: Any = 0.0, **columns: Any
    ) -> pd.DataFrame:
        """Samples of w0 up, which carried these bits and has these bytes in its queue."""
        rate_bps = self.rates_bps[np.searchsorted(self.applied_s, t_s, side="right") - 1]
        numbers = {
            "t_s": t_s,
            "reading_s": 0.0,
            "rate_bps": rate_bps,
            "bytes": carried / 8,
            "backlog_bytes": waiting_bytes,
            "drops": 0.0,
        }
        sizes = {
            "burst_bytes": np.maximum(rate_bps / 8000, 1514),
            "queue_bytes": np.maximum(rate_bps / 160, 1514),
        }
        return pd.DataFrame(
            {
                "link": "w0",
                "direction": "up",
                "packets": 0.0,
                "lost": np.nan,
                **numbers,
                **sizes,
                **columns,
            }
        )


def excesses(links: pd.DataFrame, events: pd.DataFrame) -> list[str]:
    return validity.excesses(validity.directions(links, events))


def shortfalls(links: pd.DataFrame, events: pd.DataFrame) -> list[str]:
    return validity.shortfalls(validity.directions(links, events))


def timelines(rates_bps: st.SearchStrategy[float], late_s: float) -> st.SearchStrategy[Timeline]:
    """Up to ten changes a second, over 6 s."""
    return st.integers(0, 60).flatmap(
        lambda changes: st.builds(
            Timeline,
            at_s=st.lists(st.floats(0.02, 6), min_size=changes, max_size=changes).map(sorted),
            rates_bps=st.lists(rates_bps, min_size=changes + 1, max_size=changes + 1),
            late_s=st.lists(st.floats(0, late_s), min_size=changes, max_size=changes),
            share=st.floats(0, 1),
        )
    )


any_rate = st.one_of(st.just(0.0), st.floats(8e3, 1e9))
"""Nothing passes during an outage."""


@given(timeline=timelines(any_rate, late_s=0.05), seed=st.integers(0, 99))
def test_a_link_that_carries_what_it_may_is_never_blamed(timeline: Timeline, seed: int) -> None:
    t_s = moments(60, seed)
    links = timeline.links(t_s, timeline.allowed(t_s), waiting_bytes=1e12)
    assert excesses(links, timeline.events()) == []
    assert shortfalls(links, timeline.events()) == []


@given(timeline=timelines(any_rate, late_s=0.05), seed=st.integers(0, 99), at=st.integers(1, 59))
def test_a_bucket_more_or_a_packet_less_is_honest(timeline: Timeline, seed: int, at: int) -> None:
    t_s = moments(60, seed)
    bucket = 8 * timeline.links(t_s, t_s)["burst_bytes"].iloc[at - 1 : at + 1].max()
    later = np.arange(60) >= at
    assert (
        excesses(timeline.links(t_s, timeline.allowed(t_s) + later * bucket), timeline.events())
        == []
    )
    less = timeline.links(t_s, timeline.allowed(t_s) - later * bucket, waiting_bytes=1e12)
    assert shortfalls(less, timeline.events()) == []


@given(
    timeline=timelines(st.floats(20e6, 200e6), late_s=0.0),
    seed=st.integers(0, 99),
    start=st.integers(0, 45),
)
def test_a_link_that_carries_a_tenth_more_or_less_for_a_second_is_always_blamed(
    timeline: Timeline, seed: int, start: int
) -> None:
    t_s = moments(60, seed)
    allowed, gap = timeline.allowed(t_s), np.arange(59)
    inside = (gap >= start) & (gap < start + 14)
    [problem] = excesses(timeline.links(t_s, carried(allowed, 1 + 0.1 * inside)), timeline.events())
    assert problem.startswith("w0 up: carried ")
    [problem] = shortfalls(
        timeline.links(t_s, carried(allowed, 1 - 0.1 * inside), waiting_bytes=1e12),
        timeline.events(),
    )
    assert problem.startswith("w0 up: carried only ")


def carried(allowed: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Bits so far of a link that carries a share of what it may, from sample to sample."""
    return np.append(0.0, np.cumsum(np.diff(allowed) * share))


def test_a_change_inside_a_window_does_not_hide_what_is_wrong() -> None:
    """Down and up again every 20 ms for a whole minute, and no window without a change."""
    at_s = np.arange(1, 3000) * 0.02
    timeline = Timeline(at_s.tolist(), [50e6, 10e6] * 1500, late_s=[0.001] * len(at_s))
    t_s = moments(600, 1)
    allowed = timeline.allowed(t_s)
    assert excesses(timeline.links(t_s, allowed), timeline.events()) == []
    assert excesses(timeline.links(t_s, 1.1 * allowed), timeline.events())
    assert shortfalls(timeline.links(t_s, allowed, 1e9), timeline.events()) == []
    # A frame that has begun at the low rate is waited for after every rise, which is 4 % of what
    # may pass here.
    assert shortfalls(timeline.links(t_s, 0.95 * allowed, 1e9), timeline.events()) == []
    assert shortfalls(timeline.links(t_s, 0.85 * allowed, 1e9), timeline.events())


def test_a_change_that_takes_effect_late_and_is_said_to_be_on_time_is_an_excess() -> None:
    said, done = Timeline([2.0], [50e6, 10e6]), Timeline([2.08], [50e6, 10e6])
    t_s = moments(60, 0)
    [problem] = excesses(said.links(t_s, done.allowed(t_s)), said.events())
    assert "Mbit/s over 1" in problem and "above its limit of " in problem


def test_what_a_late_change_may_have_let_pass_is_allowed() -> None:
    """The driver says that a change came 50 ms late, and nobody knows when in between the kernel
    took it."""
    t_s = moments(60, 0)
    for share in (0.0, 1.0):
        timeline = Timeline([2.0, 3.0], [50e6, 10e6, 50e6], late_s=[0.05, 0.05], share=share)
        links = timeline.links(t_s, timeline.allowed(t_s), waiting_bytes=1e9)
        assert excesses(links, timeline.events()) == shortfalls(links, timeline.events()) == []


def test_the_figures_are_those_of_the_worst_window() -> None:
    timeline = Timeline([], [10e6])
    t_s = np.arange(60) / 10
    share = np.where((t_s[1:] > 2) & (t_s[1:] <= 3), 1.2, 0.5)
    [problem] = excesses(
        timeline.links(t_s, carried(timeline.allowed(t_s), share)), timeline.events()
    )
    assert problem == "w0 up: carried 12 Mbit/s over 1 s from 2 s on, above its limit of 10 Mbit/s"


def test_a_small_excess_of_a_thin_link_shows_in_a_longer_window() -> None:
    """Two frames are a quarter of a second at 100 kbit/s."""
    timeline, t_s = Timeline([], [1e5]), moments(400, 0)
    assert excesses(timeline.links(t_s, 1.1 * timeline.allowed(t_s)), timeline.events())
    assert (
        excesses(timeline.links(t_s[:20], 1.1 * timeline.allowed(t_s[:20])), timeline.events())
        == []
    )


def test_without_events_the_samples_say_what_the_limit_was() -> None:
    timeline, t_s = Timeline([2.0, 4.0], [50e6, 10e6, 50e6]), moments(60, 3)
    none = events_of({})
    assert excesses(timeline.links(t_s, timeline.allowed(t_s), 1e9), none) == []
    assert shortfalls(timeline.links(t_s, timeline.allowed(t_s), 1e9), none) == []
    assert excesses(timeline.links(t_s, 1.3 * timeline.allowed(t_s)), none)


def test_an_unlimited_link_may_carry_anything_but_only_as_long_as_it_is_unlimited() -> None:
    t_s = moments(60, 0)
    timeline = Timeline([2.0, 4.0], [10e6, 1e11, 10e6], late_s=[0.01, 0.01])
    events = events_of({"w0": [(0.0, 0.0, 10e6), (2.0, 2.01, None), (4.0, 4.01, 10e6)]})
    links = timeline.links(t_s, timeline.allowed(t_s), 1e9)
    assert excesses(links, events) == shortfalls(links, events) == []
    more = carried(timeline.allowed(t_s), np.where(t_s[1:] > 4.2, 1.2, 1.0))
    assert excesses(timeline.links(t_s, more), events)


@given(timeline=timelines(any_rate, late_s=0.05), seed=st.integers(0, 99))
def test_a_sample_that_took_long_to_read_blames_nobody(timeline: Timeline, seed: int) -> None:
    """A program that reads is off the processor for 50 ms at times; when in them it read, nobody
    knows."""
    t_s, draw = moments(60, seed), np.random.default_rng(seed)
    reading_s = np.where(draw.random(60) < 0.2, 0.05, 0.0)
    carried = timeline.allowed(np.maximum(t_s + reading_s * draw.choice([-0.5, 0.5], 60), t_s[0]))
    links = timeline.links(t_s, carried, waiting_bytes=1e12, reading_s=reading_s)
    assert excesses(links, timeline.events()) == shortfalls(links, timeline.events()) == []


def test_a_reading_at_a_rise_that_was_acknowledged_late_blames_nobody() -> None:
    """The rise came as it was due, in the middle of a reading that ended before the kernel's
    answer."""
    timeline = Timeline([2.02], [1e3, 5e7], late_s=[0.05], share=0.0)
    t_s = np.append(np.arange(0.0, 2.0, 0.1), [2.0, 2.5, 3.0])
    reading_s = np.where(t_s == 2.0, 0.06, 0.0)
    links = timeline.links(
        t_s, timeline.allowed(t_s + reading_s / 2), waiting_bytes=1e12, reading_s=reading_s
    )
    assert excesses(links, timeline.events()) == shortfalls(links, timeline.events()) == []


def test_a_single_late_reading_would_blame_a_link_that_kept_its_limit() -> None:
    """Seen in a run: 25 ms late at 250 Mbit/s, and 255.6 Mbit/s over the 1.1 s that began then."""
    t_s, timeline = np.arange(40) / 10, Timeline([], [250e6])
    late = t_s == 1.0
    links = {
        reading_s: timeline.links(
            t_s, timeline.allowed(t_s - 0.03 * late), 1e12, reading_s=reading_s * late
        )
        for reading_s in (0.0, 0.06)
    }
    assert excesses(links[0.0], timeline.events()) and not excesses(links[0.06], timeline.events())


def test_an_old_run_is_judged_by_the_bucket_it_had() -> None:
    """Eight frames, or 4 ms: a window may hold that much more."""
    timeline, t_s = Timeline([], [1e6]), np.arange(20) / 10
    for frames, blamed in ((8, False), (12, True)):
        more = timeline.allowed(t_s) + (t_s > 0.5) * frames * 1514 * 8
        assert (
            bool(excesses(timeline.links(t_s, more, burst_bytes=np.nan), timeline.events()))
            == blamed
        )


def pauses(
    t_s: np.ndarray, rate_bps: float, period_s: float, busy: float, queue_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """(carried bits, waiting bytes) of an honest link that is busy for a share of every period,
    from its beginning on."""
    number, within_s = np.divmod(t_s, period_s)
    left_s = np.maximum(busy * period_s - within_s, 0.0)
    sent = rate_bps * (number * busy * period_s + np.minimum(within_s, busy * period_s))
    return sent, np.minimum(left_s, queue_s) * rate_bps / 8


@given(
    rate_bps=st.floats(1e6, 1e9),
    period_s=st.floats(0.005, 2),
    busy=st.floats(0.02, 0.99),
    queue_s=st.floats(0.001, 0.5),
    seed=st.integers(0, 10_000),
)
def test_an_honest_link_that_pauses_between_two_samples_is_never_blamed(
    rate_bps: float, period_s: float, busy: float, queue_s: float, seed: int
) -> None:
    timeline, t_s = Timeline([], [rate_bps]), moments(300, seed)
    sent, waiting = pauses(t_s, rate_bps, period_s, busy, queue_s)
    assert shortfalls(timeline.links(t_s, sent, waiting), timeline.events()) == []


@pytest.mark.parametrize(
    ("share", "queue_s", "seconds"),
    [(0.8, 0.05, 7), (0.8, 0.2, 2), (0.9, 0.05, 15), (0.9, 0.2, 2), (0.5, 0.05, 3), (0.0, 0.05, 2)],
)
def test_a_link_that_is_slow_with_a_full_queue_is_noticed_the_sooner_the_slower_it_is(
    share: float, queue_s: float, seconds: int
) -> None:
    timeline = Timeline([], [50e6])
    for seed in range(20):
        t_s = moments(10 * seconds, seed)
        links = timeline.links(t_s, share * timeline.allowed(t_s), waiting_bytes=queue_s * 50e6 / 8)
        assert shortfalls(links, timeline.events())


def test_a_link_that_stands_still_with_a_full_queue_is_blamed() -> None:
    t_s = np.arange(60) / 10
    timeline = Timeline([], [50e6])
    share = np.where((t_s[1:] > 1) & (t_s[1:] <= 4), 0.0, 1.0)
    stuck = timeline.links(
        t_s, carried(timeline.allowed(t_s), share), np.where((t_s >= 1) & (t_s <= 4), 500, 0)
    )
    [problem] = shortfalls(stuck, timeline.events())
    assert (
        problem
        == "w0 up: carried only 0 Mbit/s over 2.9 s from 1 s on with packets in its queue, below"
        " its limit of 50 Mbit/s"
    )


def test_a_link_with_nothing_to_send_or_a_slow_one_is_not_blamed() -> None:
    t_s = moments(60, 0)
    fast, slow = Timeline([], [50e6]), Timeline([], [15e3])
    assert shortfalls(fast.links(t_s, 0 * t_s, 0), fast.events()) == []
    frames = np.floor(slow.allowed(t_s) / (8 * 1514)) * 8 * 1514  # one every 0.8 s
    assert shortfalls(slow.links(t_s, frames, 1514), slow.events()) == []


def test_a_link_too_slow_for_a_packet_a_second_is_not_blamed_until_some_should_have_left() -> None:
    """At 8 kbit/s a bucket of a frame, and the frame that leaves in debt, take 3 s."""
    timeline = Timeline([], [8e3])
    for seconds, blamed in ((3, False), (9, True)):
        t_s = np.arange(10 * seconds) / 10
        assert bool(shortfalls(timeline.links(t_s, 0 * t_s, 1514), timeline.events())) == blamed


def test_packets_dropped_from_a_queue_with_room_are_blamed() -> None:
    timeline, t_s = Timeline([], [10e6]), np.arange(60) / 10
    drops = np.minimum(np.arange(60), 30)
    links = timeline.links(t_s, 0.3 * timeline.allowed(t_s), 2000, queue_bytes=250_000, drops=drops)
    [problem] = validity.early_drops(validity.directions(links, timeline.events()))
    assert (
        problem
        == "w0 up: dropped 30 packets from 0 s on while its queue held at most 42.53 of 250 kB"
    )


@pytest.mark.parametrize(
    "change",
    [{"drops": 0.0}, {"backlog_bytes": 250_000}, {"queue_bytes": np.nan}, {"queue_bytes": 40_000}],
)
def test_drops_of_a_queue_that_may_have_been_full_are_not_blamed(change: dict[str, float]) -> None:
    timeline, t_s = Timeline([], [10e6]), np.arange(60) / 10
    links = timeline.links(
        t_s, 0.3 * timeline.allowed(t_s), 2000, queue_bytes=250_000, drops=np.arange(60)
    ).assign(**change)
    assert validity.early_drops(validity.directions(links, timeline.events())) == []


def two_hosts(arrived: float, drops: float = 0.0, lost: float = np.nan) -> pd.DataFrame:
    """w0 and w1 send 1 MB/s each, for 30 s; of every byte sent, a share arrives."""
    return link_rows(
        {
            "t_s": t_s / 10,
            "link": link,
            "direction": way,
            "bytes": 1e5 * t_s * (1 if way == "up" else arrived),
            "burst_bytes": 1514,
            "drops": t_s * drops if way == "down" else 0.0,
            "lost": t_s * lost,
        }
        for t_s in range(301)
        for link in ("w0", "w1")
        for way in ("up", "down")
    )


def test_bytes_that_no_link_received_are_missed() -> None:
    constant: dict[str, list[tuple[float, float, float | None]]] = {
        link: [(0.0, 0.0, 1e7)] for link in ("w0", "w1")
    }
    fine = host(0.5, 0.0)
    assert validity.lost_between_links(fine, two_hosts(1.0), events_of(constant)) == []
    [problem] = validity.lost_between_links(fine, two_hosts(0.99), events_of(constant))
    assert problem == "at least 0.4 MB that hosts sent came to no other link, of 60 MB"
    # What a queue dropped, or netem lost, is known.
    assert validity.lost_between_links(fine, two_hosts(0.99, drops=1.0), events_of(constant)) == []
    assert validity.lost_between_links(fine, two_hosts(0.99, lost=1.0), events_of(constant)) == []
    assert (
        validity.lost_between_links(fine, two_hosts(0.99), events_of(constant, connected=False))
        == []
    )
    # What was dropped before says nothing of what is missing afterwards.
    later = two_hosts(0.99)
    later.loc[later["t_s"] < 15, "drops"] = later["t_s"] * 10
    later.loc[later["t_s"] >= 15, "drops"] = 1000.0
    assert validity.lost_between_links(fine, later, events_of(constant))
    # Of 60 MB, 0.8 may be under way, over a trunk and a link.
    assert (
        validity.lost_between_links(fine, two_hosts(0.99), events_of(constant, delay_s=0.1)) == []
    )
    assert validity.lost_between_links(fine, two_hosts(0.95), events_of(constant, delay_s=0.1))
    # Two machines read their links at times of their own: what came between is not known.
    for arrived, missed in ((1.0, False), (0.95, True)):
        apart = two_hosts(arrived)
        one, way = apart["link"] == "w0", apart["direction"] == "up"
        apart.loc[one, "t_s"] += 0.04
        apart.loc[one, "bytes"] += 0.04e6 * np.where(way[one], 1.0, arrived)
        assert bool(validity.lost_between_links(fine, apart, events_of(constant))) == missed


def test_what_waits_between_links_while_a_processor_stands_still_is_not_missing() -> None:
    """0.6 of 60 MB that came 0.3 s later."""
    constant: dict[str, list[tuple[float, float, float | None]]] = {
        link: [(0.0, 0.0, 1e7)] for link in ("w0", "w1")
    }
    links = two_hosts(1.0)
    still = (links["direction"] == "down") & links["t_s"].between(10.0, 10.3)
    links.loc[still, "bytes"] = 1e5 * 100
    assert validity.lost_between_links(host(0.5, 0.0), links, events_of(constant)) == []


def test_changes_that_a_clock_cannot_place_are_blamed() -> None:
    """10 ms late are well, if the clock is known to 10 ms; not if it is known to 60."""
    events = events_of({"w0": [(1.0, 1.01, 1e6), (2.0, 2.01, 2e6)], "w1": [(2.0, 2.3, 1e6)]})
    assert (
        validity.unplaced_changes(events)
        == validity.unplaced_changes(events.assign(unsure_s=0.01))
        == []
    )
    [problem] = validity.unplaced_changes(events.assign(unsure_s=[0.0, 0.06, 0.06]))
    assert (
        problem == "1 of 3 states of links and flows cannot be placed within 50 ms of their time:"
        " the clock of the machine of w0 was known only to 60 ms"
    )


def test_samples_that_a_clock_cannot_place_are_blamed_where_there_are_several_machines() -> None:
    """A few are an accident."""
    links = pd.DataFrame({"link": "w0", "t_s": np.arange(40) / 10, "reading_s": 0.12})
    nodes, here = pd.DataFrame({"node": ["n1"]}), pd.DataFrame({"node": [""]})
    [problem] = validity.unplaced_samples(links, nodes)
    assert problem.startswith(
        "40 samples of w0 cannot be placed within 50 ms: the clock of its machine"
    )
    assert (
        validity.unplaced_samples(links, here)
        == validity.unplaced_samples(links, here.iloc[:0])
        == []
    )
    assert validity.unplaced_samples(links.iloc[:10], nodes) == []
    assert validity.unplaced_samples(links.assign(reading_s=0.08), nodes) == []


def test_changes_by_hand_are_no_evidence_for_a_spec(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", methods=("allreduce",))
    events = path / "cells" / "allreduce-s0" / "events.jsonl"
    last = json.loads(events.read_text().splitlines()[-1])
    for at_s in (23.1, 21.4):
        changed = {**last, "planned_s": at_s, "applied_s": at_s + 0.002, "kind": "manual"}
        append(events, [{**changed, "link": link} for link in ("w1", "w0")])
    assert summarize(load_run(path))["problems"] == [
        "allreduce-s0: its links were changed by hand: 2 times, first w1 at 21.4 s"
    ]
    once = events_of({"w0": [(3.2, 3.2, 1e6)]}, kind="manual")
    assert validity.manual_changes(once) == [
        "its links were changed by hand: 1 time, first w0 at 3.2 s"
    ]


# What ranks say


def told(
    claimed: float,
    sent: float,
    *,
    retransmits: float = 0.0,
    flows: Sequence[Any] = (),
    script: bool = False,
    scheme: str = "",
    ranks: int = 1,
    workers: int = 4,
) -> list[str]:
    """What the ranks of w0 are blamed for, whose steps of 1 s claim so many bytes each, and whose
    link carried so much TCP payload."""
    steps = pd.DataFrame(
        {
            "rank": 0,
            "step": range(20),
            "t_s": np.arange(20) + 1.5,
            "step_s": 1.0,
            "dense_bytes": 1e6,
        }
    )
    steps = steps.assign(payload_bytes=claimed, retransmits=retransmits, scheme=scheme)
    steps = pd.concat([steps.assign(rank=rank) for rank in range(ranks)])
    frames = sent / 1448 / 10 * np.arange(206)
    up = {
        "t_s": np.arange(206) / 10,
        "link": "w0",
        "direction": "up",
        "bytes": 1514 * frames,
        "packets": frames,
    }
    cell = {
        "workers": workers,
        "ranks_per_worker": ranks,
        "workload": {} if script else {"model": "mlp"},
    }
    return validity.misstated_payloads(
        cell, steps, pd.DataFrame(up), pd.DataFrame(flows, columns=list(TRAFFIC_COLUMNS))
    )


def test_a_rank_that_claims_more_than_its_link_carried_is_blamed() -> None:
    assert told(1e6, 1.005e6) == []
    assert told(1e6, 1.0e6) == []
    assert told(1e6, 0.9e6) == [
        "1 of 4 ranks say they sent more than their links carried (the worst: w0, 20 MB instead of"
        " 18.45 MB)"
    ]


def test_what_sockets_hold_when_a_step_ends_is_sent_afterwards() -> None:
    steps = pd.DataFrame(
        {"rank": 0, "step": range(4), "t_s": np.arange(4) + 1.5, "step_s": 1.0, "dense_bytes": 1e6}
    )
    steps = steps.assign(payload_bytes=1e6, retransmits=0.0, scheme="")
    t_s = np.arange(60) / 10
    frames = (1e6 * (t_s - 0.8)).clip(0, 4e6) / 1448
    up = pd.DataFrame(
        {"t_s": t_s, "link": "w0", "direction": "up", "bytes": 1514 * frames, "packets": frames}
    )
    cell, no_flow = (
        {"workers": 4, "workload": {"model": "mlp"}},
        pd.DataFrame(columns=list(TRAFFIC_COLUMNS)),
    )
    assert validity.misstated_payloads(cell, steps, up, no_flow) == []
    assert (
        "sent more"
        in validity.misstated_payloads(cell, steps.assign(payload_bytes=1.2e6), up, no_flow)[0]
    )


def test_a_rank_whose_link_carried_much_more_than_it_claims_is_blamed() -> None:
    [problem] = told(1e6, 1.3e6)
    assert problem.startswith(
        "1 of 4 ranks say they sent much less than their links carried (the worst: w0, 20 MB"
        " instead of 26"
    )
    assert told(1e6, 1.05e6) == []
    assert told(1e6, 1.3e6, flows=[{"from": "bg0", "to": "w0"}]) == []  # its acknowledgements go up
    assert told(1e6, 1.3e6, script=True) == []  # it may exchange what it likes
    assert told(1e6, 1.3e6, retransmits=np.nan) == []
    assert told(1e6, 1.3e6, retransmits=20 * 0.25e6 / 1448) == []


def test_what_the_ranks_of_a_host_say_is_added_up_as_far_as_it_leaves_the_host() -> None:
    """Two ranks that say 1 MB each: over a ring only one of them uses the link, by host what is
    said is what leaves."""
    for scheme in ("allreduce", "int8-ring", "allreduce/8", "int8-ring/8"):
        assert told(1e6, 1e6, scheme=scheme, ranks=2) == []
        assert "much less" in told(1e6, 1.5e6, scheme=scheme, ranks=2)[0]
    assert told(1e6, 1.5e6, scheme="int8", ranks=2) == []
    assert told(1e6, 2e6, scheme="host-int8-ring", ranks=2) == []
    assert told(1e6, 1.5e6, scheme="host-int8", ranks=2)[0].startswith(
        "the ranks of 1 of 4 hosts say they sent more than"
    )
    for scheme in ("allreduce", "host-int8", "int8"):
        assert "more than" in told(1e6, 0.8e6, scheme=scheme, ranks=2)[0]
        assert "much less than" in told(1e6, 2.5e6, scheme=scheme, ranks=2)[0]
    assert told(1e6, 0.0, scheme="int8", ranks=2, workers=1) == []  # nothing leaves the only host
    assert "much less than" in told(1e6, 1e6, scheme="int8", ranks=2, workers=1)[0]


def test_small_payloads_may_be_less_than_headers_and_buffers() -> None:
    assert told(5e3, 30e3) == []
    assert told(1e5, 0.5e6)


def test_nothing_is_said_of_steps_that_were_not_sampled_to_their_end() -> None:
    """A run that is going on: the last step was written after the last sample."""
    steps = pd.DataFrame(
        {
            "rank": [0],
            "step": 0,
            "t_s": 5.0,
            "step_s": 4.0,
            "payload_bytes": 1e6,
            "dense_bytes": 1e6,
        }
    )
    up = link_rows(
        {"t_s": n / 10, "link": "w0", "direction": "up", "bytes": 2e4 * n} for n in range(40)
    )
    cell = {"workers": 1, "workload": {"model": "mlp"}}
    no_flow = pd.DataFrame(columns=list(TRAFFIC_COLUMNS))
    assert validity.misstated_payloads(cell, steps.assign(retransmits=0.0), up, no_flow) == []


def test_a_method_that_counts_half_of_what_it_sends_spoils_its_cell(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", methods=("allreduce",))
    cell = path / "cells" / "allreduce-s0"
    config = json.loads((cell / "cell.json").read_text())
    (cell / "cell.json").write_text(json.dumps({**config, "workload": {"compute": "real"}}))
    assert summarize(load_run(path))["valid"]
    rows = steps_file(cell, 1).read_text()
    steps_file(cell, 1).write_text(
        rows.replace('"payload_bytes": 480000', '"payload_bytes": 240000')
    )
    assert (
        "1 of 2 ranks say they sent much less than their links carried"
        in summarize(load_run(path))["problems"][0]
    )


# The delay line


def line(late: float, overflowed: float = 0.0) -> pd.DataFrame:
    """10 s of a delay line of which of every 100 frames so many were late."""
    number = np.arange(101)
    columns = {
        "t_s": number / 10,
        "cpu_s": number / 100,
        "frames": 9999 + 100 * number,
        "late": 777 + late * number,
    }
    # what was before the first sample was calibration
    columns["overflowed"] = 5 + overflowed * (number > 50)
    return pd.DataFrame({**columns, "latest_s": 0.004, "held": 3}, columns=list(DELAYLINE_COLUMNS))


def test_a_delay_line_that_was_late_or_full_is_blamed() -> None:
    assert validity.delay_line(line(1.0)) == validity.delay_line(line(0.0)[:0]) == []
    [problem] = validity.delay_line(line(1.5))
    assert problem == "150 of 10000 frames (1.5 %) left the delay line late, by up to 4 ms"
    [problem] = validity.delay_line(line(0.0, overflowed=12))
    assert problem == "the delay line had no room for 12 frames, and was late by up to 4 ms"


def test_the_delay_line_of_a_cell_is_judged(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", methods=("allreduce",))
    append(path / "cells" / "allreduce-s0" / "delayline.jsonl", line(2.0).to_dict("records"))
    assert "left the delay line late" in summarize(load_run(path))["problems"][0]
