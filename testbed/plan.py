"""Spec → cells × hosts × links × timeline. Pure: needs no root, no network and no lab."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from netsenseml.agent import protocol
from testbed import dilation
from testbed.labs.base import LabPlan
from testbed.links.qdiscs import compile_tree, largest_packet_bytes, tc_commands
from testbed.links.state import DIRECTIONS, LinkState
from testbed.network import plan_network
from testbed.spec.errors import SpecError, place_of
from testbed.spec.files import data_folder, reader
from testbed.spec.load import apply_overrides, combinations, validate
from testbed.spec.models import ComputeSpec, MethodSpec, Spec, WorkloadSpec
from testbed.spec.units import MIN_RATE_BPS, format_rate
from testbed.timeline import Change, expand
from testbed.traffic.flows import Flow
from testbed.traffic.plan import background_hosts, describe_flow, plan_flows


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run: one method and seed under one set of conditions.

    lab: the hosts and links to build. program: the user's script with its arguments, or None for
    the built-in worker. workers: their names in order of rank; ``lab`` may have more hosts. flows: what competes with them.
    calibrate: measure the links before t = 0. dilation: all of it is slower by this factor than what the spec says.
    """

    name: str
    method: MethodSpec
    seed: int
    overrides: Mapping[str, Any]
    workload: WorkloadSpec | None
    program: tuple[str, ...] | None
    stop: protocol.StopConfig
    timeline: tuple[Change, ...]
    lab: LabPlan
    workers: tuple[str, ...]
    flows: tuple[Flow, ...] = ()
    calibrate: bool = True
    dilation: float = 1.0

    def config(self) -> protocol.CellConfig:
        """What the workers need to know, as it is written to cell.json."""
        return {
            "cell": self.name,
            "method": {"name": self.method.name, "options": dict(self.method.options)},
            "seed": self.seed,
            "workers": len(self.workers),
            "workload": self._workload_config(self.workload) if self.workload else None,
        }

    def _workload_config(self, workload: WorkloadSpec) -> protocol.WorkloadConfig:
        return {
            "model": workload.model.name,
            "model_options": workload.model.options,
            "data": workload.data.name,
            "data_options": workload.data.options,
            "batch": workload.batch,
            "stop": self.stop,
            "optimizer": {"name": workload.optimizer.name, **workload.optimizer.options},
            "compute": self._compute(workload.compute),
            "evaluate_every_s": workload.evaluate_every * self.dilation,
        }

    def _compute(self, compute: ComputeSpec) -> Any:
        if compute.pace is None and compute.emulate is None:
            return "real"
        factors = [compute.stragglers.get(worker, 1.0) for worker in self.workers]
        if compute.pace is not None:
            return {"pace_s": compute.pace * self.dilation, "factors": factors}
        assert compute.emulate is not None
        return {"emulate_s": compute.emulate * self.dilation, "jitter": compute.jitter, "factors": factors}


@dataclass(frozen=True, slots=True)
class Plan:
    """All cells of an experiment in the order of the spec; ``run.sweep`` may shuffle them."""

    name: str
    lab: str
    cells: tuple[Cell, ...]

    @property
    def needs_netem(self) -> bool:
        """True if some link has delay, jitter or loss at some time."""
        return any(cell.lab.impaired for cell in self.cells)


def make_plan(spec: Spec, directory: Path = Path()) -> Plan:
    """Cells of a spec: every combination of matrix, seed and method. Raises SpecError with the place in the spec.

    directory: where the files that the spec names are read from, the directory of the spec itself.
    """
    if spec.lab == "docker" and spec.network.topology != "star":
        fault = f"{spec.network.topology} is built in the netns lab only; use lab: netns, or topology: star"
        raise SpecError([("network.topology", fault)])
    cells: list[Cell] = []
    raw = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    read = reader(directory)
    for overrides in combinations(spec):
        varied = validate(apply_overrides(raw, overrides)) if overrides else spec
        cells += _cells(varied, overrides, directory, read)
    return Plan(spec.name, spec.lab, tuple(cells))


def _cells(spec: Spec, overrides: Mapping[str, Any], directory: Path, read: Callable[[str], str]) -> list[Cell]:
    stop = spec.stop.limits() if spec.stop else protocol.StopConfig()
    workers = tuple(f"w{rank}" for rank in range(spec.workers))
    network = plan_network(spec.network, workers, background_hosts(spec.traffic, workers))
    flows = plan_flows(spec.traffic, stop.get("seconds"))
    timeline = expand(spec.schedule, network.links, workers, trunks=network.trunks, end_s=stop.get("seconds"), read=read)
    states = [*network.links.items(), *((change.link, change.state) for change in timeline)]
    shapes = [(link, side, getattr(state, side)) for link, state in states for side in DIRECTIONS]
    for link, _, shape in shapes:
        if shape.reorder and not shape.delay_s:
            fault = f"packets of {link} cannot overtake where nothing is delayed; give it a delay, too"
            raise SpecError([("network.link.reorder", fault)])
    slow = spec.dilation
    if too_slow := [shape.rate_bps for *_, shape in shapes if shape.rate_bps and shape.rate_bps / slow < MIN_RATE_BPS]:
        fault = f"{slow:g} makes {format_rate(min(too_slow))} slower than {format_rate(MIN_RATE_BPS)}, the least of a link"
        raise SpecError([("dilation", fault)])
    network = replace(network, links={link: dilation.slowed_link(state, slow) for link, state in network.links.items()})
    timeline = tuple(dilation.slowed_change(change, slow) for change in timeline)
    shapes = [(link, side, dilation.slowed_shape(shape, slow)) for link, side, shape in shapes]
    flows = tuple(dilation.slowed_flow(flow, slow) for flow in flows)
    tcp = dilation.slowed_tcp(network.tcp, slow)
    for number, flow in enumerate(flows):
        if flow.engine == "iperf3" and flow.congestion is not None and tcp.congestion is not None:
            fault = f"iperf3 chooses before it connects, and then {tcp.congestion} of the hosts wins; leave out engine: iperf3"
            raise SpecError([(place_of(["traffic", number, "tcp", "congestion"]), fault)])
    stop = dilation.slowed_stop(stop, slow)
    folder = data_folder(spec, directory)
    return [
        Cell(
            name=_slug("-".join([method.label, *(f"{k.split('.')[-1]}-{v}" for k, v in overrides.items())])) + f"-s{seed}",
            method=method,
            seed=seed,
            overrides=dict(overrides),
            workload=spec.workload if folder is None else _with_folder(spec.workload, folder),
            program=(spec.script.file, *spec.script.args) if spec.script else None,
            stop=stop,
            timeline=timeline,
            lab=replace(
                network,
                impaired=frozenset((link, side) for link, side, shape in shapes if shape.needs_netem),
                packet_bytes=largest_packet_bytes(shape.rate_bps for *_, shape in shapes),
                folders=() if folder is None else (folder,),
                seed=seed,
                tcp=tcp,
            ),
            workers=workers,
            flows=flows,
            calibrate=spec.calibrate,
            dilation=slow,
        )
        for seed in spec.seeds
        for method in spec.methods
    ]


def _with_folder(workload: WorkloadSpec | None, folder: Path) -> WorkloadSpec:
    assert workload is not None
    data = workload.data.model_copy(update={"options": {**workload.data.options, "folder": str(folder)}})
    return workload.model_copy(update={"data": data})


def _slug(text: str) -> str:
    """A name for a directory; different texts have different ones, so what is changed or cut gets a part of its hash."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("._")[:120]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def describe(plan: Plan) -> list[str]:
    """Hosts, timeline and equivalent tc commands of a plan, for --dry-run."""
    lines = [f"{plan.name}: {len(plan.cells)} cells in the {plan.lab} lab"]
    if controls := sorted({cell.lab.tcp.congestion for cell in plan.cells if cell.lab.tcp.congestion}):
        lines.append(f"TCP of the hosts: {', '.join(controls)}")
    if max((cell.dilation for cell in plan.cells), default=1.0) > 1:
        lines.append("dilation: times, rates and delays are shown as the machine will have them")
    shown: set[tuple[Any, ...]] = set()
    for cell in plan.cells:
        lines.append(f"cell {cell.name}: method {cell.method.label}, seed {cell.seed}, {len(cell.workers)} workers")
        network = (tuple(cell.lab.links.items()), cell.timeline, cell.flows)
        if network in shown:
            lines.append("  (network as above)")
            continue
        shown.add(network)
        lines += ["  t=0 " + command for link, state in cell.lab.links.items() for command in _commands(cell, link, state)]
        for change in cell.timeline:
            lines += [f"  t={change.at_s:g}s " + command for command in _commands(cell, change.link, change.state)]
        lines += ["  " + line for flow in cell.flows for line in describe_flow(flow, cell.stop.get("seconds"))]
    return lines


def _commands(cell: Cell, link: str, state: LinkState) -> list[str]:
    commands = []
    for side in DIRECTIONS:
        tree = compile_tree(
            getattr(state, side), impaired=(link, side) in cell.lab.impaired, packet_bytes=cell.lab.packet_bytes
        )
        where, interface = (link, "eth0") if side == "up" and link not in cell.lab.trunks else ("switch", link)
        commands += tc_commands(tree, interface, f"[{where}] ")
    if not state.connected:
        commands.append(f"[switch] bridge link set dev {link} state 0")
    return commands
