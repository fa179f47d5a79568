"""The plans that a controller chooses from, and what each of them would lose."""

from collections.abc import Sequence

import torch

from netsenseml.compress.codec import Codec
from netsenseml.exchange.communicators import (
    DirectAllReduce,
    Hierarchical,
    Plan,
    RingAllReduce,
    SparseAllGather,
)
from netsenseml.exchange.mesh import Topology

_DENSEST, _STEP = 0.2, 0.7
"""Densities from the largest down, each so many times the one before."""
_SPARSE_VALUES = "int4"
"""More elements with a sign and a common magnitude would lose less energy in as many bytes. But
then what is large is sent too small and what is small too large in every step, and with a momentum
of 0.9 a small GPT diverged, at 8 % and at 2 %."""
_ROWS, _RUN = 64, 256


def plans(
    topology: Topology, floor: float, item_bytes: int = 4, *, by_host: bool = True
) -> list[Plan]:
    """The gradients as they are, of ``item_bytes`` an element; all of them in fewer bits; ever
    fewer elements, down to the share ``floor``. Each by every communicator that may be the fastest.
    by_host: once a host where hosts have several ranks.

    What sends no less than the gradients as they are is left out, but for float32 itself, which is
    sooner there over long paths.
    """
    codecs = [
        Codec(values)
        for values in ("fp32", "bf16", "int8", "int4")
        if _bits(values) <= 8 * item_bytes
    ]
    density = max(_DENSEST, floor)
    while density > 1.1 * floor:
        codecs.append(Codec(_SPARSE_VALUES, density))
        density = float(f"{density * _STEP:.2g}")
    codecs.append(Codec(_SPARSE_VALUES, floor))
    found: list[Plan] = [RingAllReduce(item_bytes)]
    for codec in codecs:
        kind = DirectAllReduce if codec.density == 1 else SparseAllGather
        flat = [kind(codec), kind(codec, ring=True)]
        found += (
            [Hierarchical(plan) for plan in flat]
            if by_host and topology.ranks_per_host > 1
            else flat
        )
    most = found[0].cost(_MANY, topology).host_bytes
    return [plan for plan in found if plan.cost(_MANY, topology).host_bytes <= 1.01 * most]


_KAPPA, _ADAPTIVE_KAPPA, _ADAPTIVE_DENSITY = 0.7, 1.0, 0.14
_APART, _ADAPTIVE_APART, _STEP_APART = 0.05, 0.3, 0.006
_LATE, _ADAPTIVE_LATE, _LATE_APART = 0.8, 0.15, 0.05


def step_progress(
    plan: Plan, lost: float, *, adaptive: bool, interval: int = 0, delay: int = 0
) -> float:
    """Progress of a step with a plan, 1 for one that loses nothing, if the share ``lost`` of a
    gradient's energy is not sent.

    Error feedback sends it later: what is lost is late, and the number of steps grows with 1 / (1 -
    lost) (Stich and Karimireddy, JMLR 2020). So with SGD progress = 1 / (1 + 0.7 x lost / (1 -
    lost)). With an adaptive optimizer, which divides by a running second moment, it is at most 1 /
    (1 + 0.14 x (1 / sqrt(d) - 1)): presumably as an element that is sent every 1 / d steps looks 1
    / d as large, and so its steps are smaller by sqrt(d). Fitted to
    ``experiments/bench/progress.py`` (an MLP, a CNN and a small GPT, three seeds, up to 225 steps):
    of 24 numbers of steps to a target each was 0.67 to 1.27 of what this says with SGD, and 0.76 to
    1.16 with AdamW.

    With an interval H the ranks step by their own gradients in between. Where their data are alike
    that costs little: the number of steps is taken to be 1.05 + 0.006 (H - 1) times as large with
    SGD, and 1.3 + 0.006 (H - 1) times with AdamW, which divides by larger second moments, as each
    rank's own gradients vary more than their mean. What ``experiments/bench/intervals.py`` measured
    with four workers, an MLP and CNNs on digits and a small GPT, one or two seeds, up to 225 steps,
    without compression: least, mean and most

    =====  ================  ================  ================
    H      2                 8                 32
    =====  ================  ================  ================
    SGD    1.01  1.08  1.12  0.82  0.99  1.07  1.05  1.15  1.26
    AdamW  1.17  1.33  1.39  1.17  1.33  1.42  1.21  1.49  1.66
    =====  ================  ================  ================

    SGD is charged a little more than that: in doubt ranks exchange, as between two exchanges
    nothing newer is in common. With 10 % and 1 % of the elements the product of both was above what
    was measured in most cases, and below it with 1 % and H = 32: 2.05 and 2.70. Of data that differ
    between ranks, by which these would drift apart, nothing was measured.

    With a delay of one exchange the number of steps is taken to be 1.8 times as large with SGD
    where gradients are exchanged, and 1.15 times with AdamW; where parameters are, 1 + 0.05 H times
    with both. What the same program measured (``--intervals 0 1 2 8 --delays 1``), against
    gradients at once, an MLP and a CNN on digits (learning rate 0.05, momentum 0.9) and with AdamW
    a small GPT, two seeds: least, mean and most of all trainings

    =====  ================  ================  ================  ================
    H      gradients         1                 2                 8
    =====  ================  ================  ================  ================
    SGD    1.17  1.77  2.53  0.90  1.01  1.15  0.92  1.01  1.16  1.18  1.40  1.66
    AdamW  1.10  1.16  1.24  1.17  1.31  1.42  1.19  1.35  1.48  1.32  1.55  1.89
    =====  ================  ================  ================  ================

    Gradients that are two or four steps old cost 1.8 to more than 12 times as many steps with SGD,
    1.2 to 2.5 with AdamW. All of that depends on the learning rate, which is not reckoned with.
    With compression nothing was measured.
    """
    inner = plan.inner if isinstance(plan, Hierarchical) else plan
    density = inner.codec.density if isinstance(inner, SparseAllGather) else 1.0
    late = (_ADAPTIVE_KAPPA if adaptive else _KAPPA) * lost / max(1 - lost, 1e-6)
    late = max(late, _ADAPTIVE_DENSITY * (density**-0.5 - 1) if adaptive else 0.0)
    of_interval = (
        0.0
        if not interval
        else (_ADAPTIVE_APART if adaptive else _APART) + _STEP_APART * (interval - 1)
    )
    of_delay = delay * (
        _LATE_APART * interval if interval else _ADAPTIVE_LATE if adaptive else _LATE
    )
    return 1 / ((1 + late) * (1 + of_interval) * (1 + of_delay))


_MANY = 1 << 22


def _bits(values: str) -> int:
    return {"fp32": 32, "bf16": 16}.get(values, 8)


def gradient_sample(gradient: torch.Tensor) -> torch.Tensor:
    """Runs of neighbours from all over a flat gradient, some 16 Ki elements: what ``lost`` needs; a
    copy in float32."""
    rows = min(_ROWS, gradient.numel() // _RUN)
    if rows < 2:
        return gradient.detach().to(torch.float32, copy=True)
    starts = torch.arange(rows, device=gradient.device) * ((gradient.numel() - _RUN) // (rows - 1))
    return (
        gradient.detach()[starts[:, None] + torch.arange(_RUN, device=gradient.device)]
        .float()
        .reshape(-1)
    )


def lost(gradient_samples: Sequence[torch.Tensor], candidates: Sequence[Plan]) -> dict[str, float]:
    """By name of a plan the share of the gradients' energy that it would not send, from samples of
    all buckets.

    For densities from one list of magnitudes in descending order, for bits by coding. 0 where there
    is no energy.
    """
    gradient = torch.cat(list(gradient_samples)).cpu()
    energies = gradient.double().square()
    total = float(energies.sum())
    if not 0 < total < float("inf"):
        return {}
    covered = energies.sort(descending=True).values.cumsum(0) / total
    of_codec: dict[str, float] = {}

    def of(codec: Codec) -> float:
        if codec.density < 1:
            share = float(covered[codec.elements(len(covered)) - 1])
            return 1 - share * (1 - of(Codec(codec.values)))
        if codec.values not in of_codec:
            rest = gradient.clone()
            codec.encode(rest, 0)
            of_codec[codec.values] = float(rest.double().square().sum()) / total
        return of_codec[codec.values]

    found = {}
    for plan in candidates:
        inner = plan.inner if isinstance(plan, Hierarchical) else plan
        found[plan.name] = (
            of(inner.codec) if isinstance(inner, DirectAllReduce | SparseAllGather) else 0.0
        )
    return found
