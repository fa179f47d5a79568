"""Estimator and policy against a simulated link: duration = latency + bytes / rate, after a free burst."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netsenseml.agent.catalog import check_method
from netsenseml.control.bdp import BdpPolicy
from netsenseml.sensing.bandwidth import BandwidthEstimate

DENSE = 1_800_000  # bytes that a plain all-reduce sends
RANKS = 4
WINDOW_S = 0.06


@dataclass
class Loop:
    """One rank's control loop over a simulated link."""

    rate_bps: float
    latency_s: float = 0.0
    burst_bytes: float = 0.0
    estimate: BandwidthEstimate = field(default_factory=BandwidthEstimate)
    policy: BdpPolicy = field(default_factory=lambda: BdpPolicy(RANKS, **check_method("netsense")))

    @property
    def payload_bytes(self) -> float:
        return DENSE if self.policy.ratio == 1 else self.policy.ratio * RANKS * DENSE

    def step(self) -> float:
        """Do one step; returns the payload of the next."""
        seconds = self.latency_s + max(1e-4, 8 * (self.payload_bytes - self.burst_bytes) / self.rate_bps)
        bandwidth_bps = self.estimate.update(round(self.payload_bytes), seconds, self.latency_s)
        self.policy.decide(bandwidth_bps, WINDOW_S, self.latency_s, DENSE)
        return self.payload_bytes

    def run(self, steps: int) -> float:
        for _ in range(steps):
            self.step()
        return self.payload_bytes

    def exposed_s(self) -> float:
        """How long the next exchange takes."""
        return self.latency_s + 8 * self.payload_bytes / self.rate_bps


def test_full_all_reduce_on_a_fast_link() -> None:
    loop = Loop(rate_bps=1e9)
    assert {loop.step() for _ in range(50)} == {DENSE}


def test_falls_within_three_steps_of_a_drop_and_comes_back_within_ten() -> None:
    loop = Loop(rate_bps=50e6)
    before = loop.run(20)
    assert loop.exposed_s() == pytest.approx(0.9 * WINDOW_S, rel=0.05)
    loop.rate_bps = 10e6
    loop.run(3)
    assert loop.exposed_s() <= WINDOW_S
    assert loop.run(20) == pytest.approx(before / 5, rel=0.05)
    loop.rate_bps = 50e6
    assert loop.run(10) == pytest.approx(before, rel=0.1)


def test_first_step_on_a_slow_link_is_enough_to_know() -> None:
    loop = Loop(rate_bps=10e6)
    loop.run(3)
    assert loop.exposed_s() <= 1.1 * WINDOW_S


def test_goes_back_to_plain_all_reduce() -> None:
    loop = Loop(rate_bps=20e6)
    assert loop.run(20) < DENSE / 4
    loop.rate_bps = 1e9
    assert loop.run(20) == DENSE


@given(rate_bps=st.floats(200e6, 400e6))
def test_does_not_flap_where_all_reduce_just_fits(rate_bps: float) -> None:
    loop = Loop(rate_bps=rate_bps)
    loop.run(30)
    assert len({loop.step() == DENSE for _ in range(30)}) == 1


@settings(max_examples=200)
@given(
    rate_bps=st.floats(2e6, 2e9),
    drop=st.floats(0.05, 1.0),
    latency_s=st.sampled_from([0.0, 0.001, 0.02, 0.2]),
    burst_bytes=st.sampled_from([0, 65_536]),
)
def test_converges_everywhere(rate_bps: float, drop: float, latency_s: float, burst_bytes: int) -> None:
    loop = Loop(rate_bps=rate_bps, latency_s=latency_s, burst_bytes=burst_bytes)
    loop.run(40)
    loop.rate_bps = rate_bps * drop
    loop.run(80)
    budget_bytes = 0.9 * loop.rate_bps / 8 * max(WINDOW_S, latency_s)
    expected = min(DENSE, max(0.001 * RANKS * DENSE, budget_bytes))
    assert loop.payload_bytes >= 0.75 * expected, "the link is not used"
    assert loop.payload_bytes <= 1.25 * expected + 2 * burst_bytes, "the link is overloaded"


def test_an_odd_step_costs_little() -> None:
    loop = Loop(rate_bps=50e6)
    usual = loop.run(20)
    loop.rate_bps = 10e6
    loop.step()
    loop.rate_bps = 50e6
    assert loop.run(8) >= 0.8 * usual


@pytest.mark.parametrize("start", [0.25, 0.5, 1.0])
def test_a_start_that_is_no_smaller_than_all_reduce_is_all_reduce(start: float) -> None:
    assert BdpPolicy(RANKS, **check_method("netsense", {"start": start})).ratio == 1


def test_floor_holds() -> None:
    policy = BdpPolicy(RANKS, **check_method("netsense", {"floor": 0.01}))
    for _ in range(20):
        policy.decide(1.0, WINDOW_S, 0.0, DENSE)
    assert policy.ratio == 0.01


def test_the_estimate_is_bounded_by_what_an_exchange_can_tell() -> None:
    estimate = BandwidthEstimate()
    assert estimate.update(1_000_000, 1.0, 0.0) == 8e6
    # Nearly all latency: says only that it is at least 80 kbit/s, so the estimate drifts but does not fall.
    assert 8e6 <= estimate.update(1_000, 0.1, 0.0999) <= 8.8e6
    assert estimate.update(1_000_000, 10.0, 0.1) == pytest.approx(8e6 / 9.9)
