"""Do links carry what they were set to? Measured with programs on the hosts of a lab, in about a
second.

Rate: every host floods the next one with UDP, all at once, and the kernel's counters of each
direction say what passed. UDP fills a link within milliseconds whatever its delay and loss, where
TCP would need many round trips; and as the counters are those of the limiter, headers are counted
as the limiter counts them.

Delay: the RTT between hosts against the sum of the one-way delays on the way there and back.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

from netsenseml.records import monotonic_s
from testbed.labs.base import Lab, LabPlan, Process
from testbed.links import measurement_programs
from testbed.links.measurement_programs import LARGEST_FLOOD_BYTES, SMALLEST_DATAGRAM_BYTES
from testbed.links.qdiscs import QdiscCounters, burst_bytes, frame_bytes
from testbed.links.shaper import Place
from testbed.links.state import LinkParameters

RATE_TOLERANCE = 0.03
DELAY_TOLERANCE, DELAY_TOLERANCE_S = 0.03, 1e-3
"""A delay may be off by the larger one of the two."""
ATTEMPTS = 3
"""What misses its tolerance is measured again, twice as long, since the machine may have been busy;
its best result counts."""

_OVERLOAD = 1.5
"""A flood is so much more than the first limit on its way lets pass."""
_WINDOW_S, _SETTLE_S, _SAMPLE_S = 0.5, 0.05, 0.025
_CHUNK_S = 0.002
_FEWEST_CHUNKS = 50
_MOST_SEGMENTS = 64
"""UDP_MAX_SEGMENTS of older kernels, <linux/udp.h>."""
_PINGS, _PING_INTERVAL_S, _PING_PATIENCE_S = 20, 0.01, 0.2
_START_S = 0.025
"""Time for the two programs of a flow to start, at least."""
_START_MARGIN = 1.25
"""And so many times as long as the first of them took."""
_CROWD = 8
"""With more flows at once everything is done more seldom, so that measuring does not take the
processors itself."""
_FEWEST_SAMPLES = 8
_DRAIN_S = 3.0
_PATIENCE_S = 10.0

Pair = tuple[str, str]
"""Two hosts: where a flow comes from, where it goes."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a link, or the way between two hosts, was expected to do, and did.

    quantity: "rate" in bits/s on the wire, of a link and direction; or "rtt" in s, from source to
    target and back. source, target: also of a rate that a single flow fills.
    tolerance: how far ``measured`` may be off, in the same unit. measured is NaN if nothing could
    be measured.
    """

    quantity: str
    expected: float
    measured: float
    tolerance: float
    link: str = ""
    direction: str = ""
    source: str = ""
    target: str = ""
    attempt: int = 1

    @property
    def error(self) -> float:
        """Deviation from what was expected, in the same unit."""
        return abs(self.measured - self.expected)

    @property
    def within(self) -> bool:
        """True if the error is no larger than the tolerance."""
        return self.error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Plain data, for records (``results.columns``)."""
        return {**asdict(self), "within": self.within}

    @property
    def subject(self) -> tuple[str, ...]:
        """What was measured; equal for all attempts."""
        return self.quantity, self.link, self.direction, self.source, self.target


@dataclass(frozen=True, slots=True)
class Round:
    """Flows that run at the same time, and the rate in bits/s that each direction which is judged
    by them must carry."""

    pairs: Sequence[Pair]
    expected_bps: Mapping[Place, float]


def carried_bps(plan: LabPlan, pairs: Iterable[Pair]) -> dict[Place, float]:
    """The rate of every limited direction when each pair is a flood; without those of which it
    cannot be said.

    From stage to stage (up, trunk, down) a direction carries what arrives and has survived, but no
    more than its limit. How floods divide a trunk that is full is a matter of chance, so nothing
    can be said of the directions behind it.
    """
    routes = {pair: plan.route(*pair) for pair in pairs}
    arriving: dict[Pair, float | None] = {
        pair: _flood_bps(plan, way) for pair, way in routes.items()
    }
    carried: dict[Place, float] = {}
    for side in sorted(
        {side for way in routes.values() for side in way}, key=lambda one: _stage(plan, one)
    ):
        parameters = _parameters(plan, side)
        members = [pair for pair, way in routes.items() if side in way]
        rates = [rate for pair in members if (rate := arriving[pair]) is not None]
        # netem loses packets before they come to the limiter, the delay line after it.
        surviving = (1 - parameters.loss.share) * (1 + parameters.duplicate)
        before, after = (1.0, surviving) if side[0] in plan.lined else (surviving, 1.0)
        offered = sum(rates) * before
        known = len(rates) == len(members)
        if parameters.rate_bps is None:
            passed = offered
        else:
            passed = min(offered, parameters.rate_bps)
            if known or offered >= parameters.rate_bps:
                carried[side] = passed
        alone = len(members) == 1 or passed == offered
        for pair in members:
            rate = arriving[pair]
            arriving[pair] = (
                rate * passed * after / sum(rates) if rate and known and alone else None
            )
    return carried


def rounds(plan: LabPlan) -> list[Round]:
    """At most two rounds of floods that fill as many directions as can be filled.

    First the ring that an all-reduce is. Where a neighbour or a trunk is slower than a link, the
    ring cannot fill the link; the second round gives each of those a partner that can.
    """
    hosts = _within_reach(plan)
    ring = _ring(hosts)
    carried = carried_bps(plan, ring)
    second = _filling(
        plan,
        hosts,
        {side: rate for side, rate in _limits(plan).items() if carried.get(side, 0.0) < 0.9 * rate},
    )
    first = Round(
        [pair for pair in ring if any(side in carried for side in plan.route(*pair))],
        {side: rate for side, rate in carried.items() if side not in second.expected_bps},
    )
    return [one for one in (first, second) if one.expected_bps]


def _filling(plan: LabPlan, hosts: Sequence[str], limits: Mapping[Place, int]) -> Round:
    """Flows that fill as many of some directions as possible, fastest first; no host sends or
    receives more than one."""
    sources, targets = list(hosts), list(hosts)
    pairs: list[Pair] = []
    filled: dict[Place, float] = {}
    for side, limit in sorted(limits.items(), key=lambda one: one[1], reverse=True):
        link, direction = side
        starts = [link] if direction == "up" and link in hosts else sources
        ends = [link] if direction == "down" and link in hosts else targets
        for pair in itertools.product(starts, ends):
            if side in filled:
                break
            usable = pair[0] in sources and pair[1] in targets and pair[0] != pair[1]
            if usable and carried_bps(plan, [pair]).get(side, 0.0) >= limit:
                carried = carried_bps(plan, [*pairs, pair])
                if all(
                    carried.get(one, 0.0) >= rate for one, rate in {**filled, side: limit}.items()
                ):
                    pairs.append(pair)
                    sources.remove(pair[0])
                    targets.remove(pair[1])
                    filled = {
                        one: rate for one, rate in limits.items() if carried.get(one, 0.0) >= rate
                    }
    return Round(pairs, filled)


def expected_rtt(plan: LabPlan, source: str, target: str) -> tuple[float, float]:
    """(mean, standard deviation) in s of the RTT between two hosts whose links are idle: the sum of
    all one-way delays."""
    hops = [
        _parameters(plan, side)
        for way in (plan.route(source, target), plan.route(target, source))
        for side in way
    ]
    return sum(hop.delay_s for hop in hops), math.sqrt(sum(hop.jitter_s**2 for hop in hops))


def delayed_pairs(plan: LabPlan) -> list[Pair]:
    """Pairs whose ways cover every host and every trunk, without those that nothing delays."""
    hosts = _within_reach(plan)
    members = plan.hosts_by_switch
    across = [
        (members[a][0], members[b][0]) for a, b in plan.trunks.values() if members[a] and members[b]
    ]
    pairs = dict.fromkeys([*_ring(hosts), *(pair for pair in across if set(pair) <= set(hosts))])
    return [pair for pair in pairs if expected_rtt(plan, *pair)[0] > 0]


def measurable(plan: LabPlan) -> bool:
    """True if the links have a limit or a delay to be measured."""
    return bool(rounds(plan) or delayed_pairs(plan))


def calibrate(lab: Lab, plan: LabPlan, logs: Path) -> list[Measurement]:
    """Measure all links of a lab whose hosts are silent; every attempt is in the result.

    logs: a directory that the hosts can write to.
    """
    programs = MeasurementPrograms(lab, logs)
    delayed = delayed_pairs(plan)
    tests = [
        *([partial(measure_rtts, programs, plan, delayed)] if delayed else []),
        *(partial(measure_rates, programs, plan, flows) for flows in rounds(plan)),
    ]
    return [measurement for test in tests for measurement in attempts(test)]


def attempts(test: Callable[[int], Sequence[Measurement]]) -> list[Measurement]:
    """Repeat a test until everything in it was within its tolerance once, but not more than
    ``ATTEMPTS`` times.

    The test is told how long it may take: 1, then 2, then 4 times what it takes when all is well.
    """
    results: list[Measurement] = []
    for attempt in range(1, ATTEMPTS + 1):
        results += [
            replace(measurement, attempt=attempt) for measurement in test(2 ** (attempt - 1))
        ]
        if all(measurement.within for measurement in closest(results)):
            break
    return results


def closest(results: Iterable[Measurement]) -> list[Measurement]:
    """Of everything that was measured, the attempt that came closest."""
    best: dict[tuple[str, ...], Measurement] = {}
    for one in results:
        before = best.get(one.subject)
        if before is None or one.error < before.error or math.isnan(before.error):
            best[one.subject] = one
    return list(best.values())


class MeasurementPrograms:
    """Runs ``measurement_programs`` on the hosts of a lab and reads what they report."""

    def __init__(self, lab: Lab, logs: Path) -> None:
        self.lab = lab
        self._logs = logs
        self._started = 0

    def start(self, host: str, program: str, *arguments: object) -> tuple[Process, Path]:
        """Start a program with a log of its own."""
        self._started += 1
        log = self._logs / f"calibration-{host}-{program}-{self._started}.log"
        return (
            self.lab.hosts[host].start(measurement_programs.command(program, *arguments), {}, log),
            log,
        )

    def report(self, running: tuple[Process, Path], seconds: float = 0.0) -> dict[str, Any] | None:
        """What a program that takes some seconds printed at its end; None if it failed, or is
        killed as it does not end."""
        process, log = running
        deadline_s = monotonic_s() + seconds + _PATIENCE_S
        while (code := process.poll()) is None and monotonic_s() < deadline_s:
            time.sleep(0.005)
        process.kill()
        if code != 0:
            return None
        report: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
        log.unlink()  # only the log of a failure is of interest
        return report

    def stop(self, running: tuple[Process, Path]) -> None:
        """End a program that runs until it is killed."""
        process, log = running
        process.kill()
        if not log.exists() or log.stat().st_size == 0:
            log.unlink(missing_ok=True)


def measure_rtts(
    programs: MeasurementPrograms, plan: LabPlan, pairs: Sequence[Pair], effort: int = 1
) -> list[Measurement]:
    """RTT of every pair at the same time: the least of some, or with jitter, which adds to the
    tolerance, their mean."""
    interval_s = _PING_INTERVAL_S * _crowding(len(pairs))
    echoes = [programs.start(host, "echo") for host in dict.fromkeys(target for _, target in pairs)]
    pings = {}
    for source, target in pairs:
        mean_s, deviation_s = expected_rtt(plan, source, target)
        address, patience_s = (
            programs.lab.hosts[target].address,
            mean_s + 4 * deviation_s + _PING_PATIENCE_S,
        )
        pings[source, target] = programs.start(
            source, "ping", address, effort * _PINGS, interval_s, patience_s
        )
    results = []
    for (source, target), running in pings.items():
        report = programs.report(
            running, effort * _PINGS * interval_s + expected_rtt(plan, source, target)[0]
        )
        rtts_s = report["rtts_s"] if report else []
        expected_s, deviation_s = expected_rtt(plan, source, target)
        tolerance_s = delay_tolerance(expected_s)
        if deviation_s and rtts_s:
            measured_s, tolerance_s = (
                fmean(rtts_s),
                tolerance_s + 3 * deviation_s / math.sqrt(len(rtts_s)),
            )
        else:
            measured_s = min(rtts_s, default=math.nan)
        results.append(
            Measurement("rtt", expected_s, measured_s, tolerance_s, source=source, target=target)
        )
    for running in echoes:
        programs.stop(running)
    return results


def delay_tolerance(expected_s: float) -> float:
    """How far a delay may be off, in s."""
    return max(DELAY_TOLERANCE * expected_s, DELAY_TOLERANCE_S)


def measure_rates(
    programs: MeasurementPrograms, plan: LabPlan, flows: Round, effort: int = 1
) -> list[Measurement]:
    """Flood all pairs of a round and read the kernel's counters until the floods end and the queues
    are empty."""
    lab = programs.lab
    crowding = _crowding(len(flows.pairs))
    ways = {pair: plan.route(*pair) for pair in flows.pairs}
    floods = {pair: _Flood.on(plan, way, crowding, effort) for pair, way in ways.items()}
    starting_s = monotonic_s()
    ignoring = [
        programs.start(host, "ignore")
        for host in dict.fromkeys(target for _, target in flows.pairs)
    ]
    # All must have started before any begins: what ends before the first sample is not measured.
    start_s = max(_START_S, _START_MARGIN * (monotonic_s() - starting_s) / len(ignoring))
    begin_s = (
        monotonic_s()
        + _SETTLE_S
        + start_s * len(floods)
        + max(expected_rtt(plan, *pair)[0] for pair in floods)
    )
    running = {}
    for (source, target), flood in floods.items():
        seconds = flood.warm_s + flood.window_s + 2 * _SAMPLE_S * crowding
        address = lab.hosts[target].address
        words = (
            address,
            lab.hosts[source].clock.own(begin_s),
            seconds,
            flood.rate_bps,
            flood.datagram_bytes,
            flood.segments,
        )
        running[source, target] = programs.start(source, "flood", *words)
    samples: list[tuple[float, Mapping[Place, QdiscCounters]]] = []
    deadline_s = (
        begin_s + max(flood.warm_s + flood.window_s for flood in floods.values()) + _PATIENCE_S
    )
    while (
        any(process.poll() is None for process, _ in running.values())
        and monotonic_s() < deadline_s
    ):
        before_s = monotonic_s()
        counters = lab.links.counters()
        samples.append(((before_s + monotonic_s()) / 2, counters))
        time.sleep(_SAMPLE_S * crowding)
    reports = {pair: programs.report(process) for pair, process in running.items()}
    for target_program in ignoring:
        programs.stop(target_program)
    _drain(lab, plan)

    results = []
    for side, expected in flows.expected_bps.items():
        through = [pair for pair, way in ways.items() if side in way]
        done = [
            (floods[pair], report, lab.hosts[pair[0]].clock)
            for pair in through
            if (report := reports[pair])
        ]
        measured = math.nan
        if len(done) == len(through):
            first_s = max(
                clock.reference(report["begin_s"]) + flood.warm_s for flood, report, clock in done
            )
            last_s = min(clock.reference(report["end_s"]) for _, report, clock in done)
            measured = _rate_between(samples, side, first_s, last_s)
        tolerance = RATE_TOLERANCE * expected
        loss = max(
            (_parameters(plan, one).loss for pair in through for one in ways[pair]),
            key=lambda one: one.share,
        )
        if loss.share:
            # Three standard deviations of a binomial share; losses in bursts are so many fewer
            # events.
            flood = floods[through[0]]
            events = expected * flood.window_s / 8 / flood.datagram_bytes / (loss.burst or 1)
            tolerance += 3 * expected * math.sqrt(loss.share * (1 - loss.share) / events)
        between = through[0] if len(through) == 1 else ("", "")
        results.append(Measurement("rate", expected, measured, tolerance, *side, *between))
    return results


@dataclass(frozen=True, slots=True)
class _Flood:
    """How a flow floods its way. Sizes are those on the wire; warm_s: after it all buckets on the
    way are empty."""

    rate_bps: float
    datagram_bytes: int
    segments: int
    warm_s: float
    window_s: float

    @classmethod
    def on(cls, plan: LabPlan, way: Sequence[Place], crowding: float, effort: int) -> "_Flood":
        limits = [rate for side in way if (rate := _parameters(plan, side).rate_bps) is not None]
        slowest = min(limits)
        # Packets of 2 ms cost few calls of the kernel and still leave the counters fine-grained.
        size = max(round(slowest * _CHUNK_S * crowding / 8), SMALLEST_DATAGRAM_BYTES)
        frame = frame_bytes(plan.mtu)
        size = min(
            size, plan.max_gso_bytes.get(way[0][0], LARGEST_FLOOD_BYTES), LARGEST_FLOOD_BYTES
        )
        segments = min(max(1, size // frame), _MOST_SEGMENTS)
        datagram = frame if segments > 1 else min(size, frame)
        shortest_s = max(
            _FEWEST_CHUNKS * datagram * segments * 8 / slowest,
            _FEWEST_SAMPLES * _SAMPLE_S * crowding,
        )
        return cls(
            rate_bps=_flood_bps(plan, way),
            datagram_bytes=datagram,
            segments=segments,
            warm_s=_SETTLE_S
            + max(burst_bytes(rate, frame, plan.shaper) * 8 / rate for rate in limits)
            / (_OVERLOAD - 1),
            window_s=effort * max(_WINDOW_S, shortest_s),
        )


def _crowding(flows: int) -> float:
    return max(1.0, flows / _CROWD)


def _rate_between(
    samples: Sequence[tuple[float, Mapping[Place, QdiscCounters]]],
    side: Place,
    first_s: float,
    last_s: float,
) -> float:
    """Rate in bits/s over the samples within a time; NaN if they are too few to tell.

    The slope of the least-squares line: on a busy machine some sample is always taken later than
    its time says.
    """
    inside = [
        (t_s, counters[side].bytes)
        for t_s, counters in samples
        if first_s <= t_s <= last_s and side in counters
    ]
    if len(inside) < 3 or inside[-1][0] - inside[0][0] < _WINDOW_S / 2:
        return math.nan
    return 8 * linear_regression(*zip(*inside, strict=True)).slope


def _drain(lab: Lab, plan: LabPlan) -> None:
    """Wait until nothing is under way any more, so that the cell begins on idle links."""
    time.sleep(
        max(
            _parameters(plan, side).delay_s + 4 * _parameters(plan, side).jitter_s
            for side in _sides(plan)
        )
    )
    deadline_s = monotonic_s() + _DRAIN_S
    while (
        any(one.backlog_bytes for one in lab.links.counters().values())
        and monotonic_s() < deadline_s
    ):
        time.sleep(0.005)


def _ring(hosts: Sequence[str]) -> list[Pair]:
    return list(zip(hosts, [*hosts[1:], *hosts[:1]], strict=True)) if len(hosts) > 1 else []


def _stage(plan: LabPlan, side: Place) -> int:
    if side[0] in plan.trunks:
        return 1
    return 0 if side[1] == "up" else 2


def _sides(plan: LabPlan) -> list[Place]:
    return [(link, direction) for link in plan.links for direction in ("up", "down")]


def _parameters(plan: LabPlan, side: Place) -> LinkParameters:
    parameters: LinkParameters = getattr(plan.links[side[0]], side[1])
    return parameters


def _limits(plan: LabPlan) -> dict[Place, int]:
    """Limits in bits/s of the directions that have one and are not cut off."""
    limits = {
        side: _parameters(plan, side).rate_bps
        for side in _sides(plan)
        if plan.links[side[0]].connected
    }
    return {side: rate for side, rate in limits.items() if rate}


def _within_reach(plan: LabPlan) -> list[str]:
    """Hosts whose links are neither cut off nor in an outage."""
    states = [(host, plan.links[host]) for host in plan.hosts]
    return [
        host
        for host, state in states
        if state.connected and 0 not in (state.up.rate_bps, state.down.rate_bps)
    ]


def _flood_bps(plan: LabPlan, way: Sequence[Place]) -> float:
    return _OVERLOAD * next(
        (rate for side in way if (rate := _parameters(plan, side).rate_bps) is not None), 0
    )
