"""Accordion (Agarwal, Wang, Lee, Venkataraman, Papailiopoulos: Adaptive Gradient Communication via
Critical Learning Regime Identification, MLSys 2021, arXiv 2010.16248), to be compared with. It
looks at gradients, and not at the network."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from netsenseml.control.budget import ByteBudget
from netsenseml.control.policy import Observation
from netsenseml.exchange.communicators import Plan
from netsenseml.exchange.mesh import Topology

_FALL = 0.5


class Accordion(ByteBudget):
    """Compress little in critical regimes, else much. A window is critical if before it

        | |D_old| - |D_new| | / |D_old| >= eta,    or the learning rate has fallen

    D_new: sum of the gradients over the window that has ended. D_old: over the one before. Until
    there are two of them the regime counts as critical, as the first epochs do in the paper.
    ``l_low`` and ``l_high`` are the paper's two levels, of low and of high compression; eta = 0.5
    is the authors'.

    Where the paper leaves something open, or supposes another system, we chose: the authors compare
    an epoch with that ten before; here a window is a number of steps, and compared with the one
    before, since a training may be shorter than ten epochs and nobody tells us of these. Levels are
    shares of all-reduce's bytes in place of K of top-k. The authors decide layer by layer, as their
    compressors work so; here one decision is for all, from the norm over all buckets. D is of rank
    0's own gradients, at up to 16384 elements of every bucket (``control.plans.gradient_sample``),
    not of the mean of all ranks. The learning rate has fallen if it is at most half of what it was
    at the beginning of the window; in the paper any decay counts, which with schedules that decay
    in every step would make all of a training critical. A change of a loss scale looks like a
    critical regime.
    """

    sample_every = 1

    def __init__(
        self,
        plans: Sequence[Plan],
        topology: Topology,
        elements: int,
        *,
        l_low: float,
        l_high: float,
        eta: float,
        window: int,
    ) -> None:
        super().__init__(plans, topology, elements, start=l_low)
        self._l_low, self._l_high, self._eta, self._window = l_low, l_high, eta, window
        self._critical, self._old = True, math.nan
        self._of: tuple[int, ...] = ()
        self._begin_window()

    def _begin_window(self) -> None:
        self._sum, self._steps, self._lr = torch.zeros(()), 0, 1.0

    def budget_bytes(self, observation: Observation) -> float:
        if observation.elements != self._of:  # other elements are looked at
            self._of, self._old = observation.elements, math.nan
            self._begin_window()
        self._lr *= observation.lr_change
        if observation.gradients:
            self._sum = self._sum + torch.cat(list(observation.gradients))
            self._steps += 1
        if self._steps == self._window:
            self._end_window(float(self._sum.norm()))
        return (self._l_low if self._critical else self._l_high) * self.dense_bytes

    def _end_window(self, new: float) -> None:
        if math.isfinite(new):  # else nothing can be told of it
            if not math.isnan(self._old):
                self._critical = abs(self._old - new) >= self._eta * self._old or self._lr <= _FALL
            self._old = new
        self._begin_window()

    def state_dict(self) -> dict[str, Any]:
        own = {"critical": self._critical, "old": self._old, "of": self._of}
        return {
            **super().state_dict(),
            **own,
            "sum": self._sum,
            "steps": self._steps,
            "lr": self._lr,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._critical, self._old, self._of = state["critical"], state["old"], tuple(state["of"])
        self._sum, self._steps, self._lr = state["sum"], state["steps"], state["lr"]
