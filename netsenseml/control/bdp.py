"""The rule of the paper (NetSenseML, Wang et al., Euro-Par 2025), as its code has it, to be
compared with."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from netsenseml.compress.codec import Codec
from netsenseml.control.policy import Observation
from netsenseml.exchange.communicators import RingAllReduce, SparseAllGather


class BdpPolicy:
    """Keep the payload below the bandwidth-delay product:

        BDP = max bandwidth x min RTT of a window, RTT = duration of the exchange, bandwidth =
        payload / RTT
        payload > threshold x BDP: ratio = max(floor, fall x ratio), else ratio = min(1, ratio +
        rise)

    ratio: share of the elements that is sent.

    With one constant payload the product is payload x min RTT / RTT, so that the ratio can only
    fall: a flaw of the rule, left as it is. What is mended is around it: one ratio for all buckets
    and ranks, a correct mean, error feedback.
    """

    may_skip_reports = False
    bandwidth_bps = None
    sample_every = 0

    def __init__(
        self,
        *,
        start: float,
        floor: float,
        threshold: float = 0.9,
        fall: float = 0.95,
        rise: float = 0.001,
        window: int = 100,
    ) -> None:
        self._ratio = max(start, floor)
        self._floor, self._threshold, self._fall, self._rise = floor, threshold, fall, rise
        self._rtts_s: deque[float] = deque(maxlen=window)
        self._bandwidths: deque[float] = deque(maxlen=window)
        self.plan = self._plan()

    def decide(self, observation: Observation) -> None:
        if observation.communication_s > 0 and observation.payload_bytes > 0:
            self._rtts_s.append(observation.communication_s)
            self._bandwidths.append(observation.payload_bytes / observation.communication_s)
            product_bytes = max(self._bandwidths) * min(self._rtts_s)
            if observation.payload_bytes > self._threshold * product_bytes:
                self._ratio = max(self._floor, self._fall * self._ratio)
            else:
                self._ratio = min(1.0, self._ratio + self._rise)
        self.plan = self._plan()

    def _plan(self) -> str:
        return (
            RingAllReduce.name
            if self._ratio == 1
            else SparseAllGather(Codec("fp32", float(f"{self._ratio:.4g}"))).name
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "ratio": self._ratio,
            "rtts_s": list(self._rtts_s),
            "bandwidths": list(self._bandwidths),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ratio = state["ratio"]
        for window, kept in (
            (self._rtts_s, state["rtts_s"]),
            (self._bandwidths, state["bandwidths"]),
        ):
            window.clear()
            window.extend(kept)
        self.plan = self._plan()
