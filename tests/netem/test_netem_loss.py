"""What netem does to packets, counted: by the programs that sent and received them, and by the
kernel."""

import random
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from wire import Flow, backlog_drops, frames_left, udp_counters

from testbed.links.state import Loss

pytestmark = pytest.mark.netem

# The verdict is on the 95 % interval, as everywhere; the assertion is on the 99.99 % interval, or a
# right kernel would fail one run in three.
Z_VERDICT, Z_FAIL = 1.960, 3.891
# The bridge itself says now and then which multicast groups it listens to (IGMP).
STRAY_PACKETS = 4


def verdict(figure, what, count, share, seen, spread=1.0):
    """Hold a number of events to the binomial interval; ``spread`` widens it where events come in
    bursts."""
    deviation = sqrt(count * share * (1 - share)) * spread
    off = (seen - count * share) / deviation
    figure(
        what,
        f"{share:.3%} ± {Z_VERDICT * deviation / count:.3%} of {count}",
        f"{seen / count:.4%}, {'within' if abs(off) <= Z_VERDICT else 'outside'} the 95 % interval",
    )
    assert abs(off) <= Z_FAIL


def send(pair, count, payload_bytes=16):
    """Send datagrams from w0 to w1 and hold the kernel's counters to what programs sent and
    received."""
    hosts, links = pair.hosts, pair.links
    before, left = links.counters(), frames_left(pair, "w1")
    elsewhere = udp_counters(hosts["w1"])["RcvbufErrors"] + backlog_drops()
    with Flow(hosts["w0"], hosts["w1"], payload_bytes) as flow:
        flow.burst(count)
        came = flow.arrivals()
    after = links.counters()
    assert after["w0", "up"].packets - before["w0", "up"].packets == count
    assert after["w0", "up"].drops == after["w1", "down"].drops == 0, (
        "a queue overflowed, so that not only netem dropped"
    )
    assert udp_counters(hosts["w1"])["RcvbufErrors"] + backlog_drops() == elsewhere
    assert links.line_counters is None or links.line_counters.refused == 0
    return (
        came,
        frames_left(pair, "w1") - left,
        after["w1", "down"].lost - before["w1", "down"].lost,
    )


@pytest.mark.parametrize(("percent", "count"), [(0.1, 400_000), (1, 200_000), (5, 100_000)])
def test_independent_loss(pair, figure, percent, count):
    share = percent / 100
    pair.set(loss=Loss(share))
    came, carried, dropped = send(pair, count)
    lost = count - len(came.number)
    assert 0 <= carried - len(came.number) <= STRAY_PACKETS
    assert 0 <= dropped - lost <= STRAY_PACKETS
    verdict(figure, f"loss of {percent:g} %", count, share, lost)
    assert came.lost_runs.mean() == pytest.approx(1 / (1 - share), rel=0.05)


@pytest.mark.parametrize(("share", "burst"), [(0.01, 3), (0.02, 8), (0.1, 20)])
def test_bursts_of_loss(pair, figure, share, burst):
    count = 400_000
    loss = Loss(share, burst=burst)
    pair.set(loss=loss)
    came, _, dropped = send(pair, count)
    lost = count - len(came.number)
    assert 0 <= dropped - lost <= STRAY_PACKETS
    memory = 1 - sum(loss.transitions)  # correlation of the state from packet to packet
    verdict(
        figure,
        f"loss of {share:.0%} in bursts of {burst}",
        count,
        share,
        lost,
        spread=sqrt((1 + memory) / (1 - memory)),
    )
    mean = came.lost_runs.mean()
    measured = f"{mean:.2f} ({mean / burst - 1:+.1%}) over {len(came.lost_runs)} bursts"
    figure(f"mean burst of {burst}", f"{burst} ± 15 %", measured)
    assert mean == pytest.approx(burst, rel=0.15)


def test_loss_in_both_states_of_gilbert_and_elliott(pair, figure):
    count = 400_000
    loss = Loss(0.03, burst=10, bad_loss=0.5, good_loss=0.005)
    pair.set(loss=loss)
    came, _, _ = send(pair, count)
    p, r = loss.transitions
    bad, memory = p / (p + r), 1 - p - r
    # Variance of a sum: that of independent losses, and what the state adds to it.
    state = bad * (1 - bad) * (loss.bad_loss - loss.good_loss) ** 2
    spread = sqrt(1 + 2 * state / (loss.share * (1 - loss.share)) * memory / (1 - memory))
    verdict(
        figure,
        "loss of 3 %: 50 % in the bad state, 0.5 % in the good",
        count,
        0.03,
        count - len(came.number),
        spread,
    )


def test_correlated_loss_is_what_netem_makes_of_it(pair, figure):
    # netem mixes each random number with the one before, which narrows their spread: fewer are low
    # enough to be a loss.
    share, correlation, count = 0.1, 0.3, 200_000
    pair.set(loss=Loss(share, correlation=correlation))
    came, _, dropped = send(pair, count)
    lost = count - len(came.number)
    assert 0 <= dropped - lost <= STRAY_PACKETS
    rng, value, losses, runs = random.Random(0), 0.5, 0, 0
    for _ in range(10 * count):
        before, value = value, (1 - correlation) * rng.random() + correlation * value
        losses += value < share
        runs += value < share <= before
    expected, burst = losses / (10 * count), losses / runs
    verdict(
        figure,
        f"loss of {share:.0%} with correlation {correlation:.0%}",
        count,
        expected,
        lost,
        spread=1.5,
    )
    assert came.lost_runs.mean() == pytest.approx(burst, rel=0.15)


def test_duplicates(pair, figure):
    count, share = 100_000, 0.02
    pair.set(duplicate=share)
    came, carried, _ = send(pair, count)
    numbers, copies = np.unique(came.number, return_counts=True)
    assert len(numbers) == count
    assert copies.max() == 2
    assert 0 <= carried - len(came.number) <= STRAY_PACKETS
    verdict(figure, f"duplicates of {share:.0%}", count, share, len(came.number) - count)


def test_corruption_flips_a_bit_and_the_checksum_finds_it(pair, figure):
    count, share, payload = 50_000, 0.04, 1000
    pair.set(corrupt=share)
    rejected = udp_counters(pair.hosts["w1"])["InCsumErrors"]
    came, carried, dropped = send(pair, count, payload)
    rejected = udp_counters(pair.hosts["w1"])["InCsumErrors"] - rejected
    assert 0 <= carried - count <= STRAY_PACKETS
    assert dropped == 0
    # Nearly all bits of a frame are payload; those of its headers are found elsewhere, or, in the
    # sender's address, not at all.
    verdict(
        figure,
        f"corruption of {share:.0%}, payload",
        count,
        share * payload / (14 + 20 + 8 + payload),
        rejected,
    )
    assert rejected <= count - len(came.number) <= rejected * 1.1


def test_reordering_lets_a_share_overtake(pair, figure):
    count, share = 30_000, 0.05
    pair.set(delay_s=0.02, reorder=share)
    with Flow(pair.hosts["w0"], pair.hosts["w1"]) as flow:
        sent_ns = flow.paced(count)
        came = flow.arrivals()
    assert len(came.number) == count
    delay_ms = (came.at_ns - sent_ns[came.number]) / 1e6
    overtook = int((delay_ms < 20).sum())
    verdict(figure, f"reordering of {share:.0%}", count, share, overtook)
    assert np.median(delay_ms[delay_ms < 20]) < 2


def test_one_property_changes_and_the_others_stay(pair):
    pair.set(delay_s=0.005, loss=Loss(0.05), duplicate=0.05)
    for link in ("w0", "w1"):
        state = pair.links.states[link]
        faster = {"rate_bps": 200_000_000}
        state = replace(
            state, up=state.up.with_changes(faster), down=state.down.with_changes(faster)
        )
        assert pair.links.apply({link: state})[link].verified
    came, _, dropped = send(pair, 20_000)
    assert dropped == pytest.approx(1000, rel=0.25)
    assert len(came.number) == pytest.approx(20_000 - 1000 + 1000, rel=0.02)
    pair.set()
    came, _, dropped = send(pair, 20_000)
    assert (len(came.number), dropped) == (20_000, 0)


def test_a_partition_and_its_end(pair):
    pair.set(loss=Loss(0.01))
    cut = replace(pair.links.states["w1"], connected=False)
    assert pair.links.apply({"w1": cut})["w1"].verified
    with Flow(pair.hosts["w0"], pair.hosts["w1"]) as flow:
        flow.burst(1000)
        assert len(flow.arrivals().number) == 0
        assert pair.links.apply({"w1": replace(cut, connected=True)})["w1"].verified
        flow.burst(1000)
        assert len(flow.arrivals().number) == pytest.approx(990, abs=30)
