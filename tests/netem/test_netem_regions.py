"""Regions with a matrix of rate and delay, from the spec to what a pair of workers gets."""

from concurrent.futures import ThreadPoolExecutor
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


def measured(ends):
    """Payload (bits/s) from one host to another, after the losses of the slow start, whose filled
    gaps come at once."""
    return goodput(*ends, warm_up_s=5.0, seconds=4.0)


def test_every_pair_of_regions_gets_its_delay_and_its_rate(figure, engine):
    network = NetworkSpec.model_validate(SPEC)
    plan = plan_network(network, ["w0", "w1", "w2"])
    impaired = frozenset((name, side) for name in plan.trunks for side in DIRECTIONS)
    with NetnsLab(replace(plan, impaired=impaired, engine=engine), ForkServer()) as lab:
        w0, w1, w2 = lab.hosts.values()
        pairs = {"eu-us": (w0, w1), "us-as": (w1, w2), "eu-as": (w2, w0)}
        limits = {name: plan.links[name].up for name in pairs}
        rtt_ms = {
            name: ping(first, second.address, 20)[1:].min() * 1e3
            for name, (first, second) in pairs.items()
        }
        with ThreadPoolExecutor() as threads:  # none of them takes anything from another
            rates_bps = dict(zip(pairs, threads.map(measured, pairs.values()), strict=True))
        for name, up in limits.items():
            wanted_ms, wanted_bps = 2 * up.delay_s * 1e3, up.rate_bps * TCP_SHARE
            found = [rates_bps[name]]
            while abs(found[-1] / wanted_bps - 1) > 0.045 and len(found) < 3:  # a machine may stall
                found.append(measured(pairs[name]))
            rate_bps = min(found, key=lambda rate_bps: abs(rate_bps - wanted_bps))
            figure(
                name,
                f"{wanted_ms:g} ms, {wanted_bps / 1e6:.2f} Mbit/s, each ± 5 %",
                f"{rtt_ms[name]:.2f} ms, {rate_bps / 1e6:.2f} Mbit/s"
                f" ({rate_bps / wanted_bps - 1:+.1%})",
            )
            assert rtt_ms[name] == pytest.approx(wanted_ms, rel=0.05)
            assert rate_bps == pytest.approx(wanted_bps, rel=0.05)
