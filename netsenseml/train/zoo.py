"""Models, data sets and optimizers of the built-in worker; their options are in ``agent.catalog``."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import sklearn.datasets
import sklearn.model_selection
import torch
from torch import nn

from netsenseml.agent.catalog import check_data, check_model, check_optimizer, is_import_path
from netsenseml.methods import load

Dataset = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""train_x, train_y, test_x, test_y: floating-point samples and int64 classes, samples along the first dimension."""

_SIDE = 8  # pixels of a digit
_CLASSES = 10


def make_model(name: str, options: dict[str, Any], seed: int) -> nn.Module:
    """The model called ``name``, or what ``package.module:callable`` makes of the options; weights drawn from ``seed``."""
    options = check_model(name, options)
    torch.manual_seed(seed)
    if is_import_path(name):
        model: nn.Module = load(name)(**options)
        return model
    return _MODELS[name](**options)


def mlp(hidden: list[int]) -> nn.Module:
    """Multi-layer perceptron with ReLU on (b, 64); 301 066 parameters at the default of two layers of 512."""
    widths = [_SIDE * _SIDE, *hidden]
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], _CLASSES))


def cnn(channels: list[int], hidden: int) -> nn.Module:
    """Convolutions (3x3, ReLU), 2x2 max pooling and two linear layers on (b, 64), taken as 8x8 images."""
    depths = [1, *channels]
    convolutions = [
        layer for a, b in itertools.pairwise(depths) for layer in (nn.Conv2d(a, b, kernel_size=3, padding=1), nn.ReLU())
    ]
    return nn.Sequential(
        nn.Unflatten(1, (1, _SIDE, _SIDE)),
        *convolutions,
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(depths[-1] * (_SIDE // 2) ** 2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, _CLASSES),
    )


_MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": cnn}


def make_data(name: str, options: dict[str, Any]) -> Dataset:
    """The data set called ``name``, or what ``package.module:callable`` returns for the options."""
    options = check_data(name, options)
    if is_import_path(name):
        data: Dataset = load(name)(**options)
        return data
    return digits()


def digits() -> Dataset:
    """Scikit-learn's handwritten digits: 1347 samples to train and 450 to test, (n, 64) float32, standardised.

    The split is the same for every seed, so that accuracies can be compared.
    """
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = sklearn.model_selection.train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    mean, scale = train_x.mean(axis=0), train_x.std(axis=0)
    scale[scale == 0] = 1  # pixels that are blank in every sample
    return (
        torch.tensor((train_x - mean) / scale, dtype=torch.float32),
        torch.tensor(train_y, dtype=torch.int64),
        torch.tensor((test_x - mean) / scale, dtype=torch.float32),
        torch.tensor(test_y, dtype=torch.int64),
    )


def make_optimizer(parameters: Iterable[nn.Parameter], config: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that ``config`` describes: its name with its options."""
    config = dict(config)
    name = config.pop("name")
    options = check_optimizer(name, config)
    if is_import_path(name):
        optimizer: torch.optim.Optimizer = load(name)(parameters, **options)
        return optimizer
    if name == "sgd":
        return torch.optim.SGD(parameters, **options)
    betas = (options.pop("beta1"), options.pop("beta2"))
    adam = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return adam(parameters, betas=betas, **options)
