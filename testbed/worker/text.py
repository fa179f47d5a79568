"""A small GPT on bytes, and text that every Python installation has."""

import sysconfig
from pathlib import Path

import torch
from torch import nn

_BYTES = 256


class Gpt(nn.Module):
    """Decoder-only transformer over bytes: (b, t) int64 -> logits (b, 256, t), for the byte after
    each (GPT-2's layout)."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(_BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _BYTES, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        logits: torch.Tensor = self.head(
            self.norm(self.blocks(self.token(text) + self.position(places)))
        )
        return logits.transpose(1, 2)


class Block(nn.Module):
    """Causal self-attention and a perceptron, each behind a normalisation and beside a short
    cut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, width = x.shape
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).split(width, dim=2)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.perceptron(x)


def library_text(
    kilobytes: int, context: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources of Python's standard library: windows of bytes (n, context) and the bytes that follow
    each, to train and test.

    Of every ten windows the last is for the test, so that both have something of all modules.
    Raises ValueError if the installation has no sources.
    """
    wanted = 1024 * kilobytes
    found = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= wanted:
            break
    windows = min(len(found), wanted) // (context + 1)
    if windows < 10:
        raise ValueError(
            f"data 'text': this Python has only {len(found)} bytes of library sources; choose a"
            " smaller context"
        )
    text = (
        torch.frombuffer(found[: windows * (context + 1)], dtype=torch.uint8)
        .view(windows, -1)
        .long()
    )
    for_test = torch.arange(windows) % 10 == 9
    train, test = text[~for_test], text[for_test]
    return train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:]
