"""The fates of frames, counted and held to binomial intervals. The seeds are fixed, so that a run
is like any other."""

import itertools
import random
from dataclasses import fields, replace
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.links.impairment import Conditions, Impairment
from testbed.links.qdiscs import Netem, distribution_table
from testbed.links.state import DISTRIBUTIONS, Loss
from testbed.links.tap import NEEDS_CHECKSUM, VNET_HEADER_BYTES

FRAME = bytes(VNET_HEADER_BYTES) + bytes(range(100))
Z = 4  # one right figure in 16 000 is outside


def within(seen, count, share, spread=1.0):
    """Within the binomial interval; ``spread`` widens it where events come in bursts."""
    return abs(seen - count * share) <= Z * sqrt(count * share * (1 - share)) * spread


def table(distribution):
    return memoryview(distribution_table(distribution)).cast("h").tolist()


def admitted(conditions, count):
    """What leaves of each of a number of frames that come at once while none is held."""
    impairment = Impairment(conditions, table(conditions.distribution))
    return impairment, [impairment.admit(FRAME, 0, 0) for _ in range(count)]


def runs(lost):
    """Lengths of the runs of losses."""
    return [len(run) for run in "".join("x" if one else " " for one in lost).split()]


def test_conditions_are_those_of_netem():
    assert {field.name for field in fields(Conditions)} == {field.name for field in fields(Netem)}


def test_a_delay_alone_is_exact():
    impairment = Impairment(Conditions(delay_ns=20_000_000))
    assert impairment.admit(FRAME, 5, 0) == [(20_000_005, FRAME)]


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05])
def test_independent_loss(share):
    count = 100_000
    impairment, leaving = admitted(Conditions(loss=Loss(share), seed=1), count)
    lost = [not copies for copies in leaving]
    assert sum(lost) == impairment.lost
    assert within(impairment.lost, count, share)
    assert sum(runs(lost)) / len(runs(lost)) == pytest.approx(1 / (1 - share), rel=0.02)


@pytest.mark.parametrize(
    "loss",
    [
        Loss(0.01, burst=3),
        Loss(0.02, burst=8),
        Loss(0.1, burst=20),
        Loss(0.03, burst=10, bad_loss=0.5, good_loss=0.005),
    ],
)
def test_bursts_of_loss(loss):
    count = 200_000
    impairment, leaving = admitted(Conditions(loss=loss, seed=2), count)
    p, r = loss.transitions
    bad, memory = p / (p + r), 1 - p - r
    state = bad * (1 - bad) * (loss.bad_loss - loss.good_loss) ** 2
    spread = sqrt(1 + 2 * state / (loss.share * (1 - loss.share)) * memory / (1 - memory))
    assert within(impairment.lost, count, loss.share, spread)
    if loss.bad_loss == 1:
        lengths = runs(not copies for copies in leaving)
        assert sum(lengths) / len(lengths) == pytest.approx(loss.burst, rel=Z / sqrt(len(lengths)))


def test_correlated_loss_is_what_netem_makes_of_it():
    share, correlation, count = 0.1, 0.3, 200_000
    impairment, leaving = admitted(
        Conditions(loss=Loss(share, correlation=correlation), seed=3), count
    )
    rng, value, losses, begun = random.Random(0), 0.5, 0, 0
    for _ in range(5 * count):
        before, value = value, (1 - correlation) * rng.random() + correlation * value
        losses += value < share
        begun += value < share <= before
    assert losses < 0.8 * 5 * count * share  # the mixed numbers are seldom as low
    assert within(impairment.lost, count, losses / (5 * count), spread=1.5)
    lengths = runs(not copies for copies in leaving)
    assert sum(lengths) / len(lengths) == pytest.approx(losses / begun, rel=0.03)


def test_a_burst_goes_on_over_a_change():
    # Otherwise ten changes a second would make the bursts of a slow link short, and losses rare.
    conditions = Conditions(loss=Loss(0.1, burst=20), seed=4)
    impairment = Impairment(conditions)
    for number in range(100_000):
        if number % 10 == 0:
            impairment.change(replace(conditions, delay_ns=number))
        impairment.admit(FRAME, 0, 0)
    assert within(impairment.lost, 100_000, 0.1, spread=sqrt(2 * 20))


def test_duplicates():
    count, share = 100_000, 0.02
    impairment, leaving = admitted(Conditions(duplicate=share, seed=5), count)
    assert {len(copies) for copies in leaving} == {1, 2}
    assert sum(map(len, leaving)) == count + impairment.duplicated
    assert within(impairment.duplicated, count, share)


def test_of_a_frame_that_is_doubled_and_lost_one_passes_and_a_copy_may_be_lost_by_itself():
    count = 20_000
    impairment, leaving = admitted(Conditions(duplicate=1.0, loss=Loss(0.5), seed=6), count)
    # Lost and doubled: one. Not lost: two, or one if the copy, which is not doubled again, is lost.
    assert {len(copies) for copies in leaving} == {1, 2}
    assert within(sum(len(copies) == 2 for copies in leaving), count, 0.25)
    assert sum(map(len, leaving)) == count + impairment.duplicated - impairment.lost


def test_corruption_flips_one_bit_anywhere_in_the_frame():
    count, share = 50_000, 0.04
    checked = bytes([2]) + FRAME[1:]  # VIRTIO_NET_HDR_F_DATA_VALID
    impairment = Impairment(Conditions(corrupt=share, seed=7))
    bits = []
    for _ in range(count):
        [(_, frame)] = impairment.admit(checked, 0, 0)
        if frame != checked:
            assert frame[0] == 0  # the receiver looks at the checksum
            flipped = int.from_bytes(frame[VNET_HEADER_BYTES:]) ^ int.from_bytes(
                checked[VNET_HEADER_BYTES:]
            )
            assert flipped.bit_count() == 1
            bits.append(flipped.bit_length() - 1)
    assert len(bits) == impairment.corrupted
    assert within(len(bits), count, share)
    assert within(sum(bit < 400 for bit in bits), len(bits), 0.5)
    assert min(bits) < 20
    assert max(bits) >= 780


def test_a_frame_without_its_checksum_is_not_corrupted():
    # It would get a right checksum over its error, and no receiver would find it.
    unfinished = bytes([NEEDS_CHECKSUM]) + FRAME[1:]
    impairment = Impairment(Conditions(corrupt=1.0))
    assert impairment.admit(unfinished, 0, 0) == [(0, unfinished)]
    assert impairment.corrupted == 0


def test_a_share_overtakes():
    count, share = 30_000, 0.05
    impairment, leaving = admitted(Conditions(delay_ns=1000, reorder=share, seed=8), count)
    assert {due for [(due, _)] in leaving} == {0, 1000}
    assert sum(due == 0 for [(due, _)] in leaving) == impairment.reordered
    assert within(impairment.reordered, count, share)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_jitter_is_the_standard_deviation_whatever_the_distribution(distribution):
    conditions = Conditions(
        delay_ns=50_000_000, jitter_ns=5_000_000, distribution=distribution, seed=9
    )
    _, leaving = admitted(conditions, 50_000)
    delays = [due for [(due, _)] in leaving]
    mean = sum(delays) / len(delays)
    deviation = sqrt(sum((delay - mean) ** 2 for delay in delays) / len(delays))
    assert mean == pytest.approx(50_000_000, abs=Z * 5_000_000 / sqrt(len(delays)))
    assert deviation == pytest.approx(5_000_000, rel=0.03)
    assert any(later < earlier for earlier, later in itertools.pairwise(delays))


@given(
    gaps=st.lists(st.integers(0, 10_000), min_size=1, max_size=50),
    delay_ns=st.integers(0, 10_000),
    jitter_ns=st.integers(0, 10_000),
    seed=st.integers(0, 100),
)
def test_in_order_nothing_overtakes_and_nothing_leaves_before_it_came(
    gaps, delay_ns, jitter_ns, seed
):
    impairment = Impairment(
        Conditions(delay_ns, jitter_ns, in_order=True, seed=seed), table("normal")
    )
    now = last = 0
    for gap in gaps:
        now += gap
        [(due, _)] = impairment.admit(FRAME, now, 0)
        assert due >= max(now, last)
        last = due


@given(
    conditions=st.builds(
        Conditions,
        delay_ns=st.integers(0, 1000),
        loss=st.builds(Loss, st.floats(0, 0.9), st.floats(0, 0.9), st.none() | st.floats(1, 20)),
        duplicate=st.floats(0, 1),
        corrupt=st.floats(0, 1),
        reorder=st.floats(0, 1),
        limit_packets=st.integers(0, 20),
        seed=st.integers(0, 100),
    )
)
def test_every_frame_is_accounted_for_and_the_limit_holds(conditions):
    impairment = Impairment(conditions)
    held = left = 0
    for _ in range(100):
        leaving = impairment.admit(FRAME, 0, held)
        assert held < conditions.limit_packets or not leaving
        left += sum(due == 0 for due, _ in leaving)
        held += sum(due > 0 for due, _ in leaving)
    assert held <= conditions.limit_packets + 1  # netem, too, lets a copy in with the last one
    assert left + held == 100 + impairment.duplicated - impairment.lost - impairment.overflowed


def test_the_same_seed_is_the_same_fate_and_a_change_begins_it_anew_only_with_another():
    conditions = Conditions(loss=Loss(0.5), seed=10)
    first, second = (admitted(conditions, 100)[1] for _ in range(2))
    assert first == second
    impairment = Impairment(conditions)
    again = [impairment.admit(FRAME, 0, 0) for _ in range(50)]
    impairment.change(replace(conditions, reorder=0.0))
    again += [impairment.admit(FRAME, 0, 0) for _ in range(50)]
    assert again == first
    impairment.change(replace(conditions, seed=11))
    impairment.change(conditions)
    assert [impairment.admit(FRAME, 0, 0) for _ in range(100)] == first
