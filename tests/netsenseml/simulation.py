"""A network and a training job that take what they take, for the controller to find out. Shares no
formula with ``sensing``.

python tests/netsenseml/simulation.py [STRIDE]      the whole table, or a row of every STRIDE
python tests/netsenseml/simulation.py --constants   what half and twice of each constant of the controller does
"""

import random
import statistics
import sys
from dataclasses import dataclass, field, replace

import torch

from netsenseml.control import controller
from netsenseml.control.controller import Controller
from netsenseml.control.plans import gradient_sample, lost, plans, step_progress
from netsenseml.control.policy import Observation, split_timing, timings, with_timing
from netsenseml.exchange.communicators import Hierarchical, Plan, RingAllReduce
from netsenseml.exchange.mesh import Topology
from netsenseml.sensing import network

LAG = 2
"""Steps until a decision is in force, as in ``methods.netsense``."""
ACCIDENT_S = 0.2
HEAVY_TAILED = torch.distributions.StudentT(3.0)


def gradient() -> torch.Tensor:
    torch.manual_seed(0)
    return HEAVY_TAILED.sample((1 << 16,))


@dataclass
class World:
    """rate_bps: of every host's link. delay_s: one way. incast: times as long as a ring that direct
    exchanges of large pieces take. fixed_s: what a bucket takes whatever is sent."""

    topology: Topology
    rate_bps: float
    delay_s: float
    compute_s: float = 0.1
    alternating: bool = False
    accidents: float = 0.0
    incast: float = 1.12
    wake_s: float = 2e-4
    jitter: float = 0.02
    coding_s: float = 1.5e-9
    fixed_s: float = 0.0
    elements: tuple[int, ...] = (500_000, 6_500_000, 4_700_000)
    on_time_s: float = 0.0
    # names of tests are the same each time
    draw: random.Random = field(default_factory=lambda: random.Random(0), repr=False)

    def step(self, plan: Plan, number: int, interval: int = 0, delay: int = 0) -> Observation:
        """One step with a plan, or as many as its interval has; what its ranks measure. With a
        delay an exchange has as long as these compute, and a link that carries nothing else."""
        noise = lambda: max(0.5, self.draw.gauss(1, self.jitter))  # noqa: E731
        compute_s = self.compute_s * noise() * ((0.5, 1.5)[number % 2] if self.alternating else 1)
        ready = [
            -compute_s * 0.6 * (1 - i / max(len(self.elements) - 1, 1))
            for i in range(len(self.elements))
        ]
        factor = self.incast if "ring" not in plan.communicator else 1.0
        hop_s = 2 * self.delay_s + self.wake_s  # the receiver asks for what it takes
        encode_s, free, done_s, busy, began = 0.0, -1e9, [], 0.0, -1e9
        coded = -1e9
        parts = (
            zip(ready, self.elements, strict=True) if not interval else [(0.0, sum(self.elements))]
        )
        for ready_s, elements in parts:
            cost = plan.cost(elements, self.topology)
            coding_s = (
                0.0 if isinstance(plan, RingAllReduce) else self.coding_s * elements * noise()
            )
            encode_s += coding_s
            coded = max(coded, ready_s) + coding_s / 2
            free = (
                max(free, coded)
                + self.fixed_s
                + 8 * cost.host_bytes * factor / (0.937 * self.rate_bps) * noise()
            )
            if isinstance(plan, Hierarchical):
                free += 4 * elements / 4e9  # memory of the host
            end = free + cost.latency_terms * hop_s * noise() + coding_s / 2
            busy += max(0.0, end - max(began, coded, *done_s[-1:]))
            done_s.append(end)
        self.on_time_s = busy
        late_s = ACCIDENT_S if self.draw.random() < self.accidents else 0.0
        until = [
            delay * (interval * compute_s if interval else compute_s + ready_s) for ready_s in ready
        ]
        exposed_s = (
            max(0.0, *(done - least for done, least in zip(done_s, until, strict=False))) + late_s
        )
        return Observation(
            plan=with_timing(plan.name, interval, delay),
            elements=self.elements,
            ready_s=tuple(ready),
            compute_s=compute_s,
            exposed_s=exposed_s,
            communication_s=busy + late_s,
            encode_s=encode_s,
            payload_bytes=round(sum(plan.cost(n, self.topology).sent_bytes for n in self.elements)),
            latency_s=hop_s * noise()
            + (ACCIDENT_S if self.draw.random() < self.accidents / 4 else 0.0),
            ring_share=1.0,
            lost={},
        )

    def seconds(self, plan: Plan, steps: int = 40) -> float:
        """Mean step with a plan; accidents by their mean, as so few steps have too few of them."""
        quiet = replace(self, accidents=0.0, draw=random.Random(1))
        seen = [quiet.step(plan, number) for number in range(steps)]
        return (
            statistics.fmean(s.compute_s + s.exposed_s for s in seen) + ACCIDENT_S * self.accidents
        )


@dataclass
class Job:
    """A training under the real controller."""

    world: World
    adaptive: bool = False
    floor: float = 0.001
    intervals: tuple[int, ...] = (1,)
    delays: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        world = self.world
        self.plans = plans(world.topology, self.floor)
        self.lost = lost([gradient_sample(gradient())], self.plans)
        coding_s = {
            plan.name: 0.0 if isinstance(plan, RingAllReduce) else world.coding_s
            for plan in self.plans
        }
        latency_s, byte_s = 2 * world.delay_s + world.wake_s, 8 * 1.1 / world.rate_bps
        self.controller = Controller(
            self.plans,
            world.topology,
            coding_s,
            self.lost,
            latency_s=latency_s,
            byte_s=byte_s,
            scarce=False,
            timings=timings(self.intervals, self.delays),
        )
        self.controller.begin(world.elements, 0.0)
        self.controller.adaptive = self.adaptive
        self.in_force = [self.controller.plan] * (1 + LAG)
        self.by_name = {plan.name: plan for plan in self.plans}
        self.number = 0

    def step_progress(self, name: str) -> float:
        return step_progress(self.by_name[name], self.lost[name], adaptive=self.adaptive)

    def run(self, steps: int) -> list[tuple[str, float]]:
        """(plan, seconds but for accidents) of every step; of plans with an interval, of all its
        steps."""
        taken = []
        for _ in range(steps):
            name = self.in_force.pop(0)
            plan, interval, delay = split_timing(name)
            seen = self.world.step(self.by_name[plan], self.number, interval, delay)
            self.number += 1
            self.controller.decide(seen)
            self.in_force.append(self.controller.plan)
            if interval:  # long before the next exchange
                self.in_force = [self.controller.plan] * (1 + LAG)
            late_s = seen.communication_s - self.world.on_time_s
            taken.append((name, max(interval, 1) * seen.compute_s + seen.exposed_s - late_s))
        return taken


def regret(
    world: World, steps: int = 300, *, adaptive: bool = False
) -> tuple[float, float, str, str]:
    """(progress per second over the best fixed plan's, seconds of the plan it settles on over those
    of the best that loses no more, that plan, the best fixed one)."""
    job = Job(world, adaptive)
    taken = job.run(steps)
    rate = sum(job.step_progress(name) for name, _ in taken) / (
        sum(taken_s for _, taken_s in taken) + ACCIDENT_S * world.accidents * steps
    )
    seconds = {plan.name: world.seconds(plan) for plan in job.plans}
    best = max(seconds, key=lambda name: job.step_progress(name) / seconds[name])
    late = [name for name, _ in taken[steps // 2 :]]
    settled = max(set(late), key=late.count)
    rivals = [s for name, s in seconds.items() if job.lost[name] <= job.lost[settled] * 1.001]
    return (
        rate / (job.step_progress(best) / seconds[best]),
        seconds[settled] / min(rivals),
        settled,
        best,
    )


def worlds() -> list[World]:
    found = []
    for ranks, per_host in ((2, 1), (8, 1), (8, 2), (64, 1), (64, 8)):
        for delay_s in (1e-4, 1e-3, 1e-2, 1e-1):
            for rate_bps in (1e6, 1e7, 1e8, 1e9, 1e10):
                for alternating in (False, True):
                    for accidents in (0.0, 0.1):
                        found.append(
                            World(
                                Topology(ranks, per_host),
                                rate_bps,
                                delay_s,
                                alternating=alternating,
                                accidents=accidents,
                            )
                        )
    return found


def share_of_best(job: Job, steps: int) -> float:
    """Progress per second of the job's next steps over the best fixed plan's."""
    seconds = {plan.name: job.world.seconds(plan, 6) for plan in job.plans}
    names = [name for name, _ in job.run(steps)]
    made = sum(map(job.step_progress, names)) / sum(seconds[name] for name in names)
    return made / max(job.step_progress(name) / seconds[name] for name in seconds)


def known_after(before_bps: float, after_bps: float, accidents: float, most: int = 60) -> int:
    """Steps until a change of the network's rate is known: the bandwidth right within a quarter for
    a step."""
    world = World(Topology(4), before_bps, 1e-3, accidents=accidents)
    job = Job(world)
    job.run(60)
    world.rate_bps = after_bps
    for step in range(1, most + 1):
        job.run(1)
        bandwidth_bps = job.controller.bandwidth_bps
        if bandwidth_bps is not None and abs(bandwidth_bps / (0.937 * after_bps) - 1) < 0.25:
            return step
    return most


CONSTANTS = {
    network: ("WINDOW", "FORGETTING", "RESOLUTION", "SURPRISE", "IN_A_ROW", "UNKNOWN", "OWN"),
    controller: ("OPTIMISM",),
}
RATES = ((5e8, 1e8), (1e8, 2e7), (1e9, 2e7))


def table(stride: int) -> None:
    print(
        f"{'ranks':>5} {'/host':>5} {'delay':>7} {'rate':>9} {'alt':>3} {'acc':>4}  progress  time "
        " settled / best"
    )
    every = []
    for world in worlds()[::stride]:
        progress, time, settled, best = regret(world)
        every.append((progress, time))
        print(
            f"{world.shape.ranks:5} {world.shape.ranks_per_host:5} {1e3 * world.delay_s:5.1f}ms"
            f" {world.rate_bps / 1e6:7.0f}M {world.alternating:3} {world.accidents:4} "
            f" {progress:8.3f} {time:5.2f}  {settled} / {best}"
        )
    print(
        "worst",
        min(every)[0],
        max(t for _, t in every),
        "mean",
        statistics.fmean(p for p, _ in every),
    )


def constants() -> None:
    """Every 13th network, and drops and rises with and without accidents; a row for every constant,
    halved and doubled."""
    print(
        "constant                progress: worst  mean   steps until a drop is known: mean  most  "
        " a rise: mean  most"
    )
    cases = [(network, "WINDOW", 1.0)] + [
        (m, name, f) for m, names in CONSTANTS.items() for name in names for f in (0.5, 2.0)
    ]
    for module, name, factor in cases:
        value = getattr(module, name)
        other = type(value)(round(value * factor) if isinstance(value, int) else value * factor)
        setattr(module, name, other)
        progress = [regret(world)[0] for world in worlds()[5::13]]
        drops = [
            known_after(high, low, accidents) for high, low in RATES for accidents in (0.0, 0.1)
        ]
        rises = [
            known_after(low, high, accidents) for high, low in RATES for accidents in (0.0, 0.1)
        ]
        setattr(module, name, value)
        label = f"{name} {value} -> {other}" if factor != 1 else "as they are"
        print(
            f"{label:31} {min(progress):6.3f} {statistics.fmean(progress):6.4f}"
            f" {statistics.fmean(drops):34.1f} {max(drops):5} {statistics.fmean(rises):14.1f}"
            f" {max(rises):5}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["--constants"]:
        constants()
    else:
        table(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
