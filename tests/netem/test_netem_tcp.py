"""What TCP gets on links that lose and delay: the figures that users ask for are TCP's, not those
of single datagrams."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import sqrt

import pytest
from conftest import ENGINE
from wire import transfer

from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.state import LinkParameters, LinkState, Loss
from testbed.network import max_gso_bytes

pytestmark = pytest.mark.netem
MSS_BITS = 1448 * 8


PERCENTS = (0.1, 1)


@pytest.fixture(scope="module")
def flows():
    """By percent of loss, what a flow gets, and how many packets were lost to it; each has a link
    of its own."""
    fast = LinkParameters(200_000_000)
    ends = {
        percent: (f"w{2 * number}", f"w{2 * number + 1}") for number, percent in enumerate(PERCENTS)
    }
    links = {source: LinkState(fast, fast) for source, _ in ends.values()}
    for percent, (_, sink) in ends.items():
        links[sink] = LinkState(fast, replace(fast, delay_s=0.01, loss=Loss(percent / 100)))
    plan = LabPlan(
        links, impaired=frozenset((sink, "down") for _, sink in ends.values()), engine=ENGINE
    )
    # Links as a plan would make them, with packets as large as a plan allows.
    directions = [
        (link, side, getattr(state, side))
        for link, state in links.items()
        for side in ("up", "down")
    ]
    lab = NetnsLab(replace(plan, max_gso_bytes=max_gso_bytes(plan, directions)), ForkServer())
    with lab, ThreadPoolExecutor() as threads:

        def measured(percent):
            source, sink = ends[percent]
            return transfer(
                lab.hosts[source], lab.hosts[sink], warm_up_s=2.0, seconds=10.0, congestion="reno"
            )

        found = list(threads.map(measured, PERCENTS))
        counters = lab.links.counters()
    lost = [counters[sink, "down"].lost for _, sink in ends.values()]
    return dict(zip(PERCENTS, zip(found, lost, strict=True), strict=True))


@pytest.mark.parametrize("percent", PERCENTS)
def test_tcp_meets_the_loss_of_single_frames(figure, flows, percent):
    # netem lost one of so many GSO packets of up to 64 KiB: a tenth of the loss, and three times
    # the goodput.
    share = percent / 100
    found, lost = flows[percent]
    # Mathis et al. 1997: MSS / RTT * C / sqrt(p), C = sqrt(3/2) if every segment is acknowledged,
    # sqrt(3/4) if every other one.
    expected_bps = MSS_BITS / 0.01 / sqrt(share)
    low, high = sqrt(3 / 4) * expected_bps, sqrt(3 / 2) * expected_bps
    figure(
        f"TCP with a loss of {percent:g} %",
        f"{low / 1e6:.1f} to {high / 1e6:.1f} Mbit/s (Mathis), {percent:g} % sent again",
        f"{found.goodput_bps / 1e6:.1f} Mbit/s, {found.again / found.segments:.3%} of"
        f" {found.segments}",
    )
    deviation = sqrt(found.segments * share * (1 - share))
    assert abs(lost - found.segments * share) <= 4 * deviation
    assert found.again / found.segments == pytest.approx(
        share, rel=0.25, abs=4 * deviation / found.segments
    )
    assert 0.7 * low <= found.goodput_bps <= 1.3 * high
