"""DeMo: the fast components of the momentum, beside backward."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not declared so
from torch.futures import Future

from netsenseml.compress.codec import Codec, add_decoded
from netsenseml.compress.sparsify import largest_in_chunks
from netsenseml.exchange.collective import all_reduce_mean
from netsenseml.exchange.collectives import all_gather, all_gather_bytes
from netsenseml.exchange.communicators import DIRECT_BYTES, Context, Cost, gather_cost
from netsenseml.exchange.mesh import Topology
from netsenseml.exchange.scheduler import Exchange
from netsenseml.methods.compressed import Compressed
from netsenseml.statistics import StepStatistics


class DeMo(Compressed):
    """DeMo (Peng, Quesnelle and Kingma, arXiv 2411.19870): every rank has its own momentum, and
    shares what is largest in it.

        m_r <- decay m_r + g_r
        q_r = the topk largest DCT coefficients of every square of m_r
        m_r <- m_r - q_r

    All ranks step by the mean q of q_r. So it is an exchange of gradients in every step, with the
    momentum as its memory, and is done in backward. The defaults are those of the authors' program:
    decay 0.999, and 32 coefficients of a square of 64 by 64 of a matrix. Of a side that 64 does not
    divide it takes the largest divisor below; a convolution is a matrix of its first dimension by
    all others.

    The paper's optimizer is SGD by sign(q), without a momentum but m. Ours is the user's, and
    ``update`` is what it is given as gradient: ``sign`` sign(q), ``mean`` q, ``auto`` the first if
    the optimizer is adaptive, as Adam, and the second if not. The learning rate of Adam counts in
    units of parameters, as the paper's does: of signs its second moment is 1, so that AdamW with
    beta1 = 0 makes the paper's step, with its weight decay. A beta1 of its own would average the
    signs, which are those of other components in every step, and was worse (small GPT on text, 300
    steps: loss 2.41 instead of 2.17). The testbed's worker takes it away, as it does for dgc; so
    should a script. The learning rate of SGD counts in units of gradients, which signs are not:
    with ``mean`` it keeps its momentum, and q is but a compressed gradient. As an optimizer shows
    what it is by stepping, the first step of ``auto`` is by q, of which Adam makes sign(q).

    How many coefficients it takes depends on the model: after 1000 steps of the small GPT of
    experiments/bench/demo_text.py the loss was 1.274 with AdamW, 1.277 with topk 256 (a 19th of the
    bytes), and 1.377 with the authors' 32 (a 91st), each with the better of two learning rates, and
    one seed.

    Of a coefficient that only some ranks send, the others count as 0; the authors' program takes
    the mean of those that do. The transforms are matrix products, whose last bits may differ from
    one kind of processor to another: the replicas are the same bit by bit among processors of one
    kind.
    """

    takes_shards = False

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        *,
        decay: float,
        chunk: int,
        topk: int,
        values: str,
        update: str,
    ) -> None:
        super().__init__(module, group, Coefficients((), chunk, topk, values, False))
        self._decay, self._chunk, self._topk, self._values = decay, chunk, topk, values
        self._update, self._adaptive = update, False

    def optimizer(self, *, adaptive: bool) -> None:
        self._adaptive = adaptive

    def begin(self) -> None:
        super().begin()
        self.memory.rescale(self._decay)

    def exchange(self, bucket: GradBucket, statistics: StepStatistics) -> Future[torch.Tensor]:
        statistics.scheme, parameters = f"demo/{self._values}", tuple(bucket.parameters())
        sign = self._update == "sign" or (self._update == "auto" and self._adaptive)
        shapes = tuple(parameter.shape for parameter in parameters)
        plan = Coefficients(shapes, self._chunk, self._topk, self._values, sign)
        return all_reduce_mean(bucket.buffer(), parameters, plan, self.mesh, statistics)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "adaptive": self._adaptive}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._adaptive = state["adaptive"]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Every rank sends the largest DCT coefficients of every chunk to all others: (N - 1) c bytes
    for c coded bytes, 1 latency term, N - 1 round a ring.

    shapes: of the parameters that the tensor consists of. sign: the result is the mean's signs, as
    floating point.
    """

    shapes: tuple[torch.Size, ...]
    chunk: int
    topk: int
    values: str
    sign: bool
    communicator: ClassVar[str] = "gather"
    dense: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"demo/{self.values}"

    @property
    def _squares(self) -> "list[Squares]":
        return [squares(shape, self.chunk) for shape in self.shapes if shape.numel()]

    def _parts(self, tensor: torch.Tensor) -> "list[tuple[Squares, torch.Tensor]]":
        """Of the tensor: a parameter each."""
        return list(
            zip(
                self._squares,
                tensor.split([square.rows * square.columns for square in self._squares]),
                strict=True,
            )
        )

    @property
    def elements(self) -> int:
        """Coefficients sent of the tensor."""
        return sum(square.count * min(self.topk, square.size) for square in self._squares)

    @property
    def codec(self) -> Codec:
        """Of the coefficients."""
        return Codec(self.values, self.elements / sum(shape.numel() for shape in self.shapes))

    def cost(self, elements: int, topology: Topology) -> Cost:
        sent = all_gather_bytes(self.codec.nbytes(elements), topology.ranks)
        return gather_cost(sent, topology, ring=sent > DIRECT_BYTES)

    def exchange(self, compensated: torch.Tensor, context: Context) -> Exchange:
        statistics, ranks = context.statistics, context.ranks
        with statistics.coding():
            coefficients = self.transform(compensated)
            slot = self.codec.encode(coefficients, context.seed, chosen=self.chosen(coefficients))
            compensated.copy_(self.invert(coefficients))
        sent = all_gather_bytes(len(slot), ranks)
        send = partial(all_gather, slot, context.stages[0], ring=sent > DIRECT_BYTES)
        rows = yield statistics.launch(send, sent, elements=self.elements)
        with statistics.coding():
            mean = coefficients.zero_()
            # rank after rank, so that the additions have the same order everywhere
            for row in rows:
                add_decoded(row, mean, 1 / ranks)
            result = context.out.copy_(self.invert(mean))
            return (
                torch.where(result.isnan(), result, result.sign(), out=result)
                if self.sign
                else result
            )

    def transform(self, tensor: torch.Tensor) -> torch.Tensor:
        """Coefficients of a tensor, shape (n,), square after square; likewise."""
        return torch.cat([square.transform(part) for square, part in self._parts(tensor)])

    def invert(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Inverse of ``transform``."""
        return torch.cat([square.invert(part) for square, part in self._parts(coefficients)])

    def chosen(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Positions of the largest of every square, ascending, int64."""
        parts, begin = [], 0
        for square, part in self._parts(coefficients):
            parts.append(
                begin
                + largest_in_chunks(part, square.size, min(self.topk, square.size) / square.size)
            )
            begin += len(part)
        return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Squares:
    """A matrix of rows x columns, cut into squares of height x width; a vector is one row."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def size(self) -> int:
        """Elements of a square."""
        return self.height * self.width

    @property
    def count(self) -> int:
        """Of the squares."""
        return self.rows * self.columns // self.size

    def transform(self, part: torch.Tensor) -> torch.Tensor:
        """Orthonormal DCT-II of every square, in both directions: shape (n,), row after row ->
        square after square."""
        down, across = (basis(side, part.device) for side in (self.height, self.width))
        bands = down @ part.view(-1, self.height, self.columns)
        cut = bands.view(len(bands), self.height, -1, self.width) @ across.T
        return cut.transpose(1, 2).reshape(-1)

    def invert(self, part: torch.Tensor) -> torch.Tensor:
        """Inverse of ``transform``, its transpose."""
        down, across = (basis(side, part.device) for side in (self.height, self.width))
        cut = part.view(self.rows // self.height, -1, self.height, self.width) @ across
        bands = cut.transpose(1, 2).reshape(-1, self.height, self.columns)
        return (down.T @ bands).view(-1)


@cache
def squares(shape: torch.Size, chunk: int) -> Squares:
    """How a parameter, which is not empty, is cut: sides are the largest divisors of its own up to
    ``chunk``."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = shape.numel() // rows
    return Squares(
        rows,
        columns,
        *(next(n for n in range(chunk, 0, -1) if side % n == 0) for side in (rows, columns)),
    )


@cache
def basis(side: int, device: torch.device) -> torch.Tensor:
    """Row k has the k-th cosine: shape (side, side), float32, orthonormal."""
    k = torch.arange(side, dtype=torch.float64)
    cosines = torch.cos(math.pi / side * (k + 0.5) * k[:, None]) * math.sqrt(2 / side)
    cosines[0] /= math.sqrt(2)
    return cosines.float().to(device)
