"""How the mean of a tensor is formed: what is sent, in how many stages, at what cost.

A *plan* is a communicator with its compressor (``Codec``). It takes what a rank wants to send
(gradient plus residual), returns the mean of what all ranks sent, bit for bit the same on every
rank, and leaves in place what was not sent:

    mean of the results = mean of what was to be sent - mean of the residuals

n is the number of elements, N ranks exchange; bytes are what one rank sends, without TCP/IP
headers. A *latency term* is the time in which an empty message gets to another rank and is taken
there; stages, and hops of a ring, pass theirs one after another.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.distributed as dist

from netsenseml.compress.codec import Codec, Sent, add_decoded
from netsenseml.compress.sparsify import kept_elements
from netsenseml.exchange.collectives import (
    all_gather,
    all_gather_bytes,
    all_reduce_bytes,
    all_reduce_mean,
    all_to_all_chunks,
)
from netsenseml.exchange.mesh import Mesh, Topology
from netsenseml.exchange.scheduler import Exchange
from netsenseml.statistics import StepStatistics

_HOST, _RING = "host-", "-ring"
_CHUNK = 256
"""Chunks of a tensor are multiples of every codec's block, so that only the last block of a tensor
is incomplete."""


class Cost(NamedTuple):
    """What an exchange costs a rank. sent_bytes: by this rank. host_bytes: across its host's
    network interface, one way."""

    sent_bytes: float
    host_bytes: float
    latency_terms: int


@dataclass(frozen=True, slots=True)
class Context:
    """One tensor at the moment of its exchange.

    rank, stages: this rank's number in the groups that exchange, one for every stage. number: of
    the exchange, the same on all ranks. out: shape (n,) float32, takes the mean; what it holds
    before is of no use. sent: filled by the compressor.
    """

    mesh: Mesh
    statistics: StepStatistics
    number: int
    out: torch.Tensor
    sent: Sent
    rank: int
    stages: tuple[dist.ProcessGroup, dist.ProcessGroup]

    @property
    def ranks(self) -> int:
        return self.stages[0].size()

    @property
    def seed(self) -> int:
        """Of stochastic rounding; differs between ranks, or their errors would not average out."""
        return self.number * self.mesh.ranks + self.mesh.rank

    def of_share(self, out: torch.Tensor) -> "Context":
        """The same among the ranks of all hosts that have this rank's number within theirs. out:
        its share of ``out``."""
        mesh = self.mesh
        stages = mesh.cross_host_stage(0), mesh.cross_host_stage(1)
        return replace(
            self, rank=mesh.cross_host_ranks.index(mesh.rank), stages=stages, out=out, sent=Sent()
        )


class Plan(Protocol):
    """See the module."""

    @property
    def name(self) -> str:
        """As it appears in the records."""

    @property
    def communicator(self) -> str:
        """What its time depends on, beside bytes: plans of one communicator differ in nothing
        else."""

    @property
    def dense(self) -> bool:
        """Whether all elements are sent."""

    def cost(self, elements: int, topology: Topology) -> Cost:
        """Of exchanging so many elements."""

    def exchange(self, compensated: torch.Tensor, context: Context) -> Exchange:
        """Exchange ``compensated``, shape (n,) float32, which holds afterwards what was not sent;
        returns the mean, likewise."""


@dataclass(frozen=True, slots=True)
class RingAllReduce:
    """Ring all-reduce of the gradients as they are: 2 b (N - 1) / N n bytes with b bytes an
    element, 2 (N - 1) latency terms.

    A ring crosses a host's interface once, however many of its ranks are on the host, if these are
    numbered one after another.
    """

    item_bytes: int = 4
    name: ClassVar[str] = "allreduce"
    communicator: ClassVar[str] = "ring"
    dense: ClassVar[bool] = True

    def cost(self, elements: int, topology: Topology) -> Cost:
        sent = all_reduce_bytes(self.item_bytes * elements, topology.ranks)
        return Cost(sent, sent, 2 * (topology.ranks - 1))

    def exchange(self, compensated: torch.Tensor, context: Context) -> Exchange:
        mean = context.out.copy_(compensated)
        compensated.zero_()
        sent = all_reduce_bytes(mean.nbytes, context.ranks)
        send = partial(all_reduce_mean, mean, context.stages[0])
        return mean.copy_((yield context.statistics.launch(send, sent, elements=len(mean))))


@dataclass(frozen=True, slots=True)
class DirectAllReduce:
    """Every rank reduces one chunk and tells all others: 2 (N - 1) / N c bytes for c coded bytes, 2
    latency terms.

    1. All-to-all: rank r gets chunk r of every other rank; its own stays exact.
    2. It averages them, and codes the mean. The error of this second coding is known to rank r
    alone, so it
       keeps it for the next step, N times, as what it keeps counts for 1 / N of a mean.
    3. All-gather of the coded chunks: to every rank directly, or with ``ring`` round the ring,
       where every link carries one flow at a time and N - 1 latency terms are passed.

    A ring that reduces coded values would code N - 1 times instead of twice (CGX calls this
    scatter-reduce-allgather).
    """

    codec: Codec
    ring: bool = False
    dense: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.codec.name + _RING * self.ring

    @property
    def communicator(self) -> str:
        return "direct" + _RING * self.ring

    def cost(self, elements: int, topology: Topology) -> Cost:
        chunks = [self.codec.nbytes(size) for size in chunk_sizes(elements, topology.ranks)]
        scattered = sum(chunks) * (topology.ranks - 1) / topology.ranks
        gathered = all_gather_bytes(chunks[0], topology.ranks)
        crossing = topology.ranks_crossing
        host_bytes = crossing * scattered + (1 if self.ring else crossing) * gathered
        return Cost(scattered + gathered, host_bytes, 1 + (topology.ranks - 1 if self.ring else 1))

    def exchange(self, compensated: torch.Tensor, context: Context) -> Exchange:
        statistics, rank, ranks = context.statistics, context.rank, context.ranks
        codec, sizes = self.codec, chunk_sizes(len(compensated), ranks)
        chunks = compensated.split(sizes)
        own = chunks[rank]
        with statistics.coding():
            empty = torch.empty(0, dtype=torch.uint8, device=compensated.device)
            seed = context.seed * (ranks + 1)
            coded = [
                empty if i == rank else codec.encode(chunk, seed + i)
                for i, chunk in enumerate(chunks)
            ]
        size = codec.nbytes(sizes[rank])
        received = yield statistics.launch(
            partial(
                all_to_all_chunks,
                coded,
                [0 if i == rank else size for i in range(ranks)],
                context.stages[0],
            ),
            sum(map(len, coded)),
            elements=len(compensated),
        )
        with statistics.coding():
            mean = torch.zeros_like(own)
            rows = iter(received.view(ranks - 1, size)) if ranks > 1 else iter(())
            for i in range(ranks):  # in the same order on every rank
                if i == rank:
                    mean.add_(own, alpha=1 / ranks)
                else:
                    add_decoded(next(rows), mean, 1 / ranks)
            slot = torch.zeros(codec.nbytes(sizes[0]), dtype=torch.uint8, device=compensated.device)
            recoded = codec.encode(mean, seed + ranks)
            slot[: len(recoded)] = recoded
            torch.mul(mean, ranks, out=own)
        gathered = yield statistics.launch(
            partial(all_gather, slot, context.stages[1], ring=self.ring),
            all_gather_bytes(len(slot), ranks),
        )
        with statistics.coding():
            result = context.out.zero_()
            for row, chunk, size in zip(gathered, result.split(sizes), sizes, strict=True):
                add_decoded(row[: codec.nbytes(size)], chunk)
        return result


@dataclass(frozen=True, slots=True)
class SparseAllGather:
    """Every rank sends its coded tensor to all others: (N - 1) c bytes for c coded bytes, 1 latency
    term, N - 1 with ``ring``.

    Best for few elements: what arrives need not be coded again.
    """

    codec: Codec
    ring: bool = False

    @property
    def name(self) -> str:
        return self.codec.name + _RING * self.ring

    @property
    def communicator(self) -> str:
        return "gather" + _RING * self.ring

    @property
    def dense(self) -> bool:
        return self.codec.density == 1

    def cost(self, elements: int, topology: Topology) -> Cost:
        sent = all_gather_bytes(self.codec.nbytes(elements), topology.ranks)
        return gather_cost(sent, topology, self.ring)

    def exchange(self, compensated: torch.Tensor, context: Context) -> Exchange:
        statistics, ranks = context.statistics, context.ranks
        with statistics.coding():
            slot = self.codec.encode(compensated, context.seed, sent=context.sent)
        rows = yield statistics.launch(
            partial(all_gather, slot, context.stages[0], ring=self.ring),
            all_gather_bytes(len(slot), ranks),
            elements=self.codec.elements(len(compensated)),
        )
        with statistics.coding():
            # Rank after rank, so that the additions have the same order everywhere.
            mean = context.out.zero_()
            for row in rows:
                add_decoded(row, mean, 1 / ranks)
        return mean


@dataclass(frozen=True, slots=True)
class Hierarchical:
    """The ranks of a host form their mean exactly, each of a share of the tensor, exchange their
    shares with the same ranks of the other hosts, and tell each other.

    1. All-to-all within the host: its l-th rank gets the l-th share of every other one, and
    averages them in float32.
    2. It exchanges this mean by the inner plan with the l-th ranks of the other hosts. The residual
       is its own, L times, as it counts for one of the host's L ranks in the next mean.
    3. All-gather of the shares within the host.

    A host's interface carries no more than if the host were one rank, and each rank codes one L-th.
    Within a host it goes through NCCL where each rank has a GPU of its own and the group of DDP is
    NCCL's, else through Gloo. Worth its two more stages where the network is thinner than what
    joins the ranks of a host. Where hosts are of unequal size, or there is but one, all ranks
    exchange as if each had a host of its own.
    """

    inner: DirectAllReduce | SparseAllGather

    @property
    def name(self) -> str:
        return _HOST + self.inner.name

    @property
    def communicator(self) -> str:
        return _HOST + self.inner.communicator

    @property
    def dense(self) -> bool:
        return self.inner.dense

    def cost(self, elements: int, topology: Topology) -> Cost:
        shares = [
            self.inner.cost(share, topology.of_hosts)
            for share in chunk_sizes(elements, topology.ranks_per_host)
        ]
        sent, across, terms = zip(*shares, strict=True)
        return Cost(sum(sent) / len(shares), sum(across), max(terms))

    def exchange(self, compensated: torch.Tensor, context: Context) -> Exchange:
        mesh, statistics, ranks = (
            context.mesh,
            context.statistics,
            context.mesh.topology.ranks_per_host,
        )
        if ranks == 1 or not len(compensated):  # Gloo exchanges no tensors without elements
            return (yield from self.inner.exchange(compensated, context))
        number, sizes = mesh.host_ranks.index(mesh.rank), chunk_sizes(len(compensated), ranks)
        own, out = compensated.split(sizes)[number], context.out.split(sizes)
        # Now, as all ranks are in the same order here. An exchange with a gather comes to its end a
        # stage sooner than one with an all-reduce; hence a group for each.
        end = mesh.host_stage(2 if isinstance(self.inner, DirectAllReduce) else 1)
        of_share = context.of_share(out[number])
        send = partial(
            all_to_all_chunks, compensated.split(sizes), [len(own)] * ranks, mesh.host_stage(0)
        )
        shares = (yield statistics.launch(send, 0)).to(compensated.device)
        with statistics.coding():
            mean = shares.view(ranks, len(own)).div_(ranks).sum(0)
            compensated.zero_()
        result = yield from self.inner.exchange(mean, of_share)
        with statistics.coding():
            torch.mul(mean, ranks, out=own)
            context.sent.residual_scale = ranks**0.5
            slot = result.new_zeros(sizes[0])
            slot[: len(result)] = result
        for row, share in zip(
            (yield statistics.launch(partial(all_gather, slot, end, ring=True), 0)),
            out,
            strict=True,
        ):
            share.copy_(row[: len(share)], non_blocking=True)
        return context.out


def gather_cost(sent: float, topology: Topology, ring: bool) -> Cost:
    """Of an all-gather in which every rank sends so many bytes in all: round a ring, or directly to
    all others."""
    return Cost(
        sent, sent if ring else topology.ranks_crossing * sent, topology.ranks - 1 if ring else 1
    )


@dataclass(frozen=True, slots=True)
class WideAllGather:
    """Top-k as it is mostly published: a float32 and an int64 index for every value, 12 (N - 1) k
    bytes, 1 latency term.

    Our kernels choose; only the form differs. As what arrives from all ranks takes more memory than
    the tensor, a large one is chosen from and exchanged in pieces of so many elements, one after
    another; the next tensor must wait for it.
    """

    density: float
    piece: int = 1 << 24
    dense: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"topk12@{100 * self.density:.4g}%"

    @property
    def communicator(self) -> str:
        return self.name

    def cost(self, elements: int, topology: Topology) -> Cost:
        sent = (
            _WIDE_BYTES
            * (topology.ranks - 1)
            * sum(kept_elements(size, self.density) for size in self._pieces(elements))
        )
        return Cost(sent, topology.ranks_crossing * sent, len(self._pieces(elements)))

    def _pieces(self, elements: int) -> list[int]:
        whole, rest = divmod(elements, self.piece)
        return [self.piece] * whole + [rest] * (rest > 0)

    def exchange(self, compensated: torch.Tensor, context: Context) -> Exchange:
        statistics, ranks = context.statistics, context.ranks
        for piece, mean in zip(
            compensated.split(self.piece), context.out.split(self.piece), strict=True
        ):
            k, sent = kept_elements(len(piece), self.density), Sent()
            with statistics.coding():
                mean.copy_(piece)
                Codec("fp32", self.density).encode(piece, 0, sent=sent)
                positions = (
                    sent.positions.long()
                    if sent.positions is not None
                    else torch.arange(k, device=piece.device)
                )
                slot = torch.cat([mean[positions].view(torch.uint8), positions.view(torch.uint8)])
                mean.zero_()
            send = partial(
                all_gather, slot, context.stages[0], ring=len(slot) * (ranks - 1) > DIRECT_BYTES
            )
            rows = yield statistics.launch(send, all_gather_bytes(len(slot), ranks), elements=k)
            with statistics.coding():
                for row in rows.to(piece.device):
                    kept, places = (part.clone() for part in row.split([4 * k, 8 * k]))
                    mean.index_add_(
                        0, places.view(torch.int64), kept.view(torch.float32) * (1 / ranks)
                    )
        return context.out


_WIDE_BYTES = 4 + 8
DIRECT_BYTES = 1 << 19
"""Methods that cannot choose gather up to so many bytes directly, and more of them round the ring.
Measured with 4 ranks at 20, 100 and 500 Mbit/s: 2 kB take 1.8 ms directly and 3.5 ms round the
ring, 100 and 500 kB the same, 2 MB 7 to 22 % longer directly."""


@dataclass(frozen=True, slots=True)
class BySize:
    """The inner plan, directly or round a ring, by ``DIRECT_BYTES``: the best form of a method that
    senses nothing."""

    inner: DirectAllReduce | SparseAllGather

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def communicator(self) -> str:
        return self.inner.communicator

    @property
    def dense(self) -> bool:
        return self.inner.dense

    def chosen(self, elements: int, ranks: int) -> "DirectAllReduce | SparseAllGather":
        """The form for so many elements."""
        inner = self.inner
        gathered = (
            chunk_sizes(elements, ranks)[0] if isinstance(inner, DirectAllReduce) else elements
        )
        return replace(
            inner, ring=all_gather_bytes(inner.codec.nbytes(gathered), ranks) > DIRECT_BYTES
        )

    def cost(self, elements: int, topology: Topology) -> Cost:
        return self.chosen(elements, topology.ranks).cost(elements, topology)

    def exchange(self, compensated: torch.Tensor, context: Context) -> Exchange:
        return self.chosen(len(compensated), context.ranks).exchange(compensated, context)


@dataclass(frozen=True, slots=True)
class RandomK:
    """All-reduce of elements that chance chooses, the same on all ranks, so that no index crosses
    the network.

    One element from each of k equal parts of the tensor: k distinct elements in time O(k). 8 (N -
    1) / N k bytes.
    """

    density: float
    dense: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"random@{100 * self.density:.4g}%"

    @property
    def communicator(self) -> str:
        return self.name

    def cost(self, elements: int, topology: Topology) -> Cost:
        return RingAllReduce().cost(kept_elements(elements, self.density), topology)

    def chosen(self, elements: int, seed: int) -> torch.Tensor:
        """Indices of the elements, ascending, int64."""
        k = kept_elements(elements, self.density)
        edges = torch.arange(k + 1) * elements // max(k, 1)
        within = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return edges[:-1] + (within * edges.diff()).long()

    def exchange(self, compensated: torch.Tensor, context: Context) -> Exchange:
        with context.statistics.coding():
            chosen = self.chosen(len(compensated), context.number).to(compensated.device)
            values = compensated[chosen]
            compensated[chosen] = 0
        sent = all_reduce_bytes(values.nbytes, context.ranks)
        send = partial(all_reduce_mean, values, context.stages[0])
        mean = yield context.statistics.launch(send, sent, elements=len(chosen))
        with context.statistics.coding():
            return context.out.zero_().index_copy_(0, chosen, mean.to(chosen.device))


def parse(name: str) -> Plan:
    """The plan with a name as the records have it; raises ValueError, one line."""
    if name == RingAllReduce.name:
        return RingAllReduce()
    if name.startswith(_HOST):
        inner = parse(name.removeprefix(_HOST))
        if isinstance(inner, DirectAllReduce | SparseAllGather):
            return Hierarchical(inner)
    codec = Codec.parse(name.removesuffix(_RING))
    ring = name.endswith(_RING)
    return DirectAllReduce(codec, ring) if codec.density == 1 else SparseAllGather(codec, ring)


def chunk_sizes(elements: int, ranks: int) -> list[int]:
    """Elements of each rank's chunk; all are equal but for the last ones, which may be smaller or
    empty."""
    full = -(-elements // ranks)
    full = -(-full // _CHUNK) * _CHUNK
    return [max(0, min(full, elements - i * full)) for i in range(ranks)]
