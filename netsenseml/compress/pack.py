"""Sparse values and their indices in one buffer of a size that all ranks know."""

import torch

BYTES_PER_ELEMENT = 8
"""A float32 value and an int32 index."""


def pack(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """One uint8 buffer of 8 k bytes: k float32 values, then k int32 indices, in native byte order.

    values, indices: shape (k,), any floating point and any integer type; indices < 2**31.
    """
    if values.shape != indices.shape or values.dim() != 1:
        raise ValueError(f"values {tuple(values.shape)} and indices {tuple(indices.shape)} must be of one shape (k,)")
    return torch.cat([values.to(torch.float32).view(torch.uint8), indices.to(torch.int32).view(torch.uint8)])


def unpack(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (k,) float32 and indices (k,) int32 of a packed buffer, as views of it."""
    if buffer.dtype != torch.uint8 or buffer.numel() % BYTES_PER_ELEMENT:
        raise ValueError(f"not a packed buffer: {buffer.numel()} elements of {buffer.dtype}")
    values, indices = buffer.tensor_split(2)
    return values.view(torch.float32), indices.view(torch.int32)
