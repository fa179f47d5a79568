"""What a method of exchanging gradients is."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future

from netsenseml.statistics import StepStatistics


class Method:
    """How gradients cross the network.

    The session calls, on every rank in the same order: ``begin`` before the first bucket of a
    backward that synchronises, ``exchange`` for every bucket, ``end_backward`` when all buckets
    have been exchanged (on a thread of the process group or of the method: never wait there), and
    ``finish`` once the times of that are known: at once, or with gradients on an accelerator, which
    is behind, when the next backward has come to its last bucket, or where somebody asks. Replicas
    stay equal only if every rank computes the same result bit by bit. A method may also leave the
    gradients as they are, and exchange what came of them in ``after_step``.
    """

    bandwidth_bps: float | None = None
    """Bandwidth estimate in use, bits/s; None if the method does not sense."""

    senses = False
    """True if round-trip times belong in this method's records."""

    takes_complex = True
    """Whether gradients may be complex numbers."""

    takes_shards = True
    """Whether ``exchange`` does without knowing a bucket's number, and whether it is the last
    one."""

    holds_unused = False
    """Set where DDP looks for parameters that a step leaves out: what is kept for these must not be
    sent then."""

    keeps_copy = False
    """Set where steps may be undone."""

    takes_scaler = True
    """Whether it goes with a GradScaler."""

    waits = False
    """Whether ``exchange`` waits for other ranks."""

    steps_until_exchange = 1
    """How many steps a rank may make at most while another has stopped: until the next exchange."""

    optimizers: Collection[torch.optim.Optimizer] = ()
    """Those that have made a step with the model's gradients, as the session keeps them."""

    shares_buffers = True
    """Whether DDP may send the model's buffers from rank 0 to all others before every forward."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        """module: the model, for the names of its parameters; further options come as keywords."""
        self.group = group

    def begin(self) -> None:
        """Prepare for a backward."""

    def exchange(self, bucket: GradBucket, statistics: StepStatistics) -> Future[torch.Tensor]:
        """Launch the exchange of one bucket; the future holds the mean gradient, in the bucket's
        shape and type.

        statistics: is told what is sent (``launch``, ``scheme``), how long coding takes
            (``coding``) and what share of the gradient is lost (``lose``), without which a report
            cannot compare the method with those that lose no more.
        """
        raise NotImplementedError

    def end_backward(self) -> Callable[[StepStatistics], None]:
        """What is to be called as ``finish``: another one where that needs to know what the next
        backward changes."""
        return self.finish

    def finish(self, statistics: StepStatistics) -> None:
        """Learn from a finished exchange."""

    def optimizer(self, *, adaptive: bool) -> None:
        """What kind of optimizer takes the gradients. adaptive: it divides by a running second
        moment, as Adam does."""

    def rescale(self, factor: float, *, gradients: bool) -> None:
        """What is kept for later is to be so many times as large, as the learning rate has changed.

        gradients: these themselves are so many times as large now, as the loss scale has changed.
        """

    def after_step(self, statistics: StepStatistics) -> None:
        """The optimizer has made its step, or has left it out: exchange parameters now. May wait,
        which is exposed time."""

    def synchronize(self, statistics: StepStatistics) -> None:
        """Make the parameters of all ranks equal now, where they are not; called on all of them."""

    def synchronized(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has what all ranks had in common last; nobody waits."""
        return contextlib.nullcontext()

    def undo(self) -> None:
        """The optimizer left out this step; what was sent in it of what was kept is to be kept
        again."""

    def end_step(self) -> None:
        """A step is over, of one or several backwards; ``undo`` goes back to here."""

    def close(self) -> None:
        """End background work."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of this rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint of the same rank."""
