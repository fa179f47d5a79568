"""Traces: what a file says, and what its replay makes of it."""

import itertools
import runpy
from bisect import bisect_right
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from testbed.links.state import LinkParameters, LinkState, Loss
from testbed.plan import make_plan
from testbed.run.directory import create
from testbed.spec.errors import SpecError
from testbed.spec.load import load_spec
from testbed.timeline import expand
from testbed.timeline.patterns import parse_entry
from testbed.timeline.recording import PACKET_BITS, parse_recording

pytestmark = pytest.mark.fast

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ONE = {"w0": LinkState(LinkParameters(rate_bps=50_000_000), LinkParameters(rate_bps=50_000_000))}
EXAMPLE = "t_s,rate_mbps\n0,10\n1,0\n1.5,0\n2,30\n3,40\n"

steps = st.lists(st.integers(1, 5000), min_size=2, max_size=30)
packets = (
    st.lists(st.integers(0, 3000), min_size=1, max_size=300)
    .map(sorted)
    .filter(lambda times: times[-1] > 0)
)


def replay(text=EXAMPLE, end_s=None, at="0s", **keys):
    """Changes of w0 under a trace with this text."""
    return expand(
        [parse_entry({"at": at, "trace": "a.csv", **keys})], ONE, end_s=end_s, read=lambda _: text
    )


def rate_at(changes, at_s):
    return changes[
        bisect_right([change.at_s for change in changes], at_s + 1e-6) - 1
    ].state.down.rate_bps


def csv_of(gaps_ms, rates_bps):
    times = [0, *itertools.accumulate(gaps_ms)]
    rows = [f"{time},{rate}" for time, rate in zip(times, rates_bps, strict=False)]
    return "\n".join(["t_ms,rate_bps", *rows]) + "\n"


@st.composite
def csvs(draw):
    gaps = draw(steps)
    size = len(gaps) + 1
    return csv_of(
        gaps, draw(st.lists(st.integers(8000, 10**9), min_size=size, max_size=size, unique=True))
    )


@given(steps, st.data())
def test_a_csv_says_what_was_written(gaps, data):
    size = len(gaps) + 1
    columns = {
        name: data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))
        for name in ("rate_bps", "delay_s", "loss")
    }
    times = [0, *itertools.accumulate(gaps)]
    rows = [",".join(map(repr, row)) for row in zip(times, *columns.values(), strict=True)]
    recording = parse_recording("\n".join([",".join(["t_ms", *columns]), *rows]))
    assert {name: list(values) for name, values in recording.columns.items()} == columns
    assert recording.times_s == pytest.approx([time / 1e3 for time in times])
    assert recording.length_s == pytest.approx((times[-1] + gaps[-1]) / 1e3)


@pytest.mark.parametrize(
    "text",
    [
        "t_s,rate_mbps,delay_ms,loss_percent\n0,12,10,1\n2,0.5,20,0\n",
        "t,rate,delay,loss\n0s,12mbit,10ms,1%\n2s,500kbit,20ms,0%\n",
        (
            '# made by hand\n\nloss, "delay_us", rate_kbps, t_ms\r\n0.01, 10000, 12000, 5000\r\n0,'
            " 20000, 500, 7000\r\n"
        ),
        "t,rate,delay,loss\n1e3,12000kbit,0.01s,0.01\n1002,0.5mbit/s,20000us,0\n",
    ],
)
def test_units_stand_in_the_header_or_in_the_cells(text):
    recording = parse_recording(text)
    assert recording.times_s == pytest.approx((0, 2))
    assert recording.length_s == pytest.approx(4)
    assert recording.columns["rate_bps"] == pytest.approx((12e6, 500e3))
    assert recording.columns["delay_s"] == pytest.approx((0.01, 0.02))
    assert recording.columns["loss"] == pytest.approx((0.01, 0))


@given(packets, st.integers(1, 500))
def test_counting_packets_keeps_their_bytes(times, window_ms):
    recording = parse_recording("\n".join(map(str, times)), window_ms / 1e3)
    ends = (*recording.times_s[1:], recording.length_s)
    rates = recording.columns["rate_bps"]
    bits = sum(
        rate * (end - start)
        for rate, start, end in zip(rates, recording.times_s, ends, strict=True)
    )
    assert bits == pytest.approx(len(times) * PACKET_BITS)
    assert recording.length_s == times[-1] / 1e3
    widths = [end - start for start, end in zip(recording.times_s, ends, strict=True)]
    assert widths[:-1] == pytest.approx([window_ms / 1e3] * (len(widths) - 1))
    assert widths[-1] <= 1.5 * window_ms / 1e3 + 1e-9


def test_a_packet_belongs_to_the_window_that_it_ends():
    recording = parse_recording("0\n50\n100\n101\n200\n")
    assert recording.columns["rate_bps"] == pytest.approx(
        (3 * PACKET_BITS / 0.1, 2 * PACKET_BITS / 0.1)
    )


def test_a_replay_has_the_rows_at_their_times_and_a_rate_of_nothing_is_an_outage():
    assert [(change.at_s, change.state.up.rate_bps) for change in replay()] == [
        (0, 10_000_000),
        (1, 0),  # and nothing at 1.5, where nothing changes
        (2, 30_000_000),
        (3, 40_000_000),
    ]
    assert {change.at_s for change in replay(at="5s")} == {5, 6, 7, 8}


@given(csvs(), st.integers(1, 3))
def test_repetitions_are_shifted_copies(text, times):
    length_s = round(parse_recording(text).length_s, 6)
    once = replay(text)
    again = replay(text, repeat=True, end_s=round(length_s * (times + 1), 6))
    assert len(again) == len(once) * (times + 1)
    for number, change in enumerate(again):
        original = once[number % len(once)]
        assert change.at_s == pytest.approx(
            original.at_s + number // len(once) * length_s, abs=2e-6
        )
        assert change.state == original.state


@given(csvs(), st.floats(1, 50), st.floats(1, 10))
def test_scaling_is_linear(text, rate, time):
    plain, scaled = (
        replay(text, scale={"rate": 1, "time": 1}),
        replay(text, scale={"rate": rate, "time": time}),
    )
    assert [change.at_s for change in scaled] == pytest.approx(
        [change.at_s * time for change in plain], abs=2e-6
    )
    expected = [max(8000, change.state.down.rate_bps * rate) for change in plain]
    assert [change.state.down.rate_bps for change in scaled] == pytest.approx(expected, abs=1)
    assert replay(text, scale=rate) == replay(text, scale={"rate": rate})


@given(csvs(), st.floats(0, 0.99), st.booleans())
def test_an_offset_begins_inside_the_recording(text, share, repeat):
    length_s = parse_recording(text).length_s
    offset_ms = int(share * length_s * 1e3)
    whole = replay(text, repeat=repeat, end_s=3 * length_s)
    cut = replay(text, repeat=repeat, offset=f"{offset_ms}ms", end_s=2 * length_s)
    assert cut[0].at_s == 0
    for change in cut:
        assert change.state.down.rate_bps == rate_at(whole, change.at_s + offset_ms / 1e3)


def test_all_columns_are_replayed_each_in_its_direction():
    text = "t_s,rate_mbps,delay_ms,jitter_ms,loss_percent\n0,10,5,1,1\n1,20,6,2,60\n"
    first, second = replay(text, scale={"rate": 2, "delay": 3, "loss": 2})
    assert first.state.up == LinkParameters(rate_bps=20_000_000)
    assert first.state.down == LinkParameters(
        rate_bps=20_000_000,
        delay_s=pytest.approx(0.015),
        jitter_s=pytest.approx(0.003),
        loss=Loss(0.02),
    )
    assert second.state.down.loss == Loss(1.0)
    only = replay(text, direction="down")[0].state
    assert (only.up, only.down.rate_bps) == (ONE["w0"].up, 10_000_000)
    only = replay(EXAMPLE, direction="up")[0].state
    assert (only.up.rate_bps, only.down) == (10_000_000, ONE["w0"].down)


def test_a_trace_ends_with_its_time_and_with_the_run():
    assert replay(**{"for": "2s"})[-1].at_s == 1
    assert replay(end_s=2.5)[-1].at_s == 2
    assert replay(repeat=True, end_s=100)[-1].at_s == 99
    with pytest.raises(SpecError, match=r"schedule\[0\].for: is missing"):
        replay(repeat=True)


@pytest.mark.parametrize(
    "text",
    [
        "1\n",  # 12 Mbit/s in Mahimahi's way
        # the same, written out; its windows differ by a rounding
        "\n".join(map(str, range(1, 1001))),
        "t_s,rate_mbps,delay_ms\n0,12,0\n1,12,0\n",
    ],
)
def test_a_constant_that_is_repeated_is_one_change_in_a_run_of_any_length(text):
    for end_s in (None, 10, 1e7):
        (change,) = replay(text, repeat=True, end_s=end_s)
        assert (change.at_s, change.state.up.rate_bps, change.state.down.rate_bps) == (
            0,
            12_000_000,
            12_000_000,
        )


def test_mahimahis_constant_rate_is_good_in_a_run_of_steps(tmp_path):
    (tmp_path / "t.packets").write_text("1\n")
    path = spec_with(
        tmp_path,
        [{"at": "0s", "trace": "t.packets", "repeat": True}],
        workload={"stop": {"steps": 9}},
    )
    (cell,) = make_plan(load_spec(path), tmp_path).cells
    assert [change.state.down.rate_bps for change in cell.timeline] == [12_000_000]


@pytest.mark.parametrize(
    ("text", "keys", "words"),
    [
        (
            "t_s,delay_s\n0,1\n1,900\n",
            {"scale": {"delay": 2}},
            "trace: a.csv has delays above 1000s",
        ),
        (EXAMPLE, {"scale": {"delay": 2}}, "scale.delay: a.csv has no delay that could be scaled"),
        (
            "t_s,delay_ms\n0,1\n1,2\n",
            {"scale": 2},
            "scale.rate: a.csv has no rate that could be scaled",
        ),
        ("", {}, "trace: a.csv is empty"),
        ("# nothing\n", {}, "trace: a.csv is empty"),
        ("t_s,rate_mbps\n", {}, "trace: a.csv line 1: has less than two rows"),
        ("t_s\n0\n1\n", {}, "trace: a.csv line 1: the header has no column besides the time"),
        (
            "rate_mbps,loss\n0,1\n1,1\n",
            {},
            "trace: a.csv line 1: the header has no column for the time",
        ),
        (
            "t_s,rate_mb\n0,1\n1,1\n",
            {},
            "trace: a.csv line 1: unknown column 'rate_mb'; did you mean 'rate_mbps'?",
        ),
        ("t_s,rate,rate_bps\n0,1,1\n1,1,1\n", {}, "trace: a.csv line 1: rate has two columns"),
        ("0.0,5\n0.1,6\n", {}, "trace: a.csv line 1: '0.0' is neither the header of a CSV"),
        (
            "#\nt_s,rate_mbps\n0,1\n\n1,x\n",
            {},
            "trace: a.csv line 5: rate_mbps: 'x' is not a number",
        ),
        (
            "t_s,rate_mbps\n0,1\n1,\n",
            {},
            "trace: a.csv line 3: rate_mbps: is empty; give a value in every row",
        ),
        (
            "t_s,rate_mbps\n0,1\n1,nan\n",
            {},
            "trace: a.csv line 3: rate_mbps: nan is not a number from 0",
        ),
        (
            "t_s,rate_mbps\n0,1\n1,-4\n",
            {},
            "trace: a.csv line 3: rate_mbps: -4 is not a number from 0",
        ),
        ("t_s,rate_mbps\n0,1\n1,2,3\n", {}, "trace: a.csv line 3: has 3 cells, the header has 2"),
        (
            "t_s,rate_mbps\n0,1\n0,2\n",
            {},
            "trace: a.csv line 3: t is 0 s after 0 s on the line before; it must increase",
        ),
        (
            "t_s,rate\n0,1mbit\n1,12\n",
            {},
            "trace: a.csv line 3: rate: '12' has no unit; write a rate like 50mbit",
        ),
        ("t_s,loss\n0,1\n1,5\n", {}, "trace: a.csv line 3: loss: '5' is out of range"),
        (
            "t_s,loss_percent\n0,1\n1,101\n",
            {},
            "trace: a.csv line 3: loss_percent: 101 is out of range",
        ),
        ("t_s,delay\n0,1ms\n1,fast\n", {}, "trace: a.csv line 3: delay: 'fast' is not a time"),
        ("t_us,rate_mbps\n0,1\n10,2\n", {}, "trace: a.csv has rows less than 1ms apart"),
        (
            "t_s,rate_gbps\n0,1\n1,99\n",
            {"scale": 2},
            "trace: a.csv has rates above 100gbit; scale them down",
        ),
        ("1\n2\nx\n", {}, "trace: a.csv line 3: 'x' is not a whole number of milliseconds"),
        ("1\n3\n2\n", {}, "trace: a.csv line 3: 2 ms comes before the 3 ms of the line before"),
        ("0\n0\n", {}, "trace: a.csv line 2: it ends at 0 ms"),
        ("1\n9999999999\n", {}, "trace: a.csv makes 100,000,000 windows"),
        (
            EXAMPLE,
            {"every": "1s"},
            "every: is for packet-delivery files; a.csv has times of its own",
        ),
        (EXAMPLE, {"offset": "4s"}, "offset: 4s is not within a.csv, which ends at 4s"),
        ("t_s,delay_ms\n0,1\n1,2\n", {"direction": "up"}, "direction: a.csv has more than a rate"),
    ],
    ids=itertools.count(),
)
def test_what_is_wrong_with_a_trace_is_named_with_its_line(text, keys, words):
    with pytest.raises(SpecError) as raised:
        replay(text, **keys)
    assert str(raised.value).startswith("schedule[0]." + words)


def spec_with(directory, schedule, **more):
    data = {
        "name": "traced",
        "workers": 1,
        "network": {"link": {"rate": "50mbit"}},
        "schedule": schedule,
        "workload": {"stop": {"seconds": 10}},
        "methods": ["allreduce"],
        **more,
    }
    directory.mkdir(exist_ok=True)
    path = directory / "spec.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_run_directory_has_its_traces_so_that_it_can_be_resumed_from_anywhere(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.csv").write_text(EXAMPLE)
    (tmp_path / "a.csv").write_text("t_s,rate_mbps\n0,70\n1,80\n")
    schedule = [{"at": "0s", "trace": "../one/a.csv"}, {"at": "5s", "trace": "../a.csv"}]
    matrix = {"schedule.0.trace": ["../one/a.csv", "../a.csv"]}
    path = spec_with(tmp_path / "specs", schedule, matrix=matrix)
    spec = load_spec(path)
    plan = make_plan(spec, path.parent)
    directory = create(spec, tmp_path / "runs", path.parent)
    (tmp_path / "one" / "a.csv").unlink()
    (tmp_path / "a.csv").unlink()
    again = make_plan(load_spec(directory / "spec.yaml"), directory)
    assert [cell.timeline for cell in again.cells] == [cell.timeline for cell in plan.cells]
    assert (
        len({cell.timeline for cell in plan.cells}) == len({cell.name for cell in again.cells}) == 2
    )
    assert sorted(path.name for path in (directory / "traces").iterdir()) == ["a-2.csv", "a.csv"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("b.csv", "b.csv does not exist beside the spec; did you mean 'a.csv'? valid: a.csv"),
        ("no/a.csv", "no/a.csv does not exist beside the spec; there is no file in"),
        ("../specs", "../specs is a directory"),
        ("binary", "binary cannot be read: it is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, words):
    path = spec_with(tmp_path / "specs", [{"at": "0s", "trace": name}])
    (path.parent / "a.csv").write_text(EXAMPLE)
    (path.parent / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError) as raised:
        make_plan(load_spec(path), path.parent)
    assert str(raised.value).startswith(f"schedule[0].trace: {words}")


@pytest.mark.parametrize(
    "path",
    sorted([*(EXPERIMENTS / "schedules").glob("*.yaml"), *(EXPERIMENTS / "wan").glob("*.yaml")]),
    ids=lambda path: path.name,
)
def test_shipped_schedules_are_good_and_survive_their_run_directory(path, tmp_path):
    spec = load_spec(path)
    plan = make_plan(spec, path.parent)
    directory = create(spec, tmp_path, path.parent)
    again = load_spec(directory / "spec.yaml")
    assert make_plan(again, directory) == plan


def test_shipped_traces_are_what_their_generator_makes():
    traces = runpy.run_path(str(EXPERIMENTS / "traces" / "generate.py"))["TRACES"]
    for name, make in traces.items():
        text = (EXPERIMENTS / "traces" / name).read_text()
        assert make() == text
        assert len(text) < 30_000
        assert 60 <= parse_recording(text).length_s <= 120
    files = {
        path.name
        for path in (EXPERIMENTS / "traces").iterdir()
        if path.suffix not in (".py", ".md")
    }
    assert files - {"__pycache__"} == set(traces)
