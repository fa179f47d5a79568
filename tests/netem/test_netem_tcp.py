"""What TCP gets on links that lose and delay: the figures that users ask for are TCP's, not those of single datagrams."""

from dataclasses import replace
from math import sqrt

import pytest
from conftest import ENGINE, Pair
from wire import transfer

from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.links.state import LinkState, Loss, Shape
from testbed.network import packet_bytes

pytestmark = pytest.mark.netem
MSS_BITS = 1448 * 8


def lab(down: Shape) -> Pair:
    """Two hosts whose links are as a plan would make them, with packets as large as a plan allows."""
    links = {"w0": LinkState(Shape(down.rate_bps), Shape(down.rate_bps)), "w1": LinkState(Shape(down.rate_bps), down)}
    plan = LabPlan(links, impaired=frozenset({("w1", "down")}), engine=ENGINE)
    shapes = [(link, side, getattr(state, side)) for link, state in links.items() for side in ("up", "down")]
    return Pair(replace(plan, packet_bytes=packet_bytes(plan, shapes)), ForkServer())


@pytest.mark.parametrize("percent", [0.1, 1])
def test_tcp_meets_the_loss_of_single_frames(figure, percent):
    # netem lost one of so many GSO packets of up to 64 KiB: a tenth of the loss, and three times the goodput.
    share = percent / 100
    with lab(Shape(200_000_000, delay_s=0.01, loss=Loss(share))) as pair:
        found = transfer(pair.hosts["w0"], pair.hosts["w1"], warm_up_s=2.0, seconds=10.0, congestion="reno")
        lost = pair.links.counters()["w1", "down"].lost
    # Mathis et al. 1997: MSS / RTT * C / sqrt(p), C = sqrt(3/2) if every segment is acknowledged, sqrt(3/4) if every other one.
    expected_bps = MSS_BITS / 0.01 / sqrt(share)
    low, high = sqrt(3 / 4) * expected_bps, sqrt(3 / 2) * expected_bps
    figure(
        f"TCP with a loss of {percent:g} %",
        f"{low / 1e6:.1f} to {high / 1e6:.1f} Mbit/s (Mathis), {percent:g} % sent again",
        f"{found.goodput_bps / 1e6:.1f} Mbit/s, {found.again / found.segments:.3%} of {found.segments}",
    )
    deviation = sqrt(found.segments * share * (1 - share))
    assert abs(lost - found.segments * share) <= 4 * deviation
    assert found.again / found.segments == pytest.approx(share, rel=0.25, abs=4 * deviation / found.segments)
    assert 0.7 * low <= found.goodput_bps <= 1.3 * high
