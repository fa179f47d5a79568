"""Methods that code what they send, by one of the schemes of ``exchange.schemes``, mostly with error feedback."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future

from netsenseml.compress.codec import Codec, Sent
from netsenseml.compress.feedback import ErrorFeedback, energy_lost, sample
from netsenseml.exchange.collectives import dissolve, own_group
from netsenseml.exchange.conveyor import Conveyor, Exchange
from netsenseml.exchange.schemes import Gather, Lot, RandomK, Scheme, TwoPhase, WideGather
from netsenseml.ledger import Ledger
from netsenseml.methods.base import Method, require_cpu


class Coded(Method):
    """Exchange by a scheme on a thread of its own, beside backward. What is not sent waits in the error feedback:

    sent + new residual = gradient + old residual
    """

    feedback: ErrorFeedback | None

    def __init__(
        self, module: nn.Module, group: dist.ProcessGroup, scheme: Scheme, *, feedback: bool = True, momentum: float = 0.0
    ) -> None:
        super().__init__(module, group)
        require_cpu(module)
        self.scheme = scheme
        self.feedback = ErrorFeedback(module.named_parameters(), momentum=momentum) if feedback else None
        self.steps = 0
        """Backwards so far, from which all randomness is drawn."""
        self._conveyor = Conveyor()
        self._groups = own_group(group), own_group(group)

    def begin(self) -> None:
        self.steps += 1

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        ledger.scheme = self.scheme.name
        return self._conveyor.submit(self._exchange(bucket.buffer(), bucket.parameters(), bucket.index(), ledger))

    def _exchange(self, gradient: torch.Tensor, parameters: list[torch.Tensor], index: int, ledger: Ledger) -> Exchange:
        sent = Sent()
        feedback = self.feedback
        with ledger.coding():
            if feedback is not None:
                wanted = feedback.accumulate(parameters, gradient)
            else:
                wanted = gradient.to(torch.float32, copy=True)
            before = sample(wanted)
        out = gradient if gradient.dtype == wanted.dtype else torch.empty_like(wanted)
        lot = Lot(self._groups, ledger, shared_seed=self.steps * _BUCKETS + index, sent=sent, out=out)
        mean = yield from self.scheme.exchange(wanted, lot)
        with ledger.coding():
            ledger.lose(energy_lost(before, wanted), wanted.numel() * before.square().mean().item())
            if feedback is not None:
                feedback.mask(parameters, sent.positions)
                if not wanted.sum().isfinite():
                    feedback.heal(parameters)
            return gradient.copy_(mean)  # which does nothing where the mean was formed in it

    def close(self) -> None:
        self._conveyor.close()
        for group in self._groups:
            dissolve(group)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "feedback": self.feedback.state_dict() if self.feedback is not None else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        if self.feedback is not None:
            self.feedback.load_state_dict(state["feedback"])


_BUCKETS = 1 << 16
"""More than a model has buckets."""


class Quantized(Coded):
    """Two-phase quantised all-reduce: all elements, in 16, 8 or 4 bits."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, values: str, feedback: bool = True) -> None:
        super().__init__(module, group, TwoPhase(Codec(values)), feedback=feedback)


class Qsgd(Quantized):
    """QSGD (Alistarh et al., NeurIPS 2017): stochastic rounding and nothing else, as its error has mean zero.

    In its best form: a scale for every block of values, and exchanged in two phases.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, bits: int) -> None:
        super().__init__(module, group, values=f"int{bits}", feedback=False)


class SignSgd(Coded):
    """Signs and a mean magnitude for every block, with error feedback (EF-signSGD, Karimireddy et al., ICML 2019).

    In two phases, with error feedback in both (DoubleSqueeze, Tang et al., ICML 2019).
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__(module, group, TwoPhase(Codec("sign")))


class TopK(Coded):
    """The largest share ``ratio`` of every bucket."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, ratio: float, values: str) -> None:
        super().__init__(module, group, Gather(Codec(values, ratio)))


class WideTopK(Coded):
    """The largest share ``ratio`` of every bucket in the form of the paper: 12 bytes a value, and backward waits meanwhile."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, ratio: float) -> None:
        super().__init__(module, group, WideGather(ratio))

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        done = super().exchange(bucket, ledger)
        done.wait()
        return done


class Random(Coded):
    """A random share ``ratio`` of every bucket, the same elements on all ranks."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, ratio: float) -> None:
        super().__init__(module, group, RandomK(ratio))


class Dgc(Coded):
    """Deep gradient compression (Lin et al., ICLR 2018): top-k of momentum-corrected gradients, with a warm-up.

    Every rank applies the momentum to its own gradients, before the choice, and forgets it where it sent. Over the first
    ``warmup`` steps the share falls from a quarter to ``ratio``, by the same factor each step.
    """

    def __init__(
        self, module: nn.Module, group: dist.ProcessGroup, *, ratio: float, values: str, momentum: float, warmup: int
    ) -> None:
        self._ratio, self._values, self._warmup = ratio, values, warmup
        super().__init__(module, group, self._scheme_at(0), momentum=momentum)

    def begin(self) -> None:
        super().begin()
        self.scheme = self._scheme_at(self.steps - 1)

    def _scheme_at(self, step: int) -> Scheme:
        if step >= self._warmup or self._ratio >= _WARM_RATIO:
            return Gather(Codec(self._values, self._ratio))
        share = _WARM_RATIO * (self._ratio / _WARM_RATIO) ** (step / self._warmup)
        return Gather(Codec(self._values, float(f"{share:.3g}")))


_WARM_RATIO = 0.25
