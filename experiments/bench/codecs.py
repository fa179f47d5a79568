"""What coding a gradient costs, and what it saves: every codec beside torch.topk and a copy in memory, on one thread.

    python experiments/bench/codecs.py [ELEMENTS] [REPETITIONS]

Times are medians of the thread's processor time, everything in turn, so that other work on the machine matters little.
The baseline of the sparse codecs is the usual way: torch.topk of the magnitudes, unsorted, values gathered, indices cast to
int32. Encoding includes the removal of what was sent from the residual, which the baseline does not do; decoding adds to a
dense tensor. Lost is the share of the energy, the sum of squares, that is left behind.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from netsenseml.compress.codec import VALUES, Codec, add_decoded
from netsenseml.compress.sparsify import slots

RESNET18 = 11_689_512
DENSITIES = (0.1, 0.01, 0.001)
CODECS = [*(Codec(values) for values in VALUES), *(Codec(values, density) for density in DENSITIES for values in VALUES)]
GRADIENTS: dict[str, Callable[[int], torch.Tensor]] = {
    "normal": torch.randn,
    "heavy-tailed": lambda n: torch.randn(n).pow_(3),
}


def milliseconds(work: Callable[[], object]) -> float:
    begin_s = time.thread_time()
    work()
    return 1000 * (time.thread_time() - begin_s)


def usual_sparse(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    indices = x.abs().topk(k, sorted=False).indices
    return x[indices], indices.to(torch.int32)


def measure(x: torch.Tensor, repetitions: int) -> Table:
    n = x.numel()
    wanted, out = torch.empty_like(x), torch.zeros_like(x)
    copy_ms: list[float] = []
    usual_ms: dict[float, list[float]] = {density: [] for density in DENSITIES}
    encode_ms: dict[Codec, list[float]] = {codec: [] for codec in CODECS}
    decode_ms: dict[Codec, list[float]] = {codec: [] for codec in CODECS}
    lost: dict[Codec, float] = {}
    for repetition in range(repetitions):
        copy_ms.append(milliseconds(partial(wanted.copy_, x)))
        for density, times in usual_ms.items():
            times.append(milliseconds(partial(usual_sparse, x, slots(n, density))))
        for codec in CODECS:
            wanted.copy_(x)
            encode_ms[codec].append(milliseconds(partial(codec.encode, wanted, seed=repetition)))
            lost[codec] = float(wanted.double().square().sum() / x.double().square().sum())
            buffer = codec.encode(wanted.copy_(x), seed=repetition)
            decode_ms[codec].append(milliseconds(partial(add_decoded, buffer, out)))

    table = Table("scheme", "encode ms", "× topk", "decode ms", "MB", "bytes/sent", "lost", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    table.add_row("copy", f"{statistics.median(copy_ms):.1f}", "", "", f"{4e-6 * n:.3f}", "4.00", "")
    for density, times in usual_ms.items():
        k = slots(n, density)
        usual = f"{statistics.median(times):.1f}"
        table.add_row(f"torch.topk {100 * density:g}%", usual, "1.0", "", f"{8e-6 * k:.3f}", "8.00", "")
    for codec in CODECS:
        own_ms = statistics.median(encode_ms[codec])
        baseline = usual_ms.get(codec.density)
        table.add_row(
            codec.name,
            f"{own_ms:.1f}",
            f"{statistics.median(baseline) / own_ms:.1f}" if baseline else "",
            f"{statistics.median(decode_ms[codec]):.1f}",
            f"{1e-6 * codec.nbytes(n):.3f}",
            f"{codec.nbytes(n) / codec.elements(n):.2f}",
            f"{lost[codec]:.1e}" if lost[codec] < 0.01 else f"{lost[codec]:.3f}",
        )
    return table


def main(elements: int = RESNET18, repetitions: int = 5) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for kind, gradient in GRADIENTS.items():
        table = measure(gradient(elements), repetitions)
        table.title = f"{kind}, {elements} elements"
        Console().print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
