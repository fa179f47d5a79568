"""Error feedback: what was not sent is kept and added to the next gradient."""

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

import torch

from netsenseml.streams import use_here

_SAMPLE = 1 << 16
_RELEASE = 0.5
"""Times the norm of a gradient: so much of a residual goes with it at most where all is sent. All
at once is a step that clipping cuts away and that Adam's second moment remembers: the norm of what
was sent went 0.8, 3.7, 0.5 in one training."""

Key = Hashable
"""Finds a residual: any name, or the tuple of parameters that a bucket consists of, whose residuals
are kept one by one."""


class Compensated(NamedTuple):
    """What is to be sent of one tensor now, and what waits for a later time.

    tensor: shape (n,), float32; the memory itself, in which what is not sent is to be left. held:
    parts of it and what must be added to them again after the exchange. gradient_norm: estimate of
    the gradient's.
    """

    tensor: torch.Tensor
    held: list[tuple[torch.Tensor, torch.Tensor]]
    gradient_norm: float


class ErrorFeedback:
    """Residuals by key, and velocities beside them if there is a momentum.

        sent + new residual = gradient + old residual

    DDP rebuilds its buckets after the first backward, so a bucket's number says nothing about what
    is in it. What is kept for a bucket is one float32 tensor of a row for each memory; when the
    same parameters turn up in another arrangement, what is kept for them moves along.

    With ``momentum`` m, this is the momentum correction of deep gradient compression (Lin et al.,
    ICLR 2018): instead of the gradient g, its velocity u is accumulated in the residual v,

        u <- m u + g,  v <- v + u

    so that an element that waits gains as much momentum as one that is sent at once. Then the
    optimizer must have no momentum of its own. ``settle`` forgets the velocity of what was sent,
    lest a delayed gradient be carried on (momentum factor masking). Where all is sent nothing is
    delayed, and without a mask this is plain momentum.

    limit: a residual that outgrows so many times its gradient's norm is scaled down to that. None:
    never. ``holds_unused``: nothing is sent for a parameter whose gradient is exactly zero. Where
    all ranks left it out of their forward, DDP drops what arrives for it, and what was sent would
    be lost. ``keeps_copy``: see ``restore``.
    """

    def __init__(
        self,
        names: Iterable[tuple[str, torch.Tensor]] = (),
        *,
        momentum: float = 0.0,
        limit: float | None = None,
    ) -> None:
        """names: of the parameters that keys consist of, for checkpoints."""
        self.momentum = momentum
        self.limit = limit
        self.holds_unused = False
        self.keeps_copy = False
        self._rows = 2 if momentum else 1
        self._names: dict[Key, str] = {parameter: name for name, parameter in names}
        self._flat: dict[tuple[Key, ...], torch.Tensor] = {}
        self._kept: dict[Key, torch.Tensor] = {}
        self._copies: list[tuple[tuple[Key, ...], torch.Tensor]] = []

    def compensate(self, key: Key, gradient: torch.Tensor, *, dense: bool) -> Compensated:
        """Gradient, shape (n,), floating point, plus residual. Call ``settle`` after the exchange.

        dense: all elements are sent, so that no more of the residual goes with them than
        ``_RELEASE`` allows.
        """
        parts = _parts(key)
        rows = self._tensor(parts, gradient)
        if self.keeps_copy:
            self._copies.append((parts, rows.clone()))
        residual, *velocity = rows
        gradient_norm = norm(gradient)
        held = []
        if dense and (size := norm(residual)) > _RELEASE * gradient_norm:
            released = _RELEASE * gradient_norm / size
            held.append((residual, residual * (1 - released)))
            residual.mul_(released)
        unused = []
        if self.holds_unused:
            sizes = [_size(part, gradient) for part in parts]
            for view, of_part in zip(rows.split(sizes, dim=1), gradient.split(sizes), strict=True):
                if not of_part.any():
                    unused.append(view)
                    held.append((view, view.clone()))
        for v in velocity:
            gradient = torch.add(gradient, v, alpha=self.momentum, out=v)
        residual.add_(gradient)
        for view in unused:
            view.zero_()
        return Compensated(residual, held, gradient_norm)

    def settle(
        self,
        key: Key,
        exchanged: Compensated,
        sent: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
    ) -> float:
        """End the exchange of what ``compensate`` returned; returns the norm of what is kept over
        that of the gradient.

        sent: positions of what was sent, shape (k,), integer; None if all or unknown. What is not
        finite is forgotten: all ranks have seen that there was an overflow, and it must not come
        back for ever.
        scale: norm of the residual over that of what was not sent, and so the factor of ``limit``.
        """
        residual = exchanged.tensor
        rows = self._tensor(_parts(key), residual)
        if self.momentum and sent is not None:
            rows[1].index_fill_(0, sent.long(), 0)
        for view, kept in exchanged.held:
            view.add_(kept)
        size = norm(residual)
        if not math.isfinite(size) or not rows.sum().isfinite():
            rows.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            return 0.0
        ratio = size / exchanged.gradient_norm if exchanged.gradient_norm > 0 else 0.0
        if self.limit is not None and ratio > (limit := self.limit * scale):
            residual.mul_(limit / ratio)
            return limit
        return ratio

    def holds(self, key: Key) -> bool:
        """Whether anything is kept for a key."""
        return any(part in self._kept for part in _parts(key))

    def forget(self, key: Key) -> None:
        """Free what is kept for a key."""
        for part in _parts(key):
            self._kept.pop(part, None)
        self._flat.pop(_parts(key), None)

    def take(self, key: Key) -> torch.Tensor | None:
        """The residual of a key that is a name, shape (n,), or None; nothing is kept for it any
        more."""
        if key not in self._kept:
            return None
        residual = self._kept[key][0]
        use_here(residual)
        self.forget(key)
        return residual

    def add(self, key: Key, tensor: torch.Tensor) -> None:
        """Keep a tensor, shape (n,), as if an exchange had left it behind. Between two exchanges of
        the key."""
        self._tensor(_parts(key), tensor)[0].add_(tensor)

    def rescale(self, factor: float, *, velocity: bool = True) -> None:
        """What is kept is to be ``factor`` times as large. velocity: that, too, as the gradients
        themselves have another unit."""
        for rows in self._kept.values():
            use_here(rows)
            (rows if velocity else rows[:1]).mul_(factor)

    def drop_copies(self) -> None:
        """A step is over; ``restore`` goes back to here."""
        self._copies.clear()

    def restore(self) -> None:
        """The optimizer left the step out: what was sent in it is kept for the next. Needs
        ``keeps_copy``."""
        for parts, copy in reversed(self._copies):
            self._tensor(parts, copy[0]).copy_(copy)
        self._copies.clear()

    def _tensor(self, parts: tuple[Key, ...], like: torch.Tensor) -> torch.Tensor:
        if parts not in self._flat:
            self._arrange(parts, like)
        use_here(self._flat[parts])
        return self._flat[parts]

    def _arrange(self, parts: tuple[Key, ...], like: torch.Tensor) -> None:
        sizes = [_size(part, like) for part in parts]
        flat = torch.zeros(self._rows, sum(sizes), dtype=torch.float32, device=like.device)
        moved = set(parts)
        self._flat = {key: kept for key, kept in self._flat.items() if moved.isdisjoint(key)}
        self._flat[parts] = flat
        for part, view in zip(parts, flat.split(sizes, dim=1), strict=True):
            if part in self._kept:
                view.copy_(self._kept[part])
            self._kept[part] = view

    def state_dict(self) -> dict[str, torch.Tensor]:
        """By the name of every key that has one its residual, and by ``NAME:velocity`` its
        velocity."""
        return {
            f"{self._names.get(part, str(part))}{suffix}": row.clone()
            for part, rows in self._kept.items()
            for suffix, row in zip(_SUFFIXES, rows, strict=False)
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over a checkpoint; raises ValueError, one line, for a parameter that does not exist
        or has another size."""
        keys: dict[str, Key] = {name: parameter for parameter, name in self._names.items()}
        self._flat, self._kept = {}, {}
        for name, value in state.items():
            plain = name.removesuffix(_VELOCITY)
            part = keys.get(plain, plain)
            if keys and plain not in keys:
                raise ValueError(
                    f"the checkpoint has a residual of '{plain}', which is no parameter of this"
                    " model"
                )
            if isinstance(part, torch.Tensor) and part.numel() != value.numel():
                raise ValueError(
                    f"the checkpoint's residual of '{plain}' has {value.numel()} elements, not"
                    f" {part.numel()}"
                )
            device = part.device if isinstance(part, torch.Tensor) else value.device
            rows = self._kept.setdefault(
                part, torch.zeros(self._rows, value.numel(), device=device)
            )
            if plain == name:
                rows[0] = value.reshape(-1)
            elif self.momentum:
                rows[1] = value.reshape(-1)


_VELOCITY = ":velocity"
_SUFFIXES = ("", _VELOCITY)


def _parts(key: Key) -> tuple[Key, ...]:
    return (
        key
        if isinstance(key, tuple) and all(isinstance(part, torch.Tensor) for part in key)
        else (key,)
    )


def _size(part: Key, whole: torch.Tensor) -> int:
    return part.numel() if isinstance(part, torch.Tensor) else whole.numel()


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Up to about 64 Ki elements of a tensor, evenly spaced; a copy."""
    return tensor[:: tensor.numel() // _SAMPLE | 1].clone()


def norm(tensor: torch.Tensor) -> float:
    """Estimate of the Euclidean norm, from ``sample``."""
    some = tensor[:: tensor.numel() // _SAMPLE | 1]
    return math.sqrt(tensor.numel() / max(some.numel(), 1)) * float(
        torch.linalg.vector_norm(some, dtype=torch.float64)
    )


def energy_lost(before: torch.Tensor, residual: torch.Tensor) -> float:
    """Share of the energy (sum of squares) of a tensor that was left behind, estimated from
    ``before = sample(tensor)``.

    0 if there was none; NaN if it was not finite.
    """
    whole = before.double().square().sum()
    left = sample(residual).double().square().sum()
    return float(left / whole) if whole else 0.0
