"""What coding a gradient costs, and what it saves: every codec beside torch.topk and a copy in
memory, on one thread.

    python experiments/bench/codecs.py [ELEMENTS] [REPETITIONS]

Times are nanoseconds of the thread's processor time per element of the gradient, medians,
everything in turn, so that other work on the machine matters little. Bits are those of the buffer
per element sent. Lost is the share of the energy, the sum of squares, that is left behind. The
baseline of the sparse codecs is the usual way: torch.topk of the magnitudes, unsorted, values
gathered, indices cast to int32. Encoding includes the removal of what was sent from the residual,
which the baseline does not do; decoding adds to a dense tensor.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from netsenseml.compress.codec import VALUES, Codec, add_decoded
from netsenseml.compress.sparsify import kept_elements

RESNET18 = 11_689_512
DENSITIES = (0.1, 0.01, 0.001)
CODECS = [
    *(Codec(values) for values in VALUES),
    *(Codec(values, stochastic=True) for values in ("int8", "int4")),
    *(Codec(values, density) for density in DENSITIES for values in VALUES),
]
GRADIENTS: dict[str, Callable[[int], torch.Tensor]] = {
    "Student's t, 3 degrees of freedom": (
        lambda n: torch.randn(n) / torch.randn(3, n).square_().mean(dim=0).sqrt_()
    ),
    "normal": torch.randn,
}


def nanoseconds(work: Callable[[], object]) -> int:
    begin_ns = time.thread_time_ns()
    work()
    return time.thread_time_ns() - begin_ns


def usual_sparse(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    indices = x.abs().topk(k, sorted=False).indices
    return x[indices], indices.to(torch.int32)


def measure(x: torch.Tensor, repetitions: int) -> Table:
    n = x.numel()
    energy = float(x.double().square().sum())
    compensated, out = torch.empty_like(x), torch.zeros_like(x)
    copy_ns: list[int] = []
    usual_ns: dict[float, list[int]] = {density: [] for density in DENSITIES}
    encode_ns: dict[Codec, list[int]] = {codec: [] for codec in CODECS}
    decode_ns: dict[Codec, list[int]] = {codec: [] for codec in CODECS}
    lost: dict[Codec, float] = {}
    for repetition in range(repetitions):
        copy_ns.append(nanoseconds(partial(compensated.copy_, x)))
        for density, times in usual_ns.items():
            times.append(nanoseconds(partial(usual_sparse, x, kept_elements(n, density))))
        for codec in CODECS:
            compensated.copy_(x)
            encode_ns[codec].append(
                nanoseconds(partial(codec.encode, compensated, seed=repetition))
            )
            lost[codec] = float(compensated.double().square().sum()) / energy
            buffer = codec.encode(compensated.copy_(x), seed=repetition)
            decode_ns[codec].append(nanoseconds(partial(add_decoded, buffer, out)))

    table = Table(
        "scheme",
        "encode ns",
        "× topk",
        "decode ns",
        "MB",
        "bits",
        "lost",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    table.add_row(
        "copy", f"{statistics.median(copy_ns) / n:.2f}", "", "", f"{4e-6 * n:.3f}", "32.00", ""
    )
    for density, times in usual_ns.items():
        k = kept_elements(n, density)
        usual = f"{statistics.median(times) / n:.2f}"
        table.add_row(
            f"torch.topk {100 * density:g}%", usual, "1.0", "", f"{8e-6 * k:.3f}", "64.00", ""
        )
    for codec in CODECS:
        own_ns = statistics.median(encode_ns[codec])
        baseline = usual_ns.get(codec.density)
        table.add_row(
            codec.name + " by chance" * codec.stochastic,
            f"{own_ns / n:.2f}",
            f"{statistics.median(baseline) / own_ns:.1f}" if baseline else "",
            f"{statistics.median(decode_ns[codec]) / n:.2f}",
            f"{1e-6 * codec.nbytes(n):.3f}",
            f"{8 * codec.nbytes(n) / codec.elements(n):.2f}",
            f"{lost[codec]:.1e}" if lost[codec] < 0.01 else f"{lost[codec]:.3f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("elements", type=int, nargs="?", default=RESNET18)
    parser.add_argument("repetitions", type=int, nargs="?", default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for kind, gradient in GRADIENTS.items():
        table = measure(gradient(given.elements), given.repetitions)
        table.title = f"{kind}, {given.elements} elements"
        Console().print(table)


if __name__ == "__main__":
    main()
