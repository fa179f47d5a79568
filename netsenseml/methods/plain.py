"""All-reduce as it is, and in a type of half the size."""

from functools import partial

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from netsenseml.exchange.collectives import all_reduce_bytes, all_reduce_hops, all_reduce_mean
from netsenseml.ledger import Ledger
from netsenseml.methods.base import Method


class AllReduce(Method):
    """DDP's own exchange: all-reduce of every bucket in the gradients' own type."""

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        ledger.scheme = "allreduce"
        ranks, gradient = self.group.size(), bucket.buffer()
        return ledger.launch(
            partial(allreduce_hook, self.group, bucket),
            payload_bytes=all_reduce_bytes(gradient.nbytes, ranks),
            hops=all_reduce_hops(ranks),
            elements=gradient.numel(),
        )


class Half(Method):
    """All-reduce in a type of 16 bits; what rounding takes is lost.

    PyTorch's hook for bfloat16 needs CUDA. This one also divides before it sums, so that float16 cannot overflow there.
    """

    dtype: torch.dtype

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        ledger.scheme = str(self.dtype).removeprefix("torch.")
        ranks, gradient = self.group.size(), bucket.buffer()
        with ledger.coding():
            half = gradient.to(self.dtype, copy=True)

        def decode(done: Future[torch.Tensor]) -> torch.Tensor:
            mean = done.value()
            with ledger.coding():
                return gradient.copy_(mean)

        return ledger.launch(
            partial(all_reduce_mean, half, self.group),
            payload_bytes=all_reduce_bytes(half.nbytes, ranks),
            hops=all_reduce_hops(ranks),
            elements=half.numel(),
        ).then(decode)


class BFloat16(Half):
    """8 bits of exponent and of precision: the range of float32."""

    dtype = torch.bfloat16


class Float16(Half):
    """11 bits of precision, but nothing above 65504."""

    dtype = torch.float16
