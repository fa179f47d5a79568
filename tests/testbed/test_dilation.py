"""Time dilation: what is slowed down, and what is reported."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.plan import Cell, make_plan
from testbed.results.load import load_run
from testbed.results.summary import summarize
from testbed.spec.load import validate
from tests.testbed.synthetic_run import write_run

SPEC = {
    "workers": 4,
    "network": {"link": {"rate": "100mbit", "delay": "10ms", "queue": "50ms"}},
    "schedule": [{"at": "2s", "links": ["w1"], "ramp": {"rate": "50mbit"}, "over": "2s"}],
    "traffic": [
        {"from": "bg0", "to": "w1", "at": "3s", "for": "4s", "udp": {"rate": "5mbit"}},
        {"from": "bg0", "to": "w2", "tcp": {"streams": 2}, "on": "2s", "off": "1s"},
    ],
    "workload": {
        "stop": {"seconds": "10s"},
        "compute": {"pace": "20ms", "stragglers": {"w3": 2}},
        "evaluate_every": "1s",
    },
    "methods": ["netsense"],
}


def cell(dilation: float) -> Cell:
    return make_plan(validate({**SPEC, "dilation": dilation})).cells[0]


@given(st.floats(1, 50))
def test_everything_is_slower_by_the_same_factor(factor: float) -> None:
    real, slow = cell(1), cell(factor)
    for name, state in real.lab.links.items():
        for side in ("up", "down"):
            a, b = getattr(state, side), getattr(slow.lab.links[name], side)
            if a.rate_bps is None:  # that of the host that sends the traffic
                assert b.rate_bps is None
                continue
            assert b.rate_bps == pytest.approx(a.rate_bps / factor, abs=1)
            assert (b.delay_s, b.queue_s) == pytest.approx((a.delay_s * factor, a.queue_s * factor))
            assert b.rate_bps * b.queue_s == pytest.approx(a.rate_bps * a.queue_s, rel=1e-4)
    assert [c.at_s for c in slow.timeline] == pytest.approx(
        [c.at_s * factor for c in real.timeline], abs=1e-5
    )
    assert [c.state.up.rate_bps for c in slow.timeline] == pytest.approx(
        [c.state.up.rate_bps / factor for c in real.timeline], abs=1
    )
    for a, b in zip(real.flows, slow.flows, strict=True):
        assert (b.at_s, b.end_s, b.rate_bps) == pytest.approx(
            (a.at_s * factor, a.end_s * factor, a.rate_bps / factor), abs=1
        )
    assert slow.flows[1].on is not None and slow.flows[1].on.seconds == pytest.approx(2 * factor)
    assert slow.stop == pytest.approx({"seconds": 10 * factor})
    if factor > 1:  # CUBIC's window would not be slowed down
        assert (slow.lab.tcp.congestion, slow.lab.tcp.min_rto_s) == (
            "reno",
            pytest.approx(0.2 * factor),
        )
    workload = slow.config()["workload"]
    assert workload is not None
    assert workload["compute"] == {
        "pace_s": pytest.approx(0.02 * factor),
        "factors": [1, 1, 1, 2],
        "slow": [],
    }
    assert workload["evaluate_every_s"] == pytest.approx(factor)
    assert workload["stop"] == slow.stop


def test_a_congestion_control_that_the_spec_names_stays() -> None:
    spec = validate({**SPEC, "dilation": 2, "network": {**SPEC["network"], "congestion": "cubic"}})
    assert make_plan(spec).cells[0].lab.tcp.congestion == "cubic"
    assert cell(1).lab.tcp.congestion is None  # the kernel's own


def test_times_are_reported_as_if_nothing_had_been_slowed_down(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    clocked, reported = load_run(run), None
    for file in run.glob("cells/*/cell.json"):
        file.write_text(file.read_text().replace('"workers"', '"dilation": 4.0, "workers"', 1))
    reported = load_run(run)
    for column in ("t_s", "step_s", "comm_s"):
        assert (4 * reported.steps[column]).to_list() == pytest.approx(
            clocked.steps[column].to_list()
        )
    assert (reported.links["rate_bps"] / 4).to_list() == pytest.approx(
        clocked.links["rate_bps"].to_list()
    )
    assert reported.steps["payload_bytes"].equals(clocked.steps["payload_bytes"])
    before, after = summarize(clocked), summarize(reported)
    assert after["valid"] and before["valid"]  # judged in the machine's own time
    for a, b in zip(before["cells"], after["cells"], strict=True):
        assert b["throughput_samples_per_s"] == pytest.approx(4 * a["throughput_samples_per_s"])
        assert b["step_s_median"] == pytest.approx(a["step_s_median"] / 4)


def test_lateness_is_judged_in_the_machines_own_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", late_s=0.06)
    for file in run.glob("cells/*/cell.json"):
        file.write_text(file.read_text().replace('"workers"', '"dilation": 4.0, "workers"', 1))
    [problem, *_] = summarize(load_run(run))["problems"]
    assert "60 ms late" in problem
