"""What a method of exchanging gradients is."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future

from netsenseml.ledger import Ledger


def require_cpu(module: nn.Module) -> None:
    """Raise ValueError, one line, for a model whose gradients the methods that code cannot take."""
    for parameter in module.parameters():
        if parameter.device.type != "cpu":
            raise ValueError(f"gradients on {parameter.device} cannot be coded yet; choose allreduce, bf16 or fp16")


class Method:
    """How gradients cross the network.

    The session calls, on every rank in the same order: ``begin`` before the first bucket of a backward that
    synchronises, ``exchange`` for every bucket, ``finish`` when all buckets have been exchanged (on a thread of the
    process group or of the method: never wait there). Replicas stay equal only if every rank computes the same result bit by
    bit.
    """

    bandwidth_bps: float | None = None
    """Bandwidth estimate in use, bits/s; None if the method does not sense."""

    senses = False
    """True if round-trip times belong in this method's records."""

    asks_kernel = True
    """False in a step after which the kernel's view of the connections is not needed."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        """module: the model, for the names of its parameters; further options come as keywords."""
        self.group = group

    def begin(self) -> None:
        """Prepare for a backward."""

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        """Launch the exchange of one bucket; the future holds the mean gradient, in the bucket's shape and type.

        ledger: is told what is sent (``launch``, ``scheme``), how long coding takes (``coding``) and what share of the gradient
            is lost (``lose``), without which a report cannot compare the method with those that lose no more.
        """
        raise NotImplementedError

    def finish(self, ledger: Ledger) -> None:
        """Learn from a finished exchange."""

    def close(self) -> None:
        """End background work."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of this rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint of the same rank."""
