"""CLOCK_MONOTONIC of one machine against that of another, in which a run's times are written."""

from dataclasses import dataclass

MOST_DRIFT = 1e-3
"""Two clocks go apart by no more: the kernel slews each by at most 500 ppm (adjtimex(2))."""


@dataclass(frozen=True, slots=True)
class Clock:
    """This machine's clock as a line, by which its times become the orchestrator's, and the other
    way round.

    orchestrator's time = own time + offset_s + drift * (own time - at_s)

    unsure_s: how far ``offset_s`` may be off at ``at_s``; unsure_drift: how far ``drift`` may be.
    """

    offset_s: float = 0.0
    drift: float = 0.0
    at_s: float = 0.0
    unsure_s: float = 0.0
    unsure_drift: float = 0.0

    def reference(self, own_s: float) -> float:
        """The orchestrator's time at a time of this machine."""
        return own_s + self.offset_s + self.drift * (own_s - self.at_s)

    def own(self, reference_s: float) -> float:
        """This machine's time at a time of the orchestrator."""
        return self.at_s + (reference_s - self.offset_s - self.at_s) / (1 + self.drift)

    def uncertainty_s(self, own_s: float) -> float:
        """How far ``reference`` may be off at a time of this machine."""
        return self.unsure_s + self.unsure_drift * abs(own_s - self.at_s)


HERE = Clock()
"""Of the orchestrator's own machine."""
