"""The estimate of latency and bandwidth, on made-up steps: exact ones, noisy ones, and any at all."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netsenseml.sensing.network import NetworkEstimate, Transfer

SHARE = 1448 / 1514 * 0.98


class Link:
    """A link behind a token bucket, and machines that are sometimes late. The payload should take 30 to 60 ms by the estimate.

    credit_s: what the bucket lets pass for free after a pause. late: share of the steps that are late, by 20 ms on average.
    """

    def __init__(self, seed=0, alpha_s=1e-4, hops=6, credit_s=4e-3, late=0.1, noise=0.03, min_rtt_s=None):
        self.estimate = NetworkEstimate()
        self._random = random.Random(seed)
        self._alpha_s, self._hops, self._credit_s, self._late, self._noise = alpha_s, hops, credit_s, late, noise
        self._min_rtt_s = min_rtt_s

    def steps(self, mbit, count):
        """Errors of the estimate after each of some steps at a rate."""
        true_bps = mbit * 1e6 * SHARE
        errors = []
        for _ in range(count):
            payload = max(10_000, (self.estimate.beta_bps or 10e6) / 8 * 0.06 * self._random.uniform(0.5, 1))
            line_s = 8 * payload / true_bps
            seconds = self._hops * self._alpha_s + line_s - min(self._credit_s, 0.9 * line_s)
            seconds += abs(self._random.gauss(0, 5e-4)) + seconds * abs(self._random.gauss(0, self._noise))
            if self._random.random() < self._late:
                seconds += self._random.expovariate(1 / 0.02)
            self.estimate.update([Transfer(round(payload), self._hops, seconds)], None, self._min_rtt_s)
            errors.append(self.estimate.beta_bps / true_bps - 1)
        return errors


def steps_until_close(errors):
    return next(i + 1 for i, error in enumerate(errors) if abs(error) <= 0.2)


def exact(alpha_s, beta_bps, payload, hops=6):
    return Transfer(payload, hops, hops * alpha_s + 8 * payload / beta_bps)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mbit", [20, 100, 500])
def test_a_network_that_stays_is_known_after_20_steps(mbit, seed):
    errors = Link(seed).steps(mbit, 60)
    settled = errors[19:]
    assert sum(abs(error) <= 0.1 for error in settled) >= 0.85 * len(settled)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("mbit", [20, 100, 500])
def test_what_a_token_bucket_gives_away_is_no_bandwidth_on_a_quiet_network(mbit, seed):
    errors = Link(seed, late=0.0, noise=0.005).steps(mbit, 20)
    assert abs(errors[-1]) <= 0.05


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("late", [0.0, 0.1])
def test_drops_are_followed_within_5_steps_and_rises_within_15(seed, late):
    link = Link(seed, late=late)
    link.steps(500, 30)
    for mbit, most in ((100, 5), (20, 5), (100, 15), (500, 15), (20, 5), (500, 15)):
        assert steps_until_close(link.steps(mbit, 30)) <= most


@pytest.mark.parametrize("seed", range(5))
def test_latency_of_a_long_way_is_not_taken_for_a_thin_link(seed):
    link = Link(seed, alpha_s=5e-3, credit_s=0.0)
    errors = link.steps(100, 60)[30:]
    assert sum(abs(error) <= 0.2 for error in errors) >= 0.85 * len(errors)
    assert link.estimate.alpha_s == pytest.approx(5e-3, rel=0.3)


def test_one_late_step_moves_nothing():
    link = Link(late=0.0)
    link.steps(100, 30)
    before = link.estimate.beta_bps
    link.estimate.update([Transfer(600_000, 6, 1.0)])
    assert link.estimate.beta_bps == pytest.approx(before, rel=0.05)


def test_a_competing_flow_leaves_the_rest():
    link = Link(late=0.0)
    link.steps(100, 30)
    assert steps_until_close(link.steps(55, 20)) <= 10
    assert abs(link.steps(55, 20)[-1]) < 0.1


@given(
    alpha_s=st.floats(1e-5, 2e-3),
    beta_bps=st.floats(5e6, 1e9),
    shares=st.lists(st.floats(0.2, 1), min_size=48, max_size=48),
)
def test_exact_times_give_what_made_them(alpha_s, beta_bps, shares):
    estimate = NetworkEstimate()
    for share in shares:
        estimate.update([exact(alpha_s, beta_bps, round(share * beta_bps / 8 * 0.1))], None, 2 * alpha_s)
    assert estimate.beta_bps == pytest.approx(beta_bps, rel=0.02)
    assert estimate.alpha_s == pytest.approx(alpha_s, rel=0.2, abs=2e-4)


def test_two_sizes_tell_latency_from_bandwidth_without_any_kernel():
    estimate = NetworkEstimate()
    for i in range(100):
        estimate.update([exact(3e-3, 100e6, (200_000, 800_000)[i % 2])])
    assert estimate.alpha_s == pytest.approx(3e-3, rel=0.02)
    assert estimate.beta_bps == pytest.approx(100e6, rel=0.01)


def test_one_size_leaves_latency_at_half_of_the_smallest_rtt():
    known, unknown = NetworkEstimate(), NetworkEstimate()
    for _ in range(50):
        known.update([exact(3e-3, 100e6, 500_000)], None, 6e-3)
        unknown.update([exact(3e-3, 100e6, 500_000)])
    assert (known.alpha_s, known.beta_bps) == pytest.approx((3e-3, 100e6))
    assert (unknown.alpha_s, unknown.beta_bps) == pytest.approx((0, 8 * 500_000 / (6 * 3e-3 + 0.04)))


def test_a_round_trip_time_that_is_known_late_upsets_nothing():
    draw = random.Random(0)
    for count in range(1, 30):
        estimate = NetworkEstimate()
        for i in range(count + 30):
            seconds = exact(5e-4, 100e6, 500_000).seconds + (draw.uniform(0.005, 0.02) if i % 4 == 0 else draw.uniform(0, 1e-4))
            estimate.update([Transfer(500_000, 6, seconds)], None, 1e-3 if i >= count else None)
            variances = [estimate.state_dict()["spread"][j][j] for j in range(3)]
            assert min(variances) >= 0
        assert estimate.beta_bps == pytest.approx(100e6, rel=0.1)


def test_what_the_kernel_saw_the_connections_carry_was_no_latency():
    with_kernel, without = NetworkEstimate(), NetworkEstimate()
    for _ in range(50):
        with_kernel.update([exact(3e-3, 100e6, 500_000)], 100e6)
        without.update([exact(3e-3, 100e6, 500_000)])
    assert without.beta_bps < 75e6
    assert with_kernel.beta_bps == pytest.approx(100e6, rel=0.05)


@given(st.floats(1e3, 1e6), st.integers(0, 1000))
def test_the_kernels_word_never_moves_the_estimate_down(slow_bps, seed):
    draw = random.Random(seed)
    with_kernel, without = NetworkEstimate(), NetworkEstimate()
    for _ in range(20):
        transfers = [Transfer(draw.randint(10**5, 10**6), 6, draw.uniform(0.01, 0.1))]
        with_kernel.update(transfers, slow_bps)
        without.update(transfers)
    assert with_kernel.state_dict()["line"] == without.state_dict()["line"]


ANY_TRANSFER = st.builds(Transfer, st.integers(0, 50_000_000), st.integers(0, 200), st.floats(0, 100, allow_subnormal=False))
ANY_STEP = st.tuples(
    st.lists(ANY_TRANSFER, max_size=4),
    st.none() | st.floats(1e-3, 1e12),
    st.none() | st.floats(0, 100),
)


@given(st.lists(ANY_STEP, max_size=30))
def test_any_steps_give_sane_numbers_the_same_ones_everywhere_and_across_a_checkpoint(steps):
    first, second = NetworkEstimate(), NetworkEstimate()
    for step in steps:
        first.update(*step)
        resumed = NetworkEstimate()
        resumed.load_state_dict(json.loads(json.dumps(second.state_dict())))
        second = resumed
        second.update(*step)
        assert first.state_dict() == second.state_dict()
        assert 0 <= first.alpha_s < math.inf
        assert first.beta_bps is None or 0 < first.beta_bps < math.inf
        assert 0 <= first.predict_s(0, 0) <= first.predict_s(1000, 0) <= first.predict_s(1000, 3) < math.inf
        assert first.predict_s(1000, 3) <= first.predict_s(5000, 3) <= first.predict_s(5000, 4)


@given(st.floats(1e-3, 1), st.floats(1.01, 10), st.integers(10_000, 50_000_000))
def test_a_slower_network_is_never_estimated_faster(seconds, factor, payload):
    fast, slow = NetworkEstimate(), NetworkEstimate()
    for _ in range(5):
        fast.update([Transfer(payload, 6, seconds)])
        slow.update([Transfer(payload, 6, factor * seconds)])
        assert slow.beta_bps <= fast.beta_bps
        assert slow.predict_s(payload, 6) >= fast.predict_s(payload, 6)


def test_nothing_is_learned_from_nothing():
    estimate = NetworkEstimate()
    estimate.update([])
    estimate.update([Transfer(0, 6, 1.0)])
    estimate.update([Transfer(100, 6, 0.0)], 1e6, 2e-3)
    assert estimate.beta_bps is None
    assert estimate.predict_s(1000, 6) == 6e-3  # what is known of latency


def test_only_the_sums_over_a_step_count():
    whole, parts = NetworkEstimate(), NetworkEstimate()
    for payload in (400_000, 600_000, 500_000):
        whole.update([Transfer(payload, 12, 0.0625)])
        parts.update([Transfer(payload - 1000, 6, 0.0625), Transfer(1000, 6, 0.0)])
    assert whole.state_dict() == parts.state_dict()
