"""Methods that always exchange by the same plan, or by one that only the step decides."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future

from netsenseml.compress.codec import Codec, load_kernels
from netsenseml.compress.feedback import ErrorFeedback
from netsenseml.exchange.collective import all_reduce_mean
from netsenseml.exchange.communicators import (
    BySize,
    DirectAllReduce,
    Plan,
    RandomK,
    SparseAllGather,
    WideAllGather,
)
from netsenseml.exchange.mesh import Mesh
from netsenseml.methods.base import Method
from netsenseml.statistics import StepStatistics


class Compressed(Method):
    """Exchange by a plan, beside backward, mostly with error feedback."""

    takes_complex = False

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        plan: Plan,
        *,
        feedback: bool = True,
        momentum: float = 0.0,
        limit: float | None = None,
    ) -> None:
        super().__init__(module, group)
        for device in {parameter.device for parameter in module.parameters()}:
            load_kernels(device)  # or the first step would
        self.plan = plan
        self.memory = ErrorFeedback(module.named_parameters(), momentum=momentum, limit=limit)
        self._feedback = feedback
        of_gradients = next(
            (parameter.device for parameter in module.parameters() if parameter.requires_grad), None
        )
        self.mesh = Mesh(group, memory=self.memory, device=of_gradients)
        self.steps = 0
        """Backwards so far."""

    def begin(self) -> None:
        self.steps += 1
        self.memory.holds_unused, self.memory.keeps_copy = self.holds_unused, self.keeps_copy

    def exchange(self, bucket: GradBucket, statistics: StepStatistics) -> Future[torch.Tensor]:
        statistics.scheme, key = self.plan.name, tuple(bucket.parameters())
        return all_reduce_mean(
            bucket.buffer(), key, self.plan, self.mesh, statistics, feedback=self._feedback
        )

    def rescale(self, factor: float, *, gradients: bool) -> None:
        self.memory.rescale(factor, velocity=gradients)

    def undo(self) -> None:
        self.memory.restore()

    def end_step(self) -> None:
        self.memory.drop_copies()

    def close(self) -> None:
        self.mesh.close()

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "sequence": self.mesh.sequence,
            "feedback": self.memory.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.mesh.sequence = state["steps"], state["sequence"]
        self.memory.load_state_dict(state["feedback"])


class Quantized(Compressed):
    """Two-phase quantised all-reduce: all elements, in 16, 8 or 4 bits."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, values: str) -> None:
        super().__init__(module, group, BySize(DirectAllReduce(Codec(values))))


class Qsgd(Compressed):
    """QSGD (Alistarh et al., NeurIPS 2017): stochastic rounding and nothing else, as its error has
    mean zero.

    In its best form: a scale for every block of values, and exchanged in two phases.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, bits: int) -> None:
        super().__init__(
            module,
            group,
            BySize(DirectAllReduce(Codec(f"int{bits}", stochastic=True))),
            feedback=False,
        )


class SignSgd(Compressed):
    """Signs and a mean magnitude for every block, with error feedback (EF-signSGD, Karimireddy et
    al., ICML 2019).

    In two phases, with error feedback in both (DoubleSqueeze, Tang et al., ICML 2019).
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__(module, group, BySize(DirectAllReduce(Codec("sign"))))


class TopK(Compressed):
    """The largest share ``ratio`` of every bucket."""

    def __init__(
        self, module: nn.Module, group: dist.ProcessGroup, *, ratio: float, values: str
    ) -> None:
        super().__init__(module, group, BySize(SparseAllGather(Codec(values, ratio))))


class WideTopK(Compressed):
    """The largest share ``ratio`` of every bucket in the form of the paper: 12 bytes a value, and
    backward waits meanwhile."""

    waits = True

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, ratio: float) -> None:
        super().__init__(module, group, WideAllGather(ratio))

    def exchange(self, bucket: GradBucket, statistics: StepStatistics) -> Future[torch.Tensor]:
        done = super().exchange(bucket, statistics)
        done.wait()
        return done


class Random(Compressed):
    """A random share ``ratio`` of every bucket, the same elements on all ranks."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, ratio: float) -> None:
        super().__init__(module, group, RandomK(ratio))


class Dgc(Compressed):
    """Deep gradient compression (Lin et al., ICLR 2018): top-k of momentum-corrected gradients,
    with a warm-up.

    Every rank applies the momentum to its own gradients, before the choice, and forgets it where it
    sent. Over the first ``warmup`` steps the share falls from a quarter to ``ratio``, by the same
    factor each step.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        *,
        ratio: float,
        values: str,
        momentum: float,
        warmup: int,
    ) -> None:
        self._ratio, self._values, self._warmup = ratio, values, warmup
        super().__init__(module, group, self._plan_at(0), momentum=momentum)

    def begin(self) -> None:
        super().begin()
        self.plan = self._plan_at(self.steps - 1)

    def _plan_at(self, step: int) -> Plan:
        ratio = self._ratio
        if step < self._warmup and ratio < _WARM_RATIO:
            ratio = float(f"{_WARM_RATIO * (ratio / _WARM_RATIO) ** (step / self._warmup):.3g}")
        return BySize(SparseAllGather(Codec(self._values, ratio)))


_WARM_RATIO = 0.25
