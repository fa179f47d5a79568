"""Entries of a schedule about workers: what they become, what is refused, and what results make of
restarts."""

from pathlib import Path

import pytest
from synthetic_run import append, steps_file, write_cell
from test_results import cell_of, step
from test_validity import step_rows

from testbed.plan import describe, make_plan
from testbed.results import validity
from testbed.results.load import load_run
from testbed.spec.errors import SpecError
from testbed.spec.load import validate
from testbed.timeline.workers import Kills, Slowdown
from testbed.worker.program import Compute

SPEC = {"workers": 2, "methods": ["allreduce"]}
PACED = {"compute": {"pace": "100ms"}, "stop": {"seconds": 30}}


def plan(schedule, workload=PACED, **changes):
    return make_plan(validate({**SPEC, "workload": workload, "schedule": schedule, **changes}))


def test_entries_about_workers_stand_beside_those_about_links():
    (cell,) = plan(
        [
            {"at": "9s", "restart": ["w1", "w0"]},
            {"at": "2s", "set": {"rate": "1mbit"}},
            {"at": "5s", "kill": "w1"},
            {"at": "3s", "slow": {"w1": 3}, "for": "4s"},
        ],
        dilation=2,
    ).cells
    assert cell.kills == (Kills(10.0, ("w1",), False), Kills(18.0, ("w1", "w0"), True))
    assert cell.slowdowns == (Slowdown("w1", 6.0, 14.0, 3.0),)
    assert len(cell.timeline) == 2 and cell.may_restart and not cell.restarts
    compute = cell.config()["workload"]["compute"]
    assert [Compute.of(compute, 1).factor(t_s) for t_s in (5.9, 6.0, 13.9, 14.0)] == [1, 3, 3, 1]
    assert Compute.of(compute, 0).factor(7.0) == 1
    lines = "\n".join(describe(plan([{"at": "5s", "kill": "w1"}, {"at": "6s", "slow": {"w0": 2}}])))
    assert "t=5s kill w1\n" in lines and "t=6s to the end: w0 computes 2 times as long" in lines


def test_what_happens_to_a_worker_happens_to_all_of_its_ranks():
    workload = {"compute": {"pace": "100ms", "stragglers": {"w1": 2}}, "stop": {"seconds": 30}}
    several = {"ranks_per_worker": 2, "network": {"connections": 3}}
    planned = plan([{"at": "3s", "slow": {"w1": 3}}], workload, **several)
    (cell,) = planned.cells
    assert (list(cell.ranks), list(cell.ranks_of("w1"))) == ([0, 1, 2, 3], [2, 3])
    compute = cell.config()["workload"]["compute"]
    assert [Compute.of(compute, rank).seconds for rank in cell.ranks] == [0.1, 0.1, 0.2, 0.2]
    assert [Compute.of(compute, rank).factor(4.0) for rank in cell.ranks] == [1, 1, 3, 3]
    lines = "\n".join(describe(planned))
    assert "2 workers of 2 ranks\n  3 connections between any two ranks\n" in lines


BAD_WORKERS = [
    ({"kill": "w7"}, "schedule[0]", "there is no worker 'w7'; there are w0 to w1"),
    ({"kill": []}, "schedule[0]", "must not be empty"),
    ({"slow": {"w0": 0}}, "schedule[0]", "0.1"),
    ({"slow": {"w3": 2}}, "schedule[0]", "there is no worker 'w3'"),
    ({"slow": {"w0": 2}, "for": "0s"}, "schedule[0]", "greater than 0"),
    ({"slow": {"w0": 2}, "for": "60s"}, "schedule[0].for", "comes after the end of the run at 30s"),
    ({"kill": "w0", "at": "40s"}, "schedule[0].at", "comes after the end of the run"),
    ({"kill": "w0", "for": "1s"}, "schedule[0].for", "belongs to a"),
    ({"kil": "w0"}, "schedule[0].kil", "did you mean 'kill'"),
]


@pytest.mark.parametrize(("entry", "place", "words"), BAD_WORKERS)
def test_what_is_wrong_with_them(entry, place, words):
    with pytest.raises(SpecError) as raised:
        plan([{"at": "1s", **entry}])
    (found, text), *_ = raised.value.errors
    assert found.startswith(place) and words in text, raised.value.errors


def test_real_compute_cannot_be_slowed_down():
    with pytest.raises(SpecError) as raised:
        plan([{"at": "1s", "slow": {"w0": 2}}], workload={"stop": {"seconds": 30}})
    assert raised.value.errors == [
        (
            "schedule[0].slow",
            (
                "what real compute takes is for this machine to say; it needs compute: {pace: …} or"
                " {emulate: …}"
            ),
        )
    ]


def test_a_slow_time_is_no_missed_pace():
    rows = step_rows([0.02, 0.06]).assign(t_s=[0.1, 0.2, 0.3] * 2)
    paced = {"pace_s": 0.02, "factors": [1, 1], "slow": [[1, 0.0, None, 3.0]]}
    assert validity.missed_pace(rows, paced) == []
    assert validity.missed_pace(rows, {**paced, "slow": [[1, 0.0, 0.1, 3.0]]})


def test_steps_that_are_done_again_count_once(tmp_path: Path) -> None:
    """Three steps, a failure at 3.5 s, all trains again at 5 s from step 1 on: four steps of 10
    samples by 8 s."""
    cell = write_cell(tmp_path / "cells" / "c", evaluated=False)
    for records_file in cell.glob("hosts/*/steps*.jsonl"):
        records_file.unlink()
    append(steps_file(cell, 0), [step(0, number, number + 1.0) for number in range(3)])
    append(
        steps_file(cell, 0).with_name("steps-1.jsonl"),
        [step(0, number, number + 5.0) for number in range(1, 4)],
    )
    failure = {"planned_s": 3.0, "worker": "w0", "text": "was ended by signal 9; its log is empty"}
    kinds = {"kill": 3.0, "failure": 3.5, "restart": 5.0}
    append(
        cell / "failures.jsonl",
        [{**failure, "t_s": t_s, "kind": kind} for kind, t_s in kinds.items()],
    )
    run = load_run(tmp_path)
    found = cell_of(run, "c")
    assert (found["restarts"], found["lost_steps"]) == (1, 2)
    assert found["throughput_samples_per_s"] == pytest.approx(40 / 8)
    assert len(run.steps) == 6


def test_a_kill_that_came_late_is_blamed(tmp_path: Path) -> None:
    cell = write_cell(tmp_path / "cells" / "c")
    append(
        cell / "failures.jsonl",
        [{"planned_s": 3.0, "t_s": 3.2, "worker": "w1", "kind": "kill", "text": ""}],
    )
    assert "w1 was killed 200 ms after its time, 3 s" in validity.late_kills(
        load_run(tmp_path).failures
    )
