"""Time dilation: rates, delays and compute slowed by one factor, and times reported divided by it.

Traffic that is F times as slow meets the same queues in the same order, so an experiment may stand
for links and accelerators that this machine could not keep up with. TCP's own clocks are slowed
down where the kernel lets us (``links.routes``). Under dilation F the others are F times as short
as they would be: the delayed acknowledgement (40 ms), the second before a connection's first
segment is sent again; and coding, which takes what it takes on this machine.
"""

from dataclasses import replace

from testbed.links.routes import Tcp
from testbed.protocol import StopConfig
from testbed.timeline import Change
from testbed.timeline.workers import Kills, Slowdown
from testbed.traffic.flows import Duration, Flow

CAVEAT = (
    "Delayed acknowledgements of TCP (40 ms) and coding are not slowed down, and so are reported as"
    " shorter; TCP follows Reno unless the spec says otherwise, because CUBIC and BBR go by the"
    " clock"
)

_MIN_RTO_S = 0.2  # TCP_RTO_MIN of Linux


def slowed_tcp(tcp: Tcp, factor: float) -> Tcp:
    """A longer minimum of the time-out, and a window that grows by the round trip instead of the
    clock: Reno's.

    CUBIC's grows with the cube of the seconds since the last loss (RFC 9438), and BBR probes every
    few seconds, so both would lose and pause sooner than they should.
    """
    return (
        tcp
        if factor == 1
        else replace(tcp, congestion=tcp.congestion or "reno", min_rto_s=_MIN_RTO_S * factor)
    )


def slowed_change(change: Change, factor: float) -> Change:
    """A change of a link, later and slower."""
    return Change(round(change.at_s * factor, 6), change.link, change.state.slowed(factor))


def slowed_kills(kills: Kills, factor: float) -> Kills:
    """Kills of workers, later."""
    return replace(kills, at_s=kills.at_s * factor)


def slowed_slowdown(slowdown: Slowdown, factor: float) -> Slowdown:
    """A time of slow compute, later and longer."""
    to_s = None if slowdown.to_s is None else slowdown.to_s * factor
    return replace(slowdown, from_s=slowdown.from_s * factor, to_s=to_s)


def slowed_flow(flow: Flow, factor: float) -> Flow:
    """A competing flow, later, longer and, if it has a rate of its own, slower."""

    def longer(duration: Duration | None) -> Duration | None:
        return (
            None if duration is None else Duration(duration.seconds * factor, duration.exponential)
        )

    return replace(
        flow,
        at_s=flow.at_s * factor,
        end_s=flow.end_s * factor,
        rate_bps=max(1, round(flow.rate_bps / factor)) if flow.rate_bps else 0,
        on=longer(flow.on),
        off=longer(flow.off),
    )


def slowed_stop(stop: StopConfig, factor: float) -> StopConfig:
    """A limit in seconds is that of the experiment, not of the clock."""
    return {**stop, "seconds": stop["seconds"] * factor} if "seconds" in stop else stop
