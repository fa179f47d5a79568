"""What the hook itself costs: time that a step of 100 ms spends in netsenseml while plain
all-reduce is the best there is.

    testbed run experiments/bench/bookkeeping.yaml    # the figures are in logs/w0.log of each cell

Counted is what DDP alone would not do: the calls of the hook, sensing, deciding and the records,
less the launch of the all-reduce. Both as time on a processor and as time on the clock, in which a
thread also waits for a processor: beside the workers' own threads, those of Gloo copy and add.
Steps differ, as at ease netsense shares only every other one: hence the mean.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import netsenseml
from netsenseml.exchange import collective
from netsenseml.statistics import StepStatistics

STEPS, COMPUTE_S = 100, 0.1
CLOCKS = (time.thread_time, time.perf_counter)
spent = [0.0, 0.0]


def timed(function: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
    """The function, its times added to ``spent`` or taken from it."""

    def call(*args: Any, **options: Any) -> Any:
        began = [clock() for clock in CLOCKS]
        try:
            return function(*args, **options)
        finally:
            for i, clock in enumerate(CLOCKS):
                spent[i] += sign * (clock() - began[i])

    return call


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))), bucket_cap_mb=2
    )
    collective.ring_mean = timed(collective.ring_mean, sign=-1)
    StepStatistics._landed = timed(StepStatistics._landed)  # type: ignore[method-assign]
    session = netsenseml.attach(model, "netsense")
    session.exchange = timed(session.exchange)
    session._exchanged = timed(session._exchanged)
    session._close_step = timed(session._close_step)
    steps_ms = []
    for _ in range(STEPS):
        spent[:] = 0.0, 0.0
        time.sleep(COMPUTE_S)
        model(torch.randn(4, 512)).sum().backward()
        session.step(0.0, samples=4)
        steps_ms.append([1e3 * seconds for seconds in spent])
    settled = steps_ms[STEPS // 2 :]
    scheme = session.last["scheme"]
    session.close()
    if dist.get_rank() == 0:
        for what, times_ms in zip(
            ("on a processor", "on the clock"), zip(*settled, strict=True), strict=True
        ):
            mean, high = statistics.fmean(times_ms), sorted(times_ms)[int(0.9 * len(times_ms))]
            print(
                f"{scheme}: bookkeeping {mean:.2f} ms a step {what} in the mean, {high:.2f} ms in"
                " the 90th percentile"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
