"""Traffic of a spec → flows, and the hosts that exist for them alone; pure data."""

import re
from collections.abc import Iterator, Sequence

from testbed.spec.errors import SpecError, did_you_mean, place_of
from testbed.spec.models import TcpSpec, TrafficSpec
from testbed.spec.units import format_rate, format_size, format_time
from testbed.traffic.flows import FIRST_PORT, Flow, Phase, phases

_BACKGROUND_HOST = re.compile(r"bg(0|[1-9][0-9]{0,2})")
_PHASES_SHOWN = 10


def background_hosts(traffic: Sequence[TrafficSpec], workers: Sequence[str]) -> tuple[str, ...]:
    """The hosts bg0, bg1, … that the traffic names, in order. Raises SpecError for a host that
    cannot be."""
    found: set[str] = set()
    for index, entry in enumerate(traffic):
        for key, name in (("from", entry.source), ("to", entry.target)):
            if _BACKGROUND_HOST.fullmatch(name):
                found.add(name)
            elif name not in workers:
                error = (
                    f"there is no host {name!r}; {did_you_mean(name, workers)}, and bg0, bg1, … for"
                    " traffic alone"
                )
                raise SpecError([(place_of(["traffic", index, key]), error)])
    return tuple(sorted(found, key=lambda name: int(name.removeprefix("bg"))))


def plan_flows(traffic: Sequence[TrafficSpec], stop_s: float | None) -> tuple[Flow, ...]:
    """One flow for each entry, in order. stop_s: when the cell ends, if known.

    Raises SpecError for an entry that begins after that.
    """
    flows: list[Flow] = []
    for index, entry in enumerate(traffic):
        if stop_s is not None and entry.at >= stop_s:
            error = (
                f"the traffic at {format_time(entry.at)} comes after the end of the run at"
                f" {format_time(stop_s)} (stop.seconds); make it earlier or the run longer"
            )
            raise SpecError([(place_of(["traffic", index, "at"]), error)])
        flow = _flow(entry, FIRST_PORT + index, {flow.name for flow in flows})
        flows.append(flow)
    return tuple(flows)


def _flow(entry: TrafficSpec, port: int, taken: set[str]) -> Flow:
    name = f"{entry.source}-{entry.target}"
    number = 2
    while name in taken:
        name = f"{entry.source}-{entry.target}-{number}"
        number += 1
    tcp = entry.tcp or TcpSpec()
    return Flow(
        name=name,
        source=entry.source,
        target=entry.target,
        kind="tcp" if entry.tcp else "udp",
        port=port,
        engine=entry.engine,
        at_s=entry.at,
        end_s=entry.at + entry.duration if entry.duration is not None else float("inf"),
        streams=tcp.streams,
        congestion=tcp.congestion,
        rate_bps=entry.udp.rate if entry.udp else 0,
        packet_bytes=entry.udp.packet if entry.udp else 0,
        on=entry.on,
        off=entry.off,
        seed=entry.seed,
    )


def describe_flow(flow: Flow, stop_s: float | None) -> Iterator[str]:
    """What a flow does, phase by phase, in words; of many phases the first ones. stop_s: when the
    cell ends, if known."""
    last_s = float("inf") if stop_s is None else stop_s
    engine = ", by iperf3" if flow.engine == "iperf3" else ""
    for number, phase in enumerate(phases(flow)):
        if phase.at_s >= last_s:
            return
        if number == _PHASES_SHOWN:
            yield f"t={phase.at_s:g}s [{flow.source}] and so on"
            return
        until = f"until t={phase.end_s:g}s" if phase.end_s < last_s else "to the end"
        yield (
            f"t={phase.at_s:g}s [{flow.source}] {_what(flow, phase)} to {flow.target}"
            f" {until}{engine}"
        )


def _what(flow: Flow, phase: Phase) -> str:
    if flow.kind == "udp":
        return f"UDP {format_rate(flow.rate_bps)} in packets of {format_size(flow.packet_bytes)}"
    congestion = f" ({flow.congestion})" if flow.congestion else ""
    return f"{phase.streams} TCP {'stream' if phase.streams == 1 else 'streams'}{congestion}"
