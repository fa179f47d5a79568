"""What a plan makes of links: how large packets may be, what is said of queues, what --dry-run
shows of the delay line."""

import pytest

from testbed.plan import describe, make_plan, notes
from testbed.spec.load import validate

pytestmark = pytest.mark.fast

FRAME, WHOLE = 1514, 46 * 1514
WORKLOAD = {"model": "mlp", "data": "digits", "batch": 8, "stop": {"seconds": 5}}


def plan_of(network, **more):
    spec = {
        "name": "x",
        "workers": 3,
        "network": network,
        "workload": WORKLOAD,
        "methods": ["bf16"],
    }
    return make_plan(validate({**spec, **more}))


def cell_of(network, **more):
    (cell,) = plan_of(network, **more).cells
    return cell


def packets(network, **more):
    return dict(cell_of(network, **more).lab.max_gso_bytes)


def test_a_host_sends_packets_as_large_as_its_own_link_takes_in_a_millisecond_whatever_others_have():
    link = {"rate": "900mbit"}
    traffic = [{"from": "bg0", "to": "w1", "udp": {"rate": "1mbit"}}]
    found = packets({"link": link, "links": {"w2": {"rate": "1mbit"}}}, traffic=traffic)
    assert found == {"w0": WHOLE, "w1": WHOLE, "w2": FRAME, "bg0": WHOLE}
    assert packets({"link": {"rate": "200mbit"}})["w0"] == 25_000


def test_it_is_the_fastest_state_of_the_run_that_counts_as_thin_states_cut_for_themselves():
    schedule = [{"at": "1s", "set": {"rate": "1mbit"}}, {"at": "2s", "set": {"rate": "100mbit"}}]
    assert packets({"link": {"rate": "10mbit"}}, schedule=schedule)["w0"] == 12_500


def test_where_netem_meets_single_packets_every_host_on_the_way_sends_frames():
    lossy = {
        "topology": "regions",
        "link": {"rate": "1gbit"},
        "regions": {"a": ["w0"], "b": ["w1"], "c": ["w2"]},
    }
    lossy["between"] = {
        "all": {"rate": "100mbit", "delay": "5ms"},
        "a-b": {"rate": "100mbit", "loss": "1%"},
    }
    assert packets({**lossy, "engine": "netem"}) == {"w0": FRAME, "w1": FRAME, "w2": WHOLE}
    # there the kernel cuts them for the delay line
    assert set(packets({**lossy, "engine": "userspace"}).values()) == {WHOLE}


def test_with_tbf_no_packet_is_larger_than_the_smallest_bucket():
    found = packets(
        {"link": {"rate": "900mbit"}, "links": {"w2": {"rate": "1mbit"}}, "shaper": "tbf"}
    )
    assert set(found.values()) == {8 * FRAME}


def test_a_queue_that_cannot_be_as_short_as_asked_is_told():
    assert notes(cell_of({"link": {"rate": "50mbit", "queue": "50ms"}})) == []
    assert notes(
        cell_of({"link": {"rate": "50mbit"}, "links": {"w1": {"rate": "1mbit", "queue": "10ms"}}})
    ) == ["the queue of w1 holds 12112us at 1mbit instead of 10ms: a frame must fit"]


def test_the_dry_run_shows_what_the_delay_line_is_told_and_only_what_changes():
    network = {"link": {"rate": "20mbit", "delay": "5ms"}, "engine": "userspace"}
    lines = describe(
        plan_of(network, schedule=[{"at": "1s", "links": "w1", "set": {"delay": "9ms"}}])
    )
    assert sum("[delay line]" in line and "delay 5000us" in line for line in lines) == 3
    later = [line for line in lines if line.startswith("  t=1s")]
    assert len(later) == 1
    assert "[delay line] w1 down: netem" in later[0]
    assert "delay 9000us" in later[0]
    assert not any("handle 7e51" in line for line in lines)
    assert any("delay line in user space" in line for line in lines)
