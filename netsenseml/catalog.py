"""Names and options of methods, without importing torch.

The testbed validates a spec against this table before anything starts; ``attach`` resolves its
options with the same functions, so both accept exactly the same things. A name may also be
``package.module:attribute``. Such a
name is the user's own code: it is accepted here together with its options, and loaded by the
worker.
"""

import difflib
import importlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its type, its default and the values it may take.

    kind: bool, int, float, str (one of ``choices``) or list; of what, its default tells: of
        positive integers, or of texts. An int is accepted where a float is meant.
    low, high: inclusive bounds of a number; above: exclusive lower bound. choices: the values, if
    they can be listed. word: a text that may stand in place of a number.
    """

    kind: type
    default: Any
    help: str
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    choices: tuple[Any, ...] = ()
    word: str = ""

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
        if isinstance(value, str) and (self.kind is str or (self.word and value == self.word)):
            return value
        if self.kind is float and _is_int(value):
            value = float(value)
        fits = _is_int(value) if self.kind is int else isinstance(value, self.kind)
        if not fits or (
            self.kind is not bool and not (self.low <= value <= self.high and value > self.above)
        ):
            raise ValueError(self.expected)
        return value

    def json_schema(self) -> dict[str, Any]:
        """What ``check`` takes, as JSON Schema."""
        out: dict[str, Any] = {"description": self.help, "default": self.default}
        if self.kind is list:
            of = {"type": "integer", "minimum": 1} if self._of_numbers else {"type": "string"}
            return {**out, "type": "array", "items": of}
        if self.choices:
            return {**out, "enum": list(self.choices)}
        out["type"] = {bool: "boolean", int: "integer", float: "number", str: "string"}[self.kind]
        bounds = {"minimum": self.low, "maximum": self.high, "exclusiveMinimum": self.above}
        out |= {key: bound for key, bound in bounds.items() if math.isfinite(bound)}
        if not self.word:
            return out
        number = {key: out.pop(key) for key in list(out) if key not in ("description", "default")}
        return {**out, "anyOf": [{"const": self.word}, number]}

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
        number = "an integer" if self.kind is int else "a number"
        return " ".join(
            [f"{self.word} or" if self.word else "", number, " and ".join(filter(None, bounds))]
        ).strip()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


Options = Mapping[str, Option]

_RATIO = Option(float, 0.1, "share of the gradient elements that every rank sends", above=0, high=1)
_VALUES = Option(
    str, "bf16", "type of the values that are sent", choices=("fp32", "bf16", "int8", "int4")
)

_INNER_STEPS = Option(
    int, 500, "steps that every rank makes by itself between two exchanges", low=1
)
_OUTER_LR = Option(float, 1.0, "learning rate of the outer optimizer", above=0)
_UPDATES = ("auto", "sign", "mean")

POLICIES: Mapping[str, tuple[str, ...]] = {
    "progress": ("floor", "interval", "delay", "hierarchy"),
    "bdp": ("floor", "start"),
    "kimad": ("floor", "start", "time_budget"),
    "dc2": ("floor", "start", "target_delay"),
    "deco": ("floor", "start"),
    "accordion": ("floor", "l_low", "l_high", "eta", "window"),
    "fixed": ("schemes",),
}
"""Policies of netsense, and which of its options are for each."""

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
        "momentum": Option(
            float,
            0.9,
            "momentum correction; the optimizer must then have none of its own",
            low=0,
            high=1,
        ),
        "warmup": Option(int, 100, "steps in which the share falls from a quarter to ratio", low=0),
    },
    "quantized": {
        "values": Option(
            str, "int8", "type of the values that are sent", choices=("bf16", "int8", "int4")
        )
    },
    "qsgd": {"bits": Option(int, 8, "bits of a value", choices=(8, 4))},
    "signsgd": {},
    "powersgd": {"rank": Option(int, 4, "rank of the approximation", low=1)},
    "localsgd": {
        "inner_steps": replace(_INNER_STEPS, default=8),
        "values": replace(_VALUES, default="fp32"),
    },
    "diloco": {
        "inner_steps": _INNER_STEPS,
        "outer_lr": replace(_OUTER_LR, default=0.7),
        "outer_momentum": Option(
            float, 0.9, "Nesterov momentum of the outer optimizer", low=0, high=1
        ),
        "values": replace(_VALUES, default="fp32"),
        "fragments": Option(int, 1, "parts of the model that are exchanged in turn", low=1),
        "overlap": Option(int, 0, "steps that an exchange may last, beside the training", low=0),
        "mixing": Option(
            float, 0.5, "share that ranks keep of what is their own, with overlap", low=0, high=1
        ),
    },
    "sparseloco": {
        "inner_steps": replace(_INNER_STEPS, default=30),
        "ratio": replace(_RATIO, default=64 / 4096),
        "chunk": Option(int, 4096, "elements of which the largest share 'ratio' is sent", low=1),
        "decay": Option(float, 0.95, "share that is kept of what was not sent", low=0, high=1),
        "outer_lr": _OUTER_LR,
    },
    "demo": {
        "decay": Option(float, 0.999, "decay of the momentum", low=0, high=1),
        "chunk": Option(int, 64, "side of the squares that are transformed", low=1, high=1024),
        "topk": Option(int, 32, "coefficients of a square that are sent", low=1),
        "values": _VALUES,
        "update": Option(
            str,
            "auto",
            "what the optimizer is given: signs (auto: if adaptive) or values",
            choices=_UPDATES,
        ),
    },
    "netsense": {
        "policy": Option(
            str,
            "progress",
            "what decides: our rule, that of a paper, or the list 'schemes'",
            choices=tuple(POLICIES),
        ),
        "floor": Option(
            float, 0.001, "smallest share of the elements (all but fixed)", above=0, high=1
        ),
        "interval": Option(
            int,
            1,
            "steps from one exchange to the next, or auto: as is best (progress)",
            low=1,
            word="auto",
        ),
        "delay": Option(
            int,
            0,
            "exchanges that a mean waits until it is applied, beside the training; auto: as is best"
            " (progress)",
            low=0,
            high=1,
            word="auto",
        ),
        "start": Option(
            float,
            0.01,
            "first steps: share of the elements (bdp), or of all-reduce's bytes (kimad, dc2, deco)",
            above=0,
            high=1,
        ),
        "time_budget": Option(
            float, 0.0, "seconds that a step may take; 0: 1.5 times what it computes (kimad)", low=0
        ),
        "target_delay": Option(
            float,
            0.0,
            "seconds that an exchange is to take; 0: as long as a step computes (dc2)",
            low=0,
        ),
        "l_low": Option(
            float,
            0.3,
            "share of all-reduce's bytes in critical regimes (accordion)",
            above=0,
            high=1,
        ),
        "l_high": Option(
            float, 0.03, "share of all-reduce's bytes otherwise (accordion)", above=0, high=1
        ),
        "eta": Option(
            float,
            0.5,
            "relative change of the gradients' norm that is critical (accordion)",
            above=0,
        ),
        "window": Option(
            int,
            32,
            "steps whose gradients are compared with those of the window before (accordion)",
            low=1,
        ),
        "schemes": Option(
            list, [], "scheme of every step, as the records name them; the last one goes on (fixed)"
        ),
        "hierarchy": Option(
            str,
            "auto",
            "auto: where hosts have several ranks, each exchanges a share for its host; flat: every"
            " rank with every other (progress)",
            choices=("auto", "flat"),
        ),
    },
}

ENTRY_POINTS = "netsenseml.methods"
"""Group of entry points under which a package registers methods of its own."""


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
    resolved = resolve("method", known, name, options)
    if name == "netsense":
        _check_policy(resolved)
    if resolved.get("overlap", 0) >= resolved.get("inner_steps", 1):
        steps = resolved["inner_steps"]
        raise ValueError(
            f"method '{name}': overlap must be below inner_steps, {steps}, not"
            f" {resolved['overlap']}"
        )
    for scheme in resolved.get("schemes", ()):
        check_scheme(scheme)
    return resolved


def _check_policy(options: Mapping[str, Any]) -> None:
    policy = options["policy"]
    for key, option in METHODS["netsense"].items():
        users = [user for user, own in POLICIES.items() if key in own]
        if users and policy not in users and options[key] != option.default:
            raise ValueError(
                f"method 'netsense': {key} is for policy: {' or '.join(users)}, not for {policy}"
            )
    if policy == "fixed" and not options["schemes"]:
        raise ValueError("method 'netsense': policy 'fixed' needs schemes, for example [int8]")
    if options["l_high"] > options["l_low"]:
        high, low = options["l_high"], options["l_low"]
        raise ValueError(f"method 'netsense': l_high must be at most l_low, {low:g}, not {high:g}")


def check_scheme(name: str) -> None:
    """Raise ValueError, one line, unless ``name`` is a scheme that netsense can use."""
    found = re.fullmatch(SCHEME, name)
    if not found or (found[1] is not None and not 0 < float(found[1]) < 100):
        raise ValueError(
            f"unknown scheme '{name}'; there are allreduce, {', '.join(_DENSE)}, and such as"
            " sparse-int8@1%; all but the first also with -ring behind them, to gather round a"
            " ring, or host- before them, where hosts have several ranks; and all with such as /8"
            " at the end, to exchange parameters every 8 steps, or +1, to apply the mean one"
            " exchange later"
        )


_DENSE = ("fp32", "bf16", "int8", "int4", "sign")
SCHEME = (
    rf"(?:allreduce|(?:host-)?(?:{'|'.join(_DENSE)}|sparse-(?:{'|'.join(_DENSE)})@([0-9]*\.?[0-9]+)%)(?:-ring)?)"
    r"(?:(?:/(?:[2-9]|[1-9][0-9]+))?(?:\+1)?|/1\+1)"
)
"""Names of schemes; the group is the share of a sparse one in %, which lies between 0 and 100."""


def registered_methods() -> dict[str, EntryPoint]:
    """Methods that installed packages bring along, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def is_import_path(name: str) -> bool:
    """True if the name has the form ``package.module:attribute``."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(
        part.isidentifier() for part in [*module.split("."), *attribute.split(".")]
    )


def load(path: str) -> Any:
    """The object at ``package.module:attribute``; raises ValueError, one line, if there is none."""
    module, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load '{path}': {error}") from error
    return found


def nearest_first(name: str, choices: Iterable[str]) -> list[str]:
    """The choices, those that look most like ``name`` first."""
    return sorted(choices, key=lambda choice: -difflib.SequenceMatcher(None, name, choice).ratio())


def resolve(
    kind: str, catalog: Mapping[str, Options], name: str, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Options of ``name`` in a catalog with the defaults filled in; raises ValueError, one line
    that names the choices."""
    given = dict(options or {})
    if is_import_path(name):
        return given
    if name not in catalog:
        choices = ", ".join(nearest_first(name, catalog))
        raise ValueError(
            f"unknown {kind} '{name}'; choose from {choices}, or package.module:attribute"
        )
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
            raise ValueError(
                f"{kind} '{name}': {key} must be {error}, not {given[key]!r}"
            ) from None
    return resolved
