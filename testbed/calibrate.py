"""``testbed calibrate``: what a scratch lab of four hosts does, against what theory allows.

TCP goodput: a full frame has 1514 bytes and carries 1448 of payload (1500 less IP, TCP and its
timestamps), so one flow can have 95.6 % of the rate. In a ring, where every host sends to the next
one as in an all-reduce, each direction also carries the acknowledgements of another flow, 66 bytes
each: one for every second segment (RFC 5681) at low rates, hardly any where the kernel hands on
many segments as one packet. One for every fourth is the middle, 1448/(1514 + 66/4) = 94.6 %, and
either end is 1.1 % away from it.
The flows use cubic: with BBR, which some machines have as their default, the flow and not the link
decides (it took 3 to 5 % less of a busy ring at 37 Mbit/s).

RTT is the sum of the one-way delays. Both ends add the jitter of one way, so its standard deviation
is that of the RTT ÷ √2.
"""

import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from netsenseml.records import monotonic_s
from testbed.children import module_command
from testbed.labs import open_labs
from testbed.labs.base import LabError, LabPlan
from testbed.labs.calibration import (
    RATE_TOLERANCE,
    Measurement,
    MeasurementPrograms,
    Pair,
    attempts,
    closest,
    delay_tolerance,
)
from testbed.labs.netns import sandbox_command
from testbed.links.qdiscs import ETHERNET_FRAME_BYTES
from testbed.links.state import DIRECTIONS, LinkParameters, LinkState, Loss
from testbed.network import max_gso_bytes
from testbed.signals import (
    DOCKER_GRACE_S,
    EXIT_INTERRUPTED,
    child_of_ours,
    interrupt_main_thread_once,
    unblock_interrupts,
    watch_parent_pipe,
)
from testbed.spec.units import format_rate

HOSTS = ("w0", "w1", "w2", "w3")
RING = (("w0", "w1"), ("w1", "w2"), ("w2", "w3"), ("w3", "w0"))
ONE_FLOW_SHARE = 1448 / ETHERNET_FRAME_BYTES
RING_SHARE = 1448 / (ETHERNET_FRAME_BYTES + 66 / 4)
CONGESTION = "cubic"
JITTER_TOLERANCE = 0.1
BURST_TOLERANCE = 0.15

_WARM_S, _SECONDS = 1.0, 5.0
_STREAMS, _WINDOW_BYTES, _WARM_ROUND_TRIPS = 4, 2_000_000, 30
_PINGS, _PINGS_OF_JITTER, _PING_INTERVAL_S = 200, 1000, 0.005
_PROBE_BYTES = 100
_PROBES, _PROBES_PER_S, _PROBE_S = 100_000, 10_000, 10.0


@dataclass(frozen=True, slots=True)
class Conditions:
    """What to calibrate: goodput and RTT at some rates in bits/s; at each of them also delay,
    jitter (s) and loss (share).

    burst: mean length of the bursts in which packets are lost; None: independently.
    """

    rates_bps: tuple[int, ...]
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    burst: float | None = None
    engine: str = "auto"

    @property
    def impaired(self) -> bool:
        """True if something must delay or lose packets."""
        return bool(self.delay_s or self.jitter_s or self.loss)


def calibrate(conditions: Conditions, lab: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure in a lab, "netns" or "docker"; raises LabError if it cannot be made,
    KeyboardInterrupt if it was told to end.

    {"lab", "valid", "worst_goodput": the largest shortfall as a share of what was expected,
     negative if all were above, "rows": [{"rate_bps", "quantity", "expected", "measured",
     "tolerance", "within", "attempts"}]}
    quantity: goodput_one, goodput_ring, goodput_streams (bits/s of payload; the slowest flow),
        rtt_min, rtt_median, jitter (s), loss, burst (packets).
    progress: told what has been measured.
    """
    rows = []
    with closing(
        _calibrate_in_sandbox(conditions)
        if lab == "netns"
        else _calibrate_by_daemon(conditions, lab)
    ) as found:
        for row in found:
            rows.append(row)
            progress(f"{row['quantity']} at {format_rate(row['rate_bps'])} measured")
    shortfalls = [
        1 - (row["measured"] or 0) / row["expected"]
        for row in rows
        if row["quantity"].startswith("goodput")
    ]
    return {
        "lab": lab,
        "valid": all(row["within"] for row in rows),
        "worst_goodput": max(shortfalls),
        "rows": rows,
    }


def _calibrate_in_sandbox(conditions: Conditions) -> Generator[dict[str, Any], None, None]:
    command = [
        *sandbox_command(),
        *module_command("testbed.calibrate", json.dumps(asdict(conditions))),
    ]
    with child_of_ours(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield json.loads(line)
    if child.returncode == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if child.returncode != 0:
        raise LabError(f"the lab ended with exit code {child.returncode}")


def _calibrate_by_daemon(conditions: Conditions, lab: str) -> Generator[dict[str, Any], None, None]:
    with interrupt_main_thread_once(DOCKER_GRACE_S) as (_, interrupted):
        try:
            yield from _calibrate_here(conditions, lab)
        except Exception:
            if interrupted.is_set():
                raise KeyboardInterrupt from None
            raise


def _calibrate_here(conditions: Conditions, lab: str) -> Iterator[dict[str, Any]]:
    with _scratch_directory(lab) as directory, open_labs(lab, directory, preload=[]) as open_lab:
        logs = directory / "cells"
        logs.mkdir()
        for rate_bps in conditions.rates_bps:
            # A queue of a round trip's length, which TCP needs to go on at full speed after a loss.
            plain = LinkParameters(
                rate_bps, queue_s=max(LinkParameters().queue_s, 2 * conditions.delay_s)
            )
            worse = replace(
                plain,
                delay_s=conditions.delay_s,
                jitter_s=conditions.jitter_s,
                loss=Loss(conditions.loss, burst=conditions.burst),
            )
            for down in (plain, worse) if worse.impaired else (plain,):
                plan = _lab_plan(LinkState(plain, down), conditions.engine)
                with open_lab(plan) as scratch:
                    for test in _Bench(MeasurementPrograms(scratch, logs), down).tests():
                        for best in closest(results := attempts(test)):
                            yield _row(rate_bps, best, len({one.attempt for one in results}))


def _lab_plan(state: LinkState, engine: str) -> LabPlan:
    links = dict.fromkeys(HOSTS, state)
    directions = [(link, side, getattr(state, side)) for link in links for side in DIRECTIONS]
    impaired = frozenset(
        (link, side) for link, side, parameters in directions if parameters.impaired
    )
    plan = LabPlan(links, impaired=impaired, engine=engine)
    return replace(plan, max_gso_bytes=max_gso_bytes(plan, directions))


def _row(rate_bps: int, best: Measurement, tries: int) -> dict[str, Any]:
    found = {
        name: getattr(best, name)
        for name in ("quantity", "expected", "measured", "tolerance", "within")
    }
    measured = None if math.isnan(best.measured) else best.measured
    return {"rate_bps": rate_bps, **found, "measured": measured, "attempts": tries}


@dataclass(frozen=True, slots=True)
class _Bench:
    """Measures a scratch lab whose links are all the same; ``down`` has the impairments."""

    programs: MeasurementPrograms
    down: LinkParameters

    def tests(self) -> list[Callable[[int], list[Measurement]]]:
        if not self.down.impaired:
            return [self.rtt, self.one_flow, self.ring]
        return [
            *([self.rtt] if self.down.delay_s else []),
            *(
                [self.streams]
                if self.down.delay_s and not self.down.loss.share and not self.down.jitter_s
                else []
            ),
            *([self.loss] if self.down.loss.share else []),
        ]

    def one_flow(self, effort: int) -> list[Measurement]:
        return self._goodput("goodput_one", RING[:1], ONE_FLOW_SHARE, effort)

    def ring(self, effort: int) -> list[Measurement]:
        return self._goodput("goodput_ring", RING, RING_SHARE, effort)

    def streams(self, effort: int) -> list[Measurement]:
        """As many streams as it takes until no window limits them: long paths hold more than one
        socket may."""
        under_way = 2 * self.down.delay_s * (self.down.rate_bps or 0) / 8
        streams = max(_STREAMS, math.ceil(under_way / _WINDOW_BYTES))
        warm_s = _WARM_S + 2 * self.down.delay_s * _WARM_ROUND_TRIPS
        return self._goodput("goodput_streams", RING[:1], ONE_FLOW_SHARE, effort, streams, warm_s)

    def _goodput(
        self,
        quantity: str,
        pairs: Sequence[Pair],
        share: float,
        effort: int,
        streams: int = 1,
        warm_s: float = _WARM_S,
    ) -> list[Measurement]:
        """The slowest flow of some that run at the same time."""
        hosts = self.programs.lab.hosts
        sinks = [
            self.programs.start(target, "sink", warm_s, effort * _SECONDS, streams)
            for _, target in pairs
        ]
        sources = [
            self.programs.start(source, "source", hosts[target].address, CONGESTION, streams)
            for source, target in pairs
        ]
        reports = [self.programs.report(sink, warm_s + effort * _SECONDS) for sink in sinks]
        for one in sources:
            self.programs.stop(one)
        rates = [
            report["bytes"] * 8 / report["seconds"] if report and report["bytes"] else math.nan
            for report in reports
        ]
        slowest = math.nan if any(map(math.isnan, rates)) else min(rates)
        expected = share * (self.down.rate_bps or math.nan)
        return [Measurement(quantity, expected, slowest, RATE_TOLERANCE * expected)]

    def rtt(self, effort: int) -> list[Measurement]:
        (source, target), expected_s = RING[0], 2 * self.down.delay_s
        # A packet every 5 ms, but a tenth of a thin link at most.
        interval_s = max(_PING_INTERVAL_S, 10 * _PROBE_BYTES * 8 / (self.down.rate_bps or math.inf))
        seconds = effort * (_PINGS_OF_JITTER if self.down.jitter_s else _PINGS) * _PING_INTERVAL_S
        patience_s = expected_s + 10 * self.down.jitter_s + 0.5
        echo = self.programs.start(target, "echo")
        address = self.programs.lab.hosts[target].address
        ping = self.programs.start(
            source, "ping", address, round(seconds / interval_s), interval_s, patience_s
        )
        report = self.programs.report(ping, seconds + patience_s)
        self.programs.stop(echo)
        rtts_s = sorted(report["rtts_s"]) if report else []
        if len(rtts_s) < _PINGS // 4:
            rtts_s = [math.nan]
        results = (
            []
            if self.down.jitter_s
            else [Measurement("rtt_min", expected_s, rtts_s[0], delay_tolerance(expected_s))]
        )
        results.append(
            Measurement("rtt_median", expected_s, median(rtts_s), delay_tolerance(expected_s))
        )
        if self.down.jitter_s:
            # 68 % of a normal distribution lie within a standard deviation; a machine that stalls
            # now and then moves the rest.
            deviation_s = (
                rtts_s[round(0.8413 * (len(rtts_s) - 1))]
                - rtts_s[round(0.1587 * (len(rtts_s) - 1))]
            ) / 2
            allowed_s = JITTER_TOLERANCE * self.down.jitter_s
            results.append(
                Measurement("jitter", self.down.jitter_s, deviation_s / math.sqrt(2), allowed_s)
            )
        return results

    def loss(self, effort: int) -> list[Measurement]:
        """Small packets one way at half the rate, so that no queue overflows; counted on the way,
        and where they arrive."""
        source, target = RING[0]
        links = self.programs.lab.links
        per_s = min(_PROBES_PER_S, (self.down.rate_bps or math.inf) / 2 / 8 / _PROBE_BYTES)
        number, patience_s = round(min(_PROBES, per_s * _PROBE_S)), 10 * _PROBE_S
        tallying = self.programs.start(target, "tally", 1 + 2 * self.down.delay_s)
        address, begin_s = (
            self.programs.lab.hosts[target].address,
            monotonic_s() + 0.5 + 2 * self.down.delay_s,
        )
        before = links.counters()
        at_s = self.programs.lab.hosts[source].clock.own(begin_s)
        words = (address, at_s, patience_s, per_s * 8 * _PROBE_BYTES, _PROBE_BYTES, 1, number)
        report = self.programs.report(self.programs.start(source, "flood", *words), patience_s)
        time.sleep(0.1 + self.down.delay_s + 4 * self.down.jitter_s)
        after = links.counters()
        tally = self.programs.report(tallying, 2.0)
        sent = after[source, "up"].packets - before[source, "up"].packets
        expected = self.down.loss.share
        lost = (
            ((after[target, "down"].lost or 0) - (before[target, "down"].lost or 0)) / sent
            if report
            else math.nan
        )
        spread = math.sqrt(expected * (1 - expected) / max(sent, 1))
        burst = self.down.loss.burst
        if burst is None:
            return [Measurement("loss", expected, lost, 3 * spread)]
        # Losses in bursts are so many fewer events (the variance of a Markov chain's sum).
        memory = 1 - sum(self.down.loss.transitions)
        results = [
            Measurement("loss", expected, lost, 3 * spread * math.sqrt((1 + memory) / (1 - memory)))
        ]
        runs = {int(length): number for length, number in tally["runs"].items()} if tally else {}
        mean = (
            sum(length * number for length, number in runs.items()) / sum(runs.values())
            if runs
            else math.nan
        )
        return [*results, Measurement("burst", burst, mean, BURST_TOLERANCE * burst)]


@contextmanager
def _scratch_directory(lab: str) -> Iterator[Path]:
    # Containers see only what is mounted where the orchestrator runs, and that is where results go.
    if lab == "docker":
        Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="calibrate-", dir="runs" if lab == "docker" else None
    ) as path:
        yield Path(path)


def main() -> int:
    """Inside the sandbox: one row a line; exit code 0, 4 with the reason on standard error, or 130
    (interrupted)."""
    with interrupt_main_thread_once() as (stop, interrupted):
        try:
            unblock_interrupts()
            threading.Thread(target=watch_parent_pipe, args=(stop,), daemon=True).start()
            for row in _calibrate_here(Conditions(**json.loads(sys.argv[1])), "netns"):
                print(json.dumps(row), flush=True)
        except (Exception, KeyboardInterrupt) as error:
            if interrupted.is_set():
                return EXIT_INTERRUPTED
            if isinstance(error, LabError | OSError):
                print(f"testbed: {error}", file=sys.stderr)
                return 4
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
