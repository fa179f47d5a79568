"""Tolerances that the verdict of a cell goes by, and that a run under way is already held to.
Imports no pandas."""

LATE_S = 0.05
"""A change of a link may be applied this much after its time, as far as the clock of its machine
can tell."""
FOREIGN_SHARE = 0.25
"""Of all processors' time. It then takes up to 1 / (1 - 0.25) times as long to compute."""
BUSY_SHARE = 0.95
"""From this share on no processor counts as idle."""
