"""Names and options of models, data sets and optimizers of the built-in worker, without importing
torch.

A name may also be ``package.module:attribute``, as for methods (``netsenseml.catalog``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from netsenseml.catalog import Option, Options, is_import_path, resolve

_CLASSES = Option(int, 100, "classes", low=2)

MODELS: Mapping[str, Options] = {
    "mlp": {"hidden": Option(list, [512, 512], "widths of the hidden layers")},
    "cnn": {
        "channels": Option(
            list, [32, 64], "channels of the 3x3 convolutions, each followed by ReLU"
        ),
        "hidden": Option(int, 256, "width of the hidden layer before the classifier", low=1),
    },
    "resnet18": {"classes": _CLASSES},
    "vgg16": {"classes": _CLASSES},
    "gpt": {
        "layers": Option(int, 4, "transformer blocks", low=1),
        "width": Option(int, 128, "of the residual stream; a multiple of heads", low=1),
        "heads": Option(int, 4, "attention heads", low=1),
        "context": Option(int, 64, "longest text, bytes", low=1),
    },
}

_FOLDER = Option(str, "", "where the data set's files were unpacked")
DATA: Mapping[str, Options] = {
    "digits": {},
    "images": {
        "classes": Option(int, 10, "classes", low=2, high=10_000),
        "side": Option(int, 32, "height and width, pixels", low=4, high=1024),
        "samples": Option(
            int, 4000, "images; a tenth of them is for the test", low=20, high=1_000_000
        ),
        "noise": Option(
            float, 1.0, "standard deviation of the noise; that of the pattern is 1", low=0
        ),
    },
    "text": {
        "kilobytes": Option(int, 512, "of library sources", low=16, high=16_384),
        "context": Option(int, 64, "length of a sample, bytes", low=1, high=4096),
    },
    "cifar10": {"folder": _FOLDER},
    "cifar100": {"folder": _FOLDER},
}

_LEARNING_RATE = {"lr": Option(float, 0.1, "learning rate", above=0)}
_WEIGHT_DECAY = {"weight_decay": Option(float, 0.0, "weight decay", low=0)}
_ADAM = {
    "lr": Option(float, 1e-3, "learning rate", above=0),
    "weight_decay": Option(float, 0.0, "weight decay", low=0),
    "beta1": Option(float, 0.9, "decay of the first moment", low=0, high=1),
    "beta2": Option(float, 0.999, "decay of the second moment", low=0, high=1),
    "eps": Option(float, 1e-8, "added to the denominator", low=0),
}

OPTIMIZERS: Mapping[str, Options] = {
    "sgd": {
        **_LEARNING_RATE,
        **_WEIGHT_DECAY,
        "momentum": Option(float, 0.0, "momentum", low=0),
        "nesterov": Option(bool, False, "Nesterov momentum"),
    },
    "adam": _ADAM,
    "adamw": {**_ADAM, "weight_decay": Option(float, 0.01, "decoupled weight decay", low=0)},
}


def check_model(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of a model with the defaults filled in; errors as in ``check_method``."""
    resolved = resolve("model", MODELS, name, options)
    if name == "gpt" and resolved["width"] % resolved["heads"]:
        raise ValueError(
            f"model 'gpt': width must be a multiple of heads, {resolved['heads']}, not"
            f" {resolved['width']}"
        )
    return resolved


def check_data(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of a data set with the defaults filled in; errors as in ``check_method``."""
    return resolve("data", DATA, name, options)


CIFAR_FILES: Mapping[str, tuple[str, ...]] = {
    "cifar10": (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    "cifar100": ("train", "test"),
}
"""Files of CIFAR's Python version; the last one is the test set."""


def check_folder(data: str, folder: Path | None) -> None:
    """Raise ValueError, one line with the way to get them, if a data set's files are not in its
    folder."""
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder} is no directory{_how_to_get(data)}")
    for file in CIFAR_FILES.get(data, ()):
        if folder is None or not (folder / file).is_file():
            raise ValueError(
                f"{file if folder is None else folder / file} is missing{_how_to_get(data)}"
            )


def _how_to_get(data: str) -> str:
    if data not in CIFAR_FILES:
        return ""
    archive = f"cifar-{data.removeprefix('cifar')}-python.tar.gz"
    return (
        f"; unpack {archive}, the Python version of https://www.cs.toronto.edu/~kriz/cifar.html, "
        f"and name the folder with {CIFAR_FILES[data][-1]} in it: folder: …"
    )


def check_pair(
    model: str, model_options: Mapping[str, Any], data: str, data_options: Mapping[str, Any]
) -> None:
    """Raise ValueError, one line, if a model cannot learn from a data set; what is the user's own
    is not known."""
    if is_import_path(model) or is_import_path(data):
        return
    fits = FITTING[model]
    if data not in fits:
        raise ValueError(
            f"'{data}' is no data for the model '{model}'; it learns from {', '.join(fits)}"
        )
    wanted, given = check_model(model, model_options), check_data(data, data_options)
    if data == "text" and given["context"] > wanted["context"]:
        raise ValueError(
            f"has {given['context']} bytes a sample, the model gpt takes {wanted['context']}; make"
            " context equal"
        )
    classes = {"cifar10": 10, "cifar100": 100}.get(data, given.get("classes", 0))
    if classes > wanted.get("classes", classes):
        raise ValueError(
            f"has {classes} classes, the model '{model}' {wanted['classes']}; make classes equal"
        )
    if model == "vgg16" and given.get("side", _VGG_SIDE) < _VGG_SIDE:
        raise ValueError(
            f"has images of {given['side']} pixels; vgg16 halves them five times, so use side:"
            f" {_VGG_SIDE}"
        )


_IMAGES = ("images", "cifar10", "cifar100")
FITTING: Mapping[str, tuple[str, ...]] = {
    "mlp": ("digits",),
    "cnn": ("digits",),
    "resnet18": _IMAGES,
    "vgg16": _IMAGES,
    "gpt": ("text",),
}
_VGG_SIDE = 32


def check_optimizer(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of an optimizer with the defaults filled in; errors as in ``check_method``."""
    resolved = resolve("optimizer", OPTIMIZERS, name, options)
    if resolved.get("nesterov") and not resolved["momentum"]:
        raise ValueError(f"optimizer '{name}': nesterov needs momentum > 0")
    return resolved
