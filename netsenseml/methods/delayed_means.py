"""Means of gradients that are applied a step later, so that their exchange is hidden behind that
step's compute."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future

from netsenseml.control.policy import with_timing
from netsenseml.exchange.collective import all_reduce_mean
from netsenseml.exchange.communicators import Plan, RingAllReduce
from netsenseml.exchange.mesh import Mesh
from netsenseml.methods.local import done
from netsenseml.records import monotonic_s
from netsenseml.statistics import StepStatistics


class DelayedMeans:
    """The exchange of a bucket lasts until the next step has computed the same bucket, and its mean
    is that step's:

        step t:  launch the exchange of g_t
                 apply m_{t-1}, the mean of g_{t-1};  in the first one zeros

    All ranks apply the same means, so replicas stay equal in every step with any optimizer, and
    nothing differs for evaluation and checkpoints of the model. What was applied is the sum of the
    means but for the newest one, which ``give_back`` puts into error feedback on every rank when
    delays end: so it is spread over the next steps, and not a step of twice the size.

    A mean that is under way when the learning rate changes is worth as much as before, as is what
    error feedback keeps: it is scaled by the old rate over the new one. After a rate has fallen at
    once to a tenth, the next step's gradients are ten times as large, which clipping would cut
    away.

    What a step of delay costs is in ``control.plans.step_progress``: with SGD so much that
    ``LocalSteps`` with an interval of one step is the better way. To correct for what the
    parameters have moved meanwhile (DC-ASGD, Zheng et al., ICML 2017) was not tried. A longer delay
    costs far more, and would need error feedback that lets two exchanges of one bucket be under
    way.
    """

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]], mesh: Mesh) -> None:
        """named: parameters, for checkpoints."""
        self._mesh = mesh
        self._parameters = dict(named)
        self._under_way: dict[tuple[torch.Tensor, ...], _UnderWay] = {}
        self._landed: list[str] = []
        """Of this backward: by which plans was exchanged what has landed in it; empty where that
        cost more, or nothing."""
        self._spent: list[StepStatistics] = []
        """What that has cost which no step has been charged with yet."""
        self.waited_s = 0.0
        """By this backward, before its end, for what was exchanged in the one before."""
        self._rescaled_s = 0.0
        """Of that, what ``rescale`` has waited and ``exchange`` has yet to add."""

    def begin(self, *, delayed: bool) -> None:
        """Before a backward."""
        self._landed, self.waited_s = [], 0.0
        if not delayed:
            self._rescaled_s = 0.0
            self.give_back()

    def measured(self, scheme: str) -> str:
        """Name of the plan that the times of this backward, which goes by ``scheme``, tell of;
        empty if of several, or none."""
        names = set(self._landed if self._under_way or self._landed else [scheme])
        return names.pop() if len(names) == 1 else ""

    def exchange(
        self, bucket: GradBucket, plan: Plan, statistics: StepStatistics
    ) -> Future[torch.Tensor]:
        gradient, key = bucket.buffer(), tuple(bucket.parameters())
        if key not in self._under_way and any(
            not set(key).isdisjoint(other) for other in self._under_way
        ):
            self.give_back()  # DDP has rearranged its buckets
        before, began_s = self._under_way.pop(key, None), monotonic_s() - self._rescaled_s
        self._rescaled_s = 0.0
        mean = torch.zeros_like(gradient) if before is None else before.mean.wait()
        if before is not None:
            if not bucket.is_last():  # when that is ready backward has ended
                self.waited_s += monotonic_s() - began_s
            self._landed.append(before.scheme if before.spent else "")
            self._spent += before.spent
        self.charge(statistics)
        scheme, spent = with_timing(plan.name, delay=1), statistics.separate()
        # residuals are added on this thread then, and so not while another works with them
        if isinstance(plan, RingAllReduce):
            for one in self._under_way.values():
                if one.scheme != scheme:
                    one.mean.wait()
        work = all_reduce_mean(gradient.clone(), key, plan, self._mesh, spent)
        self._under_way[key] = _UnderWay(scheme, work, [spent])
        return done(mean)

    def charge(self, statistics: StepStatistics) -> None:
        """A step with what has landed."""
        spent, self._spent = self._spent, []
        for one in spent:
            statistics.include(one)

    def rescale(self, factor: float) -> None:
        """Before a backward, and before what error feedback keeps is rescaled, with which exchanges
        that are under way work: wait for them. Their means are to be ``factor`` times as large."""
        if not self._under_way:
            return
        began_s = monotonic_s()
        for one in self._under_way.values():
            one.mean.wait()
        self._rescaled_s += monotonic_s() - began_s
        self._under_way = {
            key: one._replace(mean=done(one.mean.wait() * factor))
            for key, one in self._under_way.items()
        }

    def give_back(self) -> None:
        """Wait for all that is under way, and leave it to error feedback."""
        under_way, self._under_way = self._under_way, {}
        for one in under_way.values():  # for all first, as what is kept may be rearranged
            one.mean.wait()
        for key, one in under_way.items():
            self._mesh.memory.add(key, one.mean.wait())
            self._landed.append("")
            self._spent += one.spent

    def synchronize(self, statistics: StepStatistics) -> None:
        """Wait for all that is under way, on all ranks; it is kept for the next step."""
        if not self._under_way:
            return
        for key, one in self._under_way.items():
            one.mean.wait()
            self._spent += one.spent
            self._under_way[key] = one._replace(spent=[])
        self.charge(statistics)
        # A rank may close the mesh now, in which others may still be waiting for what they have yet
        # to read.
        self._mesh.group.allreduce(
            [torch.zeros(1, device=next(iter(self._parameters.values())).device)]
        ).wait()

    def state_dict(self) -> dict[str, Any]:
        names = {parameter: name for name, parameter in self._parameters.items()}
        under_way = [
            ([names[p] for p in key], one.scheme, one.mean.wait().clone())
            for key, one in self._under_way.items()
        ]
        return {"under_way": under_way}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for one in self._under_way.values():  # of steps that are not part of the checkpoint
            one.mean.wait()
        self._under_way, self._spent = {}, []
        for names, scheme, mean in state["under_way"]:
            key = tuple(self._parameters[name] for name in names)
            self._under_way[key] = _UnderWay(scheme, done(mean.to(key[0].device)), [])


class _UnderWay(NamedTuple):
    """An exchange. mean: to come. spent: what it costs, until a step has been charged with it."""

    scheme: str
    mean: Future[torch.Tensor]
    spent: list[StepStatistics]
