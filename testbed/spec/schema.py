"""JSON Schema of a spec, for editors: made from the models, the patterns of a schedule and the
catalogues of names.

``testbed schema`` prints it, and it lies as ``schema.json`` beside this file. It takes whatever
``validate`` takes. Of what that refuses it cannot say: how large a text with a unit is (a rate of
1bit), sums (a burst that cannot make up its loss), names that must be the same in two places
(``links: [w9]``), what lies beside the spec, values of a matrix, rules between two options.

Draft 7, which is what editors know best. There nothing that stands beside a ``$ref`` counts, so
only notes stand there.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import isabstract
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from netsenseml.catalog import METHODS, SCHEME, Option
from testbed.catalog import DATA, FITTING, MODELS, OPTIMIZERS
from testbed.links.state import DIRECTIONS
from testbed.spec import units
from testbed.spec.load import NOT_COMPARED, NOT_VARIED
from testbed.spec.models import KEPT, MIN_IPV6_MTU, Spec, WorkloadSpec
from testbed.timeline.field_types import CONTINUOUS
from testbed.timeline.patterns import ENTRIES
from testbed.traffic.flows import MAX_STREAMS

SCHEMA_FILE = Path(__file__).with_name("schema.json")
MARK = "Made by: testbed schema"
"""What the text of any of our schemas has in it."""

Json = dict[str, Any]

_IDENTIFIER = r"[A-Za-z_\u0080-\uffff][\w\u0080-\uffff]*"
_DOTTED = rf"{_IDENTIFIER}(?:\.{_IDENTIFIER})*"
_IMPORT_PATH: Json = {
    "type": "string",
    "pattern": rf"^{_DOTTED}:{_DOTTED}$",
    "description": "Your own, package.module:attribute.",
}
_FILLED: Json = {"not": {"type": "null"}}


class _Generator(GenerateJsonSchema):
    """Without nulls, which a spec has nowhere, and without titles that only repeat a key."""

    def nullable_schema(self, schema: Any) -> Json:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> Json:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_text(registered: Iterable[str] = ()) -> str:
    """The schema as a file; registered: names of methods that installed packages bring along."""
    return json.dumps(json_schema(registered), indent=1, ensure_ascii=False) + "\n"


def json_schema(registered: Iterable[str] = ()) -> Json:
    """The schema as data; registered as in ``schema_text``."""
    models: list[type[BaseModel]] = [Spec, *ENTRIES.values()]
    _, made = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/definitions/{model}",
        schema_generator=_Generator,
    )
    definitions: Json = made["$defs"]
    for model in _models(models):
        _say_defaults(definitions[model.__name__], model)
    _add_rules(definitions)
    definitions |= _QUANTITIES | _changes(definitions)
    definitions["Entry"] = {
        "description": (
            "From a time on, some links follow a pattern, or something happens to workers."
        ),
        "anyOf": [_ref(entry.__name__) for entry in ENTRIES.values()],
    }
    for name, short in {
        "LossSpec": _ref("share"),
        "ScriptSpec": {"type": "string", "description": "The file, beside the spec."},
        "ComputeSpec": {"const": "real", "description": "The time it takes."},
        "Scale": {**definitions["Scale"]["properties"]["rate"]},
    }.items():
        definitions[name] = {**_notes(definitions[name]), "anyOf": [short, definitions[name]]}
    for name, catalog in {
        "ModelSpec": MODELS,
        "DataSpec": DATA,
        "OptimizerSpec": OPTIMIZERS,
    }.items():
        definitions[name] = {**_notes(definitions[name]), **_choice(catalog)}
    definitions["MethodSpec"] = {
        **_notes(definitions["MethodSpec"]),
        **_choice(METHODS, registered, foreign_labels=METHODS),
    }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "$comment": MARK}
    spec = definitions.pop("Spec") | {"title": "Experiment of netsense-testbed"}
    del definitions["Duration"]  # what is behind ``duration``, which is written otherwise
    whole: Json = _tidied({**head, **spec, "definitions": dict(sorted(definitions.items()))})
    return whole


def _ref(name: str) -> Json:
    return {"$ref": f"#/definitions/{name}"}


def _notes(schema: Mapping[str, Any]) -> Json:
    return {key: schema[key] for key in ("title", "description") if key in schema}


def _object(properties: Mapping[str, Any], **more: Any) -> Json:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False, **more}


def _models(roots: Iterable[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    """Every model that is in a field of one of the roots, and the roots."""
    seen: set[type[BaseModel]] = set()
    pending: list[Any] = [*roots]
    while pending:
        part = pending.pop()
        pending += getattr(part, "__args__", ())
        if (
            isinstance(part, type)
            and issubclass(part, BaseModel)
            and part not in seen
            and not isabstract(part)
        ):
            seen.add(part)
            pending += [field.annotation for field in part.model_fields.values()]
            yield part


def _say_defaults(schema: Json, model: type[BaseModel]) -> None:
    """Defaults as people write them: with units, and without what is left out anyway."""
    written = model.model_construct().model_dump(mode="json", by_alias=True, exclude_none=True)
    for name, field in model.model_fields.items():
        key, default = field.alias or name, field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            written[key] = default.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        if written.get(key) not in (None, {}, [], ""):
            schema["properties"][key]["default"] = written[key]


_QUANTITIES: Json = {
    "rate": {
        "description": (
            "A rate a second, a number with bit, kbit, mbit or gbit; from 8kbit to 100gbit."
        ),
        "type": "string",
        "pattern": units.RATE_PATTERN,
        "patternErrorMessage": "Write a rate like 50mbit (units: bit, kbit, mbit, gbit).",
        "examples": ["50mbit"],
    },
    "time": {
        "description": "A time, a number with us, ms, s or min; or 0.",
        "type": ["string", "number"],
        "pattern": units.TIME_PATTERN,
        "patternErrorMessage": "Write a time like 10ms (units: us, ms, s, min).",
        "minimum": 0,
        "maximum": 0,
        "examples": ["10ms"],
    },
    "positive_time": {
        "description": "A time longer than 0s, a number with us, ms, s or min.",
        "type": "string",
        "pattern": units.POSITIVE_TIME_PATTERN,
        "patternErrorMessage": "Write a time longer than 0s, like 10ms (units: us, ms, s, min).",
        "examples": ["10ms"],
    },
    "seconds": {
        "description": "Seconds, or a time with its unit: us, ms, s or min.",
        "type": ["string", "number"],
        "pattern": units.TIME_PATTERN,
        "patternErrorMessage": (
            "Write a number of seconds, or a time like 2min (units: us, ms, s, min)."
        ),
        "minimum": 0,
        "maximum": 10_000_000,
        "examples": [30, "2min"],
    },
    "size": {
        "description": "A size, a number with B, kB, MB, KiB or MiB.",
        "type": "string",
        "pattern": units.SIZE_PATTERN,
        "patternErrorMessage": "Write a size like 64KiB (units: B, kB, MB, KiB, MiB).",
        "examples": ["64KiB"],
    },
    "queue": {
        "description": "A time at the rate (us, ms, s, min), or a size (B, kB, MB, KiB, MiB).",
        "type": ["string", "number"],
        "pattern": units.QUEUE_PATTERN,
        "patternErrorMessage": (
            "Write a time like 50ms (us, ms, s, min) or a size like 64KiB (B, kB, MB, KiB, MiB)."
        ),
        "minimum": 0,
        "maximum": 0,
        "examples": ["50ms", "64KiB"],
    },
    "share": {
        "description": (
            "A share of 0% to 100%; or a number from 0 to 1, but not the whole number 1."
        ),
        "type": ["string", "number"],
        "pattern": units.SHARE_PATTERN,
        "patternErrorMessage": "Write a share like 1%.",
        "minimum": 0,
        "maximum": 1,
        "examples": ["1%"],
    },
    "congestion": {
        "description": "The name of a congestion control in the kernel.",
        "type": "string",
        "pattern": "^[A-Za-z0-9_-]{1,15}$",
        "examples": ["cubic", "reno", "bbr"],
    },
    "links": {
        "description": "The name of a link, a list of names, or all.",
        "anyOf": [
            {"type": "string", "examples": ["all", "w1"]},
            {
                "type": "array",
                "items": {"type": "string"},
                "minItems": 1,
                "if": {"contains": {"const": "all"}},
                "then": {"maxItems": 1},
            },
        ],
    },
    "streams": {
        "description": (
            "A number of streams, {random: [1, 50]}, or {ramp: [1, 50]} for one more in each phase."
        ),
        "anyOf": [
            _ref("few_streams"),
            *(_object({kind: _ref("few_streams")}, required=[kind]) for kind in ("random", "ramp")),
        ],
        "examples": [4, {"random": [1, 50]}, {"ramp": [1, 50]}],
    },
    "workers": {
        "description": "The name of a worker, or a list of names.",
        "anyOf": [
            {"type": "string", "examples": ["w1"]},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 64},
        ],
    },
    "few_streams": {
        "description": "A number, or the smallest and the largest one.",
        "type": ["integer", "array"],
        "minimum": 1,
        "maximum": MAX_STREAMS,
        "items": {"type": "integer", "minimum": 1, "maximum": MAX_STREAMS},
        "minItems": 2,
        "maxItems": 2,
    },
    "duration": {
        "description": (
            "A time of at least 100ms, or {mean: 60s} for one that is drawn from an exponential"
            " distribution."
        ),
        "anyOf": [
            _ref("positive_time"),
            {
                "type": "object",
                "properties": {"mean": _ref("positive_time")},
                "required": ["mean"],
                "additionalProperties": False,
            },
        ],
    },
}


def _pair(schema: Json) -> Json:
    return {"type": "array", "items": schema, "minItems": 2, "maxItems": 2}


def _changes(definitions: Json) -> Json:
    """What may change of a link in use, also as two values of each property; and what of that
    gradually."""
    parameters, link, loss = (
        definitions[name]["properties"] for name in ("LinkParametersSpec", "LinkSpec", "LossSpec")
    )
    out: Json = {
        "LossPairs": _object({key: _pair(value) for key, value in loss.items()}, required=["share"])
    }
    for prefix, kept in (("", set(parameters) - set(KEPT)), ("Gradual", CONTINUOUS)):
        values = {key: value for key, value in parameters.items() if key in kept}
        pairs = {key: _pair(value) for key, value in values.items()}
        pairs["loss"] = {"anyOf": [pairs["loss"], _ref("LossPairs")]}
        one, two = f"{prefix}ShapeChange", f"{prefix}ShapePairs"
        sides: Json = {
            "up": _ref(one) if prefix else {"anyOf": [_ref(one), {"type": "boolean"}]},
            "down": _ref(one),
        }
        both: Json = {side: {"anyOf": [_ref(two), _pair(sides[side])]} for side in DIRECTIONS}
        for side in DIRECTIONS:
            sides[side] |= _notes(link[side])
            both[side] |= _notes(link[side])
        out |= {
            one: _object(values),
            two: _object(pairs),
            f"{prefix}LinkChange": _object({**values, **sides}, minProperties=1),
            f"{prefix}LinkPairs": _object(
                {**pairs, **both}, minProperties=1, description="Two values for each property."
            ),
        }
    return out


def _choice(
    catalog: Mapping[str, Mapping[str, Option]],
    registered: Iterable[str] = (),
    foreign_labels: Iterable[str] = (),
) -> Json:
    """A name, or a name with its options. What is the user's own has any options."""
    others = [name for name in registered if name not in catalog]
    own = {"anyOf": [_IMPORT_PATH, *([{"enum": others}] if others else [])]}
    known = [_named({"const": name}, options, foreign_labels) for name, options in catalog.items()]
    return {
        "anyOf": [
            {"enum": [*catalog, *others]},
            _IMPORT_PATH,
            *known,
            _named(own, None, foreign_labels),
        ]
    }


def _named(name: Json, options: Mapping[str, Option] | None, foreign_labels: Iterable[str]) -> Json:
    known = {key: option.json_schema() for key, option in (options or {}).items()}
    if "schemes" in known:
        known["schemes"]["items"]["pattern"] = f"^{SCHEME}$"
    others = [label for label in foreign_labels if label != name.get("const")]
    label = {"type": "string", "description": "The name in tables and directories."}
    more = _FILLED if options is None else False
    return {
        "type": "object",
        "title": name.get("const", "your own"),
        "properties": {
            "name": name,
            **known,
            "label": {**label, **({"not": {"enum": others}} if others else {})},
            "options": {
                "type": "object",
                "description": "Options may stand here, too, instead of beside the name.",
                "properties": known,
                "additionalProperties": more,
            },
        },
        "required": ["name"],
        "additionalProperties": more,
    }


def _is_one_of(names: Sequence[str], *also: Json) -> Json:
    """Matches names with and without options."""
    name = {"anyOf": [{"enum": list(names)}, *also]}
    return {
        "anyOf": [
            *name["anyOf"],
            {"type": "object", "properties": {"name": name}, "required": ["name"]},
        ]
    }


def _add_rules(definitions: Json) -> None:
    """What a model says of several keys at once, as far as it is about which of them are there."""
    some = {"type": "string", "pattern": "^[^eE]*[1-9]"}
    slowed = {
        "properties": {
            "workload": {
                "required": ["compute"],
                "properties": {"compute": _needs("pace", "emulate")},
            }
        }
    }
    star = {"properties": {"topology": {"const": "star"}, "ip": {"const": 4}}}
    kernel = {"properties": {"engine": {"enum": ["auto", "netem"]}}}
    cpu = {"properties": {"device": {"enum": ["cpu", "auto"]}}}
    rules: Mapping[str, Json] = {
        "Spec": {
            "oneOf": [{"required": ["workload"]}, {"required": ["script"]}],
            "allOf": [
                _if(
                    {"dilation": {"exclusiveMinimum": 1}},
                    {"required": ["workload"], **slowed},
                    "dilation",
                ),
                _if(
                    {"lab": {"enum": ["docker", "swarm"]}}, {"properties": {"network": star}}, "lab"
                ),
                _if(
                    {"lab": {"const": "swarm"}},
                    {"properties": {"network": kernel, "workload": cpu}},
                    "lab",
                ),
                _if(
                    {"lab": {"enum": ["netns", "docker"]}},
                    {"properties": {"placement": {"maxProperties": 0}}},
                ),
            ],
        },
        "NetworkSpec": {
            "allOf": [
                _if(
                    {"topology": {"const": "star"}}, _without("trunk", "left", "regions", "between")
                ),
                _if(
                    {"topology": {"const": "dumbbell"}},
                    {"required": ["trunk"], **_without("regions", "between")},
                    "topology",
                ),
                _if(
                    {"topology": {"const": "regions"}},
                    {"required": ["regions", "between"], **_without("trunk", "left")},
                    "topology",
                ),
                _if({"ip": {"const": 6}}, {"properties": {"mtu": {"minimum": MIN_IPV6_MTU}}}, "ip"),
            ]
        },
        "LinkParametersSpec": _if(
            {"aqm": {"const": "fifo"}}, {"properties": {"ecn": {"const": False}}}, "aqm"
        ),
        "LinkSpec": _if(
            {"aqm": {"const": "fifo"}}, {"properties": {"ecn": {"const": False}}}, "aqm"
        ),
        "TrafficSpec": {
            "oneOf": [{"required": ["tcp"]}, {"required": ["udp"]}],
            "dependencies": {"on": ["off"], "off": ["on"]},
        },
        "StopSpec": _needs("steps", "epochs", "seconds"),
        "ComputeSpec": {
            "allOf": [
                {"not": {"required": ["pace", "emulate"]}},
                _if(
                    {"jitter": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, some]}},
                    _needs("emulate"),
                    "jitter",
                ),
                _if({"stragglers": {"minProperties": 1}}, _needs("pace", "emulate"), "stragglers"),
            ]
        },
        "WorkloadSpec": {
            **_if(
                {"compute": {"type": "object", "required": ["emulate"]}},
                _only_emulated(),
                "compute",
            ),
            "else": {"allOf": [_learns_from(model, data) for model, data in FITTING.items()]},
        },
    }
    for name, rule in rules.items():
        definitions[name] |= rule
    spec, network = definitions["Spec"]["properties"], definitions["NetworkSpec"]["properties"]
    for unique in (spec["methods"], spec["seeds"], network["left"]):
        unique["uniqueItems"] = True
    varied = "|".join(key for key in spec if key not in NOT_VARIED)
    whole = "|".join(key.replace(".", r"\.") for key in NOT_COMPARED)
    spec["matrix"] |= {
        "propertyNames": {"pattern": rf"^(?!(?:{whole})$)(?:{varied})(?:\.|$)"},
        "additionalProperties": {
            "type": "array",
            "items": _FILLED,
            "minItems": 1,
            "uniqueItems": True,
        },
    }
    network["regions"]["additionalProperties"] = False
    spec["placement"]["additionalProperties"]["additionalProperties"] = False
    from_outside = definitions["ScriptSpec"]["properties"]["stop"]
    from_outside["allOf"] = [{"$ref": from_outside.pop("$ref")}, _without("steps", "epochs")]


def _needs(*keys: str) -> Json:
    """A mapping that has at least one of the keys."""
    return {"type": "object", "anyOf": [{"required": [key]} for key in keys]}


def _without(*keys: str) -> Json:
    return {"properties": dict.fromkeys(keys, False)}


def _if(properties: Json, then: Json, *required: str) -> Json:
    """required: keys that must be there, as what is left out is like anything to a schema."""
    return {"if": {"properties": properties, "required": list(required)}, "then": then}


def _only_emulated() -> Json:
    learning = {"target": False, "stop": _without("accuracy", "epochs")}
    return {"properties": {**learning, "model": _is_one_of([*MODELS])}}


def _learns_from(model: str, data: Sequence[str]) -> Json:
    """Both have a default, which counts where one of them is left out."""
    defaults = {key: WorkloadSpec.model_fields[key].default.name for key in ("model", "data")}
    then: Json = {"properties": {"data": _is_one_of(data, _IMPORT_PATH)}}
    if defaults["data"] not in data:
        then["required"] = ["data"]
    return _if(
        {"model": _is_one_of([model])}, then, *([] if model == defaults["model"] else ["model"])
    )


def _tidied(node: Any) -> Any:
    """References in place of the names that ``written_as`` gave, examples as values, a description
    with a line a paragraph."""
    if isinstance(node, list):
        return [_tidied(part) for part in node]
    if not isinstance(node, dict):
        return node
    out = {key: _tidied(value) for key, value in node.items()}
    if (name := out.get("$comment")) in _REFERRED:
        del out["$comment"]
        out = {**_ref(name), **out}
    if isinstance(examples := out.get("examples"), list):
        out["examples"] = [yaml.safe_load(one) if isinstance(one, str) else one for one in examples]
    if isinstance(text := out.get("description"), str):
        out["description"] = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
    return out


_REFERRED = {*_QUANTITIES, "LinkChange", "LinkPairs", "GradualLinkChange", "GradualLinkPairs"}
