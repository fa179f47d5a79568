"""The codec in torch operations, for tensors on an accelerator: the same bytes as ``kernels``, and
the same bits back."""

import torch

from netsenseml.compress import layout
from netsenseml.compress.sparsify import largest

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_WORD32 = 0xFFFFFFFF
_TYPE = {1: torch.uint8, 4: torch.int32}
_NAN_BF16 = 0x7FC0


def encode(
    compensated: torch.Tensor,
    plan: layout.Layout,
    key: int | None,
    buffer: torch.Tensor,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Fill ``buffer``; returns the positions sent, or None for all.

    key: of stochastic rounding, or None. chosen: positions in place of the largest.
    """
    x = compensated
    buffer[-8:] = 0  # the padding behind the codes
    buffer[: layout.HEADER_BYTES] = torch.frombuffer(bytearray(plan.header()), dtype=torch.uint8)
    if plan.dense:
        buffer[plan.codes], buffer[plan.scales], x[:] = _coded(x, plan.values, key)
        return None
    positions = largest(x, plan.k) if chosen is None else chosen.long()
    j = torch.arange(plan.k, device=x.device)
    set_bits = torch.zeros(
        8 * (plan.high.stop - plan.high.start), dtype=torch.bool, device=x.device
    )
    set_bits[(positions >> plan.low_bits) + j * plan.step] = True
    buffer[plan.high] = _bytes_of(set_bits)
    low = _bytes_of(
        (positions[:, None] >> torch.arange(plan.low_bits, device=x.device) & 1).reshape(-1)
    )
    buffer[plan.low] = 0
    buffer[plan.low.start : plan.low.start + low.numel()] = low
    buffer[plan.codes], buffer[plan.scales], x[positions] = _coded(x[positions], plan.values, key)
    return positions.int()


def add_decoded(buffer: torch.Tensor, plan: layout.Layout, out: torch.Tensor, scale: float) -> None:
    """Add ``scale`` times the decoded buffer; raises MalformedBuffer for positions that cannot
    be."""
    values = _decoded(buffer[plan.codes], buffer[plan.scales], plan) * scale
    if plan.dense:
        out += values
        return
    # as the kernels do, which makes a zero of its negative
    out[positions(buffer, plan)] += values + 0.0


def positions(buffer: torch.Tensor, plan: layout.Layout) -> torch.Tensor:
    """Of the elements in a buffer: ascending, shape (k,), int64; raises MalformedBuffer for what
    cannot be."""
    j = torch.arange(plan.k, device=buffer.device)
    if plan.dense:
        return j
    places = _bits_of(buffer[plan.high]).nonzero().squeeze(1)
    if places.numel() == plan.k:
        low = _bits_of(buffer[plan.low])[: plan.k * plan.low_bits].view(plan.k, plan.low_bits)
        low = (low.long() << torch.arange(plan.low_bits, device=buffer.device)).sum(dim=1)
        found = (places - j * plan.step) << plan.low_bits | low
        if found[-1] < plan.n and bool((found.diff() > 0).all()):
            return found
    raise layout.MalformedBuffer(f"its positions are not {plan.k} ascending ones below {plan.n}")


def _coded(
    values: torch.Tensor, form: int, key: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales as bytes, and what is left of the values, shape (k,)."""
    no_scales = values.new_empty(0, dtype=torch.uint8)
    if form == layout.FP32:
        return values.clone().view(torch.uint8), no_scales, torch.zeros_like(values)
    if form == layout.BF16:
        word = values.view(torch.int32).long() & _WORD32
        half = word + 0x7FFF + (word >> 16 & 1) >> 16
        half = torch.where((word & _MAGNITUDE) > _INFINITY, _NAN_BF16, half).to(torch.int16)
        sent = half.view(torch.bfloat16).float()
        return half.view(torch.uint8), no_scales, torch.where(sent.isfinite(), values - sent, 0)
    k = values.numel()
    x = torch.nn.functional.pad(values, (0, -k % layout.ROW)).view(-1, layout.BLOCK[form])
    largest = (x.view(torch.int32) & _MAGNITUDE).amax(dim=1, keepdim=True)
    bad = largest >= _INFINITY
    x, unit = x.masked_fill(bad, 0), largest.masked_fill(bad, 0).view(torch.float32)
    if form == layout.SIGN:
        code = (x.view(torch.int32) < 0).int()
        parts = (
            (x.abs() / unit * layout.SIGN_UNIT)
            .nan_to_num_(0)
            .int()
            .sum(dim=1, keepdim=True)
            .float()
        )
        counts = (k - layout.BLOCK[form] * torch.arange(len(x), device=x.device)[:, None]).clamp(
            1, layout.BLOCK[form]
        )
        scale, up = unit * (parts / (layout.SIGN_UNIT * counts.float())), 0x8000
    else:
        levels = torch.tensor(
            layout.LEVELS[form], dtype=torch.float32, device=x.device
        )  # by a number, CUDA would multiply by its inverse
        scale, up = (unit / levels).clamp_(min=layout.SMALLEST_SCALE), 0xFFFF
    half = (
        (scale.view(torch.int32) + up >> 16).clamp_(max=layout.LARGEST_SCALE[form]).to(torch.int16)
    )
    scale = half.view(torch.bfloat16).float()
    if form == layout.SIGN:
        # a block of zeros keeps the signs of its zeros
        sent = torch.where((code == 1) & (unit > 0), -scale, scale)
    else:
        level = (x * scale.reciprocal()).clamp_(-layout.LEVELS[form], layout.LEVELS[form])
        if key is not None:
            level += _noise(torch.arange(x.numel(), device=x.device).view(x.shape), key)
        code = level.round_().int()  # has no negative zero, and neither do the kernels
        sent = code * scale
    shifts = _shifts(form, x.device)
    code = (code & (1 << layout.BITS[form]) - 1).view(
        -1, len(shifts), layout.ROW // len(shifts)
    ) << shifts
    code = code.sum(dim=1, dtype=_TYPE[layout.WORD[form]]).view(-1)
    return (
        code.view(torch.uint8),
        half.masked_fill_(bad, _NAN_BF16).view(-1).view(torch.uint8),
        (x - sent).view(-1)[:k],
    )


def _decoded(codes: torch.Tensor, scales: torch.Tensor, plan: layout.Layout) -> torch.Tensor:
    """The values, shape (k,)."""
    if plan.values in (layout.FP32, layout.BF16):
        return codes.view(torch.float32 if plan.values == layout.FP32 else torch.bfloat16).float()
    unused, shifts = 32 - layout.BITS[plan.values], _shifts(plan.values, codes.device)
    words = codes.view(_TYPE[layout.WORD[plan.values]]).int().view(-1, 1, layout.ROW // len(shifts))
    level = words << unused - shifts >> unused  # the second shift copies the sign downwards
    if plan.values == layout.SIGN:
        level = 1 + 2 * level
    scale = scales.view(torch.bfloat16).float()[:, None]
    return (level.float().view(-1, layout.BLOCK[plan.values]) * scale).view(-1)[: plan.k]


def _shifts(form: int, device: torch.device) -> torch.Tensor:
    """By how many bits the values that share a word are shifted, shape (values, 1)."""
    return torch.arange(
        0, 8 * layout.WORD[form], layout.BITS[form], device=device, dtype=torch.int32
    )[:, None]


def _noise(place: torch.Tensor, key: int) -> torch.Tensor:
    h = place ^ key
    h = (h ^ h >> 16) * 0x85EBCA6B & _WORD32
    h = (h ^ h >> 13) * 0xC2B2AE35 & _WORD32
    return ((h >> 16).float() + 0.5) * 2**-16 - 0.5


def _bytes_of(bits: torch.Tensor) -> torch.Tensor:
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=bits.device, dtype=torch.uint8)).sum(
        dim=1, dtype=torch.uint8
    )


def _bits_of(packed: torch.Tensor) -> torch.Tensor:
    return (packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1).view(
        -1
    )
