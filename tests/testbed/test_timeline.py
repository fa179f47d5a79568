"""Properties of timelines: order, completeness, exact ends, takeover."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.links.state import LinkState, Shape
from testbed.spec.errors import SpecError
from testbed.spec.models import ScheduleEntry
from testbed.timeline import expand

LINKS = {name: LinkState(Shape(rate_bps=50_000_000), Shape(rate_bps=50_000_000)) for name in ("w0", "w1", "w2")}

times = st.integers(0, 10_000).map(lambda ms: f"{ms}ms")
rates = st.integers(1, 1000).map(lambda mbit: f"{mbit}mbit")
properties = st.fixed_dictionaries({"rate": rates}, optional={"delay": times, "up": st.fixed_dictionaries({"rate": rates})})
links = st.one_of(st.just("all"), st.lists(st.sampled_from(sorted(LINKS)), min_size=1, max_size=3, unique=True))
sets = st.fixed_dictionaries({"at": times, "links": links, "set": properties})
ramps = st.fixed_dictionaries(
    {
        "at": times,
        "links": links,
        "ramp": properties,
        "over": st.integers(1, 3000).map(lambda ms: f"{ms}ms"),
        "every": st.integers(1, 500).map(lambda ms: f"{ms}ms"),
    }
)


def entries(raw):
    return [ScheduleEntry.model_validate(entry) for entry in raw]


@given(st.lists(st.one_of(sets, ramps), max_size=6))
def test_changes_are_ordered_and_one_for_each_moment_and_link(raw):
    changes = expand(entries(raw), LINKS)
    places = [(change.at_s, change.link) for change in changes]
    assert places == sorted(set(places))
    assert {change.link for change in changes} <= set(LINKS)


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


@given(ramps)
def test_a_ramp_ends_exactly_at_its_target_on_time_and_never_turns(raw):
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
                {"at": "0s", "links": "w0", "ramp": {"rate": "10mbit"}, "over": "4s", "every": "1s"},
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
        entries([{"at": "1s", "links": "w1", "set": {"delay": "5ms"}}, {"at": "2s", "set": {"rate": "9mbit"}}]), LINKS
    )
    state = changes[-2].state
    assert changes[-2].link == "w1"
    assert state == LinkState(Shape(rate_bps=9_000_000), Shape(rate_bps=9_000_000, delay_s=0.005))


def test_a_ramp_needs_a_rate_to_start_from():
    with pytest.raises(SpecError, match="no rate to start from"):
        expand(entries([{"at": "1s", "ramp": {"rate": "5mbit"}, "over": "1s"}]), {"w0": LinkState()})
