"""Which links which floods fill, what is expected of them, and how attempts are judged; without a
network."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.labs.base import LabPlan
from testbed.labs.calibration import (
    Measurement,
    attempts,
    carried_bps,
    closest,
    delayed_pairs,
    expected_rtt,
    measurable,
    rounds,
)
from testbed.links.state import LinkParameters, LinkState, Loss

pytestmark = pytest.mark.fast


def both(rate_mbps: float | None, **more: float) -> LinkState:
    rate = None if rate_mbps is None else round(rate_mbps * 1e6)
    return LinkState(LinkParameters(rate_bps=rate), LinkParameters(rate_bps=rate, **more))


def star(*rates_mbps: float | None) -> LabPlan:
    return LabPlan({f"w{number}": both(rate) for number, rate in enumerate(rates_mbps)})


DUMBBELL = LabPlan(
    {**dict.fromkeys(("w0", "w1", "w2", "w3"), both(100)), "trunk": both(20)},
    switches={"left": ("w0", "w1"), "right": ("w2", "w3")},
    trunks={"trunk": ("left", "right")},
)


def judged(plan: LabPlan) -> dict[tuple[str, str], float]:
    return {side: rate for one in rounds(plan) for side, rate in one.expected_bps.items()}


def limits(plan: LabPlan) -> dict[tuple[str, str], int]:
    sides = {
        (link, side): getattr(state, side).rate_bps
        for link, state in plan.links.items()
        for side in ("up", "down")
    }
    return {side: rate for side, rate in sides.items() if rate is not None}


def test_a_packet_crosses_at_most_one_trunk_in_its_direction():
    assert DUMBBELL.route("w0", "w1") == (("w0", "up"), ("w1", "down"))
    assert DUMBBELL.route("w0", "w3") == (("w0", "up"), ("trunk", "up"), ("w3", "down"))
    assert DUMBBELL.route("w3", "w0") == (("w3", "up"), ("trunk", "down"), ("w0", "down"))


def test_equal_links_are_filled_by_one_ring():
    plan = star(50, 50, 50)
    (only,) = rounds(plan)
    assert only.pairs == [("w0", "w1"), ("w1", "w2"), ("w2", "w0")]
    assert only.expected_bps == limits(plan)


@pytest.mark.parametrize("plan", [star(50, 50, 50, 20), star(10, 20, 40, 80, 80), DUMBBELL])
def test_unequal_links_are_filled_where_any_flow_can_fill_them(plan):
    reached, wanted = judged(plan), limits(plan)
    fillable = {
        side
        for side, rate in wanted.items()
        if any(
            carried_bps(plan, [(a, b)]).get(side, 0) >= rate for a in plan.hosts for b in plan.hosts if a != b
        )
    }  # fmt: skip
    assert {side for side in fillable if reached.get(side) == wanted[side]} == fillable


@given(st.lists(st.none() | st.integers(1, 1000), min_size=2, max_size=10))
def test_nothing_is_expected_beyond_a_limit_and_no_host_floods_twice_at_once(rates):
    plan = star(*rates)
    for one in rounds(plan):
        assert (
            len({source for source, _ in one.pairs})
            == len({target for _, target in one.pairs})
            == len(one.pairs)
        )
        assert all(0 < rate <= limits(plan)[side] for side, rate in one.expected_bps.items())
    assert measurable(plan) == any(rate is not None for rate in rates)


def test_a_slow_neighbour_and_loss_bound_what_a_direction_carries():
    plan = LabPlan({"w0": both(50), "w1": both(50, loss=Loss(0.1)), "w2": both(20)})
    carried = carried_bps(plan, [("w0", "w1"), ("w2", "w0")])
    assert carried["w1", "down"] == pytest.approx(45e6)
    assert carried["w0", "down"] == 20_000_000


def test_what_the_delay_line_loses_has_passed_the_limiter():
    links = {"w0": both(50), "w1": both(50, loss=Loss(0.1)), "w2": both(20)}
    plan = LabPlan(links, impaired=frozenset({("w1", "down")}), engine="userspace")
    assert carried_bps(plan, [("w0", "w1")])["w1", "down"] == 50_000_000


def test_floods_share_a_trunk_but_nobody_knows_how():
    carried = carried_bps(DUMBBELL, [("w0", "w2"), ("w1", "w3")])
    assert carried["trunk", "up"] == 20_000_000
    assert ("w2", "down") not in carried


def test_a_partition_is_left_alone():
    plan = LabPlan(
        {
            "w0": both(50),
            "w1": both(50),
            "w2": LinkState(
                LinkParameters(50_000_000), LinkParameters(50_000_000), connected=False
            ),
        }
    )
    assert all("w2" not in pair for one in rounds(plan) for pair in one.pairs)
    assert all(link != "w2" for link, _ in judged(plan))


def test_rtt_is_the_sum_of_all_delays_there_and_back():
    plan = LabPlan(
        {
            "w0": both(50, delay_s=0.01),
            "w1": both(50, delay_s=0.02, jitter_s=0.003),
            "w2": both(50),
            "w3": both(50),
        }
    )
    assert expected_rtt(plan, "w0", "w1") == (pytest.approx(0.03), pytest.approx(0.003))
    assert delayed_pairs(plan) == [("w0", "w1"), ("w1", "w2"), ("w3", "w0")]


def test_every_delayed_trunk_is_measured():
    trunks = {"a-b": ("a", "b"), "a-c": ("a", "c"), "b-c": ("b", "c")}
    delayed = LinkState(LinkParameters(delay_s=0.01), LinkParameters(delay_s=0.01))
    plan = LabPlan(
        {**dict.fromkeys(("w0", "w1", "w2"), both(None)), **dict.fromkeys(trunks, delayed)},
        switches={"a": ("w0",), "b": ("w1",), "c": ("w2",)},
        trunks=trunks,
    )
    crossed = {side[0] for pair in delayed_pairs(plan) for side in plan.route(*pair)}
    assert set(trunks) <= crossed
    assert expected_rtt(plan, "w0", "w1")[0] == pytest.approx(0.02)


def rate(measured: float, link: str = "w0") -> Measurement:
    return Measurement("rate", 100.0, measured, 3.0, link, "up")


def test_a_test_is_repeated_with_more_effort_until_all_was_good_once():
    asked = []

    def test(effort):
        asked.append(effort)
        return [
            rate(99.0 if effort == 1 else 90.0, "w0"),
            rate(math.nan if effort == 1 else 98.0, "w1"),
        ]

    results = attempts(test)
    assert asked == [1, 2]
    assert [one.attempt for one in results] == [1, 1, 2, 2]
    assert all(one.within for one in closest(results))


def test_attempts_end():
    assert len(attempts(lambda effort: [rate(math.nan)])) == 3
    assert closest([rate(math.nan), rate(80.0), rate(math.nan), rate(105.0)]) == [rate(105.0)]
