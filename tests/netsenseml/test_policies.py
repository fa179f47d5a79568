"""Published controllers: each by the rule of its paper on a trace made by hand, and all of them at
work."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import torch
from groups import run_group
from small_models import backward, batches, make_ddp, parameters_hash

from netsenseml import attach
from netsenseml.catalog import POLICIES, check_method
from netsenseml.control.accordion import Accordion
from netsenseml.control.budget import ByteBudget
from netsenseml.control.dc2 import Dc2
from netsenseml.control.deco import Deco
from netsenseml.control.kimad import Kimad
from netsenseml.control.plans import plans
from netsenseml.control.policy import Observation
from netsenseml.exchange.communicators import parse
from netsenseml.exchange.mesh import Topology

TOPOLOGY, BUCKETS = Topology(2), (400_000, 600_000)
ALL = plans(TOPOLOGY, 0.001)
DENSE = 4 * sum(BUCKETS)
"""Bytes of a ring all-reduce of two ranks: 2 b (N - 1) / N n."""
MADE: dict[str, Callable[[], ByteBudget]] = {
    "kimad": lambda: Kimad(ALL, TOPOLOGY, sum(BUCKETS), start=0.05, time_budget=0.25),
    "dc2": lambda: Dc2(ALL, TOPOLOGY, sum(BUCKETS), start=0.05, target_delay=0.05),
    "deco": lambda: Deco(ALL, TOPOLOGY, sum(BUCKETS), start=0.05),
    "accordion": lambda: Accordion(
        ALL, TOPOLOGY, sum(BUCKETS), l_low=0.3, l_high=0.03, eta=0.5, window=2
    ),
}


def bytes_of(name: str) -> float:
    return sum(parse(name).cost(elements, TOPOLOGY).host_bytes for elements in BUCKETS)


def step(
    policy: ByteBudget,
    *,
    bandwidth: float = 1e6,
    latency_s: float = 0.0,
    compute_s: float = 0.1,
    **more: Any,
) -> Observation:
    """What ranks see of a step with the present plan over a link of so many bytes/s."""
    terms = parse(policy.plan).cost(max(BUCKETS), TOPOLOGY).latency_terms
    took_s = bytes_of(policy.plan) / bandwidth + terms * latency_s
    return Observation(
        plan=policy.plan,
        elements=BUCKETS,
        ready_s=(-0.05, 0.0),
        compute_s=compute_s,
        exposed_s=took_s,
        communication_s=took_s,
        encode_s=0.0,
        payload_bytes=round(bytes_of(policy.plan)),
        latency_s=latency_s or None,
        ring_share=1.0,
        lost={},
        **more,
    )


def is_best_within(name: str, budget_bytes: float) -> bool:
    """Whether it fits, and all plans that lose less do not."""
    denser = [
        plan.name for plan in ALL[: [plan.name for plan in ALL].index(name.removesuffix("-ring"))]
    ]
    return bytes_of(name) <= budget_bytes and all(
        bytes_of(other) > budget_bytes for other in denser
    )


def test_kimad_sends_what_the_bandwidth_carries_in_the_time_that_is_left() -> None:
    policy = Kimad(ALL, TOPOLOGY, sum(BUCKETS), start=0.01, time_budget=0.25)
    assert is_best_within(policy.plan, 0.01 * DENSE)
    policy.decide(step(policy))
    assert is_best_within(policy.plan, 1e6 * (0.25 - 0.1))  # 1 MB/s for 150 ms
    assert policy.bandwidth_bps == pytest.approx(8e6)
    for _ in range(8):
        policy.decide(step(policy, bandwidth=4e6, compute_s=0.05))
    assert is_best_within(policy.plan, 4e6 * (0.25 - 0.05))
    for _ in range(16):
        policy.decide(step(policy, bandwidth=1e9))
    assert policy.plan == "allreduce"
    policy.decide(step(policy, bandwidth=1e6))  # one step of 4 s outweighs seven of 4 ms
    assert is_best_within(policy.plan, (8 * DENSE / (7 * 0.004 + 4)) * 0.15)
    for _ in range(8):
        policy.decide(step(policy, compute_s=0.3))  # longer than the budget: the smallest there is
    assert bytes_of(policy.plan) == min(bytes_of(plan.name) for plan in ALL)


def test_kimad_takes_half_of_the_compute_for_its_budget_where_none_is_given() -> None:
    policy = Kimad(ALL, TOPOLOGY, sum(BUCKETS), start=0.01, time_budget=0.0)
    policy.decide(step(policy, compute_s=0.2))
    assert is_best_within(policy.plan, 1e6 * 0.1)


def test_latency_is_not_taken_for_a_thin_link() -> None:
    policy = Kimad(ALL, TOPOLOGY, sum(BUCKETS), start=0.01, time_budget=0.25)
    policy.decide(step(policy, latency_s=0.05))
    assert policy.bandwidth_bps == pytest.approx(8e6)


def test_dc2_follows_the_delay_until_that_is_the_target() -> None:
    policy = Dc2(ALL, TOPOLOGY, sum(BUCKETS), start=0.01, target_delay=0.1)
    ratio = 0.01
    for _ in range(3):
        seen = step(policy)  # 1 MB/s: whatever was sent, 100 kB would have taken the target
        policy.decide(seen)
        ratio = ratio**0.75 * (1e5 / DENSE) ** 0.25
        assert is_best_within(policy.plan, ratio * DENSE)
    for _ in range(40):
        policy.decide(step(policy))
    assert is_best_within(policy.plan, 1e5 * 1.001)
    policy.decide(step(policy, bandwidth=2e5))  # five times slower: 20 kB
    assert is_best_within(policy.plan, 1e5**0.75 * 2e4**0.25 * 1.001)
    for _ in range(40):
        policy.decide(step(policy, bandwidth=2e5))
    assert is_best_within(policy.plan, 2e4 * 1.001)
    for _ in range(40):
        policy.decide(step(policy, bandwidth=1e9))
    assert policy.plan == "allreduce"
    for _ in range(12):  # not 1000 times all-reduce, from which it would be long on its way back
        policy.decide(step(policy, bandwidth=1e6))
    assert bytes_of(policy.plan) < 0.05 * DENSE


def test_dc2_lets_an_exchange_take_as_long_as_the_compute_where_no_target_is_given() -> None:
    policy = Dc2(ALL, TOPOLOGY, sum(BUCKETS), start=0.01, target_delay=0.0)
    for _ in range(40):
        policy.decide(step(policy, compute_s=0.2))
    assert is_best_within(policy.plan, 2e5 * 1.001)


def test_deco_fills_the_compute_less_the_latency() -> None:
    policy = Deco(ALL, TOPOLOGY, sum(BUCKETS), start=0.01)
    policy.decide(step(policy, latency_s=0.02))
    assert is_best_within(policy.plan, 1e6 * (0.1 - 0.02))  # d = (T - b) a / S = 80 kB / 4 MB
    assert policy.bandwidth_bps == pytest.approx(8e6)
    for _ in range(8):
        policy.decide(step(policy, bandwidth=1e8))  # (0.1 s) (100 MB/s) > S
    assert policy.plan == "allreduce"
    policy = Deco(ALL, TOPOLOGY, sum(BUCKETS), start=0.01)
    policy.decide(step(policy, latency_s=0.2))  # a path longer than a step: nothing fits
    assert bytes_of(policy.plan) == min(bytes_of(plan.name) for plan in ALL)


def gradients(norm: float) -> tuple[torch.Tensor, ...]:
    """Of two buckets, together of this norm: 3, 4, 5."""
    return torch.tensor([0.6 * norm, 0.0]), torch.tensor([0.8 * norm])


def test_accordion_compresses_little_where_the_norm_of_the_gradients_changes_much() -> None:
    policy = Accordion(ALL, TOPOLOGY, sum(BUCKETS), l_low=0.3, l_high=0.03, eta=0.5, window=2)
    low, high = "int8", "sparse-int4@9.8%"
    assert is_best_within(low, 0.3 * DENSE) and is_best_within(high, 0.03 * DENSE)
    # Two steps a window, D = 2 x the norm: 2, 4, 4.4, 6.4, 6, 2, 2
    changes = [1.0, 0.1, 0.45, 0.06, 0.67, 0.0]
    levels = [policy.plan]
    for norm in (1.0, 2.0, 2.2, 3.2, 3.0, 1.0, 1.0):
        policy.decide(step(policy, gradients=gradients(norm)))
        assert policy.plan == levels[-1]  # within a window nothing changes
        # nor does it care for the network
        policy.decide(step(policy, gradients=gradients(norm), bandwidth=1e4))
        levels.append(policy.plan)
    assert levels == [low, low, *(low if change >= 0.5 else high for change in changes)]
    assert policy.bandwidth_bps is None


def test_accordion_sums_gradients_so_that_opposite_ones_cancel() -> None:
    policy = Accordion(ALL, TOPOLOGY, sum(BUCKETS), l_low=0.3, l_high=0.03, eta=0.5, window=2)
    for first, second in ((1.0, 1.0), (1.0, 1.0), (1.0, -1.0)):
        before = policy.plan
        for norm in (first, second):
            policy.decide(step(policy, gradients=gradients(norm)))
    assert (before, policy.plan) == ("sparse-int4@9.8%", "int8")


def test_accordion_takes_a_fall_of_the_learning_rate_for_critical() -> None:
    policy = Accordion(ALL, TOPOLOGY, sum(BUCKETS), l_low=0.3, l_high=0.03, eta=0.5, window=2)
    seen = []
    for change in (1.0, 1.0, 0.1, 1.0, 0.99):
        policy.decide(step(policy, gradients=gradients(1.0), lr_change=change))
        policy.decide(step(policy, gradients=gradients(1.0)))
        seen.append(policy.plan)
    assert seen == ["int8", "sparse-int4@9.8%", "int8", "sparse-int4@9.8%", "sparse-int4@9.8%"]


def test_accordion_begins_anew_with_other_buckets_and_learns_nothing_from_an_overflow() -> None:
    policy = Accordion(ALL, TOPOLOGY, sum(BUCKETS), l_low=0.3, l_high=0.03, eta=0.5, window=1)
    for norm in (1.0, 1.0, math.inf, 1.0):
        policy.decide(step(policy, gradients=gradients(norm)))
    assert policy.plan == "sparse-int4@9.8%"
    policy.decide(replace(step(policy, gradients=gradients(9.0)), elements=BUCKETS[::-1]))
    assert policy.plan == "sparse-int4@9.8%"  # there is nothing yet to compare it with
    policy.decide(replace(step(policy, gradients=gradients(1.0)), elements=BUCKETS[::-1]))
    assert policy.plan == "int8"


def test_large_payloads_go_round_a_ring_and_of_several_ranks_on_a_host_one_exchanges() -> None:
    for topology, elements, expected in (
        (Topology(4), 100_000, "int8"),
        (Topology(4), 100_000_000, "int8-ring"),
        # 2 n bytes of an all-reduce's 7 n, as only two hosts exchange
        (Topology(8, 4), 100_000, "host-bf16"),
    ):
        policy = Accordion(
            plans(topology, 0.001), topology, elements, l_low=0.3, l_high=0.03, eta=0.5, window=2
        )
        assert policy.plan == expected


@pytest.mark.parametrize("name", MADE)
def test_after_a_checkpoint_the_same_is_decided(name: str) -> None:
    norms = [1.0, 1.0, 3.0, 3.0, 3.0, 3.1, 1.0, 1.0, 1.1]
    trace = [
        {"bandwidth": 1e5 * (1 + i % 4), "gradients": gradients(norm)}
        for i, norm in enumerate(norms)
    ]
    policy, other = MADE[name](), MADE[name]()
    for more in trace[:3]:
        policy.decide(step(policy, **more))
    kept = io.BytesIO()
    torch.save(policy.state_dict(), kept)
    kept.seek(0)
    other.load_state_dict(torch.load(kept, weights_only=True))
    decided = []
    for more in trace[3:]:
        for one in (policy, other):
            one.decide(step(one, **more))
        assert one.plan == policy.plan
        decided.append(policy.plan)
    assert len(set(decided)) > 1


def train_and_go_on(rank: int) -> list[tuple[list[str], str]]:
    """30 steps with every policy; with accordion, which keeps most, the last 10 from a
    checkpoint."""
    found = []
    for name in MADE:
        options = {"window": 3, "eta": 100.0} if name == "accordion" else {}
        ddp, schemes = make_ddp(), []
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        session = attach(ddp, "netsense", policy=name, **options)
        for number, batch in enumerate(batches(rank, 30)):
            backward(ddp, batch)
            optimizer.param_groups[0]["lr"] = 0.1 if number < 9 else 0.01
            optimizer.step()
            session.step()
            schemes.append(session.last["scheme"])
            if name == "accordion" and number == 19:
                state = session.state_dict()
                session.close()
                again = make_ddp()
                again.module.load_state_dict(ddp.module.state_dict())
                ddp, optimizer = again, torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
                session = attach(ddp, "netsense", policy=name, **options)
                session.load_state_dict(state)
        session.close()
        found.append((schemes, parameters_hash(ddp.module)))
    return found


def test_replicas_are_identical_and_ranks_agree_with_every_policy() -> None:
    first, second = run_group(train_and_go_on, 2)
    assert first == second
    for name, (schemes, _) in zip(MADE, first, strict=True):
        assert len(set(schemes)) > 1, name
    sparse = [scheme.startswith("sparse") for scheme in first[list(MADE).index("accordion")][0]]
    # until there are two windows; as the rate falls
    assert [key for key, _ in groupby(sparse)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"policy": "kimat"},
            "policy must be one of progress, bdp, kimad, dc2, deco, accordion, fixed, not 'kimat'",
        ),
        ({"policy": "kimad", "time_budget": -1}, "time_budget must be a number >= 0, not -1"),
        (
            {"policy": "dc2", "target_delay": "50ms"},
            "target_delay must be a number >= 0, not '50ms'",
        ),
        ({"policy": "accordion", "window": 0}, "window must be an integer >= 1, not 0"),
        ({"policy": "accordion", "eta": 0}, "eta must be a number > 0, not 0"),
        ({"policy": "accordion", "l_high": 0.5}, "l_high must be at most l_low, 0.3, not 0.5"),
        ({"policy": "deco", "time_budget": 1.0}, "time_budget is for policy: kimad, not for deco"),
        ({"start": 0.1}, "start is for policy: bdp or kimad or dc2 or deco, not for progress"),
    ],
)
def test_wrong_options_are_one_line_that_names_the_choices(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as error:
        check_method("netsense", options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_options_with_their_defaults_filled_in_are_taken_again() -> None:
    for policy in POLICIES:
        options = check_method(
            "netsense", {"policy": policy, **({"schemes": ["int8"]} if policy == "fixed" else {})}
        )
        assert check_method("netsense", options) == options
