"""The compiled qdisc trees: rules of burst and queue, stable structure."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.links.qdiscs import (
    ETHERNET_FRAME_BYTES,
    UNCUT_PACKET_BYTES,
    Bfifo,
    Cake,
    Codel,
    Htb,
    HtbClass,
    Netem,
    Pfifo,
    SegmentingTbf,
    Tbf,
    bucket_of,
    changed,
    compile_tree,
    distribution_table,
    frame_bytes,
    gso_limits,
    place_of,
    queue_of,
    requests,
    tbf_max_packet_bytes,
    tc_commands,
)
from testbed.links.state import AQMS, DISTRIBUTIONS, LinkParameters, Loss

pytestmark = pytest.mark.fast

rates = st.integers(8_000, 100 * 10**9)
link_parameters = st.builds(
    LinkParameters,
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
    in_order=st.booleans(),
    aqm=st.sampled_from(AQMS),
)
mtus = st.integers(576, 9000)
AQM_NODES = {"fifo": Bfifo, "codel": Codel, "fq_codel": Codel, "cake": Cake}


@given(st.lists(rates, min_size=1, max_size=10))
def test_every_packet_fits_every_bucket_of_a_run_with_tbf(run_rates):
    # A queued packet larger than a bucket that has shrunk would stop the link for good.
    largest = tbf_max_packet_bytes(run_rates)
    for rate in run_rates:
        (tbf,) = compile_tree(LinkParameters(rate_bps=rate), max_packet_bytes=largest, shaper="tbf")
        assert tbf.burst_bytes >= min(largest, UNCUT_PACKET_BYTES)
        assert tbf.limit_bytes >= tbf.burst_bytes + ETHERNET_FRAME_BYTES
    size, segments = gso_limits(largest)
    assert segments * ETHERNET_FRAME_BYTES <= largest
    assert size <= segments * 1448


def test_a_rate_outside_the_plan_cannot_shrink_the_bucket_of_a_tbf_below_the_packets():
    largest = tbf_max_packet_bytes([10**9])
    (tbf,) = compile_tree(LinkParameters(rate_bps=10**6), max_packet_bytes=largest, shaper="tbf")
    assert tbf.burst_bytes >= UNCUT_PACKET_BYTES


@given(rates, mtus)
def test_a_bucket_is_a_millisecond_or_a_frame(rate, mtu):
    tree = compile_tree(LinkParameters(rate_bps=rate), mtu=mtu)
    assert bucket_of(tree) == max(-(-rate // 8000), frame_bytes(mtu))


@given(link_parameters, mtus)
def test_the_queue_is_what_was_asked_for_but_holds_a_frame_and_nothing_larger_than_itself_enters_it(
    parameters, mtu
):
    tree = compile_tree(parameters, mtu=mtu)
    if parameters.rate_bps is None or parameters.aqm != "fifo":
        assert queue_of(tree) is None
        return
    asked = (
        parameters.queue_bytes
        if parameters.queue_bytes is not None
        else parameters.rate_bps / 8 * parameters.queue_s
    )
    assert queue_of(tree) == pytest.approx(min(max(asked, frame_bytes(mtu)), 2**32 - 1), abs=1)
    (cut,) = (node for node in tree if isinstance(node, SegmentingTbf))
    assert frame_bytes(mtu) <= cut.largest_bytes <= max(frame_bytes(mtu), queue_of(tree))


@given(link_parameters, st.booleans())
def test_a_tree_limits_and_impairs_as_asked(parameters, impaired):
    tree = compile_tree(parameters, impaired=impaired)
    kinds = [type(node) for node in tree]
    limiter = (
        [Pfifo]
        if parameters.rate_bps is None
        else [Htb, HtbClass, SegmentingTbf, AQM_NODES[parameters.aqm]]
    )
    assert kinds == ([Netem] if impaired or parameters.impaired else []) + limiter
    assert len(requests(tree, 7, "w0")) == len(tc_commands(tree, "w0")) == len(tree)


@given(link_parameters, link_parameters, st.booleans())
def test_only_what_changes_is_sent_and_below_a_new_qdisc_everything(first, second, impaired):
    before, after = (compile_tree(parameters, impaired=impaired) for parameters in (first, second))
    levels = changed(after, before)
    assert changed(after, after) == []
    kinds = [(type(node), node.kind) for node in before] == [
        (type(node), node.kind) for node in after
    ]
    for level, node in enumerate(after):
        if level not in levels:
            assert before[level] == node
    if not kinds:
        new = next(level for level, node in enumerate(after) if level >= len(before) or type(before[level]) is not type(node)
                   or before[level].kind != node.kind)  # fmt: skip
        assert set(range(new, len(after))) <= set(levels)
    assert [node for node, _ in requests(after, 7, "w0", before)] == [
        after[level] for level in levels
    ]


@given(link_parameters, st.booleans(), st.sampled_from(["htb", "tbf"]))
def test_every_handle_is_ours_and_every_parent_is_the_one_above(parameters, impaired, shaper):
    tree = compile_tree(parameters, impaired=impaired, shaper=shaper)
    places = [place_of(tree, level) for level in range(len(tree))]
    assert len({handle for handle, _ in places}) == len(tree)
    for (above, _), (handle, parent) in pairwise(places):
        assert handle >> 20 == 0x7E5
        assert parent >> 16 == above >> 16


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
    parameters = LinkParameters(
        rate_bps=10_000_000, delay_s=0.01, jitter_s=0.001, loss=Loss(0.01, burst=4), duplicate=0.001
    )
    tree = compile_tree(parameters, seed=7)
    assert tc_commands(tree, "w1") == [
        (
            "tc qdisc replace dev w1 root handle 7e51: netem limit 2333 delay 10000us 1000us"
            " distribution normal loss gemodel 0.252525% 25% 100% 0% duplicate 0.1% seed 7"
        ),
        "tc qdisc replace dev w1 parent 7e51:1 handle 7e52: htb default 1",
        (
            "tc class replace dev w1 parent 7e52: classid 7e52:1 htb rate 10000000bit ceil"
            " 10000000bit burst 1514 cburst 1514 quantum 60000"
        ),
        (
            "tc qdisc replace dev w1 parent 7e52:1 handle 7e53: tbf rate 8000000000000000bit burst"
            " 1514 limit 62500"
        ),
        "tc qdisc replace dev w1 parent 7e53:1 handle 7e54: bfifo limit 62500",
    ]
    slower = compile_tree(
        parameters.with_changes({"rate_bps": 5_000_000, "queue_bytes": 62500}), seed=7
    )
    _, only = tc_commands(slower, "w1", before=tree)  # netem holds fewer packets; the queue stays
    assert only.startswith(
        "tc class replace dev w1 parent 7e52: classid 7e52:1 htb rate 5000000bit"
    )


@given(st.sampled_from(["htb", "tbf"]), st.booleans())
def test_in_an_outage_nothing_passes_and_the_end_of_it_replaces_no_qdisc(shaper, impaired):
    usual, outage = (
        compile_tree(LinkParameters(rate_bps=rate), shaper=shaper, impaired=impaired)
        for rate in (20_000_000, 0)
    )
    assert [type(node) for node in usual] == [type(node) for node in outage]
    (shut,) = (node for node in outage if isinstance(node, SegmentingTbf | Tbf))
    assert shut.rate_bps < 100
