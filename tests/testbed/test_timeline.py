"""Properties of timelines: order, completeness, exact ends, takeover; and what each pattern
promises."""

import itertools
from bisect import bisect_right
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from testbed.links.state import LinkParameters, LinkState, Loss
from testbed.spec.errors import SpecError
from testbed.spec.models import LinkSpec
from testbed.timeline import expand
from testbed.timeline.pairs import values_at
from testbed.timeline.patterns import PATTERNS, parse_entry
from testbed.timeline.recording import Recording
from testbed.timeline.updates import interpolate

pytestmark = pytest.mark.fast

LINKS = {
    name: LinkState(LinkParameters(rate_bps=50_000_000), LinkParameters(rate_bps=50_000_000))
    for name in ("w0", "w1", "w2")
}
ONE = {"w0": LINKS["w0"]}

times = st.integers(0, 10_000).map(lambda ms: f"{ms}ms")
lengths = st.integers(1, 3000).map(lambda ms: f"{ms}ms")
rates = st.integers(1, 1000).map(lambda mbit: f"{mbit}mbit")
pairs = st.lists(rates, min_size=2, max_size=2, unique=True)
properties = st.fixed_dictionaries(
    {"rate": rates}, optional={"delay": times, "up": st.fixed_dictionaries({"rate": rates})}
)
pairs = st.one_of(
    st.fixed_dictionaries(
        {"rate": pairs}, optional={"delay": st.lists(times, min_size=2, max_size=2)}
    ),
    st.fixed_dictionaries({"down": st.fixed_dictionaries({"rate": pairs})}),
)
links = st.one_of(
    st.just("all"), st.lists(st.sampled_from(sorted(LINKS)), min_size=1, max_size=3, unique=True)
)


def of(pattern, optional=None, **keys):
    head = {"at": times, "links": links}
    return st.fixed_dictionaries(
        {**head, **keys, pattern: properties if pattern in ("set", "ramp") else pairs},
        optional=optional,
    )


sets = of("set")
ramps = of("ramp", over=lengths, every=st.integers(1, 500).map(lambda ms: f"{ms}ms"))
sawtooths = of(
    "sawtooth", {"for": lengths}, period=st.integers(200, 3000).map(lambda ms: f"{ms}ms")
)
squares = of(
    "square",
    {"for": lengths},
    period=st.integers(20, 3000).map(lambda ms: f"{ms}ms"),
    duty=st.floats(0.1, 0.9),
)
walks = of(
    "walk",
    {"for": lengths},
    step=st.floats(0.01, 1),
    seed=st.integers(0, 5),
    every=st.just("100ms"),
)
anything = st.one_of(sets, ramps, sawtooths, squares, walks)


def entries(raw):
    return [parse_entry(entry) for entry in raw]


def down(changes, link="w0"):
    """Times and rates of one link."""
    track = [change for change in changes if change.link == link]
    return [change.at_s for change in track], [change.state.down.rate_bps for change in track]


def one(end_s=None, **entry):
    return down(expand([parse_entry({"at": "0s", **entry})], ONE, end_s=end_s))


def value_at(track, at_s):
    starts, values = track
    return values[bisect_right(starts, at_s) - 1]


@given(st.lists(anything, max_size=6))
def test_changes_are_ordered_and_one_for_each_moment_and_link(raw):
    changes = expand(entries(raw), LINKS, end_s=20)
    places = [(change.at_s, change.link) for change in changes]
    assert places == sorted(set(places))
    assert {change.link for change in changes} <= set(LINKS)
    assert all(change.at_s < 20 for change in changes)


@given(st.lists(sets, min_size=1, max_size=8))
def test_the_last_set_of_a_property_wins(raw):
    schedule = entries(raw)
    final = dict(LINKS)
    for change in expand(schedule, LINKS):
        final[change.link] = change.state
    for name, state in LINKS.items():
        for entry in sorted(schedule, key=lambda e: e.at):
            if entry.links == ["all"] or name in entry.links:
                state = entry.set.applied_to(state)
        assert final[name] == state


@given(st.lists(anything, max_size=4), times, properties)
def test_a_later_entry_takes_over_whatever_was_going_on(raw, at, wanted):
    last = parse_entry({"at": at, "set": wanted})
    schedule = [entry for entry in entries(raw) if entry.at <= last.at]
    changes = expand([*schedule, last], LINKS, end_s=20)
    given = LinkSpec.model_validate(wanted)
    for change in changes:
        if change.at_s >= round(last.at, 6):
            assert change.state == given.applied_to(change.state)
    before = [
        change for change in expand(schedule, LINKS, end_s=20) if change.at_s < round(last.at, 6)
    ]
    assert [change for change in changes if change.at_s < round(last.at, 6)] == before


@given(ramps)
def test_a_ramp_ends_exactly_at_its_target_on_time_and_never_turns(raw):
    # it begins with 50
    raw = {**raw, "ramp": {**raw["ramp"], "rate": raw["ramp"]["rate"].replace("50mbit", "51mbit")}}
    (entry,) = entries([raw])
    name = "w0" if entry.links == ["all"] else entry.links[0]
    track = [change for change in expand([entry], LINKS) if change.link == name]
    assert track[-1].at_s == pytest.approx(entry.at + entry.over, abs=2e-6)
    assert track[-1].state.down.rate_bps == entry.ramp.rate
    values = [50_000_000, *(change.state.down.rate_bps for change in track)]
    assert values in (sorted(values), sorted(values, reverse=True))
    gaps = [b.at_s - a.at_s for a, b in pairwise(track)]
    assert all(gap <= (entry.every or 0.1) + 2e-6 for gap in gaps)


def test_a_later_entry_takes_over_from_a_running_ramp():
    changes = expand(
        entries(
            [
                {
                    "at": "0s",
                    "links": "w0",
                    "ramp": {"rate": "10mbit"},
                    "over": "4s",
                    "every": "1s",
                },
                {"at": "2.5s", "links": "w0", "set": {"rate": "90mbit"}},
            ]
        ),
        LINKS,
    )
    assert [(change.at_s, change.state.up.rate_bps) for change in changes] == [
        (1.0, 40_000_000),
        (2.0, 30_000_000),
        (2.5, 90_000_000),
    ]


def test_changing_one_property_keeps_the_others():
    changes = expand(
        entries(
            [
                {"at": "1s", "links": "w1", "set": {"delay": "5ms"}},
                {"at": "2s", "set": {"rate": "9mbit"}},
            ]
        ),
        LINKS,
    )
    state = changes[-2].state
    assert changes[-2].link == "w1"
    assert state == LinkState(
        LinkParameters(rate_bps=9_000_000), LinkParameters(rate_bps=9_000_000, delay_s=0.005)
    )


def test_a_partition_stays_until_it_is_ended_and_touches_nothing_else():
    schedule = entries(
        [
            {"at": "1s", "set": {"up": False}},
            {"at": "2s", "set": {"rate": "9mbit"}},
            {"at": "3s", "set": {"up": True}},
        ]
    )
    assert [
        (change.state.connected, change.state.up.rate_bps) for change in expand(schedule, ONE)
    ] == [
        (False, 50_000_000),
        (False, 9_000_000),
        (True, 9_000_000),
    ]


def test_on_a_trunk_everything_holds_in_both_directions_and_all_means_what_it_is_told():
    schedule = entries(
        [
            {"at": "1s", "set": {"rate": "9mbit"}},
            {"at": "2s", "links": "trunk", "set": {"delay": "5ms"}},
        ]
    )
    changes = expand(schedule, {"w0": LINKS["w0"], "trunk": LINKS["w1"]}, ["w0"], trunks={"trunk"})
    assert [change.link for change in changes] == ["w0", "trunk"]
    assert (
        changes[1].state.up
        == changes[1].state.down
        == LinkParameters(rate_bps=50_000_000, delay_s=0.005)
    )


def test_a_ramp_needs_a_rate_to_start_from():
    with pytest.raises(
        SpecError, match=r"schedule\[0\].ramp.rate: link w0 has no rate to start from"
    ):
        expand(
            entries([{"at": "1s", "ramp": {"rate": "5mbit"}, "over": "1s"}]), {"w0": LinkState()}
        )


unequal = st.lists(st.integers(1, 1000), min_size=2, max_size=2, unique=True)


@given(unequal, st.integers(200, 5000), st.integers(1, 100))
def test_a_sawtooth_repeats_with_its_period_and_meets_both_values(ends, period_ms, every_ms):
    low, high = ends
    rate, period = [f"{low}mbit", f"{high}mbit"], f"{period_ms}ms"
    starts, values = one(
        end_s=3 * period_ms / 1e3, sawtooth={"rate": rate}, period=period, every=f"{every_ms}ms"
    )
    steps = len(values) // 3
    assert values == values[:steps] * 3
    assert values[:steps] in (sorted(values[:steps]), sorted(values[:steps], reverse=True))
    assert (values[0], values[steps - 1]) == (low * 10**6, high * 10**6)
    assert sum(values[:steps]) / steps == pytest.approx((low + high) / 2 * 1e6, abs=1)
    assert starts[steps] == pytest.approx(period_ms / 1e3, abs=1e-6)
    assert min(b - a for a, b in pairwise(starts)) >= every_ms / 1e3 - 2e-6


@given(unequal, st.integers(20, 5000), st.floats(0.1, 0.9))
def test_a_square_has_each_value_for_its_share_of_the_period(ends, period_ms, duty):
    first, second = ends
    period_s = period_ms / 1e3
    track = one(
        end_s=4 * period_s,
        square={"rate": [f"{first}mbit", f"{second}mbit"]},
        period=f"{period_ms}ms",
        duty=duty,
    )
    assert track[1] == [first * 10**6, second * 10**6] * 4
    for cycle in range(4):
        assert track[0][2 * cycle] == pytest.approx(cycle * period_s, abs=1e-6)
        assert track[0][2 * cycle + 1] == pytest.approx((cycle + duty) * period_s, abs=1e-6)


def test_a_square_can_cut_a_link_and_change_a_queue():
    entry = parse_entry(
        {"at": "1s", "square": {"up": [False, True], "queue": ["5ms", "8ms"]}, "period": "2s"}
    )
    states = [change.state for change in expand([entry], ONE, end_s=4)]
    assert [(state.connected, state.down.queue_s) for state in states] == [
        (False, 0.005),
        (True, 0.008),
        (False, 0.005),
    ]


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.01, 1), st.integers(0, 100))
def test_a_walk_stays_within_its_bounds_and_takes_no_step_too_far(low, more, step, seed):
    high = low + more
    starts, values = one(
        end_s=10, walk={"rate": [f"{low}mbit", f"{high}mbit"]}, every="100ms", step=step, seed=seed
    )
    assert 95 <= len(values) <= 100, "only a step that rounds to nothing is left out"
    assert all(round(at_s * 10, 6).is_integer() for at_s in starts)
    assert all(low * 10**6 <= value <= high * 10**6 for value in values)
    assert max(abs(b - a) for a, b in pairwise(values)) <= step * more * 10**6 + 1


def test_a_walk_is_the_same_for_a_seed_everywhere_and_another_on_every_link():
    walk = {"at": "0s", "walk": {"rate": ["5mbit", "50mbit"]}, "seed": 7}
    changes = expand([parse_entry(walk)], LINKS, end_s=1000)
    assert changes == expand([parse_entry(walk)], LINKS, end_s=1000)
    # As any machine must have it.
    assert down(changes)[1][:4] == [39_759_622, 35_326_878, 28_022_432, 36_737_718]
    assert down(changes)[1] != down(changes, "w1")[1]
    other = expand([parse_entry({**walk, "seed": 8})], LINKS, end_s=1000)
    assert down(other)[1] != down(changes)[1]
    # Its two directions walk together, and in the long run it is everywhere equally often.
    assert all(change.state.up.rate_bps == change.state.down.rate_bps for change in changes)
    values = sorted(down(changes)[1])
    assert values[len(values) // 4] == pytest.approx(16.25e6, rel=0.25)
    assert values[len(values) * 3 // 4] == pytest.approx(38.75e6, rel=0.15)


@pytest.mark.parametrize("pattern", sorted(set(PATTERNS) - {"set", "ramp", "trace"}))
def test_a_pattern_ends_with_its_time_or_with_the_run_and_needs_one_of_them(pattern):
    keys = {pattern: {"rate": ["10mbit", "50mbit"]}}
    keys |= {"every": "100ms"} if pattern == "walk" else {"period": "400ms"}
    assert one(end_s=3, **keys)[0][-1] < 3
    timed = one(**keys, **{"for": "2s"})
    assert timed[0][-1] < 2
    assert one(end_s=2, **keys) == timed
    with pytest.raises(
        SpecError, match=r"schedule\[0\].for: is missing, as the run has no stop.seconds"
    ):
        one(**keys)
    with pytest.raises(
        SpecError, match=r"schedule\[0\].for: 9s comes after the end of the run at 8s"
    ):
        one(end_s=8, **keys, **{"for": "9s"})


@given(st.floats(0, 1), st.floats(0, 1e9), st.floats(0, 1e9))
def test_interpolation_stays_between_and_meets_its_ends(share, first, second):
    assert interpolate(first, second, 0.0) == first
    assert interpolate(first, second, 1.0) == second
    assert (
        min(first, second) * (1 - 1e-9)
        <= interpolate(first, second, share)
        <= max(first, second) * (1 + 1e-9)
    )


def test_loss_moves_with_its_bursts():
    assert interpolate(Loss(), Loss(0.1), 0.5) == Loss(0.05)
    assert interpolate(Loss(), Loss(0.1, burst=8.0), 0.5) == Loss(0.05, burst=8.0)
    assert interpolate(Loss(0.1, burst=8.0), Loss(), 0.5) == Loss(0.05, burst=8.0)
    assert interpolate(Loss(0.25, burst=8.0), Loss(0.5, burst=4.0, bad_loss=0.5), 0.5) == Loss(
        0.375, burst=6.0, bad_loss=0.75
    )


@given(anything)
def test_an_entry_survives_a_round_trip(raw):
    (entry,) = entries([raw])
    again = parse_entry(entry.model_dump(mode="json", exclude_none=True, by_alias=True))
    assert again == entry
    assert expand([again], LINKS, end_s=20) == expand([entry], LINKS, end_s=20)


def test_loss_as_a_mapping_survives_a_round_trip():
    pair = {
        "loss": [{"share": "1%", "burst": 8}, {"share": "5%", "burst": 8}],
        "rate": ["1mbit", "2mbit"],
    }
    entry = parse_entry({"at": "0s", "sawtooth": pair, "period": "1s"})
    assert parse_entry(entry.model_dump(mode="json", exclude_none=True, by_alias=True)) == entry
    changes = expand([entry], ONE, end_s=1)
    assert (changes[0].state.down.loss, changes[-1].state.down.loss) == (
        Loss(0.01, burst=8.0),
        Loss(0.05, burst=8.0),
    )
    assert changes[-1].state.up.loss == Loss()


def test_there_is_a_limit_to_the_number_of_changes(monkeypatch):
    monkeypatch.setattr("testbed.timeline.changes.MAX_CHANGES", 1000)
    walk = parse_entry({"at": "0s", "walk": {"rate": ["5mbit", "50mbit"]}, "every": "10ms"})
    assert len(expand([walk], ONE, end_s=10)) == 1000
    with pytest.raises(
        SpecError, match=r"schedule\[0\]: the schedule makes more than 1,000 changes"
    ):
        expand([walk], ONE, end_s=10.01)


SAME, APART = {"rate": ["5mbit", "5mbit"]}, {"rate": ["5mbit", "9mbit"]}


@pytest.mark.parametrize(
    "entry",
    [
        {"square": SAME, "period": "2ms"},
        {"square": APART, "period": "2ms"},
        {"sawtooth": SAME, "period": "10000000s", "every": "1ms"},
        {"sawtooth": APART, "period": "10ms", "every": "1ms"},
        {"walk": SAME, "every": "1ms"},
        {"walk": APART, "every": "1ms"},
        {"walk": APART, "every": "1ms", "step": 1e-12},
        {"ramp": {"rate": "50mbit"}, "over": "10000000s", "every": "1ms"},
        {"trace": "1\n2\n", "repeat": True},
        {"trace": "t_ms,rate_mbps\n0,1\n1,1\n2,1\n", "repeat": True},
        {
            "trace": (
                "t_ms,rate_mbps\n" + "".join(f"{row},{1 + row // 499}\n" for row in range(500))
            ),
            "repeat": True,
        },
    ],
    ids=itertools.count(),
)
def test_nothing_that_a_schedule_asks_for_goes_on_and_on(entry, monkeypatch):
    """Whatever is pulled or computed counts for the limit, whether it changes anything or not."""
    pulled = itertools.count()

    def once_more(*_):
        assert next(pulled) < 8000, "goes on and on"

    def counted(make):
        return lambda *given, **keys: (once_more() or update for update in make(*given, **keys))

    monkeypatch.setattr("testbed.timeline.changes.MAX_CHANGES", 1000)
    monkeypatch.setattr(Recording, "replay", counted(Recording.replay))
    for pattern in PATTERNS.values():
        monkeypatch.setattr(pattern, "updates", counted(pattern.updates))
    for name in ("sawtooth", "walk"):
        monkeypatch.setattr(
            f"testbed.timeline.patterns.{name}.values_at",
            lambda *given: once_more() or values_at(*given),
        )
    try:
        assert (
            len(
                expand([parse_entry({"at": "0s", **entry})], ONE, end_s=1e7, read=lambda text: text)
            )
            == 1
        )
    except SpecError as error:
        assert "the schedule makes more than 1,000 changes" in str(error)


def test_a_move_that_changes_nothing_is_left_out():
    assert one(end_s=1, square=SAME, period="100ms") == ([0.0], [5_000_000])
    assert one(end_s=1, walk=SAME, every="100ms") == ([0.0], [5_000_000])
    # But it takes over from what went on, even if it finds the same value.
    ramp = {"at": "0s", "ramp": {"rate": "10mbit"}, "over": "4s", "every": "1s"}
    changes = expand(entries([ramp, {"at": "2s", "set": {"rate": "30mbit"}}]), ONE)
    assert down(changes) == ([1, 2], [40_000_000, 30_000_000])


def test_jitter_never_needs_a_packet_that_arrives_before_it_was_sent():
    delayed = {"w0": LinkState(LinkParameters(), LinkParameters(delay_s=0.05, jitter_s=0.02))}
    raw = {"at": "0s", "ramp": {"delay": "0s"}, "over": "1s", "every": "100ms"}
    with pytest.raises(
        SpecError,
        match=r"schedule: link w0 at 0.3s: a jitter of 20ms needs a delay of 40ms or more",
    ):
        expand([parse_entry(raw)], delayed)
    assert (
        len(expand([parse_entry({**raw, "ramp": {"delay": "0s", "jitter": "0s"}})], delayed)) == 10
    )


BAD_ENTRIES = [
    ({"ramp": {"aqm": "codel"}, "over": "1s"}, "cannot change while a link is in use"),
    (
        {"square": {"aqm": ["fifo", "codel"]}, "period": "1s"},
        "cannot change while a link is in use",
    ),
    (
        {"square": {"down": {"aqm": ["fifo", "codel"]}}, "period": "1s"},
        "cannot change while a link is in use",
    ),
    ({"walk": {"in_order": [True, False]}}, "in_order has no values in between; use square"),
    ({"sawtoth": {}}, "did you mean 'sawtooth'"),
    ({"square": {"rate": ["1mbit", "2mbit"]}}, "is missing; for example period: 10s"),
    (
        {"square": {"rate": ["1mbit", "2mbit"]}, "period": "1s", "seed": 3},
        "belongs to a walk; remove it, or write walk",
    ),
    ({"set": {"rate": "1mbit"}, "period": "1s"}, "belongs to a sawtooth or a square"),
    (
        {"square": {"rate": "1mbit"}, "period": "1s"},
        "must be two values, for example [10mbit, 50mbit], not '1mbit'",
    ),
    ({"square": {"rate": ["1mbit"]}, "period": "1s"}, "must be two values"),
    ({"square": {"rate": ["1mbit", "fast"]}, "period": "1s"}, "'fast' is not a rate"),
    ({"square": {"rat": ["1mbit", "2mbit"]}, "period": "1s"}, "did you mean 'rate'"),
    ({"square": {}, "period": "1s"}, "changes nothing"),
    ({"square": "fast", "period": "1s"}, "must be a mapping of properties to two values"),
    ({"square": {"rate": ["1mbit", "2mbit"]}, "period": "1s", "duty": "100%"}, "less than 1"),
    ({"square": {"rate": ["1mbit", "2mbit"]}, "period": "1ms"}, "at least 1ms apart"),
    ({"sawtooth": {"rate": ["1mbit", "2mbit"]}, "period": "150ms"}, "too short for two steps"),
    (
        {"sawtooth": {"queue": ["1ms", "2ms"]}, "period": "1s"},
        "queue has no values in between; use square",
    ),
    ({"walk": {"up": [True, False]}}, "up has no values in between; use square"),
    ({"ramp": {"queue": "1ms"}, "over": "1s"}, "queue has no values in between; use set"),
    ({"ramp": {"rate": "1mbit"}}, "is missing; for example over: 4s"),
    ({"ramp": {"rate": "1mbit"}, "over": "0s"}, "must be longer than 0s"),
    ({"ramp": {"rate": "1mbit"}, "over": "1s", "every": "10us"}, "at least 1ms apart"),
    ({"walk": {"rate": ["1mbit", "2mbit"]}, "for": "0s"}, "must be longer than 0s"),
    ({"trace": 5}, "valid string"),
    ({"trace": "a.csv", "scale": {"rate": -1}}, "greater than 0"),
    ({"trace": "a.csv", "scale": "much"}, "must be a mapping"),
    ({"trace": "a.csv", "direction": "left"}, "'up' or 'down'"),
]


@pytest.mark.parametrize(("entry", "words"), BAD_ENTRIES, ids=itertools.count())
def test_what_is_wrong_with_an_entry(entry, words):
    with pytest.raises((ValidationError, ValueError)) as raised:
        parse_entry({"at": "0s", **entry})
    assert words in str(raised.value)
