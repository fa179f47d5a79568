"""Error feedback: what was not sent is kept and added to the next gradient."""

from collections.abc import Iterable, Mapping, Sequence

import torch


class ErrorFeedback:
    """Residuals keyed by parameter.

    DDP rebuilds its buckets after the first backward, so a bucket's number says nothing about what is in it. The
    residual of a bucket is one flat float32 tensor; when the same parameters turn up in another arrangement, their
    residuals move along.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._names = {parameter: name for name, parameter in named_parameters}
        self._flat: dict[tuple[torch.Tensor, ...], torch.Tensor] = {}
        self._residual: dict[torch.Tensor, torch.Tensor] = {}

    def residual(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """Residual of a bucket's parameters, in their order: shape (sum of sizes,), float32, to be changed in place."""
        key = tuple(parameters)
        if key not in self._flat:
            self._arrange(key)
        return self._flat[key]

    def _arrange(self, parameters: tuple[torch.Tensor, ...]) -> None:
        moved = set(parameters)
        flat = torch.cat([self._of(parameter).reshape(-1) for parameter in parameters])
        self._flat = {key: kept for key, kept in self._flat.items() if moved.isdisjoint(key)}
        self._flat[parameters] = flat
        for parameter, view in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            self._residual[parameter] = view.view(parameter.shape)

    def _of(self, parameter: torch.Tensor) -> torch.Tensor:
        known = self._residual.get(parameter)
        return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device) if known is None else known

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Residual of every parameter that has one, by parameter name."""
        return {self._names[parameter]: residual.clone() for parameter, residual in self._residual.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over residuals; raises KeyError for a name that the model does not have."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        self._flat = {}
        self._residual = {parameters[name]: residual.to(torch.float32).clone() for name, residual in state.items()}
