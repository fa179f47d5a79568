"""What coding costs on this machine, measured before the training."""

from collections.abc import Callable, Sequence

import torch

from netsenseml.clock import Clock
from netsenseml.compress.codec import Codec, add_decoded
from netsenseml.exchange.communicators import DirectAllReduce, Hierarchical, Plan, SparseAllGather
from netsenseml.exchange.mesh import Topology

_ELEMENTS, _DEVICE_ELEMENTS = 1 << 18, 1 << 23
"""An accelerator takes as long for few elements as for many."""
_REPETITIONS = 3


def coding_costs(
    plans: Sequence[Plan], topology: Topology, device: torch.device
) -> dict[str, float]:
    """Seconds per element of a tensor that a rank spends on encoding and decoding, by name of the
    plan.

    Measured on normal numbers, for sparse codecs only at the ends: in between the cost is a line
    over the density, as one part is paid for every element and one for every element that is kept.
    Takes some tens of milliseconds, once kernels are compiled.
    """
    inner = {plan.name: plan.inner if isinstance(plan, Hierarchical) else plan for plan in plans}
    codecs = {
        plan.codec for plan in inner.values() if isinstance(plan, DirectAllReduce | SparseAllGather)
    }
    dense = {codec: _coding_s(codec, device) for codec in codecs if codec.density == 1}
    sparse = sorted(
        (codec for codec in codecs if codec.density < 1), key=lambda codec: codec.density
    )
    low, high = (
        (_coding_s(codec, device) for codec in (sparse[0], sparse[-1]))
        if sparse
        else ((0.0, 0.0), (0.0, 0.0))
    )
    costs = {}
    for name, plan in inner.items():
        by_host = name != plan.name
        ranks, share = (
            (topology.of_hosts.ranks, 1 / topology.ranks_per_host)
            if by_host
            else (topology.ranks, 1.0)
        )
        if isinstance(plan, DirectAllReduce):
            # All of the tensor once each way, and the own chunk once more: decoded from every rank,
            # encoded once.
            encode_s, decode_s = dense[plan.codec]
            costs[name] = share * (encode_s + 2 * decode_s)
        elif isinstance(plan, SparseAllGather):
            span = sparse[-1].density - sparse[0].density
            weight = (plan.codec.density - sparse[0].density) / span if span else 0.0
            encode_s, decode_s = (
                least + weight * max(0.0, most - least)
                for least, most in zip(low, high, strict=True)
            )
            costs[name] = share * (encode_s + ranks * decode_s)
    return costs


def _coding_s(codec: Codec, device: torch.device) -> tuple[float, float]:
    """Seconds per element of (encoding, decoding)."""
    elements, clock = _ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS, Clock(device)
    values = torch.randn(elements, device=device)
    out = torch.zeros_like(values)
    buffer = codec.encode(values.clone(), 0)
    encode_s = _fastest_s(lambda: codec.encode(values.clone(), 0), clock)
    return encode_s / elements, _fastest_s(lambda: add_decoded(buffer, out), clock) / elements


def _fastest_s(work: Callable[[], object], clock: Clock) -> float:
    times_s = []
    for _ in range(_REPETITIONS):
        begin = clock.mark()
        work()
        end = clock.mark()
        times_s.append(clock.seconds(end) - clock.seconds(begin))
    return min(times_s)
