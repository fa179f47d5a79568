"""Write the example traces of this directory; the same seeds give the same files everywhere.

    python experiments/traces/generate.py [DIRECTORY]

They are synthetic: simple models with the traits that make each kind of network hard. README.md
says what they are like; this prints the figures that stand there.
"""

import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from testbed.timeline.recording import Recording, parse_recording

WIFI_RATES_MBPS = (6.5, 13.0, 19.5, 26.0, 39.0, 52.0, 58.5, 65.0)
"""IEEE 802.11n, 20 MHz, one spatial stream, long guard interval: MCS 0 to 7."""


def fading(numbers: random.Random, step_s: float, correlation_s: float) -> Iterator[float]:
    """A stationary AR(1) process: mean 0, standard deviation 1, correlation falling to 1/e in
    ``correlation_s`` seconds."""
    keep = math.exp(-step_s / correlation_s)
    value = numbers.gauss(0, 1)
    while True:
        yield value
        value = keep * value + math.sqrt(1 - keep**2) * numbers.gauss(0, 1)


def outages(numbers: random.Random, step_s: float, every_s: float, mean_s: float) -> Iterator[bool]:
    """True while there is one: they begin at random, on average ``every_s`` after the last, and
    last ``mean_s`` on average."""
    out = False
    while True:
        yield out
        out = numbers.random() >= step_s / mean_s if out else numbers.random() < step_s / every_s


def cellular() -> str:
    """120 s of a moving phone: log-normal fading around 15 Mbit/s, correlated over 3 s, with
    outages when cells change."""
    numbers, step_s = random.Random("cellular 1"), 0.2
    level, out = fading(numbers, step_s, 3), outages(numbers, step_s, every_s=25, mean_s=0.8)
    lines = ["t_s,rate_mbps"]
    for index in range(600):
        rate = min(60.0, 15 * math.exp(0.6 * next(level)))
        lines.append(f"{index * step_s:.1f},{0.0 if next(out) else rate:.2f}")
    return "\n".join(lines) + "\n"


def weak_cell() -> str:
    """60 s at the edge of a cell as a packet-delivery file: about 0.7 Mbit/s, packets in bursts of
    a scheduler's grants."""
    numbers = random.Random("weak cell 1")
    times_ms: list[int] = []
    level = fading(numbers, 0.01, 1.5)
    for grant_ms in range(10, 60_001, 10):
        mean = 0.58 * math.exp(0.7 * next(level))
        # Poisson: the number of exponential gaps that fit into one.
        count, left = 0, numbers.expovariate(1)
        while left < mean:
            count, left = count + 1, left + numbers.expovariate(1)
        times_ms += [grant_ms] * count
    return "\n".join(map(str, [*times_ms[:-1], 60_000])) + "\n"


def wifi() -> str:
    """60 s of a station that walks about: the rate steps up and down the ladder of MCS, others take
    half the air at times.

    Low steps come with loss that retransmission could not mend, a busy air with delay.
    """
    numbers, step_s = random.Random("wifi 1"), 0.1
    place = 5
    busy = outages(numbers, step_s, every_s=4, mean_s=1.5)
    lines = ["t_s,rate_mbps,delay_ms,loss_percent"]
    for index in range(600):
        if numbers.random() < 0.25:
            place = min(max(place + numbers.choice((-1, 1)), 0), len(WIFI_RATES_MBPS) - 1)
        crowded = next(busy)
        rate = (
            0.65
            * WIFI_RATES_MBPS[place]
            * (numbers.uniform(0.35, 0.6) if crowded else numbers.uniform(0.9, 1.0))
        )
        delay = 2 + (numbers.expovariate(1 / 6) if crowded else numbers.expovariate(2))
        loss = 0.05 * 2 ** (5 - place) if place < 5 else 0.0
        lines.append(f"{index * step_s:.1f},{rate:.1f},{min(delay, 40):.1f},{loss:.1f}")
    return "\n".join(lines) + "\n"


def incast() -> str:
    """60 s of a fair share of a 1 Gbit/s port, into which 3 to 31 others now and then send 256 KiB
    each at the same time."""
    numbers, now_ms = random.Random("incast 1"), 0
    lines = ["t_ms,rate_mbps", "0,1000"]
    while True:
        now_ms += max(20, round(numbers.expovariate(1 / 500)))
        senders = numbers.randint(4, 32)
        length_ms = round(senders * 256 * 1024 * 8 / 1e9 * 1e3)
        if now_ms + length_ms >= 59_000:
            # The last row lasts as long as the one before it: until 60 s.
            return "\n".join([*lines, "59000,1000", "59500,1000"]) + "\n"
        lines += [f"{now_ms},{1000 / senders:.1f}", f"{now_ms + length_ms},1000"]
        now_ms += length_ms


def leo() -> str:
    """120 s of a terminal at a constellation in low orbit, as Starlink has been measured; README.md
    names the measurements.

    Every 15 s another satellite: one quality for that time decides on rate and delay, both of which
    then drift together around it; and for 0.4 s while it changes a fraction of the rate, 30 to 50
    ms more and some loss. The delay is the round trip of the access.
    """
    numbers, step_s = random.Random("leo 1"), 0.2
    level = fading(numbers, step_s, 2)
    lines = ["t_s,rate_mbps,delay_ms,jitter_ms,loss_percent"]
    quality = jitter = 0.0
    for index in range(600):
        since = index % 75  # rows of this satellite
        if since == 0:
            quality, jitter = min(max(numbers.gauss(0, 1), -2), 2), numbers.uniform(4, 7)
        better = quality + 0.4 * next(level)
        rate, delay = 100 * math.exp(0.4 * better), max(25.0, 38 - 6 * better)
        if changing := since < 2:
            rate, delay = rate * numbers.uniform(0.1, 0.3), delay + numbers.uniform(30, 50)
        lines.append(
            f"{index * step_s:.1f},{rate:.1f},{delay:.1f},{jitter:.1f},{1 if changing else 0}"
        )
    return "\n".join(lines) + "\n"


TRACES: Mapping[str, Callable[[], str]] = {
    "cellular.csv": cellular,
    "weak_cell.packets": weak_cell,
    "wifi.csv": wifi,
    "incast.csv": incast,
    "leo.csv": leo,
}


def describe(recording: Recording) -> str:
    """Length, and the rate weighted by time: mean, deviation, extremes, share of time without
    any."""
    rates = recording.columns["rate_bps"]
    ends = (*recording.times_s[1:], recording.length_s)
    grid = [
        rate
        for rate, start, end in zip(rates, recording.times_s, ends, strict=True)
        for _ in range(round((end - start) * 1e3))
    ]
    mean, deviation = statistics.fmean(grid) / 1e6, statistics.pstdev(grid) / 1e6
    return (
        f"{recording.length_s:g} s, {len(rates)} rows, mean {mean:.2f}, deviation {deviation:.2f},"
        f" from {min(rates) / 1e6:.2f} to {max(rates) / 1e6:.2f} Mbit/s,"
        f" {grid.count(0) / len(grid):.1%} of the time none"
    )


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, make in TRACES.items():
        text = make()
        (directory / name).write_text(text)
        print(f"{name}: {len(text)} bytes, {describe(parse_recording(text))}")


if __name__ == "__main__":
    main()
