"""A small model in several buckets, its data, and what comes of it."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from netsenseml.clock import Clock
from netsenseml.records import monotonic_s

ELEMENTS = 20 * 60 + 60 + 60 * 60 + 60 + 60 * 5 + 5


def make_ddp(bucket_cap_mb: float = 0.01, **options: object) -> DistributedDataParallel:
    """DDP rebuilds its buckets after the first backward."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 5)
    )
    return DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb, **options)


def batches(rank: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        yield (
            torch.randn(8, 20, generator=generator),
            torch.randint(0, 5, (8,), generator=generator),
        )


def backward(
    ddp: DistributedDataParallel, batch: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """One of this batch alone; returns the loss."""
    ddp.zero_grad()
    loss = nn.functional.cross_entropy(ddp(batch[0]), batch[1])
    loss.backward()
    return loss


def flat_gradient(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.reshape(-1) for parameter in module.parameters()]).clone()


def parameters_hash(module: nn.Module) -> str:
    """Equal for replicas that are equal bit by bit."""
    digest = hashlib.sha256()
    for tensor in module.parameters():
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class LateClock(Clock):
    """Marks are read later, as with a device; the real ones need one (tests/gpu)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.immediate = device, False

    def mark(self) -> float:
        return monotonic_s()
