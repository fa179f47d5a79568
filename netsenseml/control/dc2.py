"""DC2 (Abdelmoniem and Canini: DC2: Delay-aware Compression Control for Distributed Machine
Learning, INFOCOM 2021), to be compared with."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from netsenseml.control.budget import ByteBudget
from netsenseml.control.policy import Observation
from netsenseml.exchange.communicators import Plan
from netsenseml.exchange.mesh import Topology

_WEIGHT, _MOST = 0.25, 2.0


class Dc2(ByteBudget):
    """Let the ratio follow the delay of the exchange, so that this stays what it should be:

        aim = ratio of the step x target / delay,    log ratio <- (1 - w) log ratio + w log aim

    delay: time in which the step's collectives were under way; no model of the network says what
    part of it is bandwidth, and what latency or other traffic.

    Of the paper is the idea: compression is coupled to the delays that the network shows, more of
    it when these grow and less when they shrink, in a module of the communication library, under
    any training. **The formula is ours**, as we know the paper by its abstract alone: where its
    controller does otherwise, this is not its result. We chose: the target is what a step computes
    unless it is given, so that communication is to take no longer than that; w = 0.25, so that a
    delay that happens once moves the ratio little, and a change is followed within some ten steps;
    a ratio is a share of all-reduce's bytes, at most 1, an aim is at most 2 and at least what the
    smallest plan sends. The aim goes by the ratio with which the delay was measured, so a decision
    that comes into force steps later is not counted twice.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        topology: Topology,
        elements: int,
        *,
        start: float,
        target_delay: float,
    ) -> None:
        """target_delay: s; 0 leaves it to what a step computes."""
        super().__init__(plans, topology, elements, start=start)
        self._target_delay, self._log_ratio = target_delay, math.log(start)

    def budget_bytes(self, observation: Observation) -> float:
        target_s = self._target_delay or observation.compute_s
        aim = (
            self.sent_bytes(observation)
            / self.dense_bytes
            * target_s
            / max(observation.communication_s, 1e-9)
        )
        log_aim = math.log(min(max(aim, self.smallest_bytes / self.dense_bytes), _MOST))
        self._log_ratio = min(self._log_ratio + _WEIGHT * (log_aim - self._log_ratio), 0.0)
        return math.exp(self._log_ratio) * self.dense_bytes

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "log_ratio": self._log_ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._log_ratio = state["log_ratio"]
