"""The rule of NetSenseML (Wang et al., Euro-Par 2025), mended."""

import statistics
from collections import deque

_STAY = 0.8  # a plain all-reduce goes on until the budget is down to this share of its bytes
_WINDOWS = 5  # the median over so many steps passes over an odd one


class BdpPolicy:
    """A step may send what the network carries while the ranks compute.

    The paper keeps the payload below 0.9 of the bandwidth-delay product, max bandwidth x min RTT, with the collective's
    own duration as RTT; with payloads of one size that product equals payload x min RTT / RTT, and the ratio can only
    fall. Here the delay is one that the payload does not influence: the time that a step computes, or the network's
    latency if that is longer, as it has to be paid anyway:

        budget = share x bandwidth / 8 x max(window, latency)

    An all-gather of sparse slots (8 bytes an element) at ratio r sends n r times the bytes of a plain all-reduce, so
    from r = 1 / n on there is nothing to gain, and the step is a plain all-reduce.

    The same arguments on all ranks give the same ratio on all ranks.
    """

    def __init__(self, ranks: int, start: float, share: float, floor: float, fall: float, rise: float) -> None:
        """The options are those of the method ``netsense`` in ``agent.catalog``."""
        self.ratio = start if start * ranks < 1 else 1.0
        self._ranks = ranks
        self._share = share
        self._floor = floor
        self._fall = fall
        self._rise = rise
        self._windows: deque[float] = deque(maxlen=_WINDOWS)

    def decide(self, bandwidth_bps: float, window_s: float, latency_s: float, dense_bytes: int) -> float:
        """Ratio of the next step; 1 = plain all-reduce.

        window_s: compute time of the last step. dense_bytes: what a plain all-reduce sends from a rank, > 0.
        """
        self._windows.append(window_s)
        budget_bytes = self._share * bandwidth_bps / 8 * max(statistics.median(self._windows), latency_s)
        room = budget_bytes / dense_bytes
        if self.ratio == 1 and room >= _STAY:
            return self.ratio
        even = 1 / self._ranks  # sparse slots of this ratio are as large as a plain all-reduce
        now = min(self.ratio, even)
        ratio = max(self._floor, min(max(room * even, self._fall * now), self._rise * now))
        self.ratio = ratio if ratio < even else 1.0
        return self.ratio
