"""Specs through the command line's door: good ones load, bad ones get one line with the place and the mend."""

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from testbed.cli import app
from testbed.plan import make_plan
from testbed.spec.load import dump_spec, load_spec

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
            node[int(last) if last.isdigit() else last] = value
        text = yaml.safe_dump(data)
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


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "experiments").glob("*.yaml"), *(ROOT / "experiments" / "paper").glob("*.yaml")]),
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


@pytest.mark.parametrize(
    ("replaced", "place", "words"),
    [
        ({"wokers": 4}, "bad.yaml: wokers: ", "did you mean 'workers'?"),
        ({"network__link__rat": "5mbit"}, "bad.yaml: network.link.rat: ", "did you mean 'rate'?"),
        ({"network__link__rate": "50mb"}, "bad.yaml: network.link.rate: ", "bit, kbit, mbit, gbit"),
        ({"network__link__rate": "-50mbit"}, "bad.yaml: network.link.rate: ", "negative"),
        ({"network__link__queue": "much"}, "bad.yaml: network.link.queue: ", "64KiB"),
        ({"network__link__up": {"dealy": "5ms"}}, "bad.yaml: network.link.up.dealy: ", "did you mean 'delay'?"),
        ({"network__link__loss": {"share": "1%", "brust": 4}}, "bad.yaml: network.link.loss.brust: ", "did you mean 'burst'?"),
        ({"network__link__loss": {"share": "50%", "burst": 1, "bad": "60%"}}, "bad.yaml: network.link.loss.burst: ", "longer"),
        ({"network__link__distribution": "gauss"}, "bad.yaml: network.link.distribution: ", "normal, uniform, pareto"),
        ({"network__link__reorder": "1%"}, "bad.yaml: network.link.reorder: ", "delay"),
        ({"network__topology": "dumbbell"}, "bad.yaml: network.trunk: is missing", "dumbbell"),
        ({"network__trunk": {"rate": "5mbit"}}, "bad.yaml: network.trunk: ", "does not belong to topology star"),
        (
            {"network": {"topology": "dumbbell", "trunk": {"rate": "5mbit"}, "left": ["w0", "w8"]}},
            "bad.yaml: network.left[1]: ",
            "'w8'",
        ),
        (
            {"network": {"topology": "regions", "regions": {"eu": ["w0", "w1"], "us": ["w2"]}, "between": {"all": {}}}},
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
        ({"network__links": {"w7": {"rate": "5mbit"}}}, "bad.yaml: network.links.w7: ", "w0, w1, w2, w3"),
        ({"workload__compute": {"pace": "1s", "emulate": "1s"}}, "bad.yaml: workload.compute.emulate: ", "beside pace"),
        ({"workload__compute": {"emulate": "0s"}}, "bad.yaml: workload.compute.emulate: ", "greater than 0"),
        ({"workload__compute": {"pace": "1s", "jitter": "5%"}}, "bad.yaml: workload.compute.jitter: ", "needs emulate"),
        ({"workload__compute": {"stragglers": {"w1": 2}}}, "bad.yaml: workload.compute.stragglers: ", "needs pace"),
        (
            {"workload__compute": {"pace": "1s", "stragglers": {"w9": 2}}},
            "bad.yaml: workload.compute.stragglers.w9: ",
            "there are w0 to w3",
        ),
        ({"workload": {"compute": {"emulate": "1s"}, "stop": {"epochs": 2}}}, "bad.yaml: workload.stop: ", "no epochs"),
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
        ({"network__congestion": "no control"}, "bad.yaml: network.congestion: ", "such as cubic, reno or bbr"),
        (
            {
                "network__congestion": "reno",
                "traffic": [{"from": "bg0", "to": "w0", "engine": "iperf3", "tcp": {"congestion": "cubic"}}],
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
        ({"network__topology": "ring"}, "bad.yaml: network.topology: ", "valid: star, dumbbell, regions"),
        ({"schedule__0__links": ["w1", "w9"]}, "bad.yaml: schedule[0].links[1]: ", "there is no link 'w9'"),
        ({"schedule__1__at": "30s"}, "bad.yaml: schedule[1].at: ", "after the end of the run at 24s"),
        ({"schedule__0__set": {}}, "bad.yaml: schedule[0].set: ", "changes nothing"),
        ({"schedule__0__ramp": {"rate": "5mbit"}}, "bad.yaml: schedule[0]: ", "exactly one of set, ramp, sawtooth"),
        ({"schedule__0__over": "5s"}, "bad.yaml: schedule[0].over: ", "belongs to a ramp"),
        ({"workers": "four"}, "bad.yaml: workers: ", "whole number"),
        ({"workers": 0}, "bad.yaml: workers: ", "out of range"),
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
        ({"methods__1": {"name": "topk", "label": "bf16"}}, "bad.yaml: methods[1].label: ", "another method"),
        (
            {"methods__1": {"name": "netsense", "policy": "fixed", "schemes": ["int9"]}},
            "bad.yaml: methods[1]",
            "sparse-int8@1%",
        ),
        ({"matrix": {"network.link.rate": ["10mbit", "10mbit"]}}, "bad.yaml: matrix.", "twice"),
        ({"matrix": {"network.link.rate": []}}, "bad.yaml: matrix.network.link.rate: ", "no values"),
        ({"matrix": {"network.link.rate": ["5mbit", "fast"]}}, "bad.yaml: network.link.rate: ", "'fast'"),
        ({"script": "train.py"}, "bad.yaml: needs exactly one of workload and script", ""),
        ({"name": "../escape"}, "bad.yaml: name: ", "letters, digits"),
        ({"name": ".hidden"}, "bad.yaml: name: ", "first"),
        (
            {"network": {"topology": "regions", "regions": {"EU": ["w0", "w1"], "us": ["w2", "w3"]}}},
            "bad.yaml: network.regions.EU",
            "small letters and digits",
        ),
        ({"matrix": {"workload.target": ["90%", "95%"]}}, "bad.yaml: matrix.workload.target: ", "two experiments"),
        (
            {"workload__model": "package.module:build", "workload__compute": {"emulate": "1s"}},
            "bad.yaml: workload.model: ",
            "use compute: {pace: 120ms}",
        ),
        (
            {"workload": None, "script": {"file": "train.py", "stop": {"steps": 10}}},
            "bad.yaml: script.stop.steps: ",
            "give stop: {seconds: 60}",
        ),
        ({"seeds": [-1]}, "bad.yaml: seeds[0]: ", "out of range"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_fault_is_named_with_its_place_and_mend(tmp_path, replaced, place, words):
    line = refused(write(tmp_path, None, **replaced))
    assert line.startswith(place)
    assert words in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "must be a mapping"),
        ("name: [unclosed\n", "line 2, column 1: not valid YAML"),
        ("name: a\nname: b\n", "line 2, column 1: not valid YAML: the key 'name' stands there twice"),
        ("name: \x00\n", "not valid YAML"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
            ),
            "more than 100000 values",
        ),
        ("a: " + "[" * 5000 + "]" * 5000, "not valid YAML"),
        ("# " + "x" * (10 << 20), "is 10 MiB long"),
    ],
    ids=["empty", "comment", "list", "syntax", "twice", "nul", "bomb", "deep", "10MB"],
)
def test_a_file_that_is_no_spec(tmp_path, text, words):
    assert words in refused(write(tmp_path, text))


def test_resume_takes_a_run_directory_and_nothing_else(tmp_path):
    for arguments, words in (
        ([str(tmp_path)], "is no run directory"),
        ([str(tmp_path), "--out", str(tmp_path)], "give neither SPEC nor"),
    ):
        result = CliRunner().invoke(app, ["run", "--resume", *arguments])
        assert result.exit_code == 2
        assert words in result.stderr and len(result.stderr.splitlines()) == 1


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


def test_overrides_reach_into_the_spec():
    spec = load_spec(SMOKE, ["network.link.rate=20mbit", "schedule.0.at=2s", "methods.1.ratio=0.05"])
    assert spec.network.link.rate == 20_000_000
    assert spec.schedule[0].at == 2.0
    assert spec.methods[1].options == {"ratio": 0.05}


def test_dry_run_prints_hosts_timeline_and_tc(tmp_path):
    result = CliRunner().invoke(app, ["run", str(SMOKE), "--dry-run", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "t=0 [w0] tc qdisc replace dev eth0 root handle 7e52: tbf rate 50000000bit" in result.stdout
    assert "t=8s [switch] tc qdisc replace dev w3 root handle 7e52: tbf rate 10000000bit" in result.stdout
    assert not (tmp_path / "out").exists()


def test_matrix_makes_a_cell_for_every_combination(tmp_path):
    path = write(tmp_path, None, matrix={"network.link.rate": ["20mbit", "50mbit"], "workers": [2, 3]}, seeds=[0, 1])
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
    (cell, *_) = make_plan(load_spec(path), tmp_path).cells
    assert cell.config()["workload"]["data_options"] == {"folder": str(tmp_path / "one")}
    assert cell.lab.folders == (tmp_path / "one",)
    for matrix in ({"workload.data.folder": ["one", "two"]}, {"workload.data": [data, {**data, "folder": "two"}]}):
        path = write(tmp_path, None, workload__model="resnet18", workload__data=data, matrix=matrix)
        cells = make_plan(load_spec(path), tmp_path).cells
        assert [cell.lab.folders for cell in cells] == [(tmp_path / name,) for name in ("one", "two") for _ in range(3)]
        assert str(tmp_path) not in str([cell.overrides for cell in cells]), "the same experiment elsewhere has other cells"
    (tmp_path / "below").mkdir()
    path = write(tmp_path / "below", None, workload__model="resnet18", workload__data={**data, "folder": "../one"})
    (cell, *_) = make_plan(load_spec(path), tmp_path / "below").cells
    assert cell.lab.folders == (tmp_path / "one",)


def test_a_data_set_of_the_users_own_has_a_folder_if_there_is_one(tmp_path):
    (tmp_path / "one").mkdir()
    for given, taken in (("one", str(tmp_path / "one")), ("s3://bucket", "s3://bucket"), (["one"], ["one"]), (7, 7)):
        path = write(tmp_path, None, workload__data={"name": "package.module:make", "folder": given})
        (cell, *_) = make_plan(load_spec(path), tmp_path).cells
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
