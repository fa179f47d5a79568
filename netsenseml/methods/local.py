"""Local updates: every rank trains by itself, and now and then all exchange how far they have
come."""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future

from netsenseml.compress.codec import Codec, load_kernels
from netsenseml.compress.feedback import ErrorFeedback
from netsenseml.exchange.collective import all_reduce_mean
from netsenseml.exchange.communicators import BySize, DirectAllReduce, Plan, RingAllReduce
from netsenseml.exchange.mesh import Mesh
from netsenseml.methods.base import Method
from netsenseml.statistics import StepStatistics


class LocalUpdates(Method):
    """Ranks step by their own gradients, and exchange parameters behind every ``inner_steps``-th
    step.

    x is what all ranks had in common last, y_r what rank r has made of it since; x - y_r is its
    *pseudo-gradient*:

        g = mean of x - y_r over the ranks,  u <- m u + g,  x <- x - outer_lr (g + m u),  y_r <- x

    with m = ``outer_momentum``: Nesterov's momentum as torch.optim.SGD has it. With outer_lr = 1
    and m = 0, x becomes the mean of the ranks' parameters. What their optimizers keep stays their
    own.

    The model may be exchanged in ``fragments`` of about as many elements, one after another at even
    intervals, so that less has to cross the network at once. Each may be under way for ``overlap``
    steps, in which the ranks train on; then

        y_r <- mixing y_r + (1 - mixing) x

    With either, the ranks' parameters differ at all times, and only ``synchronize`` makes them
    equal.

    x and u are kept in float32, or in the parameters' own type if that is wider. Floating-point
    buffers, such as the running statistics of normalisation, become their mean with the last
    fragment; until then each rank has its own, as DDP shares none. A gradient that is not finite
    makes the parameters of its own rank so, and at the next exchange those of all; nothing of it
    stays in u and in the residuals. Who sets parameters from outside must set this state, too.

    Every session.step() counts as a step, also one that a GradScaler left out, lest the ranks lose
    count of each other.
    """

    takes_complex = False
    takes_shards = False
    shares_buffers = False

    plan: Plan
    """How pseudo-gradients are exchanged."""

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        scheme: str,
        *,
        inner_steps: int,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        fragments: int = 1,
        overlap: int = 0,
        mixing: float = 0.0,
    ) -> None:
        """scheme: of an exchange in the records. Raises ValueError, one line, for a model that
        cannot be exchanged so."""
        super().__init__(module, group)
        self._scheme = scheme
        self._inner_steps, self._overlap, self._mixing = inner_steps, overlap, mixing
        self.steps_until_exchange = inner_steps + overlap
        self._outer_lr, self._outer_momentum = outer_lr, outer_momentum
        trained, self._buffers = exchanged(module)
        if fragments > len(trained):
            raise ValueError(
                f"fragments must be at most {len(trained)}, as the model has no more parameters,"
                f" not {fragments}"
            )
        self.parts = _even_parts(trained, fragments)
        """Parameters of every fragment."""
        load_kernels(trained[0].device)  # or the first exchange would
        self.memory = ErrorFeedback(module.named_parameters())
        self.mesh = Mesh(group, memory=self.memory, device=trained[0].device)
        self.steps = 0
        """Of the optimizer, so far."""
        self._equal_at = 0
        """After so many of them, all ranks had the same parameters."""
        self._ended = 0
        """Steps that ended without ``after_step``. One may, as a script may load a checkpoint after
        a first backward."""
        self._aside: list[torch.Tensor] | None = None
        """What this rank has made of the model, while that has what is in common."""
        self._fragments: list[SharedState] = []
        self._of_buffers: SharedState | None = None
        self._under_way: deque[_UnderWay] = deque()
        self._before_training = module.register_forward_pre_hook(
            torch.compiler.disable(self._begin_training)
        )

    def _begin_training(self, module: nn.Module, _: Any) -> None:
        """Before the first forward, as a checkpoint may be loaded until then."""
        if module.training and torch.is_grad_enabled():
            self._take_over()

    def _take_over(self) -> None:
        """All ranks have the same parameters now."""
        self._before_training.remove()
        self._fragments = [SharedState(part) for part in self.parts]
        self._of_buffers = SharedState(self._buffers) if self._buffers else None

    def exchange(self, bucket: GradBucket, statistics: StepStatistics) -> Future[torch.Tensor]:
        """Nothing: the gradient is this rank's alone."""
        statistics.scheme = "local"
        return done(bucket.buffer())

    def end_step(self) -> None:
        self._ended += 1
        # by a backward, which needs the parameters as they are
        if self._ended > 1 and torch._C._current_graph_task_id() >= 0:
            raise RuntimeError(STEP_IS_MISSING)

    def after_step(self, statistics: StepStatistics) -> None:
        self._ended = -1
        if not self._fragments:
            return
        refuse_sharded(self.optimizers)
        self.steps += 1
        count, every = len(self._fragments), self._inner_steps
        due = [
            number
            for number in range(count)
            if (self.steps - (number + 1) * every // count) % every == 0
        ]
        landed = False
        if due or self._under_way:
            with statistics.waiting():
                for number in due:
                    self._launch(number, statistics)
                while self._under_way and self._under_way[0].until <= self.steps:
                    self._land(statistics, self._mixing)
                    landed = True
        if not landed:
            statistics.lose(1.0, 1.0)  # of this step's gradients nothing was sent
        elif count == 1 and not self._overlap:
            self._equal_at = self.steps

    def synchronize(self, statistics: StepStatistics) -> None:
        if not self.steps:
            return
        with statistics.waiting():
            if self._equal_at != self.steps:
                while self._under_way:
                    self._land(statistics, self._mixing)
                for number in range(len(self._fragments)):
                    self._launch(number, statistics)
                while self._under_way:
                    self._land(statistics, 0.0)
                self._equal_at = self.steps
            # A rank may close the mesh now, in which others may still be waiting for what they have
            # yet to read.
            self.group.allreduce([self._fragments[0].shared.new_zeros(1)]).wait()

    @contextlib.contextmanager
    def synchronized(self) -> Iterator[None]:
        if self._equal_at == self.steps:
            yield
            return
        own = self._aside = [common.own() for common in self._all]
        try:
            for common in self._all:
                common.put(common.shared)
            yield
        finally:
            self._aside = None
            for common, values in zip(self._all, own, strict=True):
                common.put(values)

    @property
    def _all(self) -> list["SharedState"]:
        return [*self._fragments, *([self._of_buffers] if self._of_buffers is not None else [])]

    def _launch(self, number: int, statistics: StepStatistics) -> None:
        fragment, spent, of_buffers = (
            self._fragments[number],
            statistics.separate(),
            statistics.separate(),
        )
        gradient = self.exchange_mean(fragment, spent)
        buffers = None
        if self._of_buffers is not None and number == len(self._fragments) - 1:
            # of an infinite one, as masks have
            drift = self._of_buffers.drift().nan_to_num_(nan=0.0)
            buffers = all_reduce_mean(
                drift, "buffers", RingAllReduce(), self.mesh, of_buffers, feedback=False
            )
        self._under_way.append(
            _UnderWay(self.steps + self._overlap, number, gradient, buffers, spent, of_buffers)
        )

    def exchange_mean(
        self, fragment: "SharedState", statistics: StepStatistics
    ) -> Future[torch.Tensor]:
        """Launch the exchange of a fragment's pseudo-gradient; the future has the mean."""
        drift = fragment.drift()
        return all_reduce_mean(drift, tuple(fragment.tensors), self.plan, self.mesh, statistics)

    def _land(self, statistics: StepStatistics, mixing: float) -> None:
        """Wait for the oldest exchange that is under way, and take the outer step."""
        _, number, gradient, buffers, spent, of_buffers = self._under_way.popleft()
        fragment = self._fragments[number]
        fragment.descend(gradient.wait(), self._outer_lr, self._outer_momentum)
        fragment.put(fragment.shared, mixing)
        if buffers is not None and self._of_buffers is not None:
            self._of_buffers.descend(buffers.wait(), 1.0, 0.0)
            self._of_buffers.put(self._of_buffers.shared)
        of_buffers.elements_sent = 0  # of gradients
        statistics.include(spent)
        statistics.include(of_buffers)
        if statistics.lost_energy is None:
            statistics.lose(0.0, 1.0)
        statistics.scheme = (
            f"{self._scheme}, {self._overlap} late" if self._overlap else self._scheme
        )

    def close(self) -> None:
        self._before_training.remove()
        self.mesh.close()

    def state_dict(self) -> dict[str, Any]:
        """The parameters of this rank are in it where they are its own, so that one checkpoint of
        the model does for all ranks."""
        under_way = [  # first, as what they do not send is in the memory only then
            (
                one.until,
                one.number,
                one.gradient.wait().clone(),
                one.buffers and one.buffers.wait().clone(),
            )
            for one in self._under_way
        ]
        return {
            "steps": self.steps,
            "equal_at": self._equal_at,
            "sequence": self.mesh.sequence,
            "feedback": self.memory.state_dict(),
            "shared": [common.shared.clone() for common in self._all],
            "velocity": [
                None if common.velocity is None else common.velocity.clone() for common in self._all
            ],
            "own": (
                None
                if self._equal_at == self.steps
                else self._aside or [common.own() for common in self._all]
            ),
            "under_way": under_way,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the model's parameters, too. Raises ValueError, one line, where the checkpoint is of
        another model, or of other fragments."""
        if not self._fragments or not state["shared"]:  # that of before the first step
            self._take_over()
        for one in self._under_way:  # of steps that are not part of the checkpoint
            for work in filter(None, (one.gradient, one.buffers)):
                work.wait()
        sizes = [common.shared.numel() for common in self._all]
        if state["shared"] and [shared.numel() for shared in state["shared"]] != sizes:
            raise ValueError(
                "the checkpoint is of another model, or of another number of fragments; go on"
                " without it"
            )
        self.steps, self._equal_at, self.mesh.sequence = (
            state["steps"],
            state["equal_at"],
            state["sequence"],
        )
        self.memory.load_state_dict(state["feedback"])
        for number, (shared, velocity) in enumerate(
            zip(state["shared"], state["velocity"], strict=True)
        ):
            common = self._all[number]
            common.shared.copy_(shared)
            common.velocity = None if velocity is None else velocity.to(common.shared, copy=True)
            common.put(
                common.shared if state["own"] is None else state["own"][number].to(common.shared)
            )
        self._under_way = deque(
            _UnderWay(
                until,
                number,
                done(gradient),
                None if buffers is None else done(buffers),
                *_nothing(self.mesh.ranks),
            )
            for until, number, gradient, buffers in state["under_way"]
        )


STEP_IS_MISSING = (
    "local updates exchange parameters in session.step(): call it after every optimizer.step(), and"
    " accumulate the gradients of several backwards under no_sync()"
)


def refuse_sharded(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise ValueError, one line, for a ZeroRedundancyOptimizer: in every step it sends what each
    rank has made of its shard of the parameters to all others, so that there are no local steps."""
    for optimizer in optimizers:
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise ValueError(
                "a ZeroRedundancyOptimizer makes no local steps; choose a method without them"
                " (netsense: interval=1 and delay=0), or the optimizer that it shards"
            )


def exchanged(module: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What local updates exchange of a model: parameters, and floating-point buffers. Raises
    ValueError, one line, where they are on several devices."""
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    trained: list[torch.Tensor] = [
        p for name, p in module.named_parameters() if p.requires_grad and name not in ignored
    ]
    buffers = [
        b for name, b in module.named_buffers() if b.is_floating_point() and name not in ignored
    ]
    if len({tensor.device for tensor in (*trained, *buffers)}) > 1:
        raise ValueError(
            "local updates exchange a model as a whole, and this one is on several devices"
        )
    return trained, buffers


class SharedState:
    """Tensors of this rank, and what all ranks have had in common of them last.

    shared: shape (n,), all of them after one another, in float32 or the widest of their types;
    velocity likewise, of the outer momentum, or None.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors
        self._sizes = [tensor.numel() for tensor in tensors]
        self._dtype = reduce(
            torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32
        )
        self.shared = self.own()
        self.velocity: torch.Tensor | None = None

    def own(self) -> torch.Tensor:
        """What this rank has now; a copy."""
        return torch.cat([tensor.detach().reshape(-1).to(self._dtype) for tensor in self.tensors])

    def drift(self) -> torch.Tensor:
        """What was in common, less what this rank has now: the pseudo-gradient."""
        own = self.own()
        return torch.sub(self.shared, own, out=own)

    def descend(self, gradient: torch.Tensor, lr: float, momentum: float) -> None:
        """A step of SGD with Nesterov's momentum; ``gradient`` is overwritten."""
        if momentum:
            if self.velocity is None:
                self.velocity = torch.zeros_like(self.shared)
            self.velocity.mul_(momentum).add_(gradient)
            gradient.add_(self.velocity, alpha=momentum)
            self.velocity.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        self.shared.sub_(gradient, alpha=lr)

    @torch.no_grad()
    def put(self, values: torch.Tensor, mixing: float = 0.0) -> None:
        """Give the tensors values, shape (n,), mixed with a share ``mixing`` of their own."""
        for tensor, part in zip(self.tensors, values.split(self._sizes), strict=True):
            if mixing:
                tensor.lerp_(part.view_as(tensor).to(tensor.dtype), 1 - mixing)
            else:
                tensor.copy_(part.view_as(tensor))


def plan_of(values: str) -> Plan:
    """The best form of exchanging all elements in a type: as they are in a ring, or coded in two
    phases."""
    return RingAllReduce() if values == "fp32" else BySize(DirectAllReduce(Codec(values)))


class _UnderWay(NamedTuple):
    """An exchange. until: step after which it is waited for. number: of the fragment. gradient,
    buffers: means to come. spent, of_buffers: what they cost."""

    until: int
    number: int
    gradient: Future[torch.Tensor]
    buffers: Future[torch.Tensor] | None
    spent: StepStatistics
    of_buffers: StepStatistics


def _nothing(ranks: int) -> tuple[StepStatistics, StepStatistics]:
    """What the rest of an exchange of a checkpoint costs."""
    return StepStatistics(ranks), StepStatistics(ranks)


def done(value: torch.Tensor) -> Future[torch.Tensor]:
    future: Future[torch.Tensor] = Future(
        devices=[value.device] if value.device.type != "cpu" else None
    )
    future.set_result(value)
    return future


def _even_parts(tensors: Sequence[torch.Tensor], count: int) -> list[list[torch.Tensor]]:
    """So many parts, of about as many elements each, in order and none of them empty."""
    rest, parts = deque(tensors), []
    for left in range(count, 0, -1):
        share = sum(tensor.numel() for tensor in rest) / left
        part = [rest.popleft()]
        while len(rest) >= left and (
            left == 1 or sum(t.numel() for t in part) + rest[0].numel() / 2 <= share
        ):
            part.append(rest.popleft())
        parts.append(part)
    return parts
