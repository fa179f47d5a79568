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
MAX_CELLS = 100_000
_MAX_KEYS = 100
"""That a matrix varies."""
_MAX_CHECKED = 2_000_000
"""Values in all combinations together, which are checked one by one in a minute or two."""


_SafeLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Without libyaml it takes ten times as long."""


class _Refused(yaml.MarkedYAMLError):
    """It is YAML, but no spec has it."""


class _UniqueKeyLoader(_SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would silently keep the last), and takes
    ``on`` and ``off`` for keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:bool":  # what YAML 1.1 makes of a plain on or off
                key_node.tag = "tag:yaml.org,2002:str"
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, int) and abs(key) >= 2**63:  # many of them may have one hash
                raise _Refused(
                    problem="has a key that is too large a number", problem_mark=key_node.start_mark
                )
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts a text in quotes that the loader would take for something else."""


# YAML 1.1 takes 1e-3 for a text, as it wants a point in each float; 1.2, by which editors go, does
# not.
for _either in (_UniqueKeyLoader, _Dumper):
    _either.add_implicit_resolver(
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
        _check_combinations(spec, raw)
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


def _check_combinations(spec: Spec, raw: Mapping[str, Any]) -> None:
    made = combinations(spec)
    values = sum(1 for _ in _nodes({key: raw[key] for key in raw if key != "matrix"}))
    if len(made) > 1 and len(made) * values > _MAX_CHECKED:
        text = f"makes {len(made):,} combinations of a spec of {values:,} values; make several"
        raise SpecError([("matrix", f"{text} experiments")])
    for combination in made if spec.matrix else ():
        validate(apply_overrides(raw, combination))


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
        data = _load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = "" if isinstance(error, _Refused) else "not valid YAML: "
        raise SpecError([(line, f"{what}{error.problem or error.context}")], name) from None
    except _ODD as error:
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


_ODD = (yaml.YAMLError, RecursionError, ValueError, LookupError, ArithmeticError, AttributeError)
"""What PyYAML raises."""


def _load(text: str) -> Any:
    """YAML text → data. Raises one of ``_ODD``."""
    depth = 0
    for event in yaml.parse(text, _SafeLoader):
        problem = ""
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEEPEST:  # libyaml would run out of its stack, and the process end with it
                problem = f"is nested more than {_DEEPEST} levels deep"
        elif (
            isinstance(event, yaml.ScalarEvent)
            and event.implicit[0]
            and len(event.value) > _LONGEST_NUMBER
            and _LIKE_A_NUMBER.fullmatch(event.value)
        ):
            problem = f"is a number of more than {_LONGEST_NUMBER} characters"
        if getattr(event, "tag", None) is not None:
            problem = f"has the tag {event.tag:.40}; a spec has none"
        if problem:
            raise _Refused(problem=problem, problem_mark=event.start_mark)
    return yaml.load(text, _UniqueKeyLoader)  # noqa: S506 (a SafeLoader)


_LONGEST_NUMBER = 64
_LIKE_A_NUMBER = re.compile(r"[-+.0-9][-+.:_0-9a-zA-Z]*")


def _check_values(data: Any, source: str) -> None:
    """Raise SpecError for what not every check would bear, and no spec has: huge whole numbers,
    half characters, and aliases by which a small file stands for billions of nodes or letters, or
    one lies in itself."""
    letters = 0
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
                raise SpecError([(place_of(place), "is a number that is too large")], source)
            letters += len(value) if isinstance(value, str) else 0
            if letters > _MOST_LETTERS:
                text = f"has more than {_MOST_LETTERS:,} letters once its aliases are expanded"
                raise SpecError([("", text)], source)
            if isinstance(value, str) and _HALF.search(value):
                raise SpecError(
                    [(place_of(place), f"{value!r:.40} has half a character; write whole ones")],
                    source,
                )


_MOST_LETTERS = 8 << 20
_HALF = re.compile("[\ud800-\udfff]")


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
    if (keys := len(spec.matrix)) > _MAX_KEYS:
        raise SpecError([("matrix", f"has {keys:,} keys; {_MAX_KEYS} are possible")])
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
    for index, (key, values) in enumerate(spec.matrix.items()):
        later = itertools.islice(spec.matrix, index + 1, None)
        if over := next((other for other in later if _lies_in(key, other)), None):
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
    if (cells := many * len(spec.methods) * len(spec.seeds)) > MAX_CELLS:
        counts = {"matrix": many, "methods": len(spec.methods), "seeds": len(spec.seeds)}
        parts = (
            f"{many:,} combinations of the matrix, {len(spec.methods):,} methods and"
            f" {len(spec.seeds):,} seeds"
        )
        text = f"{parts} make {cells:,} cells; {MAX_CELLS:,} are possible, make several experiments"
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
        given = _load(value)
        _check_values({key.strip(): given}, "--set")
        return with_override(raw, key.strip(), given)
    except SpecError as error:
        raise error.found_in("--set") from None
    except _Refused as error:
        raise SpecError([("--set", f"the value of {key.strip()} {error.problem}")]) from None
    except _ODD:
        raise SpecError(
            [("--set", f"the value of {key.strip()} is not YAML: {value!r:.60}")]
        ) from None


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a raw spec, without its matrix, with dotted keys replaced."""
    out = copy.deepcopy({key: value for key, value in raw.items() if key != "matrix"})
    for key, value in overrides.items():
        _replace(out, key, copy.deepcopy(value))
    return out


def with_override(raw: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one dotted key replaced; ``schedule.0.set.rate`` reaches into lists. Raises
    SpecError."""
    out = copy.deepcopy(dict(raw))
    _replace(out, key, value)
    return out


def _replace(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    if len(parents) >= _MOST_PARTS:
        raise SpecError([(f"{key:.40}", f"has more than {_MOST_PARTS} parts")])
    node: Any = raw
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


_MOST_PARTS = 20


def _position(items: list[Any], text: str, key: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise SpecError([(key, f"{text!r} is no position in a list of {len(items)}")])
    return int(text)


def dump_spec(spec: Spec) -> str:
    """The resolved spec as YAML; ``load_spec`` of it gives the same spec."""
    plain = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    return dump_yaml(plain)


def dump_yaml(data: Mapping[str, Any]) -> str:
    """As ``parse_yaml`` reads it. Raises SpecError for what is no plain data."""
    try:
        return str(yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    except (yaml.YAMLError, RecursionError) as error:
        what = str(error.args[0]) if error.args else "nested without end"
        raise SpecError([("", f"is no plain data: {what:.80}")]) from None
