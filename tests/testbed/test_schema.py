"""The JSON Schema for editors: it takes what the command line takes, and refuses what a schema can
refuse."""

import copy
import functools
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_hostile import WHOLE, changed, changes, examples
from test_spec import BAD, places, write
from test_timeline import BAD_ENTRIES
from test_traffic import BAD_FLOWS, BASE, TCP
from test_worker_entries import BAD_WORKERS, PACED, SPEC
from typer.testing import CliRunner

from netsenseml.catalog import METHODS
from testbed.catalog import DATA, MODELS, OPTIMIZERS
from testbed.cli import app
from testbed.spec import units
from testbed.spec.errors import SpecError
from testbed.spec.load import dump_spec, read_yaml, validate
from testbed.spec.models import parse_queue
from testbed.spec.schema import SCHEMA_FILE, json_schema, schema_text

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
SPECS = sorted([*(ROOT / "experiments").rglob("*.yaml"), ROOT / "testbed" / "starter.yaml"])
SCHEMA = json.loads(SCHEMA_FILE.read_text())
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


@functools.cache
def definition(name):
    return jsonschema.Draft7Validator(
        {**SCHEMA["definitions"][name], "definitions": SCHEMA["definitions"]}
    )


def faults(raw):
    return [f"{error.json_path}: {error.message:.200}" for error in VALIDATOR.iter_errors(raw)]


def test_what_is_shipped_is_what_the_models_give_and_the_command_prints():
    assert schema_text() == SCHEMA_FILE.read_text(), (
        "mend it with: testbed schema > testbed/spec/schema.json"
    )
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    text = SCHEMA_FILE.read_text()
    assert [
        name for name in SCHEMA["definitions"] if f'"#/definitions/{name}"' not in text
    ] == [], "nothing refers to these"
    result = CliRunner().invoke(app, ["schema"])
    assert (result.exit_code, json.loads(result.stdout)) == (0, SCHEMA)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_spec_of_the_repository_is_good_and_names_the_schema(path):
    raw = read_yaml(path)
    assert faults(raw) == []
    assert faults(yaml.safe_load(dump_spec(validate(raw)))) == []
    line = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", path.read_text().splitlines()[0])
    assert line and (path.parent / line[1]).resolve() == SCHEMA_FILE


HOW_LARGE = "a pattern says how a quantity is written, not how large it is"
COMPARED = "two values of the spec do not fit together, and a schema cannot compare them"
NAMED = "whether a name is good depends on what there is in another place"
LINKS = "it is about what a link comes to by several keys, and in time"
OUTSIDE = "it depends on files beside the spec"
MATRIX = "what may stand there depends on the key of the matrix"
TAKEN = {
    "network.link.loss.burst": COMPARED,
    "network: link w0": LINKS,
    "network.link.loss.share": (
        "to a schema 1 and 1.0 are the same number, of which the second is good"
    ),
    "network.link.delay: less than": HOW_LARGE,
    "schedule: link w0 at 8s": LINKS,
    "network.link.queue: 1513B": HOW_LARGE,
    "network.link.queue: 3KiB": HOW_LARGE,
    "network.links.w1.up.queue": HOW_LARGE,
    "schedule[0].set.queue: 1B": HOW_LARGE,
    "schedule[0].square.queue": HOW_LARGE,
    "traffic[0].udp.packet": COMPARED,
    "network.between.us-eu": NAMED,
    "matrix.network.link.rate: would be lost": COMPARED,
    "matrix: makes": COMPARED,
    "network.left[1]: 'w8'": NAMED,
    "network.regions: w3": NAMED,
    "network.between.eu-as": NAMED,
    "network.links.w7": NAMED,
    "workload.compute.stragglers.w9": NAMED,
    "placement.w9": NAMED,
    "script.args[1]: has the character NUL": (
        "nobody types it by accident, and a schema says of texts how they look"
    ),
    "script.args: has 110000 bytes": HOW_LARGE,
    "workload.data: 99 bytes": COMPARED,
    "workload.data: 200 classes": COMPARED,
    "workload.data: use side: 32": COMPARED,
    "workload.data.folder": OUTSIDE,
    "traffic[0].tcp.congestion": COMPARED,
    "dilation: 8kbit": COMPARED,
    "schedule[0].links[1]: there is no link": NAMED,
    "schedule[1].at": COMPARED,
    "network.link.rate: 'fast'": MATRIX,
}
TAKEN_OF_ENTRIES = {
    "less than 1": HOW_LARGE,
    "at least 1ms apart": HOW_LARGE,
    "too short for two steps": COMPARED,
}
TAKEN_OF_WORKERS = {
    "there is no worker": NAMED,
    "comes after the end of the run": COMPARED,
}
TAKEN_OF_FLOWS = {
    "there is no host": NAMED,
    "is the host that it comes from": COMPARED,
    "after the end of the run": COMPARED,
    "1472": HOW_LARGE,
    "the smaller number first": COMPARED,
}


def unexpected(cases, taken):
    """Bad specs that the schema takes without a reason, and reasons that no bad spec needs."""
    needed = set()
    for raw, said in cases:
        reasons = {words for words in taken if all(word in said for word in words.split(": ", 1))}
        if VALIDATOR.is_valid(raw) != bool(reasons):
            yield said
        needed |= reasons
    yield from taken.keys() - needed


def test_bad_specs_are_refused_but_for_those_that_no_schema_can_refuse(tmp_path):
    cases = [
        (read_yaml(write(tmp_path, None, **replaced)), f"{place} {words}")
        for replaced, place, words in BAD
    ]
    assert list(unexpected(cases, TAKEN)) == []


def test_bad_lines_of_a_schedule_and_bad_flows_are_refused_likewise():
    cases = [({**BASE, "schedule": [{"at": "0s", **entry}]}, words) for entry, words in BAD_ENTRIES]
    assert list(unexpected(cases, TAKEN_OF_ENTRIES)) == []
    workers = {**SPEC, "name": "workers", "workload": PACED}
    cases = [
        ({**workers, "schedule": [{"at": "1s", **entry}]}, words) for entry, _, words in BAD_WORKERS
    ]
    assert list(unexpected(cases, TAKEN_OF_WORKERS)) == []
    cases = [
        (
            {
                **BASE,
                "traffic": [
                    {key: value for key, value in {**TCP, **flow}.items() if value is not None}
                ],
            },
            words,
        )
        for flow, _, words in BAD_FLOWS
    ]
    assert list(unexpected(cases, TAKEN_OF_FLOWS)) == []


def test_an_empty_value_is_refused_everywhere():
    assert faults(WHOLE) == []
    for path in places(WHOLE):
        raw = copy.deepcopy(WHOLE)
        *parents, last = path
        functools.reduce(lambda node, part: node[part], parents, raw)[last] = None
        assert not VALIDATOR.is_valid(raw), path


@examples(60)
@given(changes)
def test_whatever_the_command_line_takes_the_schema_takes(made):
    raw = copy.deepcopy(WHOLE)
    for path, value in made:
        changed(raw, path, value)
    try:
        validate(raw)
    except (SpecError, UnicodeError):  # half a character does not come through the file
        return
    assert faults(raw) == []


UNITS = [
    "bit",
    "kbit",
    "Mbit",
    "gbit",
    "mbit/s",
    "us",
    "µs",
    "ms",
    "S",
    "min",
    "B",
    "kB",
    "KiB",
    "MIB",
    "%",
    "",
    "h",
    "mb/s",
    "x",
]
NUMBERS = [
    "0",
    "1",
    "20",
    "0.5",
    ".5",
    "5.",
    "1e3",
    "2E-1",
    "1e+2",
    "+3",
    "-3",
    "-0",
    "0.0",
    "e3",
    "1_000",
    "1,5",
    "",
    "٣",
    "--1",
]
texts = st.tuples(
    st.sampled_from(["", " "]),
    st.sampled_from(NUMBERS),
    st.sampled_from(["", " ", "\t"]),
    st.sampled_from(UNITS),
).map("".join)
others = st.sampled_from([0, 0.0, -0.0, 1, 1.0, 0.5, -1, 2, 1e8, True, False, [], ["1s"], {}])
PARSERS = {
    "rate": units.parse_rate,
    "time": units.parse_time,
    "size": units.parse_size,
    "share": units.parse_share,
    "queue": parse_queue,
}


@examples(250)
@given(st.sampled_from(sorted(PARSERS)), texts | others)
def test_a_quantity_is_what_its_parser_takes_but_for_its_size(name, value):
    try:
        PARSERS[name](value)
    except ValueError as error:
        if "out of range" in str(error) and isinstance(value, str):
            return
        if name == "share" and value == 1:
            # the whole number 1 is refused, the number 1.0 is not, and JSON has no such difference
            return
        good = False
    else:
        good = True
    assert definition(name).is_valid(value) == good


@pytest.mark.parametrize(
    ("kind", "catalog"),
    [
        ("MethodSpec", METHODS),
        ("ModelSpec", MODELS),
        ("DataSpec", DATA),
        ("OptimizerSpec", OPTIMIZERS),
    ],
)
def test_names_of_the_catalogues_are_choices_with_their_options(kind, catalog):
    check = definition(kind).is_valid
    for name, options in catalog.items():
        assert check(name) and check({"name": name}) and check({"name": name, "label": "mine"})
        assert not check({"name": name, "nonsense": 1}) and not check(
            {"name": name, "options": {"nonsense": 1}}
        )
        for key, option in options.items():
            assert check({"name": name, key: option.default}) and check(
                {"name": name, "options": {key: option.default}}
            )
            for odd in (None, {}, -1, "", True, "nonsense", [0], [None]):
                try:
                    option.check(odd)
                except ValueError:
                    assert not check({"name": name, key: odd}), (name, key, odd)
                else:
                    assert check({"name": name, key: odd}), (name, key, odd)
    assert check("package.module:Class") and check(
        {"name": "package.module:Class.inner", "anything": [1]}
    )
    assert (
        not check("nonsense")
        and not check({"name": "nonsense"})
        and not check({"ratio": 0.1})
        and not check("a.b:")
    )


def test_methods_of_installed_packages_are_choices_of_the_schema_that_is_printed():
    of_here = jsonschema.Draft7Validator(json_schema(["theirs", "topk"]))
    raw = {**BASE, "methods": ["theirs", {"name": "theirs", "any": "option"}]}
    assert of_here.is_valid(raw) and not VALIDATOR.is_valid(raw)
    assert not of_here.is_valid({**BASE, "methods": [{"name": "topk", "any": "option"}]})


def test_each_key_is_described_and_has_an_example_or_a_default_that_is_good():
    for name, part in {"Spec": SCHEMA, **SCHEMA["definitions"]}.items():
        for key, value in [
            pair
            for one in [part, *part.get("anyOf", [])]
            for pair in one.get("properties", {}).items()
        ]:
            assert (
                name.endswith("Pairs") or key == "name" or {"description", "$ref"} & value.keys()
            ), f"{name}.{key}"
            if "$ref" in value:  # nothing else that stands beside it counts
                assert set(value) <= {"$ref", "description", "default", "examples"}, f"{name}.{key}"
            check = jsonschema.Draft7Validator({**value, "definitions": SCHEMA["definitions"]})
            for good in [
                *value.get("examples", []),
                *([value["default"]] if "default" in value else []),
            ]:
                assert check.is_valid(good), f"{name}.{key}: {good}"
