"""Competing traffic as data: what flows when, where its hosts are, and what a bad spec is told."""

from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from testbed.labs.base import LabError
from testbed.links.state import LinkState
from testbed.plan import describe, make_plan
from testbed.run.machine import check_traffic
from testbed.spec.errors import SpecError
from testbed.spec.load import dump_spec, load_spec, read_yaml, validate
from testbed.traffic.flows import Duration, Flow, Streams, phases
from testbed.traffic.iperf3 import Transcript

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
BASE = {
    "workers": 2,
    "network": {"link": {"rate": "20mbit"}},
    "workload": {"stop": {"seconds": 20}},
    "methods": ["allreduce"],
}
TCP = {"from": "bg0", "to": "w1", "tcp": {}}

durations = st.builds(Duration, st.floats(0.1, 1e3), st.booleans())
pauses = st.one_of(st.just((None, None)), st.tuples(durations, durations))
streams = st.builds(
    lambda pair, ramp: Streams(*sorted(pair), ramp=ramp),
    st.tuples(st.integers(1, 128), st.integers(1, 128)),
    st.booleans(),
)


@st.composite
def flows(draw):
    at_s = draw(st.floats(0, 1e4))
    on, off = draw(pauses)
    return Flow(
        name=draw(st.sampled_from(["bg0-w0", "bg0-w1"])),
        source="bg0",
        target="w0",
        kind="tcp",
        at_s=at_s,
        end_s=draw(
            st.one_of(
                st.just(float("inf")), st.floats(0.1, 1e5).map(lambda seconds: at_s + seconds)
            )
        ),
        streams=draw(streams),
        on=on,
        off=off,
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def cell_of(*traffic, **changes):
    return make_plan(validate({**BASE, **changes, "traffic": list(traffic)})).cells[0]


@given(flows())
def test_phases_are_in_order_apart_and_within_the_flow(flow):
    found = list(islice(phases(flow), 50))
    assert found[0].at_s == flow.at_s
    assert all(flow.at_s <= phase.at_s < phase.end_s <= flow.end_s for phase in found)
    assert all(before.end_s < after.at_s for before, after in pairwise(found))
    assert all(flow.streams.fewest <= phase.streams <= flow.streams.most for phase in found)
    if flow.on is None:
        assert [phase.end_s for phase in found] == [flow.end_s]


@given(flows())
def test_the_same_flow_has_the_same_phases_on_every_host(flow):
    again = Flow.from_json(flow.to_json())
    assert again == flow
    assert list(islice(phases(again), 20)) == list(islice(phases(flow), 20))


def test_seeds_and_names_make_independent_draws():
    def draws(name, seed):
        on = Duration(5, exponential=True)
        flow = Flow(name, "bg0", "w0", "tcp", streams=Streams(1, 50), on=on, off=on, seed=seed)
        return list(islice(phases(flow), 2000))

    first = draws("bg0-w0", 0)
    assert draws("bg0-w0", 1) != first != draws("bg0-w1", 0)
    assert {phase.streams for phase in first} == set(range(1, 51))
    assert fmean(phase.end_s - phase.at_s for phase in first) == pytest.approx(5, rel=0.1)


def test_the_pattern_of_the_paper_is_one_line(tmp_path):
    line = "{from: bg0, to: w0, tcp: {streams: {random: [1, 50]}}, on: 60s, off: 10s, seed: 3}"
    path = tmp_path / "paper.yaml"
    path.write_text(
        yaml.safe_dump({**BASE, "workload": {"stop": {"seconds": 600}}}) + f"traffic:\n  - {line}\n"
    )
    spec = validate(read_yaml(path))
    (flow,) = make_plan(spec).cells[0].flows
    found = list(islice(phases(flow), 8))
    assert [(phase.at_s, phase.end_s) for phase in found] == [
        (70 * n, 70 * n + 60) for n in range(8)
    ]
    assert len({phase.streams for phase in found}) > 4
    path.write_text(dump_spec(spec))
    assert validate(read_yaml(path)) == spec


def test_streams_may_become_one_more_with_every_phase(tmp_path):
    """As in the script of the paper's authors: 1, 2, … and in the end from the beginning."""
    flow = {**TCP, "tcp": {"streams": {"ramp": [2, 4]}}, "on": "2s", "off": "1s"}
    assert [phase.streams for phase in islice(phases(cell_of(flow).flows[0]), 5)] == [2, 3, 4, 2, 3]
    path = tmp_path / "ramp.yaml"
    path.write_text(dump_spec(validate({**BASE, "traffic": [flow]})))
    assert make_plan(validate(read_yaml(path))).cells[0].flows == cell_of(flow).flows


def test_the_shipped_example_is_good_and_has_that_pattern():
    cell, *_ = make_plan(load_spec(ROOT / "experiments" / "schedules" / "competing.yaml")).cells
    assert cell.flows[0].streams == Streams(1, 50)
    assert cell.flows[0].on is not None


def test_hosts_exist_because_traffic_names_them_and_are_no_workers():
    cell = cell_of(
        {**TCP, "from": "bg10"},
        {"from": "bg2", "to": "bg10", "udp": {"rate": "5mbit"}},
        TCP,
        {**TCP, "at": "3s"},
    )
    assert cell.workers == ("w0", "w1")
    assert cell.config()["workers"] == 2
    assert cell.lab.hosts == ("w0", "w1", "bg0", "bg2", "bg10")
    assert cell.lab.links["bg2"] == LinkState()
    assert [flow.name for flow in cell.flows] == ["bg10-w1", "bg2-bg10", "bg0-w1", "bg0-w1-2"]
    assert len({flow.port for flow in cell.flows}) == 4


def test_all_links_of_a_schedule_are_the_links_of_the_workers():
    network = {"topology": "dumbbell", "trunk": {"rate": "50mbit"}, "link": {"rate": "20mbit"}}
    schedule = [
        {"at": "1s", "set": {"rate": "9mbit"}},
        {"at": "2s", "links": ["bg0", "trunk"], "set": {"rate": "8mbit"}},
    ]
    changes = cell_of(TCP, network=network, schedule=schedule).timeline
    assert [change.link for change in changes] == ["w0", "w1", "bg0", "trunk"]


@pytest.mark.parametrize(
    ("network", "switches"),
    [
        ({"topology": "star"}, {"switch": ("w0", "w1", "bg0", "bg1")}),
        ({"topology": "dumbbell", "trunk": {}}, {"left": ("w0", "bg0", "bg1"), "right": ("w1",)}),
        (
            {"topology": "dumbbell", "trunk": {}, "left": ["w0", "bg0"]},
            {"left": ("w0", "bg0"), "right": ("w1", "bg1")},
        ),
        (
            {
                "topology": "regions",
                "regions": {"eu": ["w0"], "us": ["w1", "bg1"]},
                "between": {"all": {}},
            },
            {"eu": ("w0", "bg0"), "us": ("w1", "bg1")},
        ),
    ],
)
def test_hosts_of_traffic_have_their_place_in_every_topology(network, switches):
    assert cell_of(TCP, {**TCP, "to": "bg1"}, network=network).lab.switches == switches


BAD_FLOWS = [
    (
        {"to": "w2"},
        "traffic[0].to",
        "there is no host 'w2'; did you mean 'w1'? valid: w0, w1, and bg0, bg1, …",
    ),
    ({"from": "bg01"}, "traffic[0].from", "there is no host 'bg01'"),
    ({"to": "bg0"}, "traffic[0].to", "is the host that it comes from"),
    ({"frm": "bg0"}, "traffic[0].frm", "did you mean 'from'?"),
    ({"at": "20s"}, "traffic[0].at", "after the end of the run at 20s"),
    ({"for": "0s"}, "traffic[0].for", "at least 100ms"),
    ({"udp": {"rate": "5mbit"}}, "traffic[0]", "exactly one of tcp and udp"),
    ({"tcp": None, "udp": {"rate": "5mb"}}, "traffic[0].udp.rate", "bit, kbit, mbit, gbit"),
    ({"tcp": None, "udp": {}}, "traffic[0].udp.rate", "is missing"),
    ({"tcp": None, "udp": {"rate": "5mbit", "packet": "9000B"}}, "traffic[0].udp.packet", "1472"),
    ({"tcp": {"streams": 0}}, "traffic[0].tcp.streams", "1 to 128"),
    ({"tcp": {"streams": "four"}}, "traffic[0].tcp.streams", "{random: [1, 50]}"),
    (
        {"tcp": {"streams": {"random": [50, 1]}}},
        "traffic[0].tcp.streams",
        "the smaller number first",
    ),
    ({"on": "5s"}, "traffic[0].off", "is missing"),
    ({"on": "5s", "off": {"mena": "5s"}}, "traffic[0].off", "{mean: 60s}"),
    ({"on": "5", "off": "5s"}, "traffic[0].on", "no unit"),
    ({"engine": "netperf"}, "traffic[0].engine", "valid: builtin, iperf3"),
]


@pytest.mark.parametrize(("entry", "place", "words"), BAD_FLOWS)
def test_a_fault_is_named_with_its_place_and_mend(entry, place, words):
    raw = {key: value for key, value in {**TCP, **entry}.items() if value is not None}
    with pytest.raises(SpecError) as error:
        cell_of(raw)
    ((found, text),) = error.value.errors
    assert found == place
    assert words in text


def test_a_place_for_a_host_that_no_traffic_names_is_a_fault():
    network = {"topology": "dumbbell", "trunk": {}, "left": ["w0", "bg5"]}
    with pytest.raises(SpecError, match=r"network\.left\[1\]: there is no host 'bg5'"):
        cell_of(TCP, network=network)


def test_a_dry_run_tells_what_flows():
    lines = describe(
        make_plan(
            validate(
                {
                    **BASE,
                    "traffic": [
                        {
                            **TCP,
                            "at": "3s",
                            "for": "5s",
                            "tcp": {"streams": 4, "congestion": "reno"},
                        },
                        {
                            "from": "bg0",
                            "to": "bg1",
                            "udp": {"rate": "5mbit"},
                            "on": "10s",
                            "off": "2s",
                            "engine": "iperf3",
                        },
                    ],
                }
            )
        )
    )
    assert lines[-3:] == [
        "  t=3s [bg0] 4 TCP streams (reno) to w1 until t=8s",
        "  t=0s [bg0] UDP 5mbit in packets of 1200B to bg1 until t=10s, by iperf3",
        "  t=12s [bg0] UDP 5mbit in packets of 1200B to bg1 to the end, by iperf3",
    ]


def test_what_the_machine_lacks_is_refused_with_the_mend(monkeypatch):
    with pytest.raises(
        LabError, match=r"no congestion control 'nope'; valid: .*reno.*modprobe tcp_nope"
    ):
        check_traffic([Flow("bg0-w0", "bg0", "w0", "tcp", congestion="nope")], "netns")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LabError, match="apt-get install iperf3"):
        check_traffic([Flow("bg0-w0", "bg0", "w0", "tcp", engine="iperf3")], "netns")


SERVED = """\
Server listening on 5201 (test #1)
Accepted connection from 10.77.0.3, port 53504
[  5] local 10.77.0.1 port 5201 connected to 10.77.0.3 port 53512
[  8] local 10.77.0.1 port 5201 connected to 10.77.0.3 port 53522
[ ID] Interval           Transfer     Bitrate
[  5]   0.00-0.10   sec   128 KBytes  10000 Kbits/sec                  \n\
[  8]   0.00-0.10   sec   128 KBytes  20000 Kbits/sec                  \n\
[SUM]   0.00-0.10   sec   256 KBytes  30000 Kbits/sec                  \n\
[  5]   0.10-0.20   sec  0.00 Bytes  0.00 Kbits/sec                  \n\
[  8]   0.10-0.20   sec   128 KBytes  10000 Kbits/sec                  \n\
[  8]   0.10-0.20   sec   128 KBytes  10000 Kbits/sec                  \n\
[  8]   0.00-0.20   sec   512 KBytes  40000 Kbits/sec                  receiver
"""
SERVED_UDP = """\
Server listening on 5201 (test #2)
[  5] local 127.0.0.1 port 5999 connected to 127.0.0.1 port 45053
[  5]   0.00-0.10   sec  60.9 KBytes  4982 Kbits/sec  0.073 ms  2/52 (4%)  \n\
[  5]   0.10-0.20   sec  60.9 KBytes  4985 Kbits/sec  0.119 ms  0/52 (0%)  \n\
[  5]   0.00-0.20   sec  718 KBytes  5349 Kbits/sec  0.049 ms  2/104 (2%)  receiver
"""


def test_iperf3_is_understood():
    counted = Transcript(Flow("bg0-w0", "bg0", "w0", "tcp"))
    for line in SERVED.splitlines():
        counted.take(line)
    assert (counted.bytes, counted.streams, counted.packets) == (500_000, 2, None)
    counted.take("Server listening on 5201 (test #2)")
    assert (counted.bytes, counted.streams) == (500_000, 0)

    counted = Transcript(Flow("bg0-w0", "bg0", "w0", "udp", packet_bytes=1200))
    for line in SERVED_UDP.splitlines():
        counted.take(line)
    assert (counted.bytes, counted.streams, counted.packets, counted.lost) == (
        102 * 1200,
        None,
        102,
        2,
    )
