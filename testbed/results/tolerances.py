"""Tolerances that the verdict of a cell goes by, and that a run under way is already held to.
Imports no pandas."""

from collections.abc import Mapping
from typing import Any

from testbed.protocol import number

LATE_S = 0.05
"""A change of a link may be applied this much after its time, as far as the clock of its machine
can tell."""
TAKEN_SHARE = 0.04
"""Of the time of a process. So much longer may a step be for it: more would be seen in a ratio."""
STOPPED_SHARE = 0.02
"""Of the samples of a machine. A process may stand still in so many of them."""
BUSY_SHARE = 0.95
"""From this share on no processor counts as idle."""


def taken_share(load: Mapping[str, Any]) -> float:
    """What other programs took from a cell, at most, by one row of the table host: the share of the
    time for which one of its processes waited for a processor, but no more than others used of all
    of them.

    Where it is not known of the processes, that for which any program waited; where the kernel does
    not tell this either, all of the time in which no processor was idle. 0 if it is not known what
    others used.
    """
    busy = number(load.get("cpu_busy_share"))
    waited = number(load.get("cpu_waited_share"))
    waited = number(load.get("cpu_some_share")) if waited is None else waited
    waited = float(busy is not None and busy >= BUSY_SHARE) if waited is None else waited
    foreign, processors = number(load.get("cpu_foreign_share")), number(load.get("processors"))
    return min(waited, (foreign or 0.0) * (processors or 1.0))
