"""Selection of the largest elements of a gradient, exactly k of them."""

import math

import torch

_SAMPLE = 1 << 14
"""Elements looked at to guess the threshold, at most: its relative error at density d is about 1 /
sqrt(d * sample)."""

_MAGNITUDE = 0x7FFFFFFF


def kept_elements(elements: int, ratio: float) -> int:
    """Elements to send out of ``elements`` at ``ratio``: ceil(ratio * elements), at least 1 if
    there are any."""
    # The nudge keeps 0.1 * 30 = 3.0000000000000004 from becoming 4.
    return min(elements, max(math.ceil(ratio * elements * (1 - 1e-12)), 1))


def sampling(n: int, k: int) -> tuple[int, int]:
    """(stride s, rank r): more than k of n elements are, most likely, as large as the r-th largest
    of every s-th.

    k of n are expected to be k / s of the sample; the rank is three standard deviations above that.
    A guess from the threshold of the last step would save 0.1 ms, and miss whenever the gradient
    shrinks.
    """
    stride = max(n // _SAMPLE, 8) | 1  # odd, as the shapes of layers are even
    expected = k / stride
    return stride, min(-(-n // stride), math.ceil(expected + 3 * math.sqrt(expected) + 1))


def largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k elements of largest magnitude: int64, ascending.

    values: shape (n,), floating point; 1 <= k <= n. NaN is larger than infinity, so that it is sent
    (as an all-reduce would send it) and does not stay behind. Among equal magnitudes the lower
    index wins.

    A threshold that slightly more than k elements reach is guessed from a strided sample; the
    largest of so few are found at little cost. If fewer than k reach it, they are looked for among
    all elements.
    """
    n = values.numel()
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to {n}, not {k}")
    # as integers they have the stated order
    magnitude = values.float().view(torch.int32) & _MAGNITUDE
    stride, rank = sampling(n, k)
    candidates = (magnitude >= magnitude[::stride].topk(rank).values[-1]).nonzero().squeeze(1)
    if candidates.numel() < k:
        candidates = torch.arange(n, device=values.device)
    order = magnitude[candidates].sort(descending=True, stable=True).indices[:k]
    return candidates[order].sort().values


def largest_in_chunks(values: torch.Tensor, chunk: int, ratio: float) -> torch.Tensor:
    """Indices of the share ``ratio`` of largest magnitude of each ``chunk`` successive elements:
    int64, ascending.

    values: shape (n,), floating point. Of m elements ``kept_elements(m, ratio)`` are taken, also of
    the last chunk, which may be smaller. NaN is the largest.
    """
    whole = values.numel() // chunk * chunk
    found = []
    for begin, rows in ((0, values[:whole].view(-1, chunk)), (whole, values[whole:].view(1, -1))):
        if rows.numel():
            k = kept_elements(rows.shape[1], ratio)
            columns = rows.abs().topk(k, dim=1, sorted=False).indices.sort(dim=1).values
            ends = torch.arange(len(rows), device=values.device)[:, None] * rows.shape[1]
            found.append((begin + ends + columns).view(-1))
    return torch.cat(found)
