"""SparseLoCo: local updates of which few elements are sent, in two bits each."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.futures import Future

from netsenseml.compress.codec import Codec, add_decoded, positions
from netsenseml.compress.sparsify import kept_elements, largest_in_chunks
from netsenseml.exchange.collectives import all_gather, all_gather_bytes
from netsenseml.exchange.communicators import DIRECT_BYTES, Context, Cost, gather_cost
from netsenseml.exchange.mesh import Topology
from netsenseml.exchange.scheduler import Exchange
from netsenseml.methods.local import LocalUpdates, SharedState
from netsenseml.statistics import StepStatistics


class SparseLoCo(LocalUpdates):
    """SparseLoCo (Sarfi et al., arXiv 2508.15706): error feedback takes the place of DiLoCo's outer
    momentum.

        e_r <- decay e_r + (x - y_r)
        q_r = Q(top-k of every chunk of e_r)
        e_r <- e_r - q_r,  x <- x - outer_lr mean of q_r

    The defaults are those of the authors' run of 72 B parameters (arXiv 2603.08163): 30 inner
    steps, 64 of every 4096 elements, decay 0.95, an outer lr of 1. Their chunks are squares of a
    matrix, ours are successive elements of one parameter. Q is that of ``TwoBits``; theirs has four
    levels for a whole tensor.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        *,
        inner_steps: int,
        ratio: float,
        chunk: int,
        decay: float,
        outer_lr: float,
    ) -> None:
        super().__init__(
            module, group, "sparseloco/2bit", inner_steps=inner_steps, outer_lr=outer_lr
        )
        self._decay = decay
        self.plan = TwoBits(tuple(parameter.numel() for parameter in self.parts[0]), ratio, chunk)

    def exchange_mean(
        self, fragment: SharedState, statistics: StepStatistics
    ) -> Future[torch.Tensor]:
        self.memory.rescale(self._decay)
        return super().exchange_mean(fragment, statistics)


@dataclass(frozen=True, slots=True)
class TwoBits:
    """Every rank sends the largest elements of every chunk to all others, in two bits: (N - 1) c
    bytes for c coded bytes, 1 latency term, N - 1 round a ring.

    sizes: of the parameters that the tensor consists of; no chunk has elements of two. ratio: share
    that is sent of a chunk.

    Two bits are two signs: that of the value, and that of what is left of it less a mean magnitude,
    which has a mean magnitude of its own, both of 128 values. So a value becomes one of four
    levels, +-s +-t. With 64 of 4096 elements, a value takes 2 bits, 0.25 for its share of s and t,
    and 8 for its position (``layout``): 0.16 bits an element of the tensor.
    """

    sizes: tuple[int, ...]
    ratio: float
    chunk: int
    name: ClassVar[str] = "2bit"
    communicator: ClassVar[str] = "gather"
    dense: ClassVar[bool] = False

    @property
    def elements(self) -> int:
        """Sent of the tensor."""
        chunks, last = zip(*(divmod(size, self.chunk) for size in self.sizes), strict=True)
        return sum(chunks) * kept_elements(self.chunk, self.ratio) + sum(
            kept_elements(size, self.ratio) for size in last
        )

    @property
    def _codec(self) -> Codec:
        return Codec("sign", self.elements / sum(self.sizes))

    @property
    def nbytes(self) -> int:
        """Coded."""
        return self._codec.nbytes(sum(self.sizes)) + _SIGNS.nbytes(self.elements)

    def cost(self, elements: int, topology: Topology) -> Cost:
        sent = all_gather_bytes(self.nbytes, topology.ranks)
        return gather_cost(sent, topology, ring=sent > DIRECT_BYTES)

    def exchange(self, compensated: torch.Tensor, context: Context) -> Exchange:
        statistics, ranks = context.statistics, context.ranks
        with statistics.coding():
            slot = self.encode(compensated)
        sent = all_gather_bytes(len(slot), ranks)
        send = partial(all_gather, slot, context.stages[0], ring=sent > DIRECT_BYTES)
        rows = yield statistics.launch(send, sent, elements=self.elements)
        with statistics.coding():
            mean = context.out.zero_()
            # rank after rank, so that the additions have the same order everywhere
            for row in rows.to(mean.device):
                self.add_decoded(row, mean, 1 / ranks)
        return mean

    def encode(self, compensated: torch.Tensor) -> torch.Tensor:
        """The bytes, uint8 of shape (nbytes,); what was not sent stays in ``compensated``."""
        parts, begin = [], 0
        for part in compensated.split(self.sizes):
            parts.append(begin + largest_in_chunks(part, self.chunk, self.ratio))
            begin += len(part)
        chosen = torch.cat(parts)
        first = self._codec.encode(compensated, 0, chosen=chosen)
        left = compensated[chosen]
        second = _SIGNS.encode(left, 0)
        compensated[chosen] = left
        return torch.cat([first, second])

    def add_decoded(self, slot: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """Add ``scale`` times what was sent to ``out``, shape (n,)."""
        first, second = slot.split(
            [self.nbytes - _SIGNS.nbytes(self.elements), _SIGNS.nbytes(self.elements)]
        )
        add_decoded(first, out, scale)
        left = add_decoded(second, out.new_zeros(self.elements), scale)
        out.index_add_(0, positions(first), left)


_SIGNS = Codec("sign")
