"""What it costs to begin: importing netsenseml, attach, and the first step, beside the steps that
follow.

    python experiments/bench/attach.py [--repetitions N] [--methods NAME ...]

For each method so many fresh pairs of processes, which meet over the loopback and train a
perceptron of 1.3 million parameters. Milliseconds of rank 0, medians over the pairs: import is that
of all that attach needs, once torch and its distributed part are there; later is the median of the
20 steps behind the third. "plain" is DDP without a hook. Run it twice on a machine where nothing
was compiled yet: the first process compiles for some seconds.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from typing import Any

METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "plain": None,
    "allreduce": ("allreduce", {}),
    "int8": ("quantized", {"values": "int8"}),
    "topk": ("topk", {"ratio": 0.01}),
    "netsense": ("netsense", {}),
}
STEPS = 23


def begin(rank: int, name: str, directory: str, results: Any) -> None:
    import torch
    import torch._dynamo  # which DDP does when it is made
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(16, 256)
    found, method = {"import": 0.0, "attach": 0.0}, METHODS[name]
    session = None
    dist.barrier()
    if method is not None:
        began_s = time.perf_counter()
        import netsenseml.api

        found["import"] = time.perf_counter() - began_s
        dist.barrier()
        began_s = time.perf_counter()
        session = netsenseml.attach(model, method[0], **method[1])
        found["attach"] = time.perf_counter() - began_s
    took = []
    for _ in range(STEPS):
        dist.barrier()
        began_s = time.perf_counter()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        if session is not None:
            session.step(loss)
        took.append(time.perf_counter() - began_s)
    if session is not None:
        session.close()
    if rank == 0:
        results.put(
            found
            | {
                "first": took[0],
                "second": took[1],
                "third": took[2],
                "later": statistics.median(took[3:]),
            }
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    columns = ("import", "attach", "first", "second", "third", "later")
    print(f"{'ms':12}", *(f"{column:>9}" for column in columns), sep="")
    for name in given.methods:
        rows = []
        for _ in range(given.repetitions):
            results = context.SimpleQueue()
            with tempfile.TemporaryDirectory() as directory:
                pair = [
                    context.Process(target=begin, args=(rank, name, directory, results))
                    for rank in range(2)
                ]
                for process in pair:
                    process.start()
                for process in pair:
                    process.join()
                if any(process.exitcode for process in pair):
                    raise SystemExit(f"{name}: a rank has failed")
            rows.append(results.get())
        medians = (
            f"{1e3 * statistics.median(row[column] for row in rows):9.1f}" for column in columns
        )
        print(f"{name:12}", *medians, sep="", flush=True)


if __name__ == "__main__":
    main()
