"""The codec in torch operations, for tensors on an accelerator: the same bytes as ``kernels``, and the same bits back."""

import torch

from netsenseml.compress.layout import (
    BF16,
    BLOCK,
    BLOCK_BYTES,
    FP32,
    INT4,
    INT8,
    LARGEST,
    LEVELS,
    SIGN,
    SIGN_UNIT,
    Layout,
    MalformedBuffer,
)
from netsenseml.compress.sparsify import largest

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_WORD32 = 0xFFFFFFFF


def encode(wanted: torch.Tensor, plan: Layout, key: int, buffer: torch.Tensor) -> torch.Tensor | None:
    """Fill the sections of ``buffer``; returns the positions sent, or None for all."""
    if plan.dense:
        buffer[plan.codes], buffer[plan.scales], wanted[:] = _coded(wanted, plan.values, key)
        return None
    positions = largest(wanted, plan.k)
    j = torch.arange(plan.k, device=wanted.device)
    set_bits = torch.zeros(8 * (plan.high.stop - plan.high.start), dtype=torch.bool, device=wanted.device)
    set_bits[(positions >> plan.low_bits) + j * plan.step] = True
    buffer[plan.high] = _bytes_of(set_bits)
    low = _bytes_of((positions[:, None] >> torch.arange(plan.low_bits, device=wanted.device) & 1).reshape(-1))
    buffer[plan.low] = 0
    buffer[plan.low.start : plan.low.start + low.numel()] = low
    buffer[plan.codes], buffer[plan.scales], wanted[positions] = _coded(wanted[positions], plan.values, key)
    return positions.int()


def add_decoded(buffer: torch.Tensor, plan: Layout, out: torch.Tensor, scale: float) -> None:
    """Add ``scale`` times the decoded buffer; raises MalformedBuffer for positions that cannot be."""
    values = _decoded(buffer[plan.codes], buffer[plan.scales], plan) * scale
    if plan.dense:
        out += values
        return
    j = torch.arange(plan.k, device=buffer.device)
    places = _bits_of(buffer[plan.high]).nonzero().squeeze(1)
    if places.numel() == plan.k:
        low = _bits_of(buffer[plan.low])[: plan.k * plan.low_bits].view(plan.k, plan.low_bits)
        low = (low.long() << torch.arange(plan.low_bits, device=buffer.device)).sum(dim=1)
        positions = (places - j * plan.step) << plan.low_bits | low
        if positions[-1] < plan.n and bool((positions.diff() > 0).all()):
            out[positions] += values + 0.0  # as the kernels do, which makes a zero of its negative
            return
    raise MalformedBuffer(f"its positions are not {plan.k} ascending ones below {plan.n}")


def _coded(values: torch.Tensor, form: int, key: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales as bytes, and what is left of the values, shape (k,)."""
    no_scales = values.new_empty(0, dtype=torch.uint8)
    if form == FP32:
        return values.clone().view(torch.uint8), no_scales, torch.zeros_like(values)
    if form == BF16:
        word = values.view(torch.int32).long() & _WORD32
        half = word + 0x7FFF + (word >> 16 & 1) >> 16
        half = torch.where((word & _MAGNITUDE) > _INFINITY, 0x7FC0, half)
        half = torch.where(half < 1 << 15, half, half - (1 << 16)).to(torch.int16)
        sent = half.view(torch.bfloat16).float()
        return half.view(torch.uint8), no_scales, torch.where(sent.isfinite(), values - sent, 0)
    k = values.numel()
    x = torch.nn.functional.pad(values, (0, -k % BLOCK)).view(-1, BLOCK)
    bits = x.view(torch.int32)
    largest = (bits & _MAGNITUDE).amax(dim=1, keepdim=True)
    unit = largest.view(torch.float32)
    bad = largest >= _INFINITY
    if form == SIGN:
        code = (bits < 0).to(torch.uint8)
        parts = (x.abs() / unit * SIGN_UNIT).nan_to_num_(0, 0, 0).int().sum(dim=1, keepdim=True).float()
        counts = torch.full_like(parts, SIGN_UNIT * BLOCK)
        counts[-1:] = SIGN_UNIT * ((k - 1) % BLOCK + 1)
        scale = unit * (parts / counts)
        sent = torch.where(code == 1, -scale, scale)
        code = (code.view(-1, 8, BLOCK // 8) << torch.arange(8, device=x.device, dtype=torch.uint8)[:, None]).sum(1)
    else:
        levels = LEVELS[form]
        scale = unit.clamp(max=LARGEST) / levels
        place = torch.arange(x.numel(), device=x.device).view(x.shape)
        level = (x / scale + _noise(place, key)).floor_().clamp_(-levels, levels)
        level = torch.where(bad | (scale == 0), 0, level)
        sent = level * scale
        code = level.int() & 0xFF
        if form == INT4:
            code = code[:, : BLOCK // 2] & 15 | (code[:, BLOCK // 2 :] & 15) << 4
    scale = scale.masked_fill(bad, torch.nan)
    left = (x - sent).masked_fill_(bad, 0)
    return code.to(torch.uint8).view(-1), scale.view(-1).view(torch.uint8), left.view(-1)[:k]


def _decoded(codes: torch.Tensor, scales: torch.Tensor, plan: Layout) -> torch.Tensor:
    """The values, shape (k,)."""
    if plan.values in (FP32, BF16):
        return codes.view(torch.float32 if plan.values == FP32 else torch.bfloat16).float()
    rows = codes.view(-1, BLOCK_BYTES[plan.values])
    if plan.values == INT8:
        level = rows.view(torch.int8)
    elif plan.values == INT4:
        level = torch.cat([(rows << 4).view(torch.int8) >> 4, rows.view(torch.int8) >> 4], dim=1)
    else:
        level = 1 - 2 * torch.cat([rows >> part & 1 for part in range(8)], dim=1).view(torch.int8)
    return (level.float() * scales.view(torch.float32)[:, None]).view(-1)[: plan.k]


def _noise(place: torch.Tensor, key: int) -> torch.Tensor:
    h = place ^ key
    h = (h ^ h >> 16) * 0x85EBCA6B & _WORD32
    h = (h ^ h >> 13) * 0xC2B2AE35 & _WORD32
    return ((h >> 16).float() + 0.5) * 2**-16


def _bytes_of(bits: torch.Tensor) -> torch.Tensor:
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=bits.device, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def _bits_of(packed: torch.Tensor) -> torch.Tensor:
    return (packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1).view(-1)
