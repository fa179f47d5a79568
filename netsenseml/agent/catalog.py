"""Names and options of methods, models, data sets and optimizers, without importing torch.

The testbed validates a spec against these tables before anything starts; the worker resolves its configuration with
the same functions, so both accept exactly the same things. A name may also be ``package.module:attribute``. Such a
name is the user's own code: it is accepted here together with its options, and loaded by the worker.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its type, its default and the values it may take.

    kind: bool, int, float, str (one of ``choices``) or list; of what, its default tells: of positive integers, or of texts.
        An int is accepted where a float is meant.
    low, high: inclusive bounds of a number; above: exclusive lower bound. choices: the values, if they can be listed.
    """

    kind: type
    default: Any
    help: str
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    choices: tuple[Any, ...] = ()

    def check(self, value: Any) -> Any:
        """The value in the option's type; raises ValueError saying what is expected."""
        if self.kind is list:
            if isinstance(value, (list, tuple)) and all(self._fits_list(item) for item in value):
                return list(value)
            raise ValueError(self.expected)
        if self.choices:
            if value in self.choices and isinstance(value, self.kind):
                return value
            raise ValueError(self.expected)
        if self.kind is str and isinstance(value, str):
            return value
        if self.kind is float and _is_int(value):
            value = float(value)
        fits = _is_int(value) if self.kind is int else isinstance(value, self.kind)
        if not fits or (self.kind is not bool and not (self.low <= value <= self.high and value > self.above)):
            raise ValueError(self.expected)
        return value

    @property
    def _of_numbers(self) -> bool:
        return bool(self.default) and _is_int(self.default[0])

    def _fits_list(self, item: Any) -> bool:
        return _is_int(item) and item > 0 if self._of_numbers else isinstance(item, str)

    @property
    def expected(self) -> str:
        """What a value must look like, in words."""
        if self.kind is list:
            return "a list of positive integers" if self._of_numbers else "a list of texts"
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.kind is bool:
            return "true or false"
        bounds = [
            f"> {self.above:g}" if self.above > -math.inf else "",
            f">= {self.low:g}" if self.low > -math.inf else "",
            f"<= {self.high:g}" if self.high < math.inf else "",
        ]
        return " ".join(["an integer" if self.kind is int else "a number", " and ".join(filter(None, bounds))]).strip()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


Options = Mapping[str, Option]

_RATIO = Option(float, 0.1, "share of the gradient elements that every rank sends", above=0, high=1)
_VALUES = Option(str, "bf16", "type of the values that are sent", choices=("fp32", "bf16", "int8", "int4"))

METHODS: Mapping[str, Options] = {
    "allreduce": {},
    "bf16": {},
    "fp16": {},
    "topk": {"ratio": _RATIO, "values": _VALUES},
    "topk12": {"ratio": _RATIO},
    "randomk": {"ratio": _RATIO},
    "dgc": {
        "ratio": replace(_RATIO, default=0.01),
        "values": _VALUES,
        "momentum": Option(float, 0.9, "momentum correction; the optimizer must then have none of its own", low=0, high=1),
        "warmup": Option(int, 100, "steps in which the share falls from a quarter to ratio", low=0),
    },
    "quantized": {"values": Option(str, "int8", "type of the values that are sent", choices=("bf16", "int8", "int4"))},
    "qsgd": {"bits": Option(int, 8, "bits of a value", choices=(8, 4))},
    "signsgd": {},
    "powersgd": {"rank": Option(int, 4, "rank of the approximation", low=1)},
    "netsense": {
        "policy": Option(
            str, "budget", "what decides: our rule, the paper's, or the list 'schemes'", choices=("budget", "bdp", "fixed")
        ),
        "share": Option(float, 0.4, "of the compute time, so much may be waited for communication (budget)", above=0, high=100),
        "floor": Option(float, 0.001, "smallest share of the elements (budget, bdp)", above=0, high=1),
        "start": Option(float, 0.01, "share of the elements in the first steps (budget, bdp)", above=0, high=1),
        "schemes": Option(list, [], "scheme of every step, as the records name them; the last one goes on (fixed)"),
    },
}

ENTRY_POINTS = "netsenseml.methods"
"""Group of entry points under which a package registers methods of its own."""

_CLASSES = Option(int, 100, "classes", low=2)

MODELS: Mapping[str, Options] = {
    "mlp": {"hidden": Option(list, [512, 512], "widths of the hidden layers")},
    "cnn": {
        "channels": Option(list, [32, 64], "channels of the 3x3 convolutions, each followed by ReLU"),
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
        "samples": Option(int, 4000, "images; a tenth of them is for the test", low=20, high=1_000_000),
        "noise": Option(float, 1.0, "standard deviation of the noise; that of the pattern is 1", low=0),
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


def check_method(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of a method with the defaults filled in.

    Raises ValueError, one line that names the valid choices, nearest first.
    """
    known = METHODS
    if name not in METHODS and not is_import_path(name):
        registered = registered_methods()
        if name in registered:
            return dict(options or {})
        known = {**METHODS, **{key: {} for key in registered}}
    resolved = _resolve("method", known, name, options)
    if resolved.get("policy") == "fixed" and not resolved["schemes"]:
        raise ValueError(f"method '{name}': policy 'fixed' needs schemes, for example [int8]")
    if resolved.get("policy") != "fixed" and resolved.get("schemes"):
        raise ValueError(f"method '{name}': schemes need policy: fixed")
    for scheme in resolved.get("schemes", ()):
        check_scheme(scheme)
    return resolved


def check_scheme(name: str) -> None:
    """Raise ValueError, one line, unless ``name`` is a scheme that netsense can use."""
    found = _SPARSE.fullmatch(name)
    if name not in ("allreduce", *_DENSE) and not (found and 0 < float(found[1]) < 100):
        raise ValueError(f"unknown scheme '{name}'; there are allreduce, {', '.join(_DENSE)}, and such as sparse-int8@1%")


_DENSE = ("fp32", "bf16", "int8", "int4", "sign")
_SPARSE = re.compile(rf"sparse-(?:{'|'.join(_DENSE)})@([0-9]*\.?[0-9]+)%")


def registered_methods() -> dict[str, EntryPoint]:
    """Methods that installed packages bring along, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def check_model(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of a model with the defaults filled in; errors as in ``check_method``."""
    resolved = _resolve("model", MODELS, name, options)
    if name == "gpt" and resolved["width"] % resolved["heads"]:
        raise ValueError(f"model 'gpt': width must be a multiple of heads, {resolved['heads']}, not {resolved['width']}")
    return resolved


def check_data(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of a data set with the defaults filled in; errors as in ``check_method``."""
    return _resolve("data", DATA, name, options)


CIFAR_FILES: Mapping[str, tuple[str, ...]] = {
    "cifar10": (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    "cifar100": ("train", "test"),
}
"""Files of CIFAR's Python version; the last one is the test set."""


def check_folder(data: str, folder: Path | None) -> None:
    """Raise ValueError, one line with the way to get them, if a data set's files are not in its folder."""
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder} is no directory{_how_to_get(data)}")
    for file in CIFAR_FILES.get(data, ()):
        if folder is None or not (folder / file).is_file():
            raise ValueError(f"{file if folder is None else folder / file} is missing{_how_to_get(data)}")


def _how_to_get(data: str) -> str:
    if data not in CIFAR_FILES:
        return ""
    archive = f"cifar-{data.removeprefix('cifar')}-python.tar.gz"
    return (
        f"; unpack {archive}, the Python version of https://www.cs.toronto.edu/~kriz/cifar.html, "
        f"and name the folder with {CIFAR_FILES[data][-1]} in it: folder: …"
    )


def check_pair(model: str, model_options: Mapping[str, Any], data: str, data_options: Mapping[str, Any]) -> None:
    """Raise ValueError, one line, if a model cannot learn from a data set; what is the user's own is not known."""
    if is_import_path(model) or is_import_path(data):
        return
    fits = _FITTING[model]
    if data not in fits:
        raise ValueError(f"'{data}' is no data for the model '{model}'; it learns from {', '.join(fits)}")
    wanted, given = check_model(model, model_options), check_data(data, data_options)
    if data == "text" and given["context"] > wanted["context"]:
        raise ValueError(f"has {given['context']} bytes a sample, the model gpt takes {wanted['context']}; make context equal")
    classes = {"cifar10": 10, "cifar100": 100}.get(data, given.get("classes", 0))
    if classes > wanted.get("classes", classes):
        raise ValueError(f"has {classes} classes, the model '{model}' {wanted['classes']}; make classes equal")
    if model == "vgg16" and given.get("side", _VGG_SIDE) < _VGG_SIDE:
        raise ValueError(f"has images of {given['side']} pixels; vgg16 halves them five times, so use side: {_VGG_SIDE}")


_IMAGES = ("images", "cifar10", "cifar100")
_FITTING: Mapping[str, tuple[str, ...]] = {
    "mlp": ("digits",),
    "cnn": ("digits",),
    "resnet18": _IMAGES,
    "vgg16": _IMAGES,
    "gpt": ("text",),
}
_VGG_SIDE = 32


def check_optimizer(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of an optimizer with the defaults filled in; errors as in ``check_method``."""
    resolved = _resolve("optimizer", OPTIMIZERS, name, options)
    if resolved.get("nesterov") and not resolved["momentum"]:
        raise ValueError(f"optimizer '{name}': nesterov needs momentum > 0")
    return resolved


def is_import_path(name: str) -> bool:
    """True if the name has the form ``package.module:attribute``."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])


def nearest_first(name: str, choices: Iterable[str]) -> list[str]:
    """The choices, those that look most like ``name`` first."""
    return sorted(choices, key=lambda choice: -difflib.SequenceMatcher(None, name, choice).ratio())


def _resolve(kind: str, catalog: Mapping[str, Options], name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(options or {})
    if is_import_path(name):
        return given
    if name not in catalog:
        choices = ", ".join(nearest_first(name, catalog))
        raise ValueError(f"unknown {kind} '{name}'; choose from {choices}, or package.module:attribute")
    known = catalog[name]
    for key in given:
        if key not in known:
            choices = ", ".join(nearest_first(key, known)) if known else "none"
            raise ValueError(f"{kind} '{name}' has no option '{key}'; its options: {choices}")
    resolved = {}
    for key, option in known.items():
        try:
            resolved[key] = option.check(given.get(key, option.default))
        except ValueError as error:
            raise ValueError(f"{kind} '{name}': {key} must be {error}, not {given[key]!r}") from None
    return resolved
