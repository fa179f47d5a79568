"""What the hook itself costs: time that a step of 100 ms spends in netsenseml while plain all-reduce is the best there is.

    testbed run experiments/bench/bookkeeping.yaml        prints the figures into logs/w0.log of each cell

Counted is everything that is neither compute nor the collective: the calls of the hook, sensing, deciding, the records.
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

STEPS, COMPUTE_S = 100, 0.1
spent = [0.0]


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time added to ``spent``."""

    def call(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            spent[0] += time.perf_counter() - began

    return call


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))), bucket_cap_mb=2)
    session = netsenseml.attach(model, "netsense")
    session.exchange = timed(session.exchange)
    session._exchanged = timed(session._exchanged)
    session._close_step = timed(session._close_step)
    steps_ms = []
    for _ in range(STEPS):
        spent[0] = 0.0
        time.sleep(COMPUTE_S)
        model(torch.randn(4, 512)).sum().backward()
        session.step(0.0, samples=4)
        steps_ms.append(1e3 * spent[0])
    settled = steps_ms[STEPS // 2 :]
    scheme = session.last["scheme"]
    session.close()
    if dist.get_rank() == 0:
        median, high = statistics.median(settled), sorted(settled)[int(0.9 * len(settled))]
        print(f"{scheme}: bookkeeping {median:.2f} ms a step in the median, {high:.2f} ms in the 90th percentile")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
