"""Specs through the command line: good ones load, bad ones get one line with the place and the
mend."""

import copy
import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from testbed.cli import app
from testbed.labs.base import Limits
from testbed.links.state import LinkParameters, LinkState
from testbed.plan import describe, make_plan
from testbed.spec.errors import SpecError
from testbed.spec.load import (
    apply_overrides,
    combinations,
    dump_spec,
    load_spec,
    parse_link,
    validate,
)

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "experiments" / "smoke.yaml"


def write(tmp_path, text, **replaced):
    data = yaml.safe_load(SMOKE.read_text()) if text is None else None
    path = tmp_path / "bad.yaml"
    if data is not None:
        for key, value in replaced.items():
            node = data
            *parents, last = key.split("__")
            for part in parents:
                node = node[int(part) if part.isdigit() else part]
            if value is ...:
                del node[last]
            else:
                node[int(last) if last.isdigit() else last] = value
        text = yaml.safe_dump(data, sort_keys=False)
    path.write_text(text)
    return path


def refused(path, *arguments):
    """The one line that a bad spec gets; nothing may be left behind by it."""
    out = path.parent / "out"
    for command in (["validate", str(path)], ["run", str(path), "--out", str(out)]):
        result = CliRunner().invoke(app, [*command, *arguments])
        assert result.exit_code == 2, result.output
        assert not result.stdout
        assert not out.exists()
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("text", ["1e-3", "3e0", "0.e1", "off", "1_000", "0x1f", "2026-11-28", "~"])
def test_a_text_like_something_else_survives_a_round_trip(tmp_path, text):
    (tmp_path / "train.py").touch()
    script = {"file": "train.py", "args": ["--lr", text], "stop": {"seconds": 5}}
    spec = load_spec(write(tmp_path, json.dumps({"methods": ["allreduce"], "script": script})))
    assert spec.script.args == ["--lr", text]
    again = tmp_path / "again.yaml"
    again.write_text(dump_spec(spec))
    assert load_spec(again) == spec


@pytest.mark.parametrize(
    "path",
    sorted(
        [*(ROOT / "experiments").glob("*.yaml"), *(ROOT / "experiments" / "paper").glob("*.yaml")]
    ),
    ids=lambda path: path.name,
)
def test_shipped_specs_are_good_and_survive_a_round_trip(path, tmp_path):
    spec = load_spec(path)
    for script in (ROOT / "experiments").glob("*.py"):
        shutil.copy(script, tmp_path)
    again = tmp_path / "spec.yaml"
    again.write_text(dump_spec(spec))
    assert load_spec(again) == spec
    assert make_plan(load_spec(again)) == make_plan(spec)


BAD = [
    ({"wokers": 4}, "bad.yaml: wokers: ", "did you mean 'workers'?"),
    ({"network__link__rat": "5mbit"}, "bad.yaml: network.link.rat: ", "did you mean 'rate'?"),
    ({"network__link__rate": "50mb"}, "bad.yaml: network.link.rate: ", "bit, kbit, mbit, gbit"),
    ({"network__link__rate": "-50mbit"}, "bad.yaml: network.link.rate: ", "negative"),
    ({"network__link__queue": "much"}, "bad.yaml: network.link.queue: ", "64KiB"),
    (
        {"network__link__up": {"dealy": "5ms"}},
        "bad.yaml: network.link.up.dealy: ",
        "did you mean 'delay'?",
    ),
    (
        {"network__link__loss": {"share": "1%", "brust": 4}},
        "bad.yaml: network.link.loss.brust: ",
        "did you mean 'burst'?",
    ),
    (
        {"network__link__loss": {"share": "50%", "burst": 1, "bad": "60%"}},
        "bad.yaml: network.link.loss.burst: ",
        "longer",
    ),
    (
        {"network__link__distribution": "gauss"},
        "bad.yaml: network.link.distribution: ",
        "normal, uniform, pareto",
    ),
    (
        {"network__link__reorder": "1%"},
        "bad.yaml: network: link w0: ",
        "cannot overtake where nothing is delayed",
    ),
    ({"network__link__loss": 1}, "bad.yaml: network.link.loss.share: ", "1% or as 100%"),
    ({"network__link__delay": "1h"}, "bad.yaml: network.link.delay: ", "us, ms, s, min"),
    (
        {"network__link__delay": "20min"},
        "bad.yaml: network.link.delay: ",
        "less than or equal to 1000",
    ),
    (
        {"network__link": {"delay": "10ms", "jitter": "8ms"}},
        "bad.yaml: network: link w0: a jitter of 8ms",
        "16ms or more",
    ),
    (
        {"schedule__0__set": {"jitter": "8ms"}},
        "bad.yaml: schedule: link w0 at 8s: a jitter of 8ms",
        "16ms or more",
    ),
    ({"network__link__in_order": "perhaps"}, "bad.yaml: network.link.in_order: ", "true or false"),
    (
        {"network__link__aqm": "red"},
        "bad.yaml: network.link.aqm: ",
        "valid: fifo, codel, fq_codel, cake",
    ),
    (
        {"network__link__ecn": True},
        "bad.yaml: network: link w0: ecn needs a queue that marks",
        "aqm: codel, fq_codel or cake",
    ),
    (
        {"network__link__up": {"aqm": "fifo", "ecn": True}},
        "bad.yaml: network.link.up.ecn: ",
        "fifo only drops",
    ),
    (
        {"network__link": {"aqm": "codel"}, "schedule": []},
        "bad.yaml: network: link w0: codel has nothing to manage",
        "give it a rate",
    ),
    (
        {"schedule__0__set": {"aqm": "codel"}},
        "bad.yaml: schedule[0].set.aqm: cannot change while",
        "under network",
    ),
    (
        {"schedule__0__set": {"up": {"aqm": "codel"}}},
        "bad.yaml: schedule[0].set.up.aqm: cannot change",
        "under network",
    ),
    (
        {"schedule__0__set": {"ecn": True}},
        "bad.yaml: schedule[0].set.ecn: cannot change while",
        "both ends",
    ),
    ({"network__engine": "kernel"}, "bad.yaml: network.engine: ", "valid: auto, netem, userspace"),
    ({"network__shaper": "hfsc"}, "bad.yaml: network.shaper: ", "valid: htb, tbf"),
    (
        {"network__mtu": 500},
        "bad.yaml: network.mtu: 500 is out of range",
        "greater than or equal to 576",
    ),
    (
        {"network__mtu": 9001},
        "bad.yaml: network.mtu: 9001 is out of range",
        "less than or equal to 9000",
    ),
    ({"network__mtu": 1000, "network__ip": 6}, "bad.yaml: network.mtu: ", "needs 1280"),
    ({"network__ip": 5}, "bad.yaml: network.ip: ", "valid: 4, 6"),
    (
        {"network__link__queue": "1513B"},
        "bad.yaml: network.link.queue: 1513B do not hold one frame",
        "at least 1514B",
    ),
    (
        {"network__link__queue": "3KiB", "network__mtu": 9000},
        "bad.yaml: network.link.queue: 3KiB do not",
        "9014B",
    ),
    (
        {"network__links": {"w1": {"up": {"queue": "99B"}}}},
        "bad.yaml: network.links.w1.up.queue: 99B do not",
        "1514B",
    ),
    ({"schedule__0__set": {"queue": "1B"}}, "bad.yaml: schedule[0].set.queue: 1B do not", "1514B"),
    (
        {"schedule__0": {"at": "1s", "square": {"queue": ["10ms", "1KiB"]}, "period": "1s"}},
        "bad.yaml: schedule[0].square.queue: 1KiB do not",
        "1514B",
    ),
    (
        {"network__mtu": 576, "traffic": [{"from": "bg0", "to": "w0", "udp": {"rate": "1mbit"}}]},
        "bad.yaml: traffic[0].udp.packet: 1200B do not fit into one frame",
        "at most 548B",
    ),
    (
        {"schedule__0__links": ["w1", "all"]},
        "bad.yaml: schedule[0].links[1]: all stands alone",
        "links: all",
    ),
    (
        {"network": {"topology": "dumbbell", "trunk": {"rate": "5mbit"}, "left": ["w0", "w0"]}},
        "bad.yaml: network.left[1]: ",
        "'w0' stands there twice",
    ),
    (
        {
            "network": {
                "topology": "regions",
                "regions": {"eu": ["w0", "w1"], "us": ["w2", "w3"]},
                "between": {"eu-us": {"rate": "5mbit"}, "us-eu": {"rate": "9mbit"}},
            }
        },
        "bad.yaml: network.between.us-eu: ",
        "the same trunk as eu-us",
    ),
    (
        {"matrix": {"network.link.rate": ["1mbit"], "network.link": [{"rate": "5mbit"}]}},
        "bad.yaml: matrix.network.link.rate: ",
        "would be lost, as network.link comes later",
    ),
    (
        {
            "matrix": {
                f"network.links.w{link}.rate": [f"{rate}mbit" for rate in range(1, 100)]
                for link in range(4)
            }
        },
        "bad.yaml: matrix: makes 96,059,601 combinations",
        "10,000",
    ),
    ({"network__topology": "dumbbell"}, "bad.yaml: network.trunk: is missing", "dumbbell"),
    (
        {"network__trunk": {"rate": "5mbit"}},
        "bad.yaml: network.trunk: ",
        "does not belong to topology star",
    ),
    (
        {"network": {"topology": "dumbbell", "trunk": {"rate": "5mbit"}, "left": ["w0", "w8"]}},
        "bad.yaml: network.left[1]: ",
        "'w8'",
    ),
    (
        {
            "network": {
                "topology": "regions",
                "regions": {"eu": ["w0", "w1"], "us": ["w2"]},
                "between": {"all": {}},
            }
        },
        "bad.yaml: network.regions: ",
        "w3",
    ),
    (
        {
            "network": {
                "topology": "regions",
                "regions": {"eu": ["w0", "w1"], "us": ["w2", "w3"]},
                "between": {"eu-as": {"rate": "5mbit"}},
            }
        },
        "bad.yaml: network.between.eu-as: ",
        "eu-us",
    ),
    (
        {"network__links": {"w7": {"rate": "5mbit"}}},
        "bad.yaml: network.links.w7: ",
        "w0, w1, w2, w3",
    ),
    (
        {"workload__compute": {"pace": "1s", "emulate": "1s"}},
        "bad.yaml: workload.compute.emulate: ",
        "beside pace",
    ),
    ({"workload__device": "gpu"}, "bad.yaml: workload.device: ", "valid: cpu, cuda, auto"),
    (
        {"lab": "swarm", "workload__device": "cuda"},
        "bad.yaml: workload.device: ",
        "for labs of one machine",
    ),
    (
        {"lab": "swarm", "network__engine": "userspace"},
        "bad.yaml: network.engine: ",
        "use engine: netem",
    ),
    (
        {"lab": "swarm", "placement": {"w9": {"zone": "a"}}},
        "bad.yaml: placement.w9: ",
        "there is no host 'w9'",
    ),
    ({"lab": "swarm", "placement": {"w0": {"a b": "c"}}}, "bad.yaml: placement.w0.a b: ", ""),
    ({"placement": {"w0": {"zone": "a"}}}, "bad.yaml: placement: ", "use lab: swarm"),
    (
        {"workload__compute": {"emulate": "0s"}},
        "bad.yaml: workload.compute.emulate: ",
        "greater than 0",
    ),
    (
        {"workload__compute": {"pace": "1s", "jitter": "5%"}},
        "bad.yaml: workload.compute.jitter: ",
        "needs emulate",
    ),
    (
        {"workload__compute": {"stragglers": {"w1": 2}}},
        "bad.yaml: workload.compute.stragglers: ",
        "needs pace",
    ),
    (
        {"workload__compute": {"pace": "1s", "stragglers": {"w9": 2}}},
        "bad.yaml: workload.compute.stragglers.w9: ",
        "there are w0 to w3",
    ),
    (
        {"workload": {"compute": {"emulate": "1s"}, "stop": {"epochs": 2}}},
        "bad.yaml: workload.stop: ",
        "no epochs",
    ),
    (
        {"workload": {"compute": {"emulate": "1s"}, "stop": {"seconds": 30, "accuracy": "90%"}}},
        "bad.yaml: workload.stop.accuracy: ",
        "learns nothing",
    ),
    ({"workload__model": "resnet18"}, "bad.yaml: workload.data: ", "images, cifar10, cifar100"),
    (
        {"workload__model": "gpt", "workload__data": {"name": "text", "context": 99}},
        "bad.yaml: workload.data: ",
        "99 bytes",
    ),
    (
        {"workload__model": "resnet18", "workload__data": {"name": "images", "classes": 200}},
        "bad.yaml: workload.data: ",
        "200 classes",
    ),
    (
        {"workload__model": "vgg16", "workload__data": {"name": "images", "side": 16}},
        "bad.yaml: workload.data: ",
        "use side: 32",
    ),
    (
        {"workload__model": "resnet18", "workload__data": "cifar10"},
        "bad.yaml: workload.data.folder: ",
        "unpack cifar-10-python.tar.gz",
    ),
    (
        {"workload__model": "resnet18", "workload__data": {"name": "cifar100", "folder": "none"}},
        "bad.yaml: workload.data.folder: ",
        "none is no directory; unpack cifar-100-python.tar.gz",
    ),
    (
        {
            "workload__model": "resnet18",
            "workload__data": {"name": "cifar10", "folder": "~no-such-user/data"},
            "workload__compute": {"emulate": "1s"},
        },
        "bad.yaml: workload.data.folder: ",
        "home directory",
    ),
    ({"dilation": 4, "workload__compute": "real"}, "bad.yaml: dilation: ", "not real compute"),
    (
        {"network__congestion": "no control"},
        "bad.yaml: network.congestion: ",
        "such as cubic, reno or bbr",
    ),
    (
        {
            "network__congestion": "reno",
            "traffic": [
                {"from": "bg0", "to": "w0", "engine": "iperf3", "tcp": {"congestion": "cubic"}}
            ],
        },
        "bad.yaml: traffic[0].tcp.congestion: ",
        "leave out engine: iperf3",
    ),
    ({"dilation": 0.5}, "bad.yaml: dilation: ", "greater than or equal to 1"),
    (
        {"dilation": 1000, "workload__compute": {"pace": "1ms"}, "network__link__rate": "1mbit"},
        "bad.yaml: dilation: ",
        "8kbit",
    ),
    (
        {"network__topology": "ring"},
        "bad.yaml: network.topology: ",
        "valid: star, dumbbell, regions",
    ),
    (
        {"schedule__0__links": ["w1", "w9"]},
        "bad.yaml: schedule[0].links[1]: ",
        "there is no link 'w9'",
    ),
    ({"schedule__1__at": "30s"}, "bad.yaml: schedule[1].at: ", "after the end of the run at 24s"),
    ({"schedule__0__set": {}}, "bad.yaml: schedule[0].set: ", "changes nothing"),
    (
        {"schedule__0__ramp": {"rate": "5mbit"}},
        "bad.yaml: schedule[0]: ",
        "exactly one of set, ramp, sawtooth",
    ),
    ({"schedule__0__over": "5s"}, "bad.yaml: schedule[0].over: ", "belongs to a ramp"),
    ({"workers": "four"}, "bad.yaml: workers: ", "whole number"),
    ({"workers": 0}, "bad.yaml: workers: ", "out of range"),
    ({"ranks_per_worker": 0}, "bad.yaml: ranks_per_worker: ", "greater than or equal to 1"),
    ({"ranks_per_worker": "2"}, "bad.yaml: ranks_per_worker: ", "whole number"),
    ({"network__connections": 17}, "bad.yaml: network.connections: ", "less than or equal to 16"),
    ({"workload__stop": {}}, "bad.yaml: workload.stop: ", "steps, epochs and seconds"),
    ({"workload__model": "resnet"}, "bad.yaml: workload.model: ", "mlp"),
    ({"workload__compute": "fast"}, "bad.yaml: workload.compute: ", "{pace: 120ms}"),
    ({"workload__batch": 0}, "bad.yaml: workload.batch: ", "out of range"),
    ({"methods": []}, "bad.yaml: methods: ", "must not be empty"),
    ({"methods__0": "allredcue"}, "bad.yaml: methods[0]: ", "allreduce"),
    ({"methods__1": {"name": "topk", "ratio": 7}}, "bad.yaml: methods[1]: ", "ratio"),
    ({"methods__1": "allreduce"}, "bad.yaml: methods[1]: ", "twice"),
    ({"methods__1": {"name": "topk", "options": 5}}, "bad.yaml: methods[1].options: ", "mapping"),
    ({"methods__1": {"name": "topk", 5: 3}}, "bad.yaml: methods[1]", "names of options are texts"),
    (
        {"methods__1": {"name": "topk", "label": "bf16"}},
        "bad.yaml: methods[1].label: ",
        "another method",
    ),
    (
        {"methods__1": {"name": "netsense", "share": 0.4}},
        "bad.yaml: methods[1].share: is gone; ",
        "remove it",
    ),
    (
        {"methods__1": {"name": "netsense", "policy": "budget"}},
        "bad.yaml: methods[1].policy: ",
        "is now 'progress'",
    ),
    (
        {"methods__1": {"name": "netsense", "policy": "fixed", "schemes": ["int9"]}},
        "bad.yaml: methods[1]",
        "sparse-int8@1%",
    ),
    ({"matrix": {"network.link.rate": ["10mbit", "10mbit"]}}, "bad.yaml: matrix.", "twice"),
    ({"matrix": {"network.link.rate": []}}, "bad.yaml: matrix.network.link.rate: ", "no values"),
    (
        {"matrix": {"network.link.rate": ["5mbit", "fast"]}},
        "bad.yaml: network.link.rate: ",
        "'fast'",
    ),
    (
        {"workload": ..., "script": {"file": "train.py", "args": ["a", "b\0"]}},
        "bad.yaml: script.args[1]: has the character NUL",
        "in a file",
    ),
    (
        {
            "workload": ...,
            "script": {"file": "train.py", "args": ["a" * 50_000, "\u00e9" * 30_000]},
        },
        "bad.yaml: script.args: has 110000 bytes, and at most 100000",
        "put them into a file",
    ),
    ({"script": "train.py"}, "bad.yaml: needs exactly one of workload and script", ""),
    ({"name": "../escape"}, "bad.yaml: name: ", "letters, digits"),
    ({"name": ".hidden"}, "bad.yaml: name: ", "first"),
    (
        {"network": {"topology": "regions", "regions": {"EU": ["w0", "w1"], "us": ["w2", "w3"]}}},
        "bad.yaml: network.regions.EU",
        "small letters and digits",
    ),
    (
        {"matrix": {"workload.target": ["90%", "95%"]}},
        "bad.yaml: matrix.workload.target: ",
        "two experiments",
    ),
    (
        {"workload__model": "package.module:build", "workload__compute": {"emulate": "1s"}},
        "bad.yaml: workload.model: ",
        "use compute: {pace: 120ms}",
    ),
    (
        {"workload": ..., "script": {"file": "train.py", "stop": {"steps": 10}}},
        "bad.yaml: script.stop.steps: ",
        "give stop: {seconds: 60}",
    ),
    ({"seeds": [-1]}, "bad.yaml: seeds[0]: ", "out of range"),
]


@pytest.mark.parametrize(
    ("replaced", "place", "words"),
    BAD,
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_fault_is_named_with_its_place_and_mend(tmp_path, replaced, place, words):
    line = refused(write(tmp_path, None, **replaced))
    assert line.startswith(place)
    assert words in line


EVERYTHING = """
name: everything
lab: netns
workers: 4
ranks_per_worker: 2
network:
  topology: regions
  link: {rate: 50mbit, queue: 50ms, up: {rate: 20mbit}, down: {loss: {share: 1%, burst: 4}, delay: 1ms, in_order: true}}
  links: {w1: {aqm: codel, ecn: true, duplicate: 1%, corrupt: 1%, reorder: 1%, jitter: 0s, distribution: normal}}
  regions: {eu: [w0, w1], us: [w2, w3]}
  between: {all: {rate: 5mbit}}
  congestion: cubic
  engine: auto
  shaper: htb
  mtu: 1500
  ip: 4
  connections: 4
schedule:
  - {at: 1s, links: w1, set: {rate: 5mbit, down: {delay: 2ms}}}
  - {at: 2s, links: [w2], ramp: {rate: 5mbit}, over: 1s, every: 100ms}
  - {at: 3s, links: w2, sawtooth: {rate: [1mbit, 2mbit]}, period: 1s, every: 100ms, for: 2s}
  - {at: 3s, links: w3, square: {down: {rate: [1mbit, 2mbit]}}, period: 1s, duty: 50%, for: 2s}
  - {at: 6s, links: w2, walk: {rate: [1mbit, 2mbit]}, every: 1s, step: 20%, seed: 1}
  - {at: 6s, links: w3, trace: a.csv, repeat: true, scale: {rate: 2}, offset: 1s, direction: up, for: 3s}
  - {at: 7s, kill: w1}
  - {at: 8s, restart: [w0, w2]}
  - {at: 9s, slow: {w3: 2}, for: 1s}
traffic:
  - {from: w0, to: w1, at: 1s, for: 2s, tcp: {streams: 2, congestion: reno}, on: 1s, off: 1s, seed: 0, engine: builtin}
  - {from: w0, to: w1, udp: {rate: 1mbit, packet: 100B}}
workload:
  model: {name: mlp}
  data: {name: digits}
  batch: 8
  stop: {steps: 5, epochs: 1, seconds: 30, accuracy: 90%}
  optimizer: {name: sgd, lr: 0.1}
  compute: {pace: 1ms, stragglers: {w1: 2}}
  evaluate_every: 1s
  target: 90%
  warmup: 0
  checkpoint_every: 5
methods: [allreduce, {name: topk, label: k, ratio: 0.1}, {name: "own:Method", options: {a: 1}}]
seeds: [0, 1]
matrix: {network.link.rate: [5mbit, 6mbit]}
calibrate: true
dilation: 1
on_failure: continue
limits: {memory: 2GiB, pids: 500}
placement: {}
"""


def places(node, path=()):
    """Every place below a node of a raw spec."""
    for key, value in (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    ):
        yield (*path, key)
        yield from places(value, (*path, key))


def test_an_empty_value_is_refused_everywhere_and_never_means_no_limit():
    whole = yaml.safe_load(EVERYTHING.replace(" on:", " 'on':").replace(" off:", " 'off':"))
    assert validate(whole).name == "everything"
    seen = list(places(whole))
    assert len(seen) > 130
    for path in seen:
        raw = copy.deepcopy(whole)
        *parents, last = path
        functools.reduce(lambda node, part: node[part], parents, raw)[last] = None
        with pytest.raises(
            SpecError, match=r"is empty; give it a value.*, or remove the line"
        ) as raised:
            for combination in combinations(validate(raw)):
                validate(apply_overrides(raw, combination))
        assert len(raised.value.errors) == 1, path


@pytest.mark.parametrize(
    ("replaced", "line"),
    [
        (
            {"network__link__rate": None},
            "network.link.rate: is empty; give it a value such as 50mbit, or remove the line",
        ),
        (
            {"network__link__queue": None},
            "network.link.queue: is empty; give it a value such as 50ms, or remove the line",
        ),
        (
            {"network__links": {"w1": {"up": None}}},
            "network.links.w1.up: is empty; give it a value, or remove the line",
        ),
        (
            {"schedule__0__set": {"rate": None}},
            "schedule[0].set.rate: is empty; give it a value such as 50mbit, or",
        ),
        (
            {"schedule__0__at": None},
            "schedule[0].at: is empty; give it a value such as 5s, or remove the line",
        ),
        (
            {"workload__stop__seconds": None},
            "workload.stop.seconds: is empty; give it a value such as 30, or",
        ),
        (
            {"methods__1": {"name": "topk", "ratio": None}},
            "methods[1].ratio: is empty; give it a value, or remove",
        ),
        ({"schedule": None}, "schedule: is empty; give it a value, or remove the line"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_line_for_an_empty_value_has_its_place_and_an_example(tmp_path, replaced, line):
    assert refused(write(tmp_path, None, **replaced)).startswith(f"bad.yaml: {line}")


def test_a_value_of_the_command_line_that_nothing_can_be_is_named_with_its_key():
    assert (
        refused(SMOKE, "--set", f"workers={10**30}")
        == "--set: workers: is a number that is too large"
    )


def test_numbers_are_those_of_editors(tmp_path):
    text = SMOKE.read_text().replace("lr: 0.05", "lr: 5e-2")
    assert load_spec(write(tmp_path, text)).workload.optimizer.options["lr"] == 0.05
    assert (
        load_spec(SMOKE, ["workload.optimizer.lr=1E-3"]).workload.optimizer.options["lr"] == 0.001
    )
    assert "must be a whole number, not '4'" in refused(write(tmp_path, None, workers="4"))


@pytest.mark.parametrize("value", ["", "null", "~"])
def test_nothing_on_the_command_line_is_no_value_either(value):
    line = refused(SMOKE, "--set", f"network.link.rate={value}")
    assert (
        line
        == "smoke.yaml: network.link.rate: is empty; give it a value such as 50mbit, or remove the"
        " line"
    )
    with pytest.raises(SpecError, match=r"rate: is empty; give it a value such as 50mbit"):
        parse_link({"rate": None})


def test_a_link_in_use_keeps_what_manages_its_queue_and_room_for_a_frame():
    assert parse_link({"queue": "600B", "in_order": True}).in_order
    with pytest.raises(SpecError, match=r"down.aqm: cannot change while a link is in use"):
        parse_link({"down": {"aqm": "codel"}})
    with pytest.raises(
        SpecError,
        match=r"up.queue: 600B do not hold one frame; with this mtu give it at least 1514B",
    ):
        parse_link({"up": {"queue": "600B"}}, mtu=1500)


def test_what_belongs_to_the_queue_holds_in_both_directions_and_what_belongs_to_the_delay_on_down(
    tmp_path,
):
    network = {
        "topology": "dumbbell",
        "link": {
            "rate": "5mbit",
            "queue": "1514B",
            "aqm": "codel",
            "ecn": True,
            "delay": "1ms",
            "in_order": True,
        },
        "links": {"w1": {"up": {"aqm": "fq_codel", "in_order": True}, "ecn": False}},
        "trunk": {"rate": "9mbit", "in_order": True, "aqm": "codel", "queue": "1us"},
    }
    cell, *_ = make_plan(load_spec(write(tmp_path, None, network=network, schedule=[]))).cells
    codel = {"rate_bps": 5_000_000, "queue_bytes": 1514, "aqm": "codel", "ecn": True}
    links = cell.lab.links
    assert links["w0"] == LinkState(
        LinkParameters(**codel), LinkParameters(**codel, delay_s=0.001, in_order=True)
    )
    assert (links["w1"].up.aqm, links["w1"].up.in_order, links["w1"].up.ecn) == (
        "fq_codel",
        True,
        False,
    )
    assert (links["w1"].down.aqm, links["w1"].down.in_order, links["w1"].down.ecn) == (
        "codel",
        True,
        False,
    )
    trunk = LinkParameters(9_000_000, queue_s=1e-6, in_order=True, aqm="codel")
    assert links["trunk"] == LinkState(trunk, trunk)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "must be a mapping"),
        ("name: [unclosed\n", "line 2, column 1: not valid YAML"),
        (
            "name: a\nname: b\n",
            "line 2, column 1: not valid YAML: the key 'name' stands there twice",
        ),
        ("name: \x00\n", "not valid YAML"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n"
                for old, new in zip("abcdefgh", "bcdefghi", strict=True)
            ),
            "more than 100000 values",
        ),
        (
            "a: " + "[" * 5000 + "]" * 5000,
            "line 1, column 103: is nested more than 100 levels deep",
        ),
        ("# " + "x" * (10 << 20), "is 10 MiB long"),
    ],
    ids=["empty", "comment", "list", "syntax", "twice", "nul", "bomb", "deep", "10MB"],
)
def test_a_file_that_is_no_spec(tmp_path, text, words):
    assert words in refused(write(tmp_path, text))


def test_resume_takes_a_run_directory_and_nothing_else(tmp_path):
    another = tmp_path / "another"
    another.mkdir()
    write(another, None).rename(another / "spec.yaml")
    for arguments, words in (
        ([str(tmp_path)], "is no run directory"),
        ([str(tmp_path), "--out", str(tmp_path)], "give neither SPEC nor"),
        (
            [str(tmp_path), str(another)],
            f"one run directory, not with two: {tmp_path} and {another}",
        ),
    ):
        result = CliRunner().invoke(app, ["run", "--resume", *arguments])
        assert result.exit_code == 2
        assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_overlay_of_a_swarm_takes_its_bytes_from_the_mtu_unless_the_spec_says_otherwise():
    raw = yaml.safe_load(SMOKE.read_text())
    assert validate({**raw, "lab": "swarm"}).network.mtu == 1450
    assert validate({**raw, "lab": "swarm", "network": {"mtu": 8950}}).network.mtu == 8950
    assert validate(raw).network.mtu == 1500


def test_clean_says_that_it_could_not_ask_docker(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    result = CliRunner().invoke(app, ["clean"])
    assert result.exit_code == 4
    assert "Docker" in result.stderr and len(result.stderr.splitlines()) == 1


def test_missing_file_directory_and_binary(tmp_path):
    assert "there is no such file" in refused(tmp_path / "nowhere.yaml")
    assert "is a directory" in refused(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert "not UTF-8" in refused(binary)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workers", "not of the form key=value"),
        ("network.link.rate=fast", "network.link.rate: 'fast' is not a rate"),
        ("methods.9=topk", "no position in a list of 3"),
        ("name.x=1", "below a value that is no mapping"),
        ("workers=[", "not YAML"),
    ],
)
def test_bad_override(text, words):
    result = CliRunner().invoke(app, ["validate", str(SMOKE), "--set", text])
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_override_that_the_matrix_would_undo_is_refused(tmp_path):
    path = write(tmp_path, None, matrix={"network.link": [{"rate": "5mbit"}, {"rate": "6mbit"}]})
    line = refused(path, "--set", "network.link.rate=1mbit")
    assert line.startswith(
        "bad.yaml: network.link.rate: varies by the matrix, which would win; use --set"
        " 'matrix={network.link:"
    )
    assert (
        load_spec(path, ["matrix={network.link: [{rate: 1mbit}]}", "network.mtu=1400"]).network.mtu
        == 1400
    )


def test_overrides_reach_into_the_spec():
    spec = load_spec(
        SMOKE, ["network.link.rate=20mbit", "schedule.0.at=2s", "methods.1.ratio=0.05"]
    )
    assert spec.network.link.rate == 20_000_000
    assert spec.schedule[0].at == 2.0
    assert spec.methods[1].options == {"ratio": 0.05}


def test_dry_run_prints_hosts_timeline_and_tc(tmp_path):
    result = CliRunner().invoke(
        app, ["run", str(SMOKE), "--dry-run", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0
    assert re.search(r"t=0 \[w0\] tc class replace dev eth0 .* htb rate 50000000bit", result.stdout)
    assert re.search(
        r"t=8s \[switch\] tc class replace dev w3 .* htb rate 10000000bit", result.stdout
    )
    assert not (tmp_path / "out").exists()


def test_limits_of_workers_are_planned_and_told():
    spec = load_spec(SMOKE, ["limits={memory: 1.5GiB, pids: 500}"])
    plan = make_plan(spec)
    assert plan.limits == {"memory", "pids"}
    assert {cell.lab.limits for cell in plan.cells} == {Limits(memory_bytes=3 << 29, pids=500)}
    assert "  each worker has at most 1536MiB of memory and 500 processes and threads" in describe(
        plan
    )
    assert spec.model_dump(mode="json")["limits"] == {"memory": "1536MiB", "pids": 500}
    assert not make_plan(load_spec(SMOKE)).limits
    assert "lies between 16MiB and" in refused(SMOKE, "--set", "limits.memory=1MiB")


def test_matrix_makes_a_cell_for_every_combination(tmp_path):
    path = write(
        tmp_path,
        None,
        matrix={"network.link.rate": ["20mbit", "50mbit"], "workers": [2, 3]},
        seeds=[0, 1],
    )
    cells = make_plan(load_spec(path)).cells
    assert len(cells) == 2 * 2 * 2 * 3
    assert len({cell.name for cell in cells}) == len(cells)
    assert {len(cell.workers) for cell in cells} == {2, 3}


def test_the_folder_of_a_data_set_is_relative_to_the_spec(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in ("train", "test"):
            (tmp_path / name / file).touch()
    data = {"name": "cifar100", "folder": "one"}
    path = write(tmp_path, None, workload__model="resnet18", workload__data=data)
    cell, *_ = make_plan(load_spec(path), tmp_path).cells
    assert cell.config()["workload"]["data_options"] == {"folder": str(tmp_path / "one")}
    assert cell.lab.folders == (tmp_path / "one",)
    for matrix in (
        {"workload.data.folder": ["one", "two"]},
        {"workload.data": [data, {**data, "folder": "two"}]},
    ):
        path = write(tmp_path, None, workload__model="resnet18", workload__data=data, matrix=matrix)
        cells = make_plan(load_spec(path), tmp_path).cells
        assert [cell.lab.folders for cell in cells] == [
            (tmp_path / name,) for name in ("one", "two") for _ in range(3)
        ]
        assert str(tmp_path) not in str([cell.overrides for cell in cells]), (
            "the same experiment elsewhere has other cells"
        )
    (tmp_path / "below").mkdir()
    path = write(
        tmp_path / "below",
        None,
        workload__model="resnet18",
        workload__data={**data, "folder": "../one"},
    )
    cell, *_ = make_plan(load_spec(path), tmp_path / "below").cells
    assert cell.lab.folders == (tmp_path / "one",)


def test_a_data_set_of_the_users_own_has_a_folder_if_there_is_one(tmp_path):
    (tmp_path / "one").mkdir()
    for given, taken in (
        ("one", str(tmp_path / "one")),
        ("s3://bucket", "s3://bucket"),
        (["one"], ["one"]),
        (7, 7),
    ):
        path = write(
            tmp_path, None, workload__data={"name": "package.module:make", "folder": given}
        )
        cell, *_ = make_plan(load_spec(path), tmp_path).cells
        assert cell.config()["workload"]["data_options"] == {"folder": taken}
        assert cell.lab.folders == ((tmp_path / "one",) if given == "one" else ())


def test_cells_never_share_a_directory(tmp_path):
    long = [f"sparse-int8@{number}%" for number in range(1, 20)]
    methods = [
        {"name": "topk", "label": "a/b"},
        {"name": "bf16", "label": "a b"},
        {"name": "netsense", "policy": "fixed", "schemes": long},
        {"name": "netsense", "policy": "fixed", "schemes": [*long, "int8"]},
    ]
    plan = make_plan(load_spec(write(tmp_path, None, methods=methods, seeds=[0, 1, 2])))
    assert len({cell.name for cell in plan.cells}) == len(plan.cells) == 12
