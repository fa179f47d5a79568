"""Selection of the largest elements of a gradient, exactly k of them."""

import math

import torch

_SAMPLE = 1 << 14
"""Elements looked at to guess the threshold: its relative error at density d is about 1 / sqrt(d * sample)."""

_SMALL = 1 << 14
"""Below this size a plain selection is as fast as one by threshold."""


def slots(elements: int, ratio: float) -> int:
    """Elements to send out of ``elements`` at ``ratio``: ceil(ratio * elements), at least 1 if there are any."""
    # The nudge keeps 0.1 * 30 = 3.0000000000000004 from becoming 4.
    return min(elements, max(math.ceil(ratio * elements * (1 - 1e-12)), 1))


def largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k elements of largest magnitude: int64, ascending.

    values: shape (n,), floating point; 1 <= k <= n. NaN counts as infinitely large, so that it is sent (as an
    all-reduce would send it) and does not stay behind. Among equal magnitudes the lower index wins.

    The threshold that about k elements pass is guessed from a strided sample; those that pass are few, so cutting
    them to exactly k is cheap. If fewer than k pass, the exact threshold comes from all elements.
    """
    n = values.numel()
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to {n}, not {k}")
    magnitude = values.abs()
    candidates = _above(magnitude, _guess(magnitude, k)) if n > _SMALL else None
    if candidates is not None and candidates.numel() >= k:
        return candidates[_exactly(magnitude[candidates], k)]
    return _exactly(magnitude, k)


def _above(magnitude: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    # "not below" instead of "above or equal": NaN passes.
    return (magnitude < threshold).logical_not_().nonzero().squeeze(1)


def _guess(magnitude: torch.Tensor, k: int) -> torch.Tensor:
    """A threshold that somewhat more than k elements pass, most likely."""
    sample = magnitude[:: max(1, magnitude.numel() // _SAMPLE)]
    expected = sample.numel() * k / magnitude.numel()
    rank = min(sample.numel(), math.ceil(expected + 3 * math.sqrt(expected) + 1))
    return sample.nan_to_num(nan=math.inf, posinf=math.inf).kthvalue(sample.numel() - rank + 1).values


def _exactly(magnitude: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest, ascending, by exact threshold and then by position among its equals."""
    magnitude = magnitude.nan_to_num(nan=math.inf, posinf=math.inf)
    threshold = magnitude.kthvalue(magnitude.numel() - k + 1).values
    keep = magnitude > threshold
    equal = (magnitude == threshold).nonzero().squeeze(1)
    keep[equal[: k - int(keep.sum())]] = True
    return keep.nonzero().squeeze(1)
