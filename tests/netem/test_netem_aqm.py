"""Queues that are managed, which a kernel may lack as it may lack netem."""

import pytest
from wire import transfer

from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.routes import Tcp
from testbed.links.state import LinkState, Shape

pytestmark = pytest.mark.netem


@pytest.mark.parametrize("aqm", ["codel", "fq_codel", "cake"])
@pytest.mark.parametrize("ecn", [False, True])
def test_a_managed_queue_stays_short_and_marks_where_it_may(figure, aqm, ecn):
    queue = Shape(20_000_000, queue_s=0.5, aqm=aqm, ecn=ecn)
    fast = LinkState(Shape(100_000_000), Shape(100_000_000))
    plan = LabPlan({"w0": fast, "w1": LinkState(fast.up, queue)}, tcp=Tcp(ecn=ecn))
    with NetnsLab(plan, ForkServer()) as pair:
        found = transfer(pair.hosts["w0"], pair.hosts["w1"], warm_up_s=3.0, seconds=3.0)
        counters = pair.links.counters()["w1", "down"]
    waits_s = counters.backlog_bytes * 8 / 20e6
    figure(
        f"{aqm}{' with ECN' if ecn else ''}, a queue of 500 ms at 20 Mbit/s",
        "less than 100 ms wait" + (", marks and no drops" if ecn else ""),
        f"{1e3 * waits_s:.0f} ms, {found.goodput_bps / 1e6:.1f} Mbit/s, {found.marked} marked, {counters.drops} dropped",
    )
    assert waits_s < 0.1
    assert found.goodput_bps > 0.85 * 20e6
    assert (found.marked > 0) == ecn
    assert (counters.drops == 0) == ecn
