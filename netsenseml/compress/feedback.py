"""Error feedback: what was not sent is kept and added to the next gradient."""

from collections.abc import Iterable, Mapping, Sequence

import torch

_SAMPLE = 1 << 16


class ErrorFeedback:
    """Residuals keyed by parameter, and velocities beside them if there is a momentum.

    DDP rebuilds its buckets after the first backward, so a bucket's number says nothing about what is in it. What is
    kept for a bucket is one float32 tensor of a row for each memory; when the same parameters turn up in another
    arrangement, what is kept for them moves along.

    With ``momentum`` m, this is the momentum correction of deep gradient compression (Lin et al., ICLR 2018): instead of
    the gradient g, its velocity u is accumulated in the residual v,

        u <- m u + g,  v <- v + u

    so that an element that waits gains as much momentum as one that is sent at once. Then the optimizer must have no
    momentum of its own. ``mask`` forgets the velocity of what was sent, lest a delayed gradient be carried on (momentum
    factor masking). Where all is sent nothing is delayed, and without a mask this is plain momentum.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.Tensor]], *, momentum: float = 0.0) -> None:
        self.momentum = momentum
        self._rows = 2 if momentum else 1
        self._names = {parameter: name for name, parameter in named_parameters}
        self._flat: dict[tuple[torch.Tensor, ...], torch.Tensor] = {}
        self._kept: dict[torch.Tensor, torch.Tensor] = {}

    def residual(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """Residual of a bucket's parameters, in their order: shape (sum of sizes,), float32, to be changed in place."""
        return self._bucket(parameters)[0]

    def accumulate(self, parameters: Sequence[torch.Tensor], gradient: torch.Tensor) -> torch.Tensor:
        """Add a bucket's gradient, shape (n,), floating point, to its residual, and return that: what is to be sent now."""
        residual, *velocity = self._bucket(parameters)
        for v in velocity:
            gradient = torch.add(gradient, v, alpha=self.momentum, out=v)
        return residual.add_(gradient)

    def mask(self, parameters: Sequence[torch.Tensor], sent: torch.Tensor | None) -> None:
        """Forget the velocity of the elements at positions ``sent``, shape (k,), integer; None, all or unknown, for none."""
        if self.momentum and sent is not None:
            self._bucket(parameters)[1].index_fill_(0, sent.long(), 0)

    def heal(self, parameters: Sequence[torch.Tensor]) -> None:
        """Forget what is not finite: all ranks have seen that there was an overflow, and it must not come back for ever."""
        self._bucket(parameters).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def _bucket(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        key = tuple(parameters)
        if key not in self._flat:
            self._arrange(key)
        return self._flat[key]

    def _arrange(self, parameters: tuple[torch.Tensor, ...]) -> None:
        moved = set(parameters)
        flat = torch.cat([self._of(parameter) for parameter in parameters], dim=1)
        self._flat = {key: kept for key, kept in self._flat.items() if moved.isdisjoint(key)}
        self._flat[parameters] = flat
        for parameter, view in zip(parameters, flat.split([p.numel() for p in parameters], dim=1), strict=True):
            self._kept[parameter] = view

    def _of(self, parameter: torch.Tensor) -> torch.Tensor:
        known = self._kept.get(parameter)
        if known is None:
            known = torch.zeros(self._rows, parameter.numel(), dtype=torch.float32, device=parameter.device)
        return known

    def state_dict(self) -> dict[str, torch.Tensor]:
        """By the name of every parameter that has one its residual, and by ``NAME:velocity`` its velocity."""
        return {
            self._names[parameter] + suffix: row.clone().view(parameter.shape)
            for parameter, rows in self._kept.items()
            for suffix, row in zip(_SUFFIXES, rows, strict=False)
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over a checkpoint; raises KeyError for a name that the model does not have. Momentum may be new or gone."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        self._flat, self._kept = {}, {}
        for key, value in state.items():
            name = key.removesuffix(_VELOCITY)
            parameter = parameters[name]
            rows = self._kept.setdefault(parameter, self._of(parameter))
            if key == name:
                rows[0] = value.reshape(-1)
            elif self.momentum:
                rows[1] = value.reshape(-1)


_VELOCITY = ":velocity"
_SUFFIXES = ("", _VELOCITY)


def sample(wanted: torch.Tensor) -> torch.Tensor:
    """Up to about 64 Ki elements of a bucket, evenly spaced, as they are before it is encoded; see ``energy_lost``."""
    return wanted[:: wanted.numel() // _SAMPLE | 1].clone()


def energy_lost(before: torch.Tensor, residual: torch.Tensor) -> float:
    """Share of the energy (sum of squares) of a bucket that was left behind, estimated from ``before = sample(wanted)``.

    0 if there was none; NaN if it was not finite.
    """
    whole = before.double().square().sum()
    left = sample(residual).double().square().sum()
    return float(left / whole) if whole else 0.0
