"""Network part of a spec → hosts at switches and links in their first state; pure data.

A dumbbell is two switches with one trunk, regions are one switch each with a trunk between any two. A trunk is a link like any
other, so it can be scheduled, measured and cut like any other.
"""

import itertools
from collections.abc import Mapping, Sequence

from testbed.labs.base import LabPlan
from testbed.links.state import LinkState
from testbed.spec.errors import SpecError, did_you_mean, place_of
from testbed.spec.models import LinkSpec, NetworkSpec

TRUNK = "trunk"


def plan_network(network: NetworkSpec, workers: Sequence[str]) -> LabPlan:
    """Hosts, switches and links for some workers. Raises SpecError with the place in the spec."""
    switches, trunks, between = _topology(network, workers)
    links = {worker: network.link.applied_to(LinkState()) for worker in workers}
    links |= {name: spec.applied_to(LinkState(), trunk=True) for name, spec in between.items()}
    for name, spec in network.links.items():
        if name not in links:
            fault = f"there is no worker {name!r} among {len(workers)}; {did_you_mean(name, links)}"
            raise SpecError([(place_of(["network", "links", name]), fault)])
        links[name] = spec.applied_to(links[name], trunk=name in trunks)
    return LabPlan(links, switches=switches, trunks=trunks)


_Topology = tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, str]], dict[str, LinkSpec]]
"""Hosts by switch, ends by trunk, properties by trunk."""


def _topology(network: NetworkSpec, workers: Sequence[str]) -> _Topology:
    if network.topology == "dumbbell" and network.trunk is not None:
        left = network.left if network.left is not None else list(workers[: (len(workers) + 1) // 2])
        _check_workers(left, workers, ["network", "left"])
        right = tuple(worker for worker in workers if worker not in left)
        return {"left": tuple(left), "right": right}, {TRUNK: ("left", "right")}, {TRUNK: network.trunk}
    if network.topology == "regions" and network.regions is not None and network.between is not None:
        return _regions(network.regions, network.between, workers)
    return {"switch": tuple(workers)}, {}, {}


def _regions(regions: Mapping[str, list[str]], between: Mapping[str, LinkSpec], workers: Sequence[str]) -> _Topology:
    placed: list[str] = []
    for name, members in regions.items():
        _check_workers(members, workers, ["network", "regions", name])
        placed += members
    for worker in workers:
        if placed.count(worker) != 1:
            fault = f"{worker} is in no region" if worker not in placed else f"{worker} is in more than one region"
            raise SpecError([("network.regions", f"{fault}; put every worker into exactly one")])
    pairs = {f"{a}-{b}": (a, b) for a, b in itertools.combinations(regions, 2)}
    given: dict[str, LinkSpec] = {}
    for key, spec in between.items():
        pair = "-".join(reversed(key.split("-"))) if key not in pairs else key
        if key != "all" and pair not in pairs:
            raise SpecError([(place_of(["network", "between", key]), f"is no pair of regions; {did_you_mean(key, pairs)}")])
        given[key if key == "all" else pair] = spec
    for pair in pairs:
        if pair not in given and "all" not in given:
            fault = f"says nothing of {pair}; give every pair, or all"
            raise SpecError([("network.between", fault)])
    return (
        {name: tuple(members) for name, members in regions.items()},
        pairs,
        {pair: given.get(pair) or given["all"] for pair in pairs},
    )


def _check_workers(names: Sequence[str], workers: Sequence[str], place: list[str]) -> None:
    for position, name in enumerate(names):
        if name not in workers:
            fault = f"there is no worker {name!r}; {did_you_mean(name, workers)}"
            raise SpecError([(place_of([*place, position]), fault)])
