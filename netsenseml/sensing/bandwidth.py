"""Bandwidth from the duration of exchanges."""

import math

_RISE = 0.5  # share of the way up that the estimate goes in one step; the way down it goes at once
_DRIFT = 1.1  # factor per step by which an estimate that nothing contradicts grows


class BandwidthEstimate:
    """What a rank's link carries, in payload bits/s, from exchanges that would have happened anyway.

    An exchange of B bytes that takes T = latency + 8 B / bandwidth bounds the bandwidth from both sides, as the latency
    is somewhere between nothing and what is known of it:

        8 B / T  <=  bandwidth  <=  8 B / (T - latency)

    The estimate moves only as far as the bounds force it: down at once, up by half. With a large payload the bounds
    are tight. With a small one latency rules, they are far apart, and the estimate stays, which is right: such an
    exchange says little. Within the bounds it drifts up, so that payloads grow until they say more. Without this it
    could never rise again on a link whose latency exceeds the time for the payload.
    """

    def __init__(self) -> None:
        self.bps: float | None = None

    def update(self, payload_bytes: int, duration_s: float, latency_s: float) -> float:
        """Learn from one exchange; returns the estimate.

        payload_bytes: bytes that this rank sent, > 0. duration_s: how long that took, > 0. latency_s: how long it would
        have taken with nothing to send, as far as known, else 0.
        """
        low = 8 * payload_bytes / duration_s
        high = 8 * payload_bytes / (duration_s - latency_s) if duration_s > latency_s else math.inf
        if self.bps is None:
            self.bps = low
        elif self.bps > high:
            self.bps = high
        elif self.bps < low:
            self.bps += _RISE * (low - self.bps)
        else:
            self.bps = min(high, _DRIFT * self.bps)
        return self.bps
