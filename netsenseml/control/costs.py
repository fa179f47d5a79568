"""What coding costs on this machine, measured before the training."""

import time
from collections.abc import Callable, Sequence

import torch

from netsenseml.compress.codec import Codec, add_decoded
from netsenseml.exchange.schemes import Gather, Scheme, TwoPhase

_ELEMENTS = 1 << 18
_REPETITIONS = 3


def coding_costs(rungs: Sequence[Scheme], ranks: int, device: torch.device) -> dict[str, float]:
    """Seconds per element that a rank spends on encoding and decoding, by name of the scheme.

    Measured on normal numbers, for the gathers only at the ends: in between the cost is a line over the density, as one
    part is paid for every element and one for every element that is kept. Takes some tens of milliseconds.
    """
    gathers = [rung for rung in rungs if isinstance(rung, Gather)]
    costs = {rung.name: _two_phase_s(rung.codec, ranks, device) for rung in rungs if isinstance(rung, TwoPhase)}
    if gathers:
        first, last = gathers[0], gathers[-1]
        high_s, low_s = (_gather_s(rung.codec, ranks, device) for rung in (first, last))
        span = first.codec.density - last.codec.density
        for rung in gathers:
            weight = (rung.codec.density - last.codec.density) / span if span else 0.0
            costs[rung.name] = low_s + weight * max(0.0, high_s - low_s)
    return costs


def _gather_s(codec: Codec, ranks: int, device: torch.device) -> float:
    encode_s, decode_s = _coding_s(codec, device)
    return encode_s + ranks * decode_s


def _two_phase_s(codec: Codec, ranks: int, device: torch.device) -> float:
    # All of the bucket once each way, and the own chunk once more: decoded from every rank, encoded once.
    encode_s, decode_s = _coding_s(codec, device)
    return encode_s * (1 + 1 / ranks) + 2 * decode_s


def _coding_s(codec: Codec, device: torch.device) -> tuple[float, float]:
    """Seconds per element of (encoding, decoding)."""
    values = torch.randn(_ELEMENTS, device=device)
    out = torch.zeros_like(values)
    buffer = codec.encode(values.clone(), 0)
    encode_s = _fastest_s(lambda: codec.encode(values.clone(), 0))
    return encode_s / _ELEMENTS, _fastest_s(lambda: add_decoded(buffer, out)) / _ELEMENTS


def _fastest_s(work: Callable[[], object]) -> float:
    times_s = []
    for _ in range(_REPETITIONS):
        begin_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - begin_s)
    return min(times_s)
