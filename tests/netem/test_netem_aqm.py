"""Queues that are managed, which a kernel may lack as it may lack netem."""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import pytest
from wire import transfer

from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.routes import Tcp
from testbed.links.state import LinkParameters, LinkState

pytestmark = pytest.mark.netem
AQMS = ("codel", "fq_codel", "cake")


@pytest.fixture(scope="module", params=[False, True], ids=["drops", "marks"])
def found(request):
    """What one flow meets at each managed queue, and the queue's counters at its end; the flows
    have links of their own."""
    fast = LinkParameters(100_000_000)
    ends = {aqm: (f"w{2 * number}", f"w{2 * number + 1}") for number, aqm in enumerate(AQMS)}
    links = {source: LinkState(fast, fast) for source, _ in ends.values()}
    links |= {
        sink: LinkState(fast, LinkParameters(20_000_000, queue_s=0.5, aqm=aqm, ecn=request.param))
        for aqm, (_, sink) in ends.items()
    }
    one_asks = Lock()
    with (
        NetnsLab(LabPlan(links, tcp=Tcp(ecn=request.param)), ForkServer()) as lab,
        ThreadPoolExecutor() as threads,
    ):

        def measured(aqm):
            source, sink = ends[aqm]
            flow = transfer(lab.hosts[source], lab.hosts[sink], warm_up_s=3.0, seconds=3.0)
            with one_asks:  # at once, before the queue is empty
                return flow, lab.links.counters()[sink, "down"]

        return request.param, dict(zip(AQMS, threads.map(measured, AQMS), strict=True))


@pytest.mark.parametrize("aqm", AQMS)
def test_a_managed_queue_stays_short_and_marks_where_it_may(figure, found, aqm):
    ecn, by_aqm = found
    flow, counters = by_aqm[aqm]
    waits_s = counters.backlog_bytes * 8 / 20e6
    figure(
        f"{aqm}{' with ECN' if ecn else ''}, a queue of 500 ms at 20 Mbit/s",
        "less than 100 ms wait" + (", marks and no drops" if ecn else ""),
        f"{1e3 * waits_s:.0f} ms, {flow.goodput_bps / 1e6:.1f} Mbit/s, {flow.marked} marked,"
        f" {counters.drops} dropped",
    )
    assert waits_s < 0.1
    assert flow.goodput_bps > 0.85 * 20e6
    assert (flow.marked > 0) == ecn
    assert (counters.drops == 0) == ecn
