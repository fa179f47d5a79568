"""Methods of exchanging gradients, by name.

A method of your own is a class with the interface of ``Method``, named as ``package.module:Class``.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from netsenseml.agent.catalog import check_method, is_import_path
from netsenseml.compress.feedback import ErrorFeedback
from netsenseml.compress.pack import pack, unpack
from netsenseml.compress.sparsify import largest, slots
from netsenseml.control.bdp import BdpPolicy
from netsenseml.exchange.agreement import Agreement
from netsenseml.exchange.collectives import (
    all_gather_bytes,
    all_gather_hops,
    all_gather_slots,
    all_reduce_bytes,
    all_reduce_hops,
    all_reduce_mean,
)
from netsenseml.ledger import Ledger
from netsenseml.sensing.bandwidth import BandwidthEstimate


class Method:
    """How gradients cross the network.

    The session calls, on every rank in the same order: ``begin`` before the first bucket of a backward that
    synchronises, ``exchange`` for every bucket, ``finish`` when all buckets have been exchanged (on a thread of the
    process group: never wait there). Replicas stay equal only if every rank computes the same result bit by bit.
    """

    bandwidth_bps: float | None = None
    """Bandwidth estimate in use, bits/s; None if the method does not sense."""

    senses = False
    """True if round-trip times belong in this method's records."""

    def __init__(self, module: torch.nn.Module, group: dist.ProcessGroup) -> None:
        """module: the model, for the names of its parameters; further options come as keywords."""
        self.group = group

    def begin(self) -> None:
        """Prepare for a backward."""

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        """Launch the exchange of one bucket; the future holds the mean gradient, in the bucket's shape and type."""
        raise NotImplementedError

    def finish(self, ledger: Ledger) -> None:
        """Learn from a finished exchange."""

    def close(self) -> None:
        """End background work."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint."""


class AllReduce(Method):
    """DDP's own exchange: all-reduce of every bucket in the gradients' own type."""

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        ledger.scheme = "allreduce"
        payload = all_reduce_bytes(bucket.buffer().nbytes, self.group.size())
        return ledger.launch(partial(allreduce_hook, self.group, bucket), payload, bucket.buffer().numel(), _as_it_is)


class BFloat16(Method):
    """All-reduce in bfloat16: half the bytes, 8 bits of precision."""

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        ledger.scheme = "bf16"
        with ledger.coding():
            half = bucket.buffer().to(torch.bfloat16)
        payload = all_reduce_bytes(half.nbytes, self.group.size())
        send = partial(all_reduce_mean, half, self.group)
        return ledger.launch(send, payload, half.numel(), bucket.buffer().copy_)


class TopK(Method):
    """Every rank sends the same number of its largest elements; all else waits in the error feedback.

    What a rank wants to send is its gradient plus its residual: sent + new residual = gradient + old residual.
    """

    def __init__(self, module: torch.nn.Module, group: dist.ProcessGroup, ratio: float) -> None:
        super().__init__(module, group)
        self.ratio = ratio
        self.feedback = ErrorFeedback(module.named_parameters())

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        ledger.scheme = "topk"
        with ledger.coding():
            wanted = self.feedback.residual(bucket.parameters()).add_(bucket.buffer())
            chosen = largest(wanted, slots(wanted.numel(), self.ratio))
            slot = pack(wanted[chosen], chosen)
            wanted.index_fill_(0, chosen, 0)
        payload = all_gather_bytes(slot.nbytes, self.group.size())
        send = partial(all_gather_slots, slot, self.group)
        return ledger.launch(send, payload, chosen.numel(), partial(_mean_of_slots, bucket.buffer()))

    def exchange_all(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        """Plain all-reduce that also brings in what was left behind."""
        ledger.scheme = "allreduce"
        with ledger.coding():
            residual = self.feedback.residual(bucket.parameters())
            bucket.buffer().add_(residual)
            residual.zero_()
        payload = all_reduce_bytes(bucket.buffer().nbytes, self.group.size())
        return ledger.launch(partial(allreduce_hook, self.group, bucket), payload, bucket.buffer().numel(), _as_it_is)

    def state_dict(self) -> dict[str, Any]:
        return {"feedback": self.feedback.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.feedback.load_state_dict(state["feedback"])


class NetSense(TopK):
    """Sense, decide, compress: the ratio of every step is what the network can carry while the ranks compute.

    1. When a step's exchange is over, every rank shares what it measured: how long the exchange took, how long it had
       computed before, and the round-trip time. That runs behind the optimizer and the next forward.
    2. Before the first bucket of the next step, every rank feeds the same numbers into the same estimator and policy,
       and so arrives at the same ratio. At ratio 1 the step is a plain all-reduce.

    The time of an exchange is the shortest among the ranks, that of the rank which came last: the others were waiting
    for it, too.
    """

    senses = True

    def __init__(self, module: torch.nn.Module, group: dist.ProcessGroup, *, start: float, **options: float) -> None:
        self._policy = BdpPolicy(group.size(), start, **options)
        super().__init__(module, group, self._policy.ratio)
        self._estimate = BandwidthEstimate()
        self._agreement = Agreement(group)
        self._payload_bytes = self._dense_bytes = 0

    def begin(self) -> None:
        measured = self._agreement.result()
        if measured is None:
            return
        flight_s, window_s, _ = measured.amin(dim=0).tolist()
        hops = (all_reduce_hops if self.ratio == 1 else all_gather_hops)(self.group.size())
        latency_s = hops * measured[:, 2].mean().item() / 2
        self.bandwidth_bps = self._estimate.update(self._payload_bytes, flight_s, latency_s)
        self.ratio = self._policy.decide(self.bandwidth_bps, window_s, latency_s, self._dense_bytes)

    def exchange(self, bucket: GradBucket, ledger: Ledger) -> Future[torch.Tensor]:
        return (self.exchange_all if self.ratio == 1 else super().exchange)(bucket, ledger)

    def finish(self, ledger: Ledger) -> None:
        if not ledger.payload_bytes:  # a single rank has nobody to exchange with
            return
        self._payload_bytes, self._dense_bytes = ledger.payload_bytes, ledger.dense_bytes
        self._agreement.share([ledger.flight_s, ledger.window_s, ledger.tcp.min_rtt_s if ledger.tcp else 0.0])

    def close(self) -> None:
        self._agreement.result()


METHODS: Mapping[str, Callable[..., Method]] = {
    "allreduce": AllReduce,
    "bf16": BFloat16,
    "topk": TopK,
    "netsense": NetSense,
}


def make_method(name: str, module: torch.nn.Module, group: dist.ProcessGroup, options: Mapping[str, Any]) -> Method:
    """The method called ``name``; raises ValueError, one line, for a name or an option that does not exist."""
    resolved = check_method(name, options)
    method = load(name) if is_import_path(name) else METHODS[name]
    made: Method = method(module, group, **resolved)
    return made


def load(path: str) -> Any:
    """The object at ``package.module:attribute``; raises ValueError, one line, if there is none."""
    module, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load '{path}': {error}") from error
    return found


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _mean_of_slots(out: torch.Tensor, gathered: torch.Tensor) -> torch.Tensor:
    """Sum the ranks' slots into ``out`` and divide by their number: an index that several ranks kept adds up.

    Rank after rank, so that the additions have the same order everywhere and replicas stay equal bit by bit.
    """
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for slot in gathered:
        values, indices = unpack(slot)
        total.index_add_(0, indices, values)
    return out.copy_(total.div_(gathered.shape[0]))
