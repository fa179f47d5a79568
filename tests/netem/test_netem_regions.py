"""Regions with a matrix of rate and delay, from the spec to what a pair of workers gets."""

import itertools
from dataclasses import replace

import pytest
from wire import goodput, ping

from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.state import DIRECTIONS
from testbed.network import plan_network
from testbed.spec.models import NetworkSpec

pytestmark = pytest.mark.netem

SPEC = {
    "topology": "regions",
    "link": {"rate": "100mbit"},
    "regions": {"eu": ["w0"], "us": ["w1"], "as": ["w2"]},
    "between": {
        "eu-us": {"rate": "10mbit", "delay": "15ms", "queue": "100ms"},
        "eu-as": {"rate": "5mbit", "delay": "40ms", "queue": "200ms"},
        "us-as": {"rate": "20mbit", "delay": "25ms", "queue": "100ms"},
    },
}
TCP_SHARE = 1448 / 1514


def test_every_pair_of_regions_gets_its_delay_and_its_rate(figure, engine):
    network = NetworkSpec.model_validate(SPEC)
    plan = plan_network(network, ["w0", "w1", "w2"])
    impaired = frozenset((name, side) for name in plan.trunks for side in DIRECTIONS)
    with NetnsLab(replace(plan, impaired=impaired, engine=engine), ForkServer()) as lab:
        for (name, first), (other, second) in itertools.combinations(zip(SPEC["regions"], lab.hosts.values(), strict=True), 2):
            shape = plan.links[f"{name}-{other}"].up
            rtt_ms = ping(first, second.address, 20)[1:].min() * 1e3  # the others have waited for the machine, too
            wanted_ms, wanted_bps = 2 * shape.delay_s * 1e3, shape.rate_bps * TCP_SHARE
            found = []
            for _ in range(3):  # after the losses of the slow start, whose filled gaps come at once; and a machine may stall
                found.append(goodput(first, second, warm_up_s=5.0, seconds=4.0))
                if abs(found[-1] / wanted_bps - 1) <= 0.03:
                    break
            rate_bps = min(found, key=lambda rate_bps: abs(rate_bps - wanted_bps))
            figure(
                f"{name} to {other}",
                f"{wanted_ms:g} ms, {wanted_bps / 1e6:.2f} Mbit/s, each ± 5 %",
                f"{rtt_ms:.2f} ms, {rate_bps / 1e6:.2f} Mbit/s ({rate_bps / wanted_bps - 1:+.1%})",
            )
            assert rtt_ms == pytest.approx(wanted_ms, rel=0.05)
            assert rate_bps == pytest.approx(wanted_bps, rel=0.05)
