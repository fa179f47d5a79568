"""Network part of a spec → hosts at switches and links in their first state; pure data.

A dumbbell is two switches with one trunk, regions are one switch each with a trunk between any two.
A trunk is a link like any other, so it can be scheduled, measured and cut like any other.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from testbed.labs.base import LabPlan
from testbed.links.qdiscs import UNCUT_PACKET_BYTES, burst_bytes, frame_bytes, tbf_max_packet_bytes
from testbed.links.routes import Tcp
from testbed.links.state import LinkParameters, LinkState
from testbed.spec.errors import SpecError, did_you_mean, place_of
from testbed.spec.models import LinkSpec, NetworkSpec

TRUNK = "trunk"


def plan_network(
    network: NetworkSpec, workers: Sequence[str], background: Sequence[str] = ()
) -> LabPlan:
    """Hosts, switches and links for some workers. Raises SpecError with the place in the spec.

    background: hosts that only compete for the network. Their links have no limit unless
    ``network.links`` names them.
    """
    switches, trunks, between = _topology(network, workers, background)
    links = {worker: network.link.applied_to(LinkState()) for worker in workers}
    links |= {name: LinkState() for name in background}
    links |= {name: spec.applied_to(LinkState(), trunk=True) for name, spec in between.items()}
    for name, spec in network.links.items():
        if name not in links:
            error = f"there is no worker {name!r} among {len(workers)}; {did_you_mean(name, links)}"
            raise SpecError([(place_of(["network", "links", name]), error)])
        links[name] = spec.applied_to(links[name], trunk=name in trunks)
    marks = any(parameters.ecn for state in links.values() for parameters in (state.up, state.down))
    return LabPlan(
        links,
        switches=switches,
        trunks=trunks,
        engine=network.engine,
        shaper=network.shaper,
        mtu=network.mtu,
        tcp=Tcp(network.congestion, ecn=marks),
        ip=network.ip,
    )


def max_gso_bytes(
    plan: LabPlan, directions: Iterable[tuple[str, str, LinkParameters]]
) -> dict[str, int]:
    """The largest packet that each host may send, on the wire.

    directions: (link, direction, parameters) of every state of the run.
    One frame, where netem meets single packets with a fate of their own somewhere on the way: it
    would lose 64 KiB at once. (For the delay line the kernel cuts them.) Otherwise as much as the
    host's own link takes at once when it is fastest, as thinner links on the way cut for
    themselves; but with tbf no more than what the smallest of all buckets holds.
    """
    directions = list(directions)
    frame = frame_bytes(plan.mtu)
    if plan.shaper == "tbf":
        largest = dict.fromkeys(
            plan.hosts,
            tbf_max_packet_bytes((parameters.rate_bps for *_, parameters in directions), frame),
        )
    else:
        rates: dict[str, list[int | None]] = {}
        for link, side, parameters in directions:
            if side == "up":
                rates.setdefault(link, []).append(parameters.rate_bps)
        largest = {
            host: (
                UNCUT_PACKET_BYTES
                if None in rates[host]
                else min(
                    UNCUT_PACKET_BYTES,
                    burst_bytes(max(rate for rate in rates[host] if rate is not None), frame),
                )
            )
            for host in plan.hosts
        }
    fateful = {(link, side) for link, side, parameters in directions if parameters.impairs_frames}
    if fateful and plan.engine != "userspace":
        for source in plan.hosts:
            if any(
                fateful.intersection(plan.route(source, target))
                for target in plan.hosts
                if target != source
            ):
                largest[source] = frame
    return largest


_Topology = tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, str]], dict[str, LinkSpec]]
"""Hosts by switch, ends by trunk, properties by trunk."""


def _topology(network: NetworkSpec, workers: Sequence[str], background: Sequence[str]) -> _Topology:
    hosts = [*workers, *background]
    if network.topology == "dumbbell" and network.trunk is not None:
        left = (
            network.left
            if network.left is not None
            else [*workers[: (len(workers) + 1) // 2], *background]
        )
        _check_hosts(left, hosts, ["network", "left"])
        right = tuple(host for host in hosts if host not in left)
        if not left or not right:
            side, other = ("left", "right") if not left else ("right", "left")
            error = (
                f"all hosts are at the {other} and none is at the {side}, so nothing crosses the"
                " trunk; give each side some"
            )
            raise SpecError([("network.left", error)])
        return (
            {"left": tuple(left), "right": right},
            {TRUNK: ("left", "right")},
            {TRUNK: network.trunk},
        )
    if (
        network.topology == "regions"
        and network.regions is not None
        and network.between is not None
    ):
        return _regions(network.regions, network.between, workers, background)
    return {"switch": tuple(hosts)}, {}, {}


def _regions(
    regions: Mapping[str, list[str]],
    between: Mapping[str, LinkSpec],
    workers: Sequence[str],
    background: Sequence[str],
) -> _Topology:
    hosts = [*workers, *background]
    placed: list[str] = []
    for name, members in regions.items():
        _check_hosts(members, hosts, ["network", "regions", name])
        placed += members
    for host in hosts:
        if placed.count(host) != 1 and (host in workers or host in placed):
            error = (
                f"{host} is in no region"
                if host not in placed
                else f"{host} is in more than one region"
            )
            raise SpecError([("network.regions", f"{error}; put every worker into exactly one")])
    first = next(iter(regions))
    unplaced = [host for host in background if host not in placed]
    pairs = {f"{a}-{b}": (a, b) for a, b in itertools.combinations(regions, 2)}
    given: dict[str, LinkSpec] = {}
    for key, spec in between.items():
        pair = "-".join(reversed(key.split("-"))) if key not in pairs else key
        if key != "all" and pair not in pairs:
            raise SpecError(
                [
                    (
                        place_of(["network", "between", key]),
                        f"is no pair of regions; {did_you_mean(key, pairs)}",
                    )
                ]
            )
        given[key if key == "all" else pair] = spec
    for pair in pairs:
        if pair not in given and "all" not in given:
            error = f"says nothing of {pair}; give every pair, or all"
            raise SpecError([("network.between", error)])
    return (
        {
            name: (*members, *(unplaced if name == first else ()))
            for name, members in regions.items()
        },
        pairs,
        {pair: given.get(pair) or given["all"] for pair in pairs},
    )


def _check_hosts(names: Sequence[str], hosts: Sequence[str], place: list[str]) -> None:
    for position, name in enumerate(names):
        if name not in hosts:
            error = f"there is no host {name!r}; {did_you_mean(name, hosts)}"
            raise SpecError([(place_of([*place, position]), error)])
