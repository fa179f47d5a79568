"""YAML file → validated Spec. Every fault becomes a SpecError with its place; nothing else
escapes."""

import copy
import itertools
import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from testbed.files import exists, is_directory, is_file
from testbed.spec.errors import SpecError, place_of
from testbed.spec.models import LinkChange, Spec, empty, small_queues

MAX_BYTES = 1 << 20
_MAX_NODES = 100_000
_DEEPEST = 100
_MAX_COMBINATIONS = 10_000
_MAX_CELLS = 100_000
_MAX_KEYS = 1000
"""That a matrix varies."""


_SafeLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Without libyaml it takes ten times as long."""


class _UniqueKeyLoader(_SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would silently keep the last), and takes
    ``on`` and ``off`` for keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:bool":  # what YAML 1.1 makes of a plain on or off
                key_node.tag = "tag:yaml.org,2002:str"
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for a text, as it wants a point in each float; 1.2, by which editors go, does
# not.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_spec(path: Path, overrides: Sequence[str] = ()) -> Spec:
    """Read and validate a spec; ``overrides`` are texts of the form "dotted.key=value" (YAML
    value). Raises SpecError."""
    raw = read_yaml(path)
    for text in overrides:
        raw = with_text(raw, text)
    try:
        spec = validate(raw)
        _check_overrides(spec, overrides)
        for combination in combinations(spec) if spec.matrix else ():
            validate(apply_overrides(raw, combination))
    except SpecError as error:
        raise error.found_in(path.name) from None
    if spec.script and not is_file(path.parent / spec.script.file):
        message = ("script", f"there is no file {spec.script.file!r} beside the spec")
        raise SpecError([message], path.name)
    for index, name in enumerate(spec.script.files if spec.script else ()):
        named = (path.parent / spec.script.file).parent / name  # type: ignore[union-attr]
        if not is_file(named) and not is_directory(named):
            text = (
                "is neither a file nor a folder"
                if exists(named)
                else f"there is no {name!r} beside the script"
            )
            raise SpecError([(f"script.files.{index}", text)], path.name)
    return spec


def _check_overrides(spec: Spec, overrides: Sequence[str]) -> None:
    for key in (text.partition("=")[0].strip() for text in overrides):
        if varied := next((varied for varied in spec.matrix if _lies_in(key, varied)), None):
            text = (
                f"varies by the matrix, which would win; use --set 'matrix={{{varied}: [value,"
                " …]}'"
            )
            raise SpecError([(key, text)])


def _lies_in(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises SpecError for anything else."""
    name = path.name or str(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise SpecError([("", "is a directory; name the YAML file in it")], name)
        if size > MAX_BYTES:
            raise SpecError(
                [
                    (
                        "",
                        (
                            f"is {size / 2**20:.0f} MiB long; a spec has less than 1 MiB, is this"
                            " the right file?"
                        ),
                    )
                ],
                name,
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(
            [("", "there is no such file; testbed init writes one to begin with")], str(path)
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError([("", f"cannot be read: {reason}")], str(path)) from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping in YAML text; raises SpecError, of a file of that name, for anything else."""
    try:
        _check_depth(text, name)
        data = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except SpecError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(
            [(line, f"not valid YAML: {error.problem or error.context}")], name
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SpecError(
            [("", f"not valid YAML: {str(error) or type(error).__name__}")], name
        ) from None
    if data is None:
        raise SpecError([("", "is empty; testbed init writes one to begin with")], name)
    if not isinstance(data, dict):
        raise SpecError(
            [("", f"must be a mapping of keys to values, not a {type(data).__name__}")], name
        )
    _check_values(data, name)
    return data


def _check_depth(text: str, source: str) -> None:
    """Raise SpecError where libyaml would run out of its stack, and the process end with it."""
    depth = 0
    for event in yaml.parse(text, _SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            place = f"line {event.start_mark.line + 1}"
            raise SpecError([(place, f"is nested more than {_DEEPEST} levels deep")], source)


def _check_values(data: Any, source: str) -> None:
    """Raise SpecError for what not every check would bear, and no spec has: huge whole numbers,
    half characters, and aliases by which a small file stands for billions of nodes, or one lies in
    itself."""
    for count, (place, node) in enumerate(_nodes(data), 1):
        if len(place) > _DEEPEST:
            text = f"is nested more than {_DEEPEST} levels deep once its aliases are expanded"
            raise SpecError([(place_of(place[:3]), text)], source)
        if count >= _MAX_NODES:
            raise SpecError(
                [("", f"has more than {_MAX_NODES} values once its aliases are expanded")], source
            )
        # before a key becomes part of a place
        for value in [node, *node] if isinstance(node, Mapping) else [node]:
            if isinstance(value, int) and abs(value) >= 2**63:
                error = (
                    "is a number that is too large"
                    if value is node
                    else "has a key that is too large a number"
                )
                raise SpecError([(place_of(place), error)], source)
            if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise SpecError(
                    [(place_of(place), f"{value!r:.40} has half a character; write whole ones")],
                    source,
                )


def _nodes(data: Any) -> Iterator[tuple[list[str | int], Any]]:
    """Every value in raw data with its place."""
    stack: list[tuple[list[str | int], Any]] = [([], data)]
    while stack:
        place, node = stack.pop()
        yield place, node
        if isinstance(node, Mapping):
            stack.extend(([*place, str(key)], value) for key, value in node.items())
        elif isinstance(node, list):
            stack.extend(([*place, index], value) for index, value in enumerate(node))


def parse_link(raw: Mapping[str, Any], mtu: int | None = None) -> LinkChange:
    """Properties of a link, as under ``set`` in a schedule; mtu: of the network, if it is known.
    Raises SpecError."""
    try:
        change = LinkChange.model_validate(raw)
    except ValidationError as error:
        raise SpecError(
            [_place_and_text(detail) for detail in error.errors(include_url=False)]
        ) from None
    if mtu is not None and (
        faults := [(place_of(place), text) for place, text in small_queues(change, mtu)]
    ):
        raise SpecError(faults)
    return change


def validate(raw: Mapping[str, Any]) -> Spec:
    """Raw mapping → Spec; raises SpecError with every fault."""
    try:
        return Spec.model_validate(raw)
    except ValidationError as error:
        raise SpecError(
            [_place_and_text(detail) for detail in error.errors(include_url=False)]
        ) from None


_WORDING = {
    "missing": "is missing",
    "list_type": "must be a list, for example [a, b]",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "dict_type": "must be a mapping, for example {key: value}",
    "too_short": "must not be empty",
}


def _place_and_text(detail: Any) -> tuple[str, str]:
    path = [part for part in detail["loc"] if part != "[key]"]
    context = detail.get("ctx") or {}
    path += context.get("path", [])
    kind, given = detail["type"], detail.get("input")
    if given is None and kind != "missing":
        text = empty()
    elif kind in _WORDING:
        text = _WORDING[kind]
        if kind != "missing" and isinstance(given, (str, int, float, bool)):
            text += f", not {given!r:.40}"
    elif kind == "literal_error":
        text = (
            f"{given!r:.40} is unknown; valid:"
            f" {context['expected'].replace(' or ', ', ').replace(chr(39), '')}"
        )
    elif kind == "string_pattern_mismatch":
        of_region, of_spec = (
            "small letters and digits",
            "up to 64 letters, digits, '_', '-' and '.'",
        )
        allowed = (
            f"{of_spec}, not one of these three first"
            if "A-Z" in context["pattern"]
            else f"{of_region}, a letter first"
        )
        text = f"{given!r:.40} cannot be a name, which has {allowed}"
    else:
        text = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if kind.startswith(("greater", "less")):
            text = f"{given!r:.40} is out of range; it must be {text}"
    return place_of(path), text


NOT_VARIED = ("matrix", "methods", "seeds", "name", "lab")
NOT_COMPARED = ("workload", "workload.target", "workload.warmup")
"""Keys that no matrix may vary, nor what lies in the first ones."""


def combinations(spec: Spec) -> list[dict[str, Any]]:
    """Every combination of the matrix as {dotted key: value}; one empty one if there is no
    matrix."""
    if (many := math.prod(map(len, spec.matrix.values()))) > _MAX_COMBINATIONS:
        raise SpecError(
            [
                (
                    "matrix",
                    (
                        f"makes {many:,} combinations; {_MAX_COMBINATIONS:,} are possible, make"
                        " several experiments"
                    ),
                )
            ]
        )
    keys = list(spec.matrix)
    if len(keys) > _MAX_KEYS:
        raise SpecError([("matrix", f"has {len(keys):,} keys; {_MAX_KEYS} are possible")])
    for key, values in spec.matrix.items():
        if over := next(
            (later for later in keys[keys.index(key) + 1 :] if _lies_in(key, later)), None
        ):
            raise SpecError(
                [
                    (
                        place_of(["matrix", key]),
                        f"would be lost, as {over} comes later; put it below that",
                    )
                ]
            )
        if not values:
            raise SpecError([(place_of(["matrix", key]), "has no values; give at least one")])
        if twice := [value for index, value in enumerate(values) if value in values[:index]]:
            raise SpecError(
                [(place_of(["matrix", key]), f"{twice[0]!r} stands there twice; remove one")]
            )
        if key.split(".")[0] in NOT_VARIED:
            raise SpecError(
                [
                    (
                        place_of(["matrix", key]),
                        "cannot vary by matrix; methods and seeds are lists of their own",
                    )
                ]
            )
        if key in NOT_COMPARED:
            text = "cannot vary by matrix, or its cells could not be compared; run two experiments"
            raise SpecError([(place_of(["matrix", key]), text)])
    if (cells := many * len(spec.methods) * len(spec.seeds)) > _MAX_CELLS:
        counts = {"matrix": many, "methods": len(spec.methods), "seeds": len(spec.seeds)}
        parts = (
            f"{many:,} combinations of the matrix, {len(spec.methods):,} methods and"
            f" {len(spec.seeds):,} seeds"
        )
        text = (
            f"{parts} make {cells:,} cells; {_MAX_CELLS:,} are possible, make several experiments"
        )
        raise SpecError([(max(counts, key=counts.__getitem__), text)])
    return [
        dict(zip(spec.matrix, values, strict=True))
        for values in itertools.product(*spec.matrix.values())
    ]


def with_text(raw: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A copy with one "dotted.key=value" of the command line taken in; the value is YAML. Raises
    SpecError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SpecError(
            [
                (
                    "--set",
                    f"{text!r} is not of the form key=value, for example network.link.rate=20mbit",
                )
            ]
        )
    try:
        given = yaml.load(value, _UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
        _check_values({key.strip(): given}, "--set")
        return with_override(raw, key.strip(), given)
    except SpecError as error:
        raise error.found_in("--set") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise SpecError(
            [("--set", f"the value of {key.strip()} is not YAML: {value!r:.60}")]
        ) from None


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a raw spec with dotted keys replaced."""
    out = dict(raw)
    for key, value in overrides.items():
        out = with_override(out, key, value)
    return out


def with_override(raw: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one dotted key replaced; ``schedule.0.set.rate`` reaches into lists. Raises
    SpecError."""
    out = copy.deepcopy(dict(raw))
    *parents, last = key.split(".")
    node: Any = out
    for part in parents:
        if isinstance(node, list):
            node = node[_position(node, part, key)]
            continue
        if not isinstance(node, dict):
            raise SpecError([(key, f"{part!r} lies below a value that is no mapping")])
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise SpecError([(key, f"{last!r} lies below a value that is no mapping")])
    return out


def _position(items: list[Any], text: str, key: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise SpecError([(key, f"{text!r} is no position in a list of {len(items)}")])
    return int(text)


def dump_spec(spec: Spec) -> str:
    """The resolved spec as YAML; ``load_spec`` of it gives the same spec."""
    plain = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
