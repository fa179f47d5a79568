"""Sense, decide, compress: the method NetSenseML."""

import contextlib
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future

from netsenseml.catalog import POLICIES
from netsenseml.control.accordion import Accordion
from netsenseml.control.bdp import BdpPolicy
from netsenseml.control.coding import coding_costs
from netsenseml.control.controller import Controller
from netsenseml.control.dc2 import Dc2
from netsenseml.control.deco import Deco
from netsenseml.control.fixed import FixedPolicy
from netsenseml.control.kimad import Kimad
from netsenseml.control.plans import gradient_sample, lost, plans
from netsenseml.control.policy import Observation, Policy, split_timing, timings, with_timing
from netsenseml.exchange.collective import add_residual
from netsenseml.exchange.communicators import Plan, RingAllReduce, parse
from netsenseml.exchange.control import ControlChannel
from netsenseml.methods.compressed import Compressed
from netsenseml.methods.delayed_means import DelayedMeans
from netsenseml.methods.local import STEP_IS_MISSING, done, refuse_sharded
from netsenseml.methods.local_steps import LocalSteps
from netsenseml.records import monotonic_s
from netsenseml.sensing.tcp import TcpSample
from netsenseml.statistics import BackwardCosts, StepStatistics
from netsenseml.streams import start_to_host

_ANSWER = struct.Struct("<64sHd")
"""Name of a plan, steps until the next report, bandwidth estimate in bits/s or 0."""
_LAG = 2
"""Steps until a decision is in force, so that over long paths nobody waits for it; one more where
ranks have accelerators, which report a step when the next one ends."""
_PUBLISHED: Mapping[str, Callable[..., Policy]] = {
    "accordion": Accordion,
    "dc2": Dc2,
    "deco": Deco,
    "kimad": Kimad,
}
_REPORT_S, _MOST_STEPS = 0.05, 4
"""While the network bears all-reduce with ease, ranks report so often at most; a change is known so
many steps later."""


class NetSense(Compressed):
    """Every step is exchanged by the plan that makes the most progress per second on the network
    that is there.

    1. When a step's exchange is over, every rank reports what it measured: how long its collectives
       took, when its buckets were ready, how long it computed, what the kernel says of its
       connections. Rank 0 feeds that into its controller.
    2. The decision comes back behind the optimizer and the next steps, and all ranks go by it from
    the ``_LAG``-th step on.
    3. Plain all-reduce is one of the plans. While it goes on, nothing is coded, copied or kept, and
       of short steps only one every ``_REPORT_S`` is reported.

    Other policies decide in its place, from the same reports: the paper's (``control.bdp``),
    published ones (``control.kimad``, ``dc2``, ``deco``, ``accordion``: each says there what is of
    its paper and what of us), or a list (``control.fixed``).

    With a delay (int8+1) the mean of a step's gradients is applied in the next step, so that its
    exchange has as long as that computes (see ``DelayedMeans``).

    A plan may have an interval H (int8/8): then the ranks make H local steps, and exchange
    parameters behind the last one (see ``LocalSteps``). What error feedback has kept of gradients
    goes into each rank's own local steps meanwhile, as in an exchange of all elements. A decision
    on H counts from the newest exchange; where it is for an exchange in every step, parameters and
    optimizers are made equal behind the step that is under way. With a delay (int8/8+1) what an
    exchange has brought is taken behind the next one. Every session.step() counts as a step.
    """

    senses = True

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        *,
        policy: str,
        floor: float,
        interval: int | str,
        delay: int | str,
        start: float,
        schemes: Sequence[str],
        hierarchy: str,
        **published: Any,
    ) -> None:
        """published: options of published policies (``catalog.POLICIES``)."""
        super().__init__(module, group, RingAllReduce(), limit=_LIMIT)
        self._timings = timings(
            _INTERVALS if isinstance(interval, str) else (interval,),
            _DELAYS if isinstance(delay, str) else (delay,),
        )
        self._local_steps: LocalSteps | None = None
        self._delayed_means: DelayedMeans | None = None
        if self.mesh.ranks > 1:
            possible = {*self._timings, *(split_timing(name)[1:] for name in schemes)}
            if any(interval for interval, _ in possible):
                self._local_steps, self.shares_buffers = LocalSteps(module, self.mesh), False
            if (0, 1) in possible:
                self._delayed_means = DelayedMeans(module.named_parameters(), self.mesh)
            self.takes_shards = self.takes_scaler = (
                self._local_steps is None and self._delayed_means is None
            )
            self.steps_until_exchange = max(
                max(interval, 1) * (1 + delay) for interval, delay in possible
            )
        self._interval, self._delay = 0, 0
        """In force, as names have them; the ranks may still be apart when the first is 0."""
        self._optimizers_fit = self._local_steps is None
        """Whether local steps are known to be possible with them, or there are none."""
        self._alone = False
        """Whether this backward's gradients are this rank's alone."""
        self._between, self._ended = True, 0
        """Whether no backward of a step was yet; steps that ended without ``after_step``."""
        self._resumed_at = 0
        self._backwards, self._first = 0, 0
        """Of local steps since the newest exchange, or since a checkpoint: how many, and the number
        of the first."""
        self._computed_s: list[float] = []
        """Of these; with an accelerator, of the last one before them in place of the newest."""
        self._arrived: tuple[list[float], list[int]] = [], []
        """When the buckets of the first one were ready, and how many elements they have."""
        self._waited_s = self._before_s = 0.0
        """In the exchange behind the newest step, and in that between the newest backward and the
        one before."""
        self._channel = ControlChannel(self.mesh, self._decide, _ANSWER.size)
        self._candidates: list[Plan] = []
        self._policy: Policy | FixedPolicy
        if policy == "fixed" or self.mesh.ranks == 1:  # one rank alone has nothing to decide
            self._policy = FixedPolicy(schemes if policy == "fixed" else [RingAllReduce.name])
        elif policy == "bdp":
            self._policy = BdpPolicy(start=start, floor=floor)
        else:
            gradients = [p for p in module.parameters() if p.requires_grad]
            if policy == "progress":
                self._policy = self._controller(gradients, floor, by_host=hierarchy == "auto")
            else:
                own = {
                    key: value
                    for key, value in {"start": start, **published}.items()
                    if key in POLICIES[policy]
                }
                elements, item_bytes = (
                    sum(g.numel() for g in gradients),
                    max(g.element_size() for g in gradients),
                )
                candidates = plans(self.mesh.topology, floor, item_bytes)
                self._policy = _PUBLISHED[policy](candidates, self.mesh.topology, elements, **own)
        self._answers: deque[tuple[int, Future[torch.Tensor]]] = deque()
        self._pending_reports: deque[
            tuple[str, tuple[int, ...], int, list[torch.Tensor], float]
        ] = deque()
        """Of the reports under way: name of the plan, elements of every bucket, bytes, samples,
        change of the learning rate."""
        self._gradient_samples: list[torch.Tensor] = []
        self._next_report, self._next_sample, self._every = 0, 0, 1
        self._step_s = 0.0
        self._lr_change = 1.0
        self._lag = (
            _LAG
            + any(peer.device != "cpu" for peer in self.mesh.peers)
            + _LATE_LAG * any(delay for _, delay in self._timings)
        )
        if not isinstance(self._policy, FixedPolicy):
            self._follow(self._policy.plan)

    def _follow(self, name: str) -> None:
        plan, self._interval, self._delay = split_timing(name)
        self.plan = _plan(plan)

    @property
    def _scheme(self) -> str:
        return with_timing(self.plan.name, self._interval if self._alone else 0, self._delay)

    def _controller(
        self, gradients: Sequence[torch.Tensor], floor: float, *, by_host: bool
    ) -> Controller:
        """Ours, with what a few messages and some coding tell beforehand: the same on all ranks,
        though only rank 0's is used."""
        mesh, channel = self.mesh, self._channel
        item_bytes = max((gradient.element_size() for gradient in gradients), default=4)
        self._candidates = plans(mesh.topology, floor, item_bytes, by_host=by_host)
        costs = coding_costs(self._candidates, mesh.topology, gradients[0].device)
        costs = dict(zip(costs, channel.largest(list(costs.values())), strict=True))
        latency_s = min(self._probe(1) for _ in range(3))
        size, took_s = _LEAST_PROBE, latency_s
        while size <= _MOST_PROBE and took_s - latency_s < _PROBE_S:
            took_s = min(self._probe(size) for _ in range(2))  # the first one widens TCP's windows
            size *= 4
        crossing_bytes = mesh.topology.ranks_crossing * size / 4 * (mesh.ranks - 1) / mesh.ranks
        controller = Controller(
            self._candidates,
            mesh.topology,
            costs,
            lost([_heavy_tailed()], self._candidates),
            timings=self._timings,
            latency_s=latency_s,
            byte_s=max(took_s - latency_s, took_s / 10) / crossing_bytes,
            scarce=gradients[0].device.type == "cpu"
            and len(os.sched_getaffinity(0)) < 2 * len(mesh.machine_ranks),
        )
        controller.begin([sum(gradient.numel() for gradient in gradients)], _FIRST_COMPUTE_S)
        names = controller.names
        # machines may add in different orders
        (first,) = channel.largest([float(names.index(controller.plan))])
        controller.plan = names[int(first)]
        return controller

    def _probe(self, size: int) -> float:
        """How long a direct exchange takes in which every rank sends so many bytes, s; of the rank
        that waited least for others."""
        ranks = self.mesh.ranks
        _, took_s = self._channel.send(torch.zeros(-(-size // ranks) * ranks, dtype=torch.uint8))
        (negative_s,) = self._channel.largest([-took_s])
        return -negative_s

    def optimizer(self, *, adaptive: bool) -> None:
        if isinstance(self._policy, Controller):
            self._policy.adaptive = adaptive

    def rescale(self, factor: float, *, gradients: bool) -> None:
        if self._delayed_means is not None:
            self._delayed_means.rescale(factor)
        super().rescale(factor, gradients=gradients)
        if not gradients:
            self._lr_change /= factor

    def begin(self) -> None:
        super().begin()
        while self._answers and self._answers[0][0] <= self.steps - self._lag:
            name, self._every, bandwidth_bps = _ANSWER.unpack(
                self._answers.popleft()[1].wait().numpy().tobytes()
            )
            self._follow(name.rstrip(b"\0").decode())
            self.bandwidth_bps = bandwidth_bps or None
        if isinstance(self._policy, FixedPolicy):
            self._follow(self._policy.plan_at(self.steps - 1))
        if self._local_steps is not None:
            self._begin_local_steps(self._local_steps)
        if self._delayed_means is not None:
            if self.holds_unused:
                raise ValueError(
                    "with a delay a mean may come when nothing takes it: no find_unused_parameters,"
                    " or delay=0"
                )
            self._delayed_means.begin(delayed=self._delay > 0 and not self._alone)
        self._gradient_samples = []
        every, due = (
            self._policy.sample_every,
            self.steps >= max(self._next_report, self._next_sample),
        )
        self._sampling = every > 0 and due and self.mesh.rank == 0
        if self._sampling:
            self._next_sample = self.steps + every

    def _begin_local_steps(self, local_steps: LocalSteps) -> None:
        if self._interval and self._between and not local_steps.under_way:
            local_steps.begin(self.optimizers)
        self._alone, self._between = local_steps.under_way, False
        if self._alone:
            if not self._backwards:
                self._first, self._computed_s = (
                    self.steps,
                    (self._computed_s[-1:] if self._interval == 1 else []),
                )
            self._backwards += 1
        self._before_s, self._waited_s = self._waited_s, 0.0

    def exchange(self, bucket: GradBucket, statistics: StepStatistics) -> Future[torch.Tensor]:
        if self._delayed_means is not None:
            self._delayed_means.charge(statistics)
        if self._alone:
            statistics.scheme, gradient, spent = (
                self._scheme,
                bucket.buffer(),
                statistics.separate(),
            )
            add_residual(gradient, tuple(bucket.parameters()), self.memory, spent)
            # it takes time; but what is lost is told of a whole step, in ``after_step``
            spent.residual_ratio = None
            statistics.include(spent)
            return done(gradient)
        if self._sampling:
            self._gradient_samples.append(start_to_host(gradient_sample(bucket.buffer())))
        if self._delayed_means is not None and self._delay:
            statistics.scheme = self._scheme
            return self._delayed_means.exchange(bucket, self.plan, statistics)
        return super().exchange(bucket, statistics)

    def end_backward(self) -> Callable[[StepStatistics], None]:
        if self._alone:
            return partial(self._end_local_step, self._before_s, self.steps == self._first)
        scheme, waited_s = self._scheme, self._before_s
        if self._delayed_means is not None:
            scheme, waited_s = (
                self._delayed_means.measured(scheme),
                waited_s + self._delayed_means.waited_s,
            )
        if self.steps < self._next_report or not scheme or isinstance(self._policy, FixedPolicy):
            return lambda _: None
        self._next_report = self.steps + self._every
        lr_change, self._lr_change = self._lr_change, 1.0
        return partial(
            self._end_step, self.steps, scheme, waited_s, self._gradient_samples, lr_change
        )

    def _end_local_step(self, waited_s: float, first: bool, statistics: StepStatistics) -> None:
        spent = statistics.of_backward()
        self._computed_s.append(max(0.0, spent.compute_s - waited_s))
        if first:
            self._arrived = spent.ready_s, spent.bucket_elements

    def _end_step(
        self,
        step: int,
        scheme: str,
        waited_s: float,
        gradient_samples: list[torch.Tensor],
        lr_change: float,
        statistics: StepStatistics,
    ) -> None:
        spent = statistics.of_backward()
        spent = spent._replace(compute_s=max(0.0, spent.compute_s - waited_s))
        self._report(step, scheme, spent, gradient_samples, statistics.tcp, lr_change)

    def _report(
        self,
        step: int,
        scheme: str,
        spent: BackwardCosts,
        gradient_samples: list[torch.Tensor],
        tcp: TcpSample | None,
        lr_change: float = 1.0,
    ) -> None:
        last_s = max(spent.ready_s)
        if self.mesh.rank == 0:
            self._pending_reports.append(
                (
                    scheme,
                    tuple(spent.bucket_elements),
                    spent.payload_bytes,
                    gradient_samples,
                    lr_change,
                )
            )
        measured = [
            spent.exposed_s,
            spent.compute_s,
            spent.encode_s,
            spent.communication_s,
            self._channel.latency_s,
        ]
        rtt_s = (tcp.min_rtt_s if tcp is not None else None) or 0.0
        ready_s = [ready_s - last_s for ready_s in spent.ready_s]
        self._answers.append((step, self._channel.report([*measured, rtt_s, *ready_s])))

    def after_step(self, statistics: StepStatistics) -> None:
        self._ended = -1
        local_steps = self._local_steps
        # soon, though the ranks may part late
        if local_steps is not None and self.optimizers and not self._optimizers_fit:
            local_steps.refuse(self.optimizers)
            self._optimizers_fit = True
        if local_steps is None or not local_steps.under_way:
            return
        refuse_sharded(self.optimizers)
        local_steps.steps += 1
        if local_steps.steps < self._interval:
            statistics.lose(1.0, 1.0)  # of this step's gradients nothing was sent
            return
        began_s, landed = monotonic_s(), None
        with statistics.waiting():
            if not self._interval:
                statistics.scheme = RingAllReduce.name
                local_steps.end(self.optimizers, statistics)
            else:
                sampling = (
                    bool(self._candidates)
                    and self.mesh.rank == 0
                    and (self._interval > 1 or self._sampling)
                )
                landed = local_steps.exchange(
                    self.plan, self._scheme, statistics, delayed=self._delay > 0, sampling=sampling
                )
        self._waited_s = monotonic_s() - began_s
        if not self._interval:
            self._computed_s = []
            statistics.lose(0.0, 1.0)
        elif landed is None:
            statistics.lose(1.0, 1.0)
        backwards, self._backwards = self._backwards, 0
        if (
            landed is None
            or not landed.spent.payload_bytes
            or isinstance(self._policy, FixedPolicy)
        ):
            return
        # Ranks with an accelerator do not know of the newest one yet; and DDP makes its buckets
        # anew after the first.
        if backwards > 1 or (self._interval == 1 and self.steps > self._resumed_at + 2):
            landed.spent.settle()
            ready_s, elements = self._arrived
            spent = landed.spent.of_backward()._replace(
                exposed_s=self._waited_s,
                compute_s=fmean(self._computed_s),
                ready_s=ready_s,
                bucket_elements=elements,
            )
            self._report(self.steps, landed.scheme, spent, landed.gradient_samples, statistics.tcp)

    def synchronize(self, statistics: StepStatistics) -> None:
        local_steps, statistics.scheme = self._local_steps, statistics.scheme or self._scheme
        with statistics.waiting():
            if self._delayed_means is not None:
                self._delayed_means.synchronize(statistics)
            if local_steps is not None:
                local_steps.synchronize(self.plan, statistics)

    @contextlib.contextmanager
    def synchronized(self) -> Iterator[None]:
        with (
            self._local_steps.synchronized()
            if self._local_steps is not None
            else contextlib.nullcontext()
        ):
            yield

    def end_step(self) -> None:
        super().end_step()
        self._between = True
        if self._local_steps is not None:
            self._ended += 1
            # by a backward, which needs them as they are
            if self._ended > 1 and torch._C._current_graph_task_id() >= 0:
                raise RuntimeError(STEP_IS_MISSING)

    def _decide(self, rows: list[list[float]]) -> bytes:
        """On rank 0: what comes of the ranks' reports of a step. The slowest rank is the one that
        all waited for."""
        assert not isinstance(self._policy, FixedPolicy)
        plan, elements, payload_bytes, gradient_samples, lr_change = self._pending_reports.popleft()
        exposed_s, compute_s, encode_s, communication_s, latency_s, rtt_s, *ready_s = zip(
            *rows, strict=True
        )
        self._step_s = min(exposed_s) + max(compute_s)
        self._policy.decide(
            Observation(
                plan=plan,
                elements=elements,
                ready_s=tuple(map(max, ready_s)),
                compute_s=max(compute_s),
                exposed_s=min(exposed_s),
                communication_s=min(communication_s),
                encode_s=max(encode_s),
                payload_bytes=payload_bytes,
                latency_s=min(latency_s) or None,
                ring_share=fmean(rtt_s) / max(rtt_s) if min(rtt_s) > _LAN_S else 1.0,
                lost=(
                    lost(gradient_samples, self._candidates)
                    if gradient_samples and self._candidates
                    else {}
                ),
                gradients=tuple(gradient_samples),
                lr_change=lr_change,
            )
        )
        every = (
            min(_MOST_STEPS, int(_REPORT_S / self._step_s) or 1)
            if self._policy.may_skip_reports
            else 1
        )
        return _ANSWER.pack(self._policy.plan.encode(), every, self._policy.bandwidth_bps or 0.0)

    @property
    def _fits(self) -> list[str]:
        """What must be the same in a checkpoint: the policy, what it keeps and what it chooses
        from."""
        names = [with_timing(p.name, *when) for when in self._timings for p in self._candidates]
        kinds = ["apart"] * (self._local_steps is not None) + ["late"] * (
            self._delayed_means is not None
        )
        return [type(self._policy).__name__, *self._policy.state_dict(), *names, *kinds]

    def close(self) -> None:
        try:
            self._channel.close()
        finally:
            super().close()

    def state_dict(self) -> dict[str, Any]:
        answers = [(step, answer.wait().clone()) for step, answer in self._answers]
        policy = self._policy.state_dict() if self.mesh.rank == 0 else None
        kept = {
            "fits": self._fits,
            "plan": with_timing(self.plan.name, self._interval, self._delay),
            "every": self._every,
            "next_report": self._next_report,
            "answers": answers,
            "policy": policy,
            "apart": None if self._local_steps is None else self._local_steps.state_dict(),
            "late": None if self._delayed_means is None else self._delayed_means.state_dict(),
        }
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, one line, where the checkpoint is of another policy, of other plans or
        of another version."""
        if state.get("fits") != self._fits or (self.mesh.rank == 0) != (
            state["policy"] is not None
        ):
            raise ValueError(
                "the checkpoint is of another rank, version or policy of netsense, or of other"
                " plans, which depend on floor and hosts; go on without the state of the hook, with"
                " model and optimizer of one rank for all"
            )
        for _, answer in self._answers:  # of steps that are not part of the checkpoint
            answer.wait()
        # before what is kept is replaced, as exchanges that are under way work with it
        if self._delayed_means is not None:
            self._delayed_means.load_state_dict(state["late"])
        super().load_state_dict(state)
        if self.mesh.rank == 0:
            self._policy.load_state_dict(state["policy"])
        self._follow(state["plan"])
        self._every, self._next_report = state["every"], state["next_report"]
        if self._local_steps is not None:
            self._local_steps.load_state_dict(state["apart"])
        self._backwards, self._resumed_at = 0, self.steps
        self._answers.clear()
        for step, answer in state["answers"]:
            taken: Future[torch.Tensor] = Future()
            taken.set_result(answer)
            self._answers.append((step, taken))


_INTERVALS = (1, 2, 4, 8, 16, 32)
"""Of interval: auto. Longer ones were not measured (``control.plans.step_progress``)."""
_DELAYS = (0, 1)
_LATE_LAG = 2
"""Steps that a decision takes more where steps may be shorter than a round trip."""
_LIMIT = 30.0
"""Times a gradient's norm that its residual may have; reached below 0.3 % of the elements, where
stale gradients harm most."""
_LEAST_PROBE, _MOST_PROBE, _PROBE_S = 1 << 14, 1 << 22, 0.02
"""Sizes of the messages before the first step, in bytes, and from what time on one tells of the
bandwidth."""
_FIRST_COMPUTE_S = 0.03
"""What a step is taken to compute before one was seen: little, as a plan that is too dense costs
more than one too sparse."""
_LAN_S = 1e-3
"""Below that, round-trip times are the machines', not the paths'."""


@lru_cache(maxsize=256)
def _plan(name: str) -> Plan:
    return parse(name)


def _heavy_tailed() -> torch.Tensor:
    """What gradients look like before any was seen: Student's t with 3 degrees of freedom."""
    draw = torch.Generator().manual_seed(0)
    normal, *others = torch.randn(4, 1 << 14, generator=draw)
    return normal / torch.stack(others).square().mean(0).sqrt()
