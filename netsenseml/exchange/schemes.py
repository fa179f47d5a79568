"""How the mean of a bucket is formed: what is sent, in how many stages, at what cost.

A scheme takes what a rank wants to send (its gradient plus what was left behind before), returns the mean of what all
ranks sent, bit for bit the same on every rank, and leaves in place what was not sent:

    mean of the results = mean of the wants - mean of what is left

n is the number of elements, N ranks exchange; payloads are what one rank sends, without TCP/IP headers.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist

from netsenseml.compress.codec import Codec, Sent, add_decoded
from netsenseml.compress.sparsify import slots
from netsenseml.exchange.collectives import (
    all_gather_bytes,
    all_gather_hops,
    all_gather_slots,
    all_reduce_bytes,
    all_reduce_hops,
    all_reduce_mean,
    all_to_all_chunks,
)
from netsenseml.exchange.conveyor import Exchange
from netsenseml.ledger import Ledger

_CHUNK = 256
"""Chunks of a bucket are multiples of a codec's block, so that only the last block of a bucket is incomplete."""


@dataclass(frozen=True, slots=True)
class Lot:
    """One bucket at the moment of its exchange.

    groups: a process group for every stage. shared_seed: differs between steps and buckets; the same on all ranks.
    sent: filled by the scheme with what was sent. out: shape (n,) float32, takes the mean; what it holds before is of no use.
    """

    groups: tuple[dist.ProcessGroup, dist.ProcessGroup]
    ledger: Ledger
    shared_seed: int
    sent: Sent
    out: torch.Tensor

    @property
    def rank(self) -> int:
        return self.groups[0].rank()

    @property
    def ranks(self) -> int:
        return self.groups[0].size()

    @property
    def seed(self) -> int:
        """Of stochastic rounding; differs between ranks, or their errors would not average out."""
        return self.shared_seed * self.ranks + self.rank


class Scheme(Protocol):
    """See the module."""

    @property
    def name(self) -> str:
        """As it appears in the records."""

    def payloads(self, elements: int, ranks: int) -> list[tuple[float, int]]:
        """(bytes that a rank sends, hops) of every stage, for a bucket of so many elements."""

    def exchange(self, wanted: torch.Tensor, lot: Lot) -> Exchange:
        """Exchange ``wanted``, shape (n,) float32, which holds afterwards what was not sent; returns the mean, likewise."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Ring all-reduce of elements of b bytes, 4 of float32: 2 b (N - 1) / N n bytes, 2 (N - 1) hops; nothing is left behind."""

    item_bytes: int = 4
    name: ClassVar[str] = "allreduce"

    def payloads(self, elements: int, ranks: int) -> list[tuple[float, int]]:
        return [(all_reduce_bytes(self.item_bytes * elements, ranks), all_reduce_hops(ranks))]

    def exchange(self, wanted: torch.Tensor, lot: Lot) -> Exchange:
        mean = lot.out.copy_(wanted)
        wanted.zero_()
        (payload, hops), *_ = Plain().payloads(len(wanted), lot.ranks)  # what was left behind is float32
        send = partial(all_reduce_mean, mean, lot.groups[0])
        result = yield lot.ledger.launch(send, payload_bytes=payload, hops=hops, elements=len(wanted))
        return result


@dataclass(frozen=True, slots=True)
class Gather:
    """Every rank sends its coded bucket to all others: (N - 1) c bytes for c coded bytes, 1 or N - 1 hops.

    Best for few elements: what arrives need not be coded again.
    """

    codec: Codec

    @property
    def name(self) -> str:
        return self.codec.name

    def payloads(self, elements: int, ranks: int) -> list[tuple[float, int]]:
        slot = self.codec.nbytes(elements)
        return [(all_gather_bytes(slot, ranks), all_gather_hops(slot, ranks))]

    def exchange(self, wanted: torch.Tensor, lot: Lot) -> Exchange:
        ledger = lot.ledger
        with ledger.coding():
            slot = self.codec.encode(wanted, lot.seed, sent=lot.sent)
        (payload, hops), *_ = self.payloads(len(wanted), lot.ranks)
        rows = yield ledger.launch(
            partial(all_gather_slots, slot, lot.groups[0]),
            payload_bytes=payload,
            hops=hops,
            elements=self.codec.elements(len(wanted)),
        )
        with ledger.coding():
            # Rank after rank, so that the additions have the same order everywhere.
            mean = lot.out.zero_()
            for row in rows:
                add_decoded(row, mean, 1 / lot.ranks)
        return mean


@dataclass(frozen=True, slots=True)
class WideGather:
    """Top-k as it is mostly published: a float32 and an int64 index for every value, 12 (N - 1) k bytes, 1 or N - 1 hops.

    Our kernels choose; only the form differs. As what arrives from all ranks takes more memory than the bucket, a
    large one is chosen from and exchanged in pieces of so many elements, one after another; the next bucket must wait for it.
    """

    density: float
    piece: int = 1 << 24

    @property
    def name(self) -> str:
        return f"topk12@{100 * self.density:.4g}%"

    def payloads(self, elements: int, ranks: int) -> list[tuple[float, int]]:
        whole, rest = divmod(elements, self.piece)
        bytes_of_slots = [_WIDE_BYTES * slots(size, self.density) for size in [self.piece] * whole + [rest] * (rest > 0)]
        return [(all_gather_bytes(slot, ranks), all_gather_hops(slot, ranks)) for slot in bytes_of_slots]

    def exchange(self, wanted: torch.Tensor, lot: Lot) -> Exchange:
        ledger, stages = lot.ledger, self.payloads(len(wanted), lot.ranks)
        for piece, mean, (payload, hops) in zip(wanted.split(self.piece), lot.out.split(self.piece), stages, strict=True):
            k, sent = slots(len(piece), self.density), Sent()
            with ledger.coding():
                mean.copy_(piece)
                Codec("fp32", self.density).encode(piece, lot.seed, sent=sent)
                positions = sent.positions.long() if sent.positions is not None else torch.arange(k)
                slot = torch.cat([mean[positions].view(torch.uint8), positions.view(torch.uint8)])
                mean.zero_()
            send = partial(all_gather_slots, slot, lot.groups[0])
            rows = yield ledger.launch(send, payload_bytes=payload, hops=hops, elements=k)
            with ledger.coding():
                for row in rows:
                    kept, places = row.split([4 * k, 8 * k])
                    mean.index_add_(0, places.clone().view(torch.int64), kept.clone().view(torch.float32), alpha=1 / lot.ranks)
        return lot.out


_WIDE_BYTES = 4 + 8


@dataclass(frozen=True, slots=True)
class TwoPhase:
    """Quantised all-reduce: every rank reduces one chunk of the bucket and tells all others: 2 (N - 1) / N c bytes for c
    coded bytes, 2 or N hops.

    1. All-to-all: rank r gets chunk r of every rank.
    2. It decodes and averages them, and codes the mean. The error of this second coding is known to rank r alone, so it
       keeps it for the next step, N times, as what it keeps counts for 1 / N of a mean.
    3. All-gather of the coded chunks.

    A ring that reduces coded values would code N - 1 times instead of twice (CGX calls this scatter-reduce-allgather).
    """

    codec: Codec

    @property
    def name(self) -> str:
        return self.codec.name

    def payloads(self, elements: int, ranks: int) -> list[tuple[float, int]]:
        chunks = [self.codec.nbytes(size) for size in chunk_sizes(elements, ranks)]
        return [(sum(chunks) * (ranks - 1) / ranks, 1), (all_gather_bytes(chunks[0], ranks), all_gather_hops(chunks[0], ranks))]

    def exchange(self, wanted: torch.Tensor, lot: Lot) -> Exchange:
        ledger, ranks = lot.ledger, lot.ranks
        sizes = chunk_sizes(len(wanted), ranks)
        chunks = wanted.split(sizes)
        own = chunks[lot.rank]
        stages = self.payloads(len(wanted), ranks)
        with ledger.coding():
            coded = [self.codec.encode(chunk, lot.seed * (ranks + 1) + i) for i, chunk in enumerate(chunks)]
        received = yield ledger.launch(
            partial(all_to_all_chunks, coded, lot.rank, lot.groups[0]),
            payload_bytes=stages[0][0],
            hops=stages[0][1],
            elements=len(wanted),
        )
        with ledger.coding():
            mean = torch.zeros_like(own)
            for row in received:
                add_decoded(row, mean, 1 / ranks)
            slot = torch.zeros(self.codec.nbytes(sizes[0]), dtype=torch.uint8, device=wanted.device)
            recoded = self.codec.encode(mean, lot.seed * (ranks + 1) + ranks)
            slot[: len(recoded)] = recoded
            own.add_(mean, alpha=ranks)
        rows = yield ledger.launch(
            partial(all_gather_slots, slot, lot.groups[1]),
            payload_bytes=stages[1][0],
            hops=stages[1][1],
        )
        with ledger.coding():
            result = lot.out.zero_()
            for row, chunk, size in zip(rows, result.split(sizes), sizes, strict=True):
                add_decoded(row[: self.codec.nbytes(size)], chunk)
        return result


@dataclass(frozen=True, slots=True)
class RandomK:
    """All-reduce of elements that chance chooses, the same on all ranks, so that no index crosses the network.

    One element from each of k equal parts of the bucket: k distinct elements in time O(k). 8 (N - 1) / N k bytes.
    """

    density: float

    @property
    def name(self) -> str:
        return f"random@{100 * self.density:.4g}%"

    def payloads(self, elements: int, ranks: int) -> list[tuple[float, int]]:
        return [(all_reduce_bytes(4 * slots(elements, self.density), ranks), all_reduce_hops(ranks))]

    def chosen(self, elements: int, seed: int) -> torch.Tensor:
        """Indices of the elements, ascending, int64."""
        k = slots(elements, self.density)
        edges = torch.arange(k + 1) * elements // max(k, 1)
        within = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return edges[:-1] + (within * edges.diff()).long()

    def exchange(self, wanted: torch.Tensor, lot: Lot) -> Exchange:
        with lot.ledger.coding():
            chosen = self.chosen(len(wanted), lot.shared_seed).to(wanted.device)
            values = wanted[chosen]
            wanted[chosen] = 0
        (payload, hops), *_ = self.payloads(len(wanted), lot.ranks)
        send = partial(all_reduce_mean, values, lot.groups[0])
        mean = yield lot.ledger.launch(send, payload_bytes=payload, hops=hops, elements=len(chosen))
        with lot.ledger.coding():
            return lot.out.zero_().index_copy_(0, chosen, mean)


def by_name(name: str) -> Scheme:
    """The scheme with a name as the records have it; raises ValueError, one line."""
    if name == Plain.name:
        return Plain()
    codec = Codec.parse(name)
    return TwoPhase(codec) if codec.density == 1 else Gather(codec)


def chunk_sizes(elements: int, ranks: int) -> list[int]:
    """Elements of each rank's chunk; all are equal but for the last ones, which may be smaller or empty."""
    full = -(-elements // ranks)
    full = -(-full // _CHUNK) * _CHUNK
    return [max(0, min(full, elements - i * full)) for i in range(ranks)]
