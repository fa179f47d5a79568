"""Spec → cells × hosts × links × timeline. Pure: needs no root, no network and no lab."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from testbed import dilation, protocol
from testbed.labs.base import LabPlan, Limits
from testbed.links.qdiscs import (
    UNCUT_PACKET_BYTES,
    Netem,
    Tree,
    compile_tree,
    queue_of,
    tc_commands,
)
from testbed.links.state import DIRECTIONS, LinkParameters, LinkState
from testbed.network import max_gso_bytes, plan_network
from testbed.spec.errors import SpecError, did_you_mean, place_of
from testbed.spec.files import data_folder, reader
from testbed.spec.load import apply_overrides, combinations, load_spec, validate
from testbed.spec.models import ComputeSpec, MethodSpec, Spec, WorkloadSpec
from testbed.spec.units import MIN_RATE_BPS, format_rate, format_size, format_time
from testbed.timeline import Change, expand
from testbed.timeline.workers import Kills, Slowdown, kills, slowdowns
from testbed.traffic.flows import Flow
from testbed.traffic.plan import background_hosts, describe_flow, plan_flows


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run: one method and seed under one set of conditions.

    lab: the hosts and links to build. program: the user's script with its arguments, or None for
    the built-in worker. workers: names of the hosts that train, in order of rank; ``lab`` may have
    more hosts. ranks_per_worker: processes that train on each of them. connections: that Gloo has
    between two ranks. flows: what competes with them.
    calibrate: measure the links before t = 0. dilation: all of it is slower by this factor than
    what the spec says. step_timeout_s: the cell has failed when nothing moved for so long. kills,
    slowdowns: what happens to workers. restarts: whether all workers are started again when one has
    died.
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
    step_timeout_s: float = 600.0
    kills: tuple[Kills, ...] = ()
    slowdowns: tuple[Slowdown, ...] = ()
    restarts: bool = False
    ranks_per_worker: int = 1
    connections: int = 1

    @property
    def ranks(self) -> range:
        """All of them; those of one worker follow one another, as with torchrun."""
        return range(len(self.workers) * self.ranks_per_worker)

    def ranks_of(self, worker: str) -> range:
        """Those of one host."""
        first = self.workers.index(worker) * self.ranks_per_worker
        return range(first, first + self.ranks_per_worker)

    def config(self) -> protocol.CellConfig:
        """What the workers need to know, as it is written to cell.json."""
        return {
            "cell": self.name,
            "method": {"name": self.method.name, "options": dict(self.method.options)},
            "seed": self.seed,
            "workers": len(self.workers),
            "ranks_per_worker": self.ranks_per_worker,
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
            "device": workload.device,
            "evaluate_every_s": workload.evaluate_every * self.dilation,
            "checkpoint_every": workload.checkpoint_every if self.may_restart else None,
        }

    @property
    def may_restart(self) -> bool:
        """Whether workers are started again in some case."""
        return self.restarts or any(kill.restart for kill in self.kills)

    def _compute(self, compute: ComputeSpec) -> Any:
        if compute.pace is None and compute.emulate is None:
            return "real"
        slow = [
            [rank, one.from_s, one.to_s, one.factor]
            for one in self.slowdowns
            for rank in self.ranks_of(one.worker)
        ]
        stragglers = [
            compute.stragglers.get(worker, 1.0)
            for worker in self.workers
            for _ in self.ranks_of(worker)
        ]
        factors = {"factors": stragglers, "slow": slow}
        if compute.pace is not None:
            return {"pace_s": compute.pace * self.dilation, **factors}
        assert compute.emulate is not None
        return {"emulate_s": compute.emulate * self.dilation, "jitter": compute.jitter, **factors}


@dataclass(frozen=True, slots=True)
class Plan:
    """All cells of an experiment in the order of the spec; ``run.sweep`` may shuffle them."""

    name: str
    lab: str
    cells: tuple[Cell, ...]

    @property
    def impaired(self) -> bool:
        """True if some link has delay, jitter or loss at some time."""
        return any(cell.lab.impaired for cell in self.cells)

    @property
    def engines(self) -> set[str]:
        """What is to make them; more than one only with a matrix over it."""
        return {cell.lab.engine for cell in self.cells if cell.lab.impaired}

    def with_engine(self, engine: str) -> "Plan":
        """The same with an engine chosen for the cells that need one and leave it open."""
        cells = (
            replace(cell, lab=replace(cell.lab, engine=engine))
            if cell.lab.impaired and cell.lab.engine == "auto"
            else cell
            for cell in self.cells
        )
        return replace(self, cells=tuple(cells))

    @property
    def limits(self) -> set[str]:
        """Controllers of control groups by which some hosts are limited."""
        return {controller for cell in self.cells for controller in cell.lab.limits.by_controller}

    @property
    def qdiscs(self) -> set[str]:
        """Kinds of qdiscs that the kernel must have, besides netem."""
        states = [state for cell in self.cells for state in cell.lab.links.values()]
        aqms = {parameters.aqm for state in states for parameters in (state.up, state.down)} - {
            "fifo"
        }
        return {"tbf", *aqms, *(cell.lab.shaper for cell in self.cells)}


def load_plan(path: Path, overrides: Sequence[str] = ()) -> tuple[Spec, Plan]:
    """Read a spec and plan it; ``overrides`` as in ``load_spec``. Raises SpecError."""
    spec = load_spec(path, overrides)
    try:
        return spec, make_plan(spec, path.parent)
    except SpecError as error:
        raise error.found_in(path.name) from None


def make_plan(spec: Spec, directory: Path = Path()) -> Plan:
    """Cells of a spec: every combination of matrix, seed and method. Raises SpecError with the
    place in the spec.

    directory: where the files that the spec names are read from, the directory of the spec itself.
    """
    if spec.lab != "netns" and spec.network.topology != "star":
        error = (
            f"{spec.network.topology} is built in the netns lab only; use lab: netns, or topology:"
            " star"
        )
        raise SpecError([("network.topology", error)])
    if spec.lab == "swarm" and spec.workload and spec.workload.device == "cuda":
        raise SpecError(
            [("workload.device", "cuda is for labs of one machine; use lab: netns, or device: cpu")]
        )
    if spec.lab != "netns" and spec.network.ip == 6:
        raise SpecError(
            [("network.ip", "6 is built in the netns lab only; use lab: netns, or ip: 4")]
        )
    if spec.lab == "swarm" and spec.network.engine == "userspace":
        error = (
            "userspace is for labs of one machine; use engine: netem, which each node's kernel has"
            " to have, or lab: netns"
        )
        raise SpecError([("network.engine", error)])
    if spec.lab != "swarm" and spec.placement:
        raise SpecError(
            [
                (
                    "placement",
                    (
                        f"there is one machine only in the {spec.lab} lab; use lab: swarm, or leave"
                        " it out"
                    ),
                )
            ]
        )
    cells: list[Cell] = []
    raw = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    read = reader(directory)
    for overrides in combinations(spec):
        varied = validate(apply_overrides(raw, overrides)) if overrides else spec
        cells += _cells(varied, overrides, directory, read)
    return Plan(spec.name, spec.lab, tuple(cells))


def _cells(
    spec: Spec, overrides: Mapping[str, Any], directory: Path, read: Callable[[str], str]
) -> list[Cell]:
    stop = spec.stop.limits() if spec.stop else protocol.StopConfig()
    workers = tuple(map(protocol.worker_name, range(spec.workers)))
    network = plan_network(spec.network, workers, background_hosts(spec.traffic, workers))
    flows = plan_flows(spec.traffic, stop.get("seconds"))
    if strangers := [host for host in spec.placement if host not in network.hosts]:
        error = f"there is no host {strangers[0]!r}; {did_you_mean(strangers[0], network.hosts)}"
        raise SpecError([(place_of(["placement", strangers[0]]), error)])
    end_s = stop.get("seconds")
    timeline = expand(
        spec.schedule, network.links, workers, trunks=network.trunks, end_s=end_s, read=read
    )
    paced = spec.workload is not None and bool(
        spec.workload.compute.pace or spec.workload.compute.emulate
    )
    killed = [dilation.slowed_kills(kill, spec.dilation) for kill in kills(spec.schedule, end_s)]
    slowed = [
        dilation.slowed_slowdown(one, spec.dilation)
        for one in slowdowns(spec.schedule, end_s, paced)
    ]
    states = [*network.links.items(), *((change.link, change.state) for change in timeline)]
    directions = [
        (link, side, getattr(state, side)) for link, state in states for side in DIRECTIONS
    ]
    slow = spec.dilation
    rates_bps = [parameters.rate_bps for *_, parameters in directions if parameters.rate_bps]
    if too_slow := [rate_bps for rate_bps in rates_bps if rate_bps / slow < MIN_RATE_BPS]:
        error = (
            f"{slow:g} makes {format_rate(min(too_slow))} slower than {format_rate(MIN_RATE_BPS)},"
            " the least of a link"
        )
        raise SpecError([("dilation", error)])
    network = replace(
        network, links={link: state.slowed(slow) for link, state in network.links.items()}
    )
    timeline = tuple(dilation.slowed_change(change, slow) for change in timeline)
    directions = [(link, side, parameters.slowed(slow)) for link, side, parameters in directions]
    flows = tuple(dilation.slowed_flow(flow, slow) for flow in flows)
    tcp = dilation.slowed_tcp(network.tcp, slow)
    for number, flow in enumerate(flows):
        if flow.engine == "iperf3" and flow.congestion is not None and tcp.congestion is not None:
            error = (
                f"iperf3 chooses before it connects, and then {tcp.congestion} of the hosts wins;"
                " leave out engine: iperf3"
            )
            raise SpecError([(place_of(["traffic", number, "tcp", "congestion"]), error)])
    stop = dilation.slowed_stop(stop, slow)
    folder = data_folder(spec, directory)
    network = replace(
        network,
        impaired=frozenset(
            (link, side) for link, side, parameters in directions if parameters.impaired
        ),
    )
    network = replace(network, max_gso_bytes=max_gso_bytes(network, directions))
    return [
        Cell(
            name=_slug(
                "-".join([method.label, *(f"{k.split('.')[-1]}-{v}" for k, v in overrides.items())])
            )
            + f"-s{seed}",
            method=method,
            seed=seed,
            overrides=dict(overrides),
            workload=spec.workload if folder is None else _with_folder(spec.workload, folder),
            program=(spec.script.file, *spec.script.args) if spec.script else None,
            stop=stop,
            timeline=timeline,
            lab=replace(
                network,
                folders=() if folder is None else (folder,),
                device=spec.workload.device if spec.workload else "cpu",
                limits=Limits(spec.limits.memory, spec.limits.pids),
                seed=seed,
                tcp=tcp,
                placement=spec.placement,
            ),
            workers=workers,
            flows=flows,
            calibrate=spec.calibrate,
            dilation=slow,
            step_timeout_s=spec.step_timeout * slow,
            kills=tuple(killed),
            slowdowns=tuple(slowed),
            restarts=spec.on_failure == "continue",
            ranks_per_worker=spec.ranks_per_worker,
            connections=spec.network.connections,
        )
        for seed in spec.seeds
        for method in spec.methods
    ]


def _with_folder(workload: WorkloadSpec | None, folder: Path) -> WorkloadSpec:
    assert workload is not None
    data = workload.data.model_copy(
        update={"options": {**workload.data.options, "folder": str(folder)}}
    )
    return workload.model_copy(update={"data": data})


def _slug(text: str) -> str:
    """A name for a directory; different texts have different ones, so what is changed or cut gets a
    part of its hash."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("._")[:120]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def describe(plan: Plan) -> list[str]:
    """Hosts, timeline and equivalent tc commands of a plan, for --dry-run."""
    lines = [f"{plan.name}: {len(plan.cells)} cells in the {plan.lab} lab"]
    if controls := sorted(
        {cell.lab.tcp.congestion for cell in plan.cells if cell.lab.tcp.congestion}
    ):
        lines.append(f"TCP of the hosts: {', '.join(controls)}")
    if max((cell.dilation for cell in plan.cells), default=1.0) > 1:
        lines.append("dilation: times, rates and delays are shown as the machine will have them")
    shown: set[tuple[Any, ...]] = set()
    for cell in plan.cells:
        several = f" of {cell.ranks_per_worker} ranks" if cell.ranks_per_worker > 1 else ""
        lines.append(
            f"cell {cell.name}: method {cell.method.label}, seed {cell.seed}, {len(cell.workers)}"
            f" workers{several}"
        )
        if cell.connections > 1:
            lines.append(f"  {cell.connections} connections between any two ranks")
        if limits := describe_limits(cell.lab.limits):
            lines.append(f"  each worker has at most {limits}")
        network = (
            repr(replace(cell.lab, seed=0)),
            cell.timeline,
            cell.flows,
            cell.kills,
            cell.slowdowns,
        )
        if network in shown:
            lines.append("  (network as above)")
            continue
        shown.add(network)
        trees: dict[tuple[str, str], Tree] = {}
        for link, state in cell.lab.links.items():
            lines += ["  t=0 " + command for command in _commands(cell, link, state, trees)]
        for change in cell.timeline:
            lines += [
                f"  t={change.at_s:g}s " + command
                for command in _commands(cell, change.link, change.state, trees)
            ]
        lines += list(_workers_lines(cell))
        lines += ["  note: " + note for note in notes(cell)]
        lines += [
            "  " + line
            for flow in cell.flows
            for line in describe_flow(flow, cell.stop.get("seconds"))
        ]
    return lines


def describe_limits(limits: Limits) -> str:
    """In words; nothing where there are none."""
    memory = (
        [] if limits.memory_bytes is None else [f"{format_size(limits.memory_bytes)} of memory"]
    )
    return " and ".join(
        [*memory, *([] if limits.pids is None else [f"{limits.pids} processes and threads"])]
    )


def _workers_lines(cell: Cell) -> Iterator[str]:
    for kill in cell.kills:
        then = ", then all are started again" if kill.restart or cell.restarts else ""
        yield f"  t={kill.at_s:g}s kill {', '.join(kill.workers)}{then}"
    for slow in cell.slowdowns:
        until = "the end" if slow.to_s is None else f"{slow.to_s:g}s"
        yield (
            f"  t={slow.from_s:g}s to {until}: {slow.worker} computes {slow.factor:g} times as long"
        )


def notes(cell: Cell) -> list[str]:
    """What a cell's links have otherwise than the spec says, or what somebody who reads its figures
    should know."""
    return [
        *(
            ["delay, jitter and loss are made by a delay line in user space"]
            if cell.lab.lined
            else []
        ),
        *_raised_queues(cell),
    ]


def _raised_queues(cell: Cell) -> Iterator[str]:
    least: dict[str, tuple[float, LinkParameters]] = {}
    states = [*cell.lab.links.items(), *((change.link, change.state) for change in cell.timeline)]
    for link, state in states:
        for parameters in (state.up, state.down):
            if not parameters.rate_bps:
                continue
            by_time = parameters.rate_bps / 8 * parameters.queue_s
            asked = by_time if parameters.queue_bytes is None else parameters.queue_bytes
            tree = _tree(cell, parameters)
            made = queue_of(tree) or 0
            if made > asked + 1 and (
                link not in least or parameters.rate_bps < (least[link][1].rate_bps or 0)
            ):
                least[link] = made * 8 / parameters.rate_bps, parameters
    by_queue: dict[tuple[float, LinkParameters], list[str]] = {}
    for link, found in least.items():
        by_queue.setdefault(found, []).append(link)
    for (made_s, parameters), links in by_queue.items():
        rate = format_rate(parameters.rate_bps or 0)
        wanted = (
            format_time(parameters.queue_s)
            if parameters.queue_bytes is None
            else format_size(parameters.queue_bytes)
        )
        least_held = "a frame" if cell.lab.shaper == "htb" else "a bucket and a frame"
        holds = f"the queue of {', '.join(links)} holds {format_time(round(made_s, 6))} at {rate}"
        yield f"{holds} instead of {wanted}: {least_held} must fit"


def _tree(cell: Cell, parameters: LinkParameters, impaired: bool = False) -> Tree:
    return compile_tree(
        parameters,
        impaired=impaired,
        shaper=cell.lab.shaper,
        mtu=cell.lab.mtu,
        max_packet_bytes=min(cell.lab.max_gso_bytes.values(), default=UNCUT_PACKET_BYTES),
    )


def _commands(
    cell: Cell, link: str, state: LinkState, trees: dict[tuple[str, str], Tree]
) -> list[str]:
    """The commands of a change; ``trees`` has what is there, and then what is there after it."""
    commands = []
    for side in DIRECTIONS:
        before, tree = (
            trees.get((link, side)),
            _tree(cell, getattr(state, side), (link, side) in cell.lab.impaired),
        )
        trees[link, side] = tree
        where, interface = (
            (link, "eth0") if side == "up" and link not in cell.lab.trunks else ("switch", link)
        )
        if link in cell.lab.lined and isinstance(tree[0], Netem):
            if before is None or before[0] != tree[0]:
                commands.append(f"[delay line] {link} {side}: {tree[0].tc_arguments()}")
            tree, before = tree[1:], before[1:] if before else None
        commands += tc_commands(tree, interface, f"[{where}] ", before)
    if not state.connected:
        commands.append(f"[switch] bridge link set dev {link} state 0")
    return commands
