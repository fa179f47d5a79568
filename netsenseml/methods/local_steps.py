"""Local steps of a method that else exchanges gradients in every step."""

import contextlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.futures import Future

from netsenseml.compress.feedback import ErrorFeedback
from netsenseml.control.plans import gradient_sample
from netsenseml.exchange.collective import all_reduce_mean
from netsenseml.exchange.communicators import Plan, RingAllReduce
from netsenseml.exchange.mesh import Mesh
from netsenseml.methods.local import SharedState, done, exchanged, refuse_sharded
from netsenseml.statistics import StepStatistics
from netsenseml.streams import start_to_host

_KEY = "parameters"


class LocalSteps:
    """From ``begin`` on every rank steps by its own gradients, until ``end``; in between,
    ``exchange`` makes the model equal.

    x is what all ranks had in common last, y_r what rank r has made of it since, e_r what it has
    not sent yet:

        exchange:  e_r <- e_r + (x - y_r),  x <- x - mean of C(e_r),  e_r <- e_r - C(e_r),  y_r <- x
        end:       x <- x - mean of (e_r + x - y_r),  e_r <- 0,  y_r <- x
                   the state of the optimizers <- its mean

    With a delay what an exchange has brought is taken behind the next one, and the ranks train on
    meanwhile (as in CO2, Sun et al., ICLR 2024). d_r is what rank r has put in, which it keeps
    until then, and does not send again:

        exchange:  take what is under way:
                   x <- x - mean of C(e_r),  y_r <- y_r + d_r - mean of C(e_r)
                   then d_r <- x - y_r,  e_r <- e_r + d_r,  launch C(e_r)

    C is a plan. What e_r holds is a difference of parameters, and stays so when the learning rate
    changes. Between two exchanges momentum and second moments are each rank's own, as in local SGD.
    At the end they become their mean, in float32: or replicas that are equal would part again with
    the first step that all make by the same gradient. As a momentum is a sum of gradients, its mean
    is what it would be had all ranks always had the mean gradient. For that, nothing may be in the
    optimizers' ``state`` that differs between ranks and is neither a floating-point tensor nor a
    count of steps.

    Floating-point buffers become their mean with every exchange; until then each rank has its own.
    """

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        """Raises ValueError, one line, for a model that cannot be exchanged so."""
        self._mesh = mesh
        self._trained, buffers = exchanged(module)
        self._buffers = SharedState(buffers) if buffers else None
        self._buffers_met = False
        """Whether what all ranks had in common last of the buffers is of these local steps."""
        self.memory = ErrorFeedback()
        """e_r."""
        self._common: SharedState | None = None
        self.steps = 0
        """Since the newest exchange began."""
        self._exchanges: deque[_Exchange] = deque()
        """Under way: one at most."""
        self._aside: list[torch.Tensor] | None = None

    @property
    def under_way(self) -> bool:
        return self._common is not None

    def refuse(self, optimizers: Collection[torch.optim.Optimizer]) -> None:
        """Raises ValueError, one line, for optimizers that make no local steps, or keep what has no
        mean."""
        refuse_sharded(optimizers)
        self._moments(optimizers)

    def begin(self, optimizers: Collection[torch.optim.Optimizer]) -> None:
        """All ranks have the same parameters now. Raises ValueError, one line, where optimizers
        keep what has no mean."""
        self._moments(optimizers)
        self._common, self.steps, self._buffers_met = SharedState(self._trained), 0, False

    def exchange(
        self,
        plan: Plan,
        scheme: str,
        statistics: StepStatistics,
        *,
        delayed: bool = False,
        sampling: bool = False,
    ) -> "Landed | None":
        """Wait for the exchange, or, if ``delayed``, for the one before. Returns what the last has
        cost that was waited for.

        scheme: its name. sampling: with a sample of what this rank has to send.
        """
        landed = self._land(statistics)
        self._launch(plan, scheme, statistics, delayed=delayed, sampling=sampling)
        return landed if delayed else self._land(statistics)

    def end(
        self, optimizers: Collection[torch.optim.Optimizer], statistics: StepStatistics
    ) -> None:
        """An exchange of all that there is, as it is."""
        assert self._common is not None
        self._land(statistics)
        drift = self._common.drift()
        kept = self.memory.take(_KEY)
        if kept is not None:
            drift.add_(kept.to(drift))
        mean = all_reduce_mean(
            drift, _KEY, RingAllReduce(), self._mesh, statistics, feedback=False
        ).wait()
        self._common.descend(mean, 1.0, 0.0)
        self._common.put(self._common.shared)
        self._common, self.steps = None, 0
        self._average_buffers(statistics)
        moments = self._moments(optimizers)
        if moments:
            of_optimizers = SharedState(moments)
            of_optimizers.put(self._mean(of_optimizers.own(), statistics))

    def synchronize(self, plan: Plan, statistics: StepStatistics) -> None:
        """An exchange before its time, if one is to come; and no rank leaves before all have
        come."""
        self._land(statistics)
        if self._common is not None and self.steps:
            self.exchange(plan, plan.name, statistics)
        else:
            self._average_buffers(statistics)
        # A rank may close the mesh now, in which others may still be waiting for what they have yet
        # to read.
        self._mesh.group.allreduce([self._trained[0].new_zeros(1)]).wait()

    @property
    def _every(self) -> list[SharedState]:
        return [common for common in (self._common, self._buffers) if common is not None]

    def _drift(self, common: SharedState) -> torch.Tensor:
        drift = common.drift()
        # of an infinite one, as masks have
        return drift.nan_to_num_(nan=0.0) if common is self._buffers else drift

    def _launch(
        self, plan: Plan, scheme: str, statistics: StepStatistics, *, delayed: bool, sampling: bool
    ) -> None:
        """Nothing is under way. Unless ``delayed``, it is landed before the next step, and so
        nothing is kept for that."""
        own = [self._drift(common) for common in self._every]
        gradient_samples = [start_to_host(gradient_sample(own[0]))] if sampling else []
        trained, *buffers = [drift.clone() for drift in own] if delayed else own
        spent, of_buffers = statistics.separate(), statistics.separate()
        means = [all_reduce_mean(trained, _KEY, plan, self._mesh, spent, memory=self.memory)]
        means += [
            all_reduce_mean(one, None, RingAllReduce(), self._mesh, of_buffers, feedback=False)
            for one in buffers
        ]
        self._exchanges.append(
            _Exchange(own, means, Landed(scheme, spent, gradient_samples), of_buffers)
        )
        self.steps = 0

    def _land(self, statistics: StepStatistics) -> "Landed | None":
        """Wait for what is under way, and take it."""
        if not self._exchanges:
            return None
        one, every = self._exchanges.popleft(), self._every
        for common, own, mean in zip(every, one.own, one.means, strict=True):
            unsent = self._drift(common).sub_(own) if self.steps else None
            common.descend(mean.wait(), 1.0, 0.0)
            common.put(common.shared if unsent is None else common.shared - unsent)
        self._buffers_met = True
        one.of_buffers.elements_sent = 0  # of gradients
        statistics.include(one.landed.spent)
        statistics.include(one.of_buffers)
        return one.landed

    def _average_buffers(self, statistics: StepStatistics) -> None:
        if self._buffers is not None:
            self._buffers.descend(self._mean(self._drift(self._buffers), statistics), 1.0, 0.0)
            self._buffers.put(self._buffers.shared)
            self._buffers_met = True

    def _mean(self, tensor: torch.Tensor, statistics: StepStatistics) -> torch.Tensor:
        spent = statistics.separate()
        mean = all_reduce_mean(
            tensor, None, RingAllReduce(), self._mesh, spent, feedback=False
        ).wait()
        spent.elements_sent = 0  # of gradients
        statistics.include(spent)
        return mean

    def _moments(self, optimizers: Collection[torch.optim.Optimizer]) -> list[torch.Tensor]:
        """What optimizers keep of this model's parameters, in the same order on all ranks."""
        kept = [
            (p, optimizer.state[p])
            for p in self._trained
            for optimizer in optimizers
            if p in optimizer.state
        ]
        found = [
            (p, name, state[name]) for p, state in kept for name in sorted(state) if name != "step"
        ]
        values = [(p, name, value) for p, name, value in found if isinstance(value, torch.Tensor)]
        for _, name, value in values:
            if not value.is_floating_point():
                raise ValueError(
                    f"the optimizer keeps {name} as {value.dtype}, of which there is no mean; say"
                    " interval=1 and delay=0"
                )
        # others are counts, such as NAdam's mu_product
        return [value for p, _, value in values if value.device == p.device]

    @contextlib.contextmanager
    def synchronized(self) -> Iterator[None]:
        """Inside, the model has what all ranks had in common last."""
        if self._common is None or not (self.steps or self._exchanges):
            yield
            return
        every = self._every
        own = self._aside = [common.own() for common in every]
        try:
            for common in every:
                if common is not self._buffers or self._buffers_met:
                    common.put(common.shared)
            yield
        finally:
            self._aside = None
            for common, values in zip(every, own, strict=True):
                common.put(values)

    def state_dict(self) -> dict[str, Any]:
        """The parameters of this rank are in it while they are its own, so that one checkpoint of
        the model does for all."""
        exchanges = [  # first, as what they do not send is in the memory only then
            (one.own, [mean.wait().clone() for mean in one.means], one.landed.scheme)
            for one in self._exchanges
        ]
        every = self._every
        return {
            "exchanges": exchanges,
            "under_way": self.under_way,
            "steps": self.steps,
            "buffers_met": self._buffers_met,
            "kept": self.memory.state_dict(),
            "shared": [common.shared.clone() for common in every],
            "own": (self._aside or [common.own() for common in every]) if self.under_way else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the model's parameters, too."""
        # of steps that are not part of the checkpoint; they work with what is kept
        for one in self._exchanges:
            for mean in one.means:
                mean.wait()
        self._exchanges.clear()
        self._common, self.steps = (
            (SharedState(self._trained) if state["under_way"] else None),
            state["steps"],
        )
        self._buffers_met = state["buffers_met"]
        self.memory.load_state_dict(state["kept"])
        every = self._every
        for own, means, scheme in state["exchanges"]:
            owns = [tensor.to(every[0].shared) for tensor in own]
            futures = [done(mean.to(every[0].shared, copy=True)) for mean in means]
            # nothing is known of it
            spent, of_buffers = StepStatistics(self._mesh.ranks), StepStatistics(self._mesh.ranks)
            self._exchanges.append(_Exchange(owns, futures, Landed(scheme, spent, []), of_buffers))
        for number, (common, shared) in enumerate(zip(every, state["shared"], strict=True)):
            common.shared.copy_(shared)
            if state["own"] is not None:
                common.put(state["own"][number].to(common.shared))


class Landed(NamedTuple):
    """An exchange that is over. scheme: its name. gradient_samples: of what this rank had to send,
    if one was taken."""

    scheme: str
    spent: StepStatistics
    gradient_samples: list[torch.Tensor]


class _Exchange(NamedTuple):
    """An exchange, of parameters and of buffers. own: what this rank has put in. means: to come.
    of_buffers: what that of the buffers costs."""

    own: list[torch.Tensor]
    means: list[Future[torch.Tensor]]
    landed: Landed
    of_buffers: StepStatistics
