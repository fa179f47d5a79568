"""What a policy knows of a step, and what it decides. It lives on rank 0, which tells the
others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Observation:
    """One step, as all ranks saw it: of times that they wait for each other in, that of the rank
    that waited least.

    plan: name of the plan that exchanged it. elements, ready_s: of every bucket, how many elements
        it has and how long before the last gradient it was ready, s <= 0.
    compute_s: from the end of the exchange before to the last gradient. exposed_s: from there to
        the end of the exchange. If the plan has an interval (``with_timing``), of a step in
        between, and of the exchange behind the optimizer. If it has a delay, exposed_s is what was
        waited for the exchange before, and so are communication_s, encode_s and payload_bytes.
    communication_s: time in which something was under way; of the rank that waited least for the
    others.
    encode_s: spent on coding. payload_bytes: what a rank sent.
    latency_s: of an empty direct exchange among all ranks. ring_share: mean of the ranks'
    round-trip times over the largest. lost: by name of a plan, share of the newest gradients'
    energy that it would not send; empty if none was taken. gradients: samples of rank 0's own
    gradients, of every bucket (``control.plans.gradient_sample``); empty if none was taken.
    lr_change: the learning rate over that of the step that was told before.
    """

    plan: str
    elements: tuple[int, ...]
    ready_s: tuple[float, ...]
    compute_s: float
    exposed_s: float
    communication_s: float
    encode_s: float
    payload_bytes: int
    latency_s: float | None
    ring_share: float
    lost: Mapping[str, float]
    gradients: tuple[torch.Tensor, ...] = ()
    lr_change: float = 1.0


def with_timing(plan: str, interval: int = 0, delay: int = 0) -> str:
    """Name of a plan by which parameters are exchanged every ``interval`` steps, or gradients in
    every step, if that is 0. The mean is applied so many exchanges later as ``delay`` says: int8,
    int8/4, int8+1, int8/4+1."""
    return plan + (f"/{interval}" if interval else "") + (f"+{delay}" if delay else "")


def split_timing(name: str) -> tuple[str, int, int]:
    """Inverse of ``with_timing``."""
    rest, _, delay = name.partition("+")
    plan, _, interval = rest.partition("/")
    return plan, int(interval or 0), int(delay or 0)


def timings(intervals: Sequence[int], delays: Sequence[int]) -> list[tuple[int, int]]:
    """(interval, delay), as names have them, of all that the options leave to choose from.

    intervals: 1 for every step, in which gradients are exchanged, or parameters with a delay:
    without one that is no different.
    """
    found = [(interval if interval > 1 else 0, delay) for interval in intervals for delay in delays]
    return found + [(1, delay) for delay in delays if delay and 1 in intervals]


class Policy(Protocol):
    """Decides by which plan a later step is exchanged."""

    plan: str
    """Name of the plan to use from now on."""

    sample_every: int
    """Steps between two samples of the gradients; 0 for none."""

    @property
    def bandwidth_bps(self) -> float | None:
        """Payload bandwidth that the policy reckons with, bits/s; None if with none."""

    @property
    def may_skip_reports(self) -> bool:
        """Whether it would not matter if some of the next steps were not told."""

    def decide(self, observation: Observation) -> None:
        """Take a step into account, and decide."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint of the same policy."""
