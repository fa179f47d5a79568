"""All-reduce as it is, and in a type of half the size."""

from functools import partial

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from netsenseml.exchange.collectives import all_reduce_bytes, all_reduce_mean
from netsenseml.methods.base import Method
from netsenseml.statistics import StepStatistics


class AllReduce(Method):
    """DDP's own exchange: all-reduce of every bucket in the gradients' own type."""

    def exchange(self, bucket: GradBucket, statistics: StepStatistics) -> Future[torch.Tensor]:
        statistics.scheme = "allreduce"
        gradient = bucket.buffer()
        sent = all_reduce_bytes(gradient.nbytes, self.group.size())
        return statistics.launch(
            partial(allreduce_hook, self.group, bucket), sent, elements=gradient.numel()
        )


class Half(Method):
    """All-reduce in a type of 16 bits; what rounding takes is lost.

    PyTorch's hook for bfloat16 needs CUDA. This one also divides before it sums, so that float16
    cannot overflow there.
    """

    dtype: torch.dtype
    takes_complex = False

    def exchange(self, bucket: GradBucket, statistics: StepStatistics) -> Future[torch.Tensor]:
        statistics.scheme = str(self.dtype).removeprefix("torch.")
        gradient = bucket.buffer()
        with statistics.coding():
            half = gradient.to(self.dtype, copy=True)

        def decode(done: Future[torch.Tensor]) -> torch.Tensor:
            mean = done.value()
            with statistics.coding():
                return gradient.copy_(mean)

        sent = all_reduce_bytes(half.nbytes, self.group.size())
        return statistics.launch(
            partial(all_reduce_mean, half, self.group), sent, elements=half.numel()
        ).then(decode)


class BFloat16(Half):
    """8 bits of exponent and of precision: the range of float32."""

    dtype = torch.bfloat16


class Float16(Half):
    """11 bits of precision, but nothing above 65504."""

    dtype = torch.float16
