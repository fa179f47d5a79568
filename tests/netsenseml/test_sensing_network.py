"""What is learnt of the network from made-up steps: exact ones, noisy ones, and any at all."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netsenseml.exchange.communicators import parse
from netsenseml.exchange.mesh import Topology
from netsenseml.sensing.network import WINDOW, NetworkModel, Smooth

TOPOLOGY = Topology(4)
ELEMENTS = 250_000, 800_000
DENSE = "allreduce", "fp32-ring", "int8", "int8-ring", "int4-ring"
NAMES = *DENSE, "sparse-int4@10%", "sparse-int4@1%", "sparse-int4@0.1%", "sparse-int4@1%-ring"
PLANS = [parse(name) for name in NAMES]
READY_S = -0.01, 0.0


class Link:
    """Whose steps take their time, and are late now and then. fixed_s: what a bucket takes whatever
    it sends."""

    def __init__(
        self,
        mbit: float,
        latency_s: float = 1e-3,
        fixed_s: float = 0.0,
        noise: float = 0.03,
        late: float = 0.1,
    ) -> None:
        self.mbit, self.latency_s, self.fixed_s, self.noise, self.delayed_means = (
            mbit,
            latency_s,
            fixed_s,
            noise,
            late,
        )
        self.model = NetworkModel(
            PLANS, TOPOLOGY, latency_s, byte_s=1.3 * 8e-6 / mbit, element_s=1e-9
        )
        self.model.buckets(ELEMENTS)
        self.draw = random.Random(0)

    def step(self, name: str) -> None:
        plan = PLANS[NAMES.index(name)]
        free, done, busy = -1.0, -1.0, 0.0
        for elements, ready_s in zip(ELEMENTS, READY_S, strict=True):
            cost = plan.cost(elements, TOPOLOGY)
            free = max(free, ready_s) + self.fixed_s + 8 * cost.host_bytes / (1e6 * self.mbit)
            end = free + cost.latency_terms * self.latency_s
            busy += end - max(ready_s, done)
            done = end
        busy *= 1 + abs(self.draw.gauss(0, self.noise))
        busy += self.draw.expovariate(20) if self.draw.random() < self.delayed_means else 0.0
        self.model.latency.add(self.latency_s * (1 + abs(self.draw.gauss(0, self.noise))))
        self.model.learn(NAMES.index(name), READY_S, [0.0, 0.0], busy)

    def bandwidth_mbit(self, name: str) -> float:
        return self.model.bandwidth_bps(NAMES.index(name)) / 1e6

    def steps(self, name: str, count: int) -> list[float]:
        """Errors of the bandwidth after each of some steps."""
        errors = []
        for _ in range(count):
            self.step(name)
            errors.append(self.bandwidth_mbit(name) / self.mbit - 1)
        return errors


@pytest.mark.parametrize("name", ["allreduce", "int8", "sparse-int4@10%", "int4-ring"])
@pytest.mark.parametrize("mbit", [5, 50, 200])
@pytest.mark.parametrize("latency_s", [1e-4, 1e-3])
def test_a_network_that_stays_is_known_within_a_quarter(
    name: str, mbit: float, latency_s: float
) -> None:
    """By one plan, whose times alone do not tell bytes from what is fixed."""
    errors = Link(mbit, latency_s).steps(name, 60)[20:]
    assert sum(abs(error) <= 0.25 for error in errors) >= 0.9 * len(errors)


@pytest.mark.parametrize("latency_s", [0.05, 0.1])
def test_latency_of_a_long_path_is_not_taken_for_a_thin_link(latency_s: float) -> None:
    """At 100 ms a Gloo hop takes as long as 600 kB at 50 Mbit/s; the estimate was 98 % too low."""
    errors = Link(50, latency_s, late=0.0).steps("int8", 30)
    assert abs(errors[-1]) <= 0.1


@pytest.mark.parametrize("seed", range(5))
def test_a_drop_is_known_within_five_steps_and_a_rise_within_four(seed: int) -> None:
    link = Link(500, noise=0.02, late=0.05)
    link.draw.seed(seed)
    link.steps("int8", 30)
    for mbit, most in ((100, 5), (20, 5), (100, 4), (500, 4), (100, 5)):
        link.mbit = mbit
        errors = link.steps("int8", 30)
        assert next(i + 1 for i, error in enumerate(errors) if abs(error) <= 0.15) <= most


def test_one_accident_changes_nothing_and_three_together_do() -> None:
    link = Link(100, late=0.0)
    link.steps("int8", 20)
    known = link.bandwidth_mbit("int8")
    for late in (1.0, 0.0, 1.0, 1.0, 0.0):
        link.delayed_means = late
        link.fixed_s = 0.2 * late
        link.step("int8")
        assert link.bandwidth_mbit("int8") == pytest.approx(known, rel=0.05)
    link.delayed_means, link.fixed_s = 0.0, 0.2
    link.steps("int8", 3)
    assert link.bandwidth_mbit("int8") < 0.7 * known


def test_what_alternates_is_averaged_and_accidents_fall_out() -> None:
    compute = Smooth(1.0)
    for number in range(40):
        compute.add((0.06, 0.18)[number % 2])
    assert compute.value == pytest.approx(0.12, rel=0.1)
    latency = Smooth(1.0)
    for number in range(40):
        latency.add(0.2 if number % 8 == 0 else 0.001)
    assert latency.value == pytest.approx(0.001)


def test_what_is_fixed_is_told_from_bytes_once_two_sizes_were_sent() -> None:
    link = Link(400, 1e-4, fixed_s=0.02, late=0.0, noise=0.002)
    link.steps("sparse-int4@1%", 20)
    link.steps("sparse-int4@10%", 12)
    back = link.steps("sparse-int4@1%", 12)[-1]
    assert abs(back) < 0.3


def test_communicators_have_their_own_speed_and_a_change_moves_all() -> None:
    link = Link(100, 1e-4, late=0.0, noise=0.0)
    link.steps("int8", 20)
    link.mbit = 125  # a ring is faster here
    link.steps("int8-ring", 20)
    assert link.bandwidth_mbit("int8-ring") == pytest.approx(125, rel=0.15)
    own = link.bandwidth_mbit("int8-ring") / link.bandwidth_mbit("int8")
    link.mbit = 62.5
    link.steps("int8-ring", 20)
    assert link.bandwidth_mbit("int8-ring") == pytest.approx(62.5, rel=0.15)
    assert link.bandwidth_mbit("int8-ring") / link.bandwidth_mbit("int8") == pytest.approx(
        own, rel=0.1
    )


def test_small_payloads_do_not_make_a_network_thin() -> None:
    """What delays them is no lack of bandwidth."""
    link = Link(1000, 1e-4, late=0.0)
    link.steps("int8", 30)
    known = link.bandwidth_mbit("int8")
    link.fixed_s = 2e-3
    link.steps("sparse-int4@0.1%", 2)
    link.fixed_s = 0.0
    link.steps("sparse-int4@0.1%", 30)
    assert link.bandwidth_mbit("int8") >= known / 1.5


def test_what_was_not_seen_for_long_is_less_certain() -> None:
    link = Link(100, late=0.0)
    deviations = []
    for count in (20, 60):
        link.steps("sparse-int4@0.1%", count)
        parts, _ = link.model.forecast(READY_S, np.zeros((len(PLANS), 2)))
        seconds = 0.1 + parts[:, 4]
        deviations.append(link.model.deviations(parts, seconds, NAMES.index("sparse-int4@0.1%")))
        assert deviations[-1][NAMES.index("sparse-int4@0.1%")] == 0
        link.steps("int8", 20)
    link.steps("sparse-int4@0.1%", 1)
    parts, _ = link.model.forecast(READY_S, np.zeros((len(PLANS), 2)))
    fresh = link.model.deviations(parts, 0.1 + parts[:, 4], NAMES.index("sparse-int4@0.1%"))
    assert fresh[NAMES.index("int8")] < 0.5 * deviations[1][NAMES.index("int8")]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60))
def test_smooth_stays_between_what_it_was_told(values: list[float]) -> None:
    smooth = Smooth(1.0)
    for number, value in enumerate(values, 1):
        smooth.add(value)
        newest = values[max(0, number - WINDOW) : number]
        assert min(newest) * (1 - 1e-9) <= smooth.value <= max(newest) * (1 + 1e-9)


@given(st.lists(st.tuples(st.sampled_from(range(len(NAMES))), st.floats(0, 1e3)), max_size=40))
def test_any_times_at_all_leave_a_bandwidth_and_a_forecast(seen: list[tuple[int, float]]) -> None:
    model = Link(100).model
    for plan, seconds in seen:
        model.learn(plan, READY_S, [0.0, 0.0], seconds)
        assert 0 < model.bandwidth_bps(plan) < float("inf")
        for parts in model.forecast(READY_S, np.zeros((len(PLANS), 2))):
            assert (parts[:, 4] >= 0).all() and (parts[:, 4] < 1e9).all()
        assert np.isfinite(model.deviations(parts, 1.0 + parts[:, 4], plan)).all()
