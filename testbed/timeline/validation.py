"""What no link can be, however each of its properties came about."""

from testbed.links.state import DIRECTIONS, LinkParameters, LinkState
from testbed.spec.models import NO_ECN
from testbed.spec.units import format_time

_DEVIATIONS = 2
"""Jitters in a delay, at least. A packet cannot arrive before it was sent: with less, the mean
delay would be longer than asked for. With 2 that is 0.4 % of a normal distribution's, and nothing
of the others'; with 1 it would be 8 %, and without any delay the mean would be four tenths of the
jitter."""


def state_error(state: LinkState) -> str | None:
    """What is wrong with a link in such a state, or None."""
    return next((error for side in DIRECTIONS if (error := _error(getattr(state, side)))), None)


def _error(parameters: LinkParameters) -> str | None:
    if parameters.jitter_s * (1 - 1e-9) > parameters.delay_s / _DEVIATIONS:
        jitter, least = (
            format_time(parameters.jitter_s),
            format_time(parameters.jitter_s * _DEVIATIONS),
        )
        return (
            f"a jitter of {jitter} needs a delay of {least} or more, as no packet arrives before it"
            " was sent"
        )
    if parameters.reorder and not parameters.delay_s:
        return "packets cannot overtake where nothing is delayed; give it a delay, too"
    if parameters.ecn and parameters.aqm == "fifo":
        return f"ecn {NO_ECN}; give it aqm: codel, fq_codel or cake, too"
    return None
