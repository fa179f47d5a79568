"""Models, data sets and optimizers of the built-in worker; their options are in
``testbed.catalog``."""

import itertools
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import sklearn.datasets
import sklearn.model_selection
import torch
from torch import nn

from netsenseml.catalog import is_import_path
from netsenseml.methods import load
from testbed.catalog import CIFAR_FILES, check_data, check_folder, check_model, check_optimizer
from testbed.worker.emulate import Emulated, Timing
from testbed.worker.text import Gpt, library_text
from testbed.worker.vision import resnet18, vgg16

Dataset = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""train_x, train_y, test_x, test_y: floating-point samples and int64 classes, samples along the
first dimension."""

_SIDE = 8  # pixels of a digit
_CLASSES = 10


def make_model(name: str, options: dict[str, Any], seed: int) -> nn.Module:
    """The model called ``name``, or what ``package.module:callable`` makes of the options; weights
    drawn from ``seed``."""
    options = check_model(name, options)
    torch.manual_seed(seed)
    if is_import_path(name):
        model: nn.Module = load(name)(**options)
        return model
    return _MODELS[name](**options)


def mlp(hidden: list[int]) -> nn.Module:
    """Multi-layer perceptron with ReLU on (b, 64); 301 066 parameters at the default of two layers
    of 512."""
    widths = [_SIDE * _SIDE, *hidden]
    layers = [
        layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(widths[-1], _CLASSES))


def cnn(channels: list[int], hidden: int) -> nn.Module:
    """Convolutions (3x3, ReLU), 2x2 max pooling and two linear layers on (b, 64), taken as 8x8
    images."""
    depths = [1, *channels]
    convolutions = [
        layer
        for a, b in itertools.pairwise(depths)
        for layer in (nn.Conv2d(a, b, kernel_size=3, padding=1), nn.ReLU())
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


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet18": resnet18,
    "vgg16": vgg16,
    "gpt": Gpt,
}


def make_emulated(name: str, options: dict[str, Any], timing: Timing) -> Emulated:
    """The model called ``name`` without its arithmetic; images are 224 pixels high and wide, texts
    as long as can be.

    Raises ValueError for a model of the user's own, as nobody knows what its input looks like.
    """
    options = check_model(name, options)
    if is_import_path(name):
        raise ValueError(
            f"compute: emulate knows only the models {', '.join(_MODELS)}; use pace for '{name}'"
        )
    with torch.device("meta"):
        model = _MODELS[name](**options)
        if name == "gpt":
            sample = torch.zeros(1, options["context"], dtype=torch.int64)
        else:
            sample = torch.zeros(
                1,
                *(
                    (_SIDE * _SIDE,)
                    if name in ("mlp", "cnn")
                    else (3, _PUBLISHED_SIDE, _PUBLISHED_SIDE)
                ),
            )
    return Emulated(model, sample, timing)


_PUBLISHED_SIDE = 224


def make_data(name: str, options: dict[str, Any]) -> Dataset:
    """The data set called ``name``, or what ``package.module:callable`` returns for the options."""
    options = check_data(name, options)
    if is_import_path(name):
        data: Dataset = load(name)(**options)
        return data
    return _DATA[name](**options)


def digits() -> Dataset:
    """Scikit-learn's handwritten digits: 1347 samples to train and 450 to test, (n, 64) float32,
    standardised.

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


def images(classes: int, side: int, samples: int, noise: float) -> Dataset:
    """Made-up images, (n, 3, side, side) float32: a smooth pattern for every class, shifted at
    random, in noise.

    The same for every seed of an experiment; a tenth of them is for the test.
    """
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(classes, 3, 4, 4, generator=draw)
    patterns = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    patterns /= patterns.std(dim=(1, 2, 3), keepdim=True)
    labels = torch.randint(classes, (samples,), generator=draw)
    x = noise * torch.randn(samples, 3, side, side, generator=draw)
    shifts = torch.randint(side, (samples, 2), generator=draw).tolist()
    for i, (label, shift) in enumerate(zip(labels.tolist(), shifts, strict=True)):
        x[i] += patterns[label].roll(shift, dims=(1, 2))
    tests = max(1, samples // 10)
    return x[tests:], labels[tests:], x[:tests], labels[:tests]


def cifar(classes: int, folder: str) -> Dataset:
    """CIFAR-10 or CIFAR-100 from the files of its Python version: (n, 3, 32, 32) float32,
    standardised.

    Raises ValueError with the way to get them if they are not in ``folder``.
    """
    name, key = f"cifar{classes}", b"labels" if classes == 10 else b"fine_labels"
    check_folder(name, Path(folder))
    try:
        files = [(Path(folder) / file).read_bytes() for file in CIFAR_FILES[name]]
    except OSError as error:
        raise ValueError(
            f"data '{name}': {error.filename} cannot be read: {error.strerror}"
        ) from None
    parts = [pickle.loads(file, encoding="bytes") for file in files]  # noqa: S301 - the user's own files, published so
    pixels = [torch.from_numpy(part[b"data"]).view(-1, 3, 32, 32) for part in parts]
    labels = [torch.tensor(part[key], dtype=torch.int64) for part in parts]
    # every worker has all of it: no copies of 600 MB
    train_x, test_x = torch.cat(pixels[:-1]).float(), pixels[-1].float()
    mean, scale = (
        train_x.mean(dim=(0, 2, 3), keepdim=True),
        train_x.std(dim=(0, 2, 3), keepdim=True),
    )
    return (
        train_x.sub_(mean).div_(scale),
        torch.cat(labels[:-1]),
        test_x.sub_(mean).div_(scale),
        labels[-1],
    )


_DATA: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "images": images,
    "text": library_text,
    "cifar10": partial(cifar, 10),
    "cifar100": partial(cifar, 100),
}


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: dict[str, Any]
) -> torch.optim.Optimizer:
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
