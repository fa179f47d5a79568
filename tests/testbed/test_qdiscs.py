"""The compiled qdisc trees: rules of burst and queue, stable structure."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.links.qdiscs import (
    ETHERNET_FRAME_BYTES,
    UNCUT_PACKET_BYTES,
    Netem,
    Pfifo,
    Tbf,
    compile_tree,
    distribution_table,
    gso_max_size,
    largest_packet_bytes,
    requests,
    tc_commands,
)
from testbed.links.state import DISTRIBUTIONS, Loss, Shape

rates = st.integers(8_000, 100 * 10**9)
shapes = st.builds(
    Shape,
    rate_bps=st.none() | rates,
    queue_s=st.floats(0, 2),
    queue_bytes=st.none() | st.integers(1, 2**31),
    delay_s=st.floats(0, 1),
    jitter_s=st.floats(0, 0.1),
    loss=st.builds(Loss, share=st.floats(0, 1), correlation=st.floats(0, 1))
    | st.builds(Loss, share=st.floats(0.001, 0.3), burst=st.floats(1, 100)),
    duplicate=st.floats(0, 1),
    corrupt=st.floats(0, 1),
    reorder=st.floats(0, 1),
    distribution=st.sampled_from(DISTRIBUTIONS),
)


@given(st.lists(rates, min_size=1, max_size=10))
def test_every_packet_fits_every_bucket_of_a_run(run_rates):
    # A queued packet larger than a bucket that has shrunk would stop the link for good.
    largest = largest_packet_bytes(run_rates)
    for rate in run_rates:
        (tbf,) = compile_tree(Shape(rate_bps=rate), packet_bytes=largest)
        assert tbf.burst_bytes >= min(largest, UNCUT_PACKET_BYTES)
        assert tbf.limit_bytes >= tbf.burst_bytes + ETHERNET_FRAME_BYTES
    segments = gso_max_size(largest) // 1448
    assert segments * ETHERNET_FRAME_BYTES <= largest


def test_a_rate_outside_the_plan_cannot_shrink_the_bucket_below_the_packets():
    largest = largest_packet_bytes([10**9])
    (tbf,) = compile_tree(Shape(rate_bps=10**6), packet_bytes=largest)
    assert tbf.burst_bytes >= UNCUT_PACKET_BYTES


@given(shapes, st.booleans())
def test_a_tree_limits_and_impairs_as_asked(shape, impaired):
    tree = compile_tree(shape, impaired=impaired)
    kinds = [type(qdisc) for qdisc in tree]
    assert kinds == ([Netem] if impaired or shape.needs_netem else []) + [Pfifo if shape.rate_bps is None else Tbf]
    assert len(requests(tree, 7, "w0")) == len(tc_commands(tree, "w0")) == len(tree)


@given(st.floats(0.001, 0.2), st.floats(1, 50), st.floats(0.5, 1), st.floats(0, 0.0009))
def test_a_gilbert_elliott_model_has_the_loss_and_the_bursts_asked_for(share, burst, bad, good):
    p, r = Loss(share, burst=burst, bad_loss=bad, good_loss=good).transitions
    in_bad = p / (p + r)
    assert in_bad * bad + (1 - in_bad) * good == pytest.approx(share)
    assert 1 / r == pytest.approx(burst)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_delay_distribution_has_mean_zero_and_deviation_one(name):
    values = np.frombuffer(distribution_table(name), dtype=np.int16) / 8192
    assert values.mean() == pytest.approx(0, abs=1e-4)
    assert values.std() == pytest.approx(1, abs=1e-4)
    assert (np.diff(values) >= 0).all()


def test_tc_commands_are_the_ones_a_person_would_type():
    shape = Shape(rate_bps=10_000_000, delay_s=0.01, jitter_s=0.001, loss=Loss(0.01, burst=4), duplicate=0.001)
    tree = compile_tree(shape, seed=7)
    assert tc_commands(tree, "w1") == [
        "tc qdisc replace dev w1 root handle 7e51: netem limit 2333 delay 10000us 1000us distribution normal "
        "loss gemodel 0.252525% 25% 100% 0% duplicate 0.1% seed 7",
        "tc qdisc replace dev w1 parent 7e51:1 handle 7e52: tbf rate 10000000bit burst 12112 limit 62500",
    ]
