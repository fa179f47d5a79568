"""Competing traffic in whole runs in the netns lab: what flows is what was asked for, recorded, and
shares the links."""

import json

import pandas as pd
import pytest

import testbed
from tests.integration.test_run_netns import SPEC, only_run, run

pytestmark = pytest.mark.netns

PAYLOAD_SHARE = 1448 / 1514
STOP_S = 6


def carried(table: pd.DataFrame, from_s: float, to_s: float) -> float:
    """Bytes that a cumulative column ``bytes`` grew by between two times."""
    inside = table[table["t_s"].between(from_s, to_s)]["bytes"]
    return inside.max() - inside.min()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("finished")
    code, out, err = run(
        tmp_path,
        network={"link": {"rate": "20mbit"}, "links": {"bg2": {"rate": "20mbit"}}},
        schedule=[],
        traffic=[
            {"from": "bg0", "to": "w1", "at": "1s", "tcp": {"streams": 4}},
            {
                "from": "bg1",
                "to": "bg2",
                "at": "500ms",
                "for": "4s",
                "tcp": {"streams": 2, "congestion": "reno"},
            },
            {"from": "bg2", "to": "bg1", "udp": {"rate": "2mbit"}, "on": "1s", "off": "500ms"},
        ],
        workload={**SPEC["workload"], "stop": {"seconds": STOP_S}},
        methods=["allreduce"],
    )
    assert code == 0, out + err
    return testbed.load_run(only_run(tmp_path))


def flow_of(run, name):
    return run.traffic[run.traffic["flow"] == name]


def link_of(run, name, direction="down"):
    return run.links[(run.links["link"] == name) & (run.links["direction"] == direction)]


def test_hosts_of_traffic_are_no_workers(finished):
    assert finished.cells["workers"].tolist() == [2]
    assert set(finished.steps["rank"]) == {0, 1}
    assert set(finished.links["link"]) == {"w0", "w1", "bg0", "bg1", "bg2"}
    assert not list(finished.path.rglob("*.jsonl"))


def test_every_phase_began_and_ended_on_time(finished):
    events = finished.events[finished.events["kind"] == "traffic"].sort_values("planned_s")
    lateness = events["applied_s"] - events["planned_s"]
    assert lateness.between(0, 0.05).all(), events
    alone = events[events["link"] == "bg1-bg2"]
    assert [json.loads(state) for state in alone["state"]] == [{"streams": 2}, {"streams": 0}]
    assert alone["planned_s"].tolist() == [0.5, 4.5]


def test_goodput_of_a_flow_alone_on_its_link_is_what_the_kernel_counted(finished):
    flow, link = flow_of(finished, "bg1-bg2"), link_of(finished, "bg2")
    assert carried(flow, 0, STOP_S) / PAYLOAD_SHARE == pytest.approx(
        carried(link, 0, STOP_S), rel=0.05
    )
    goodput_bps = carried(flow, 1.5, 4.5) * 8 / 3
    assert 0.9 * 20e6 * PAYLOAD_SHARE <= goodput_bps <= 1.01 * 20e6
    assert flow["streams"].max() == 2
    assert flow["t_s"].diff().median() == pytest.approx(0.1, abs=0.02)


def test_a_flow_and_the_workers_share_a_link(finished):
    flow, link = flow_of(finished, "bg0-w1"), link_of(finished, "w1")
    steps = finished.steps[finished.steps["t_s"].between(1, STOP_S)]
    # In a ring, what rank 0 sends is what rank 1 receives.
    payload = steps[steps["rank"] == 0]["payload_bytes"].sum()
    competing = carried(flow, 1, STOP_S)
    # four streams leave short messages little: 460 kB and more were seen
    assert min(payload, competing) > 200_000
    assert payload + competing <= carried(link, 1, STOP_S) <= 1.02 * 20e6 / 8 * (STOP_S - 1)
    before = finished.steps[finished.steps["t_s"] < 1]["step_s"].median()
    assert steps["step_s"].median() > 1.5 * before


def test_udp_flows_at_its_rate_in_its_phases(finished):
    flow = flow_of(finished, "bg2-bg1")
    for begin_s in (0, 1.5, 3):
        assert carried(flow, begin_s, begin_s + 1.2) * 8 == pytest.approx(2e6, rel=0.1)
        assert carried(flow, begin_s + 1.2, begin_s + 1.5) == 0
    assert flow["lost"].max() == 0


def test_a_flow_that_dies_fails_the_cell_and_says_why(tmp_path, monkeypatch):
    broken = tmp_path / "bin" / "iperf3"
    broken.parent.mkdir()
    broken.write_text(
        "#!/bin/sh\necho 'iperf3: error - out of paper' >&2\necho Server listening\n[ $1 = -s ] &&"
        " sleep 60\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:/usr/bin:/bin")
    traffic = [{"from": "bg0", "to": "w1", "tcp": {}, "engine": "iperf3"}]
    code, out, _ = run(tmp_path, traffic=traffic, methods=["allreduce"])
    assert code == 1
    assert "out of paper" in out
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert "send the traffic bg0-w1" in summary["problems"][0]
