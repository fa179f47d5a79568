"""What goes wrong in a run: workers that fail, hang or talk nonsense, full disks, signals. Nothing
is lost or left."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import yaml
from sandbox import run_in_sandbox
from test_run_netns import ROOT, descendants_of, only_run, rows_written, wait_until

import testbed

pytestmark = [pytest.mark.netns, pytest.mark.shared]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
SPEC = {
    "name": "faulty",
    "workers": 2,
    "network": {"link": {"rate": "20mbit"}},
    "calibrate": False,
    "methods": ["allreduce"],
}
WORKLOAD = {
    "model": {"name": "mlp", "hidden": [64]},
    "stop": {"steps": 20},
    "compute": {"pace": "20ms"},
}


def launch(tmp_path, *options, prefix=(), **changes):
    spec = tmp_path / "faulty.yaml"
    spec.write_text(yaml.safe_dump({**SPEC, **changes}))
    command = [
        *prefix,
        sys.executable,
        "-m",
        "testbed.cli",
        "run",
        str(spec),
        "--out",
        str(tmp_path / "runs"),
        *options,
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=heed_signals,
    )


def heed_signals():
    """Whoever runs the tests may ignore some, as nohup(1) and background jobs of a shell do, and a
    child would, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finished(process, timeout_s=120):
    """Exit code and everything printed; never a traceback."""
    out, err = process.communicate(timeout=timeout_s)
    assert "Traceback" not in out + err, out + err
    return process.returncode, out + err


def run(tmp_path, **changes):
    return finished(launch(tmp_path, **changes))


def resume(directory, *options):
    command = [sys.executable, "-m", "testbed.cli", "run", "--resume", str(directory), *options]
    return finished(
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
        )
    )


def problems(tmp_path):
    return json.loads((only_run(tmp_path) / "summary.json").read_text())["problems"]


TRAINING = """
import json, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import netsenseml

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(64, 64))
session = netsenseml.attach(model)
cell = Path(os.environ["NETSENSE_CELL_DIR"])
method = json.loads((cell / "cell.json").read_text())["method"]["name"]

def train(steps=20, before=lambda step: None):
    for step in range(steps):
        before(step)
        model.zero_grad()
        model(torch.randn(4, 64)).square().sum().backward()
        time.sleep(0.01)
        if not session.step(0.0, samples=4):
            break

def done():
    session.close()
    dist.destroy_process_group()
"""


def script(tmp_path, body, name="train.py"):
    (tmp_path / name).write_text(TRAINING + textwrap.dedent(body))
    return {"file": name}


FAULTS = """
from testbed import protocol
label = json.loads((cell / "cell.json").read_text())["label"]
token = os.environ[protocol.ENV_TOKEN]

def say(hello, line=b""):
    with protocol.connect_unix(cell / protocol.SOCKET_FILE) as stranger:
        stranger.sendall(protocol.encode_message(hello) + line)
        time.sleep(0.1)

def odd(step):
    if step != 7 or rank != 1:
        return
    match label:
        case "nonsense":
            say({"type": "hello", "token": token}, b'{"flow": 1}\\n{}\\n')
        case "good":
            say({"type": "hello", "token": "?"}, b'{"type": "failed", "error": "a stranger"}\\n')
        case "raises" | "raises-closing":
            raise KeyError("no such column")
        case "writes":
            Path("model.pt").write_text("x")
        case "killed":
            print("\\x1b]0;owned\\x07 \\x1b[2J gone", flush=True)
            os.kill(os.getpid(), 9)
        case "hangs":
            while True:
                time.sleep(1)

try:
    train(before=odd)
finally:
    if label == "raises-closing":
        session.close()
if label == "no-close":
    time.sleep(rank)  # so that w0 is the first
    sys.exit(0)
if label == "good":
    os.system("setsid sleep 4242 &")
done()
match label:
    case "good":
        time.sleep(1)
        Path(os.environ["NETSENSE_OUTPUT_DIR"], f"saved-{rank}").write_text("all of it")
    case "fails-after" if rank == 0:
        time.sleep(0.3)
        raise OSError("cannot save the model")
    case "never-ends" if rank == 1:
        time.sleep(1000)
"""
GOOD = {"good"}
ENDS = {
    "nonsense": "w1 sent something that is no message: type None: ",
    "raises": "w1 failed: KeyError: 'no such column'",
    "raises-closing": "w1 failed: KeyError: 'no such column'",
    "writes": (
        "w1 failed: OSError: [Errno 30] Read-only file system: 'model.pt'; NETSENSE_OUTPUT_DIR"
        " names the directory"
    ),
    "killed": "w1 was ended by signal 9 before it was done; its log ends with: ]0;owned [2J gone",
    "hangs": "no step has ended and no gradient moved for ",
    "no-close": "w0 ended with exit code 0 before it was done, without session.close()",
    "fails-after": "w0 failed: OSError: cannot save the model",
    "never-ends": "w1 at train.py:",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """A sweep of which most cells go wrong, each in its own way; what it printed, and the run."""
    tmp_path = tmp_path_factory.mktemp("faults")
    others = {"raises": "topk", "killed": "topk", "raises-closing": "netsense"}
    methods = [
        {"name": others.get(label, "allreduce"), "label": label} for label in [*ENDS, *sorted(GOOD)]
    ]
    process = launch(tmp_path, script=script(tmp_path, FAULTS), methods=methods, step_timeout="2s")
    code, printed = finished(process, 300)
    assert code == 1, printed
    wait_until(lambda: not descendants_of(tmp_path), 2)
    return printed, testbed.load_run(only_run(tmp_path))


def test_what_goes_wrong_in_a_cell_costs_that_cell_alone(faults):
    printed, run = faults
    status = run.cells.set_index("method")["status"]
    assert {label for label in status.index if status[label] == "done"} == GOOD, printed


@pytest.mark.parametrize("label", ENDS)
def test_whoever_failed_first_is_named_with_the_cause(faults, label):
    _, run = faults
    cell = run.cells.set_index("method").loc[label]
    assert cell["problems"][0].startswith(ENDS[label]), cell["problems"]
    assert "logs" in cell["problems"][0]
    assert len(cell["earlier"]) == 1
    # of the first try
    assert (run.path / "cells" / cell["cell"] / "logs" / "earlier" / "w1.log").exists()


def test_of_a_worker_that_hangs_it_is_told_what_it_is_doing(faults):
    _, run = faults
    [problem] = run.cells.set_index("method").loc["hangs"]["problems"]
    line = next(
        n
        for n, text in enumerate((TRAINING + FAULTS).splitlines(), 1)
        if text.strip() == "time.sleep(1)"
    )
    assert f"w1 in step 7 at train.py:{line} in odd" in problem
    assert "w0 in step 7 at " in problem


def test_a_worker_may_save_its_model_after_the_last_step(faults):
    _, run = faults
    assert len(list(run.path.rglob("saved-*"))) == 2
    assert run.cells.set_index("method").loc["good"]["t_end_s"] < 1.5


def test_what_a_worker_started_ends_with_its_cell(faults):
    assert not [
        one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "4242"]
    ]


def test_what_a_log_has_cannot_do_anything_to_a_terminal(faults):
    printed, _ = faults
    assert "\x1b" not in printed and "\x07" not in printed


def test_the_end_of_a_run_is_obeyed_though_a_link_is_cut_for_good(tmp_path):
    """Once its time is over, long before the step has taken too long, and whether or not all know
    which step is the last."""
    cut = [{"at": "1s", "links": ["w1"], "set": {"up": False}}]
    spec = {**SPEC, "workload": {**WORKLOAD, "stop": {"seconds": 2}}, "schedule": cut}
    (tmp_path / "faulty.yaml").write_text(yaml.safe_dump(spec))
    code = """
    from pathlib import Path
    from rich.console import Console
    from testbed.plan import make_plan
    from testbed.run import cell, directory, sweep
    from testbed.spec.load import load_spec
    cell._CUT_S = 3.0  # instead of half a minute
    spec = load_spec(Path("faulty.yaml"))
    place = directory.create(spec, Path("runs"), Path())
    sweep.execute(make_plan(spec), place, Console())
    """
    run_in_sandbox(textwrap.dedent(code), tmp_path)
    [[problem]] = testbed.load_run(only_run(tmp_path)).cells["problems"]
    assert "and w1 is cut off" in problem and problem.startswith("the last step has not ended"), (
        problem
    )


def test_training_goes_on_after_a_link_was_cut_in_the_middle_of_it(tmp_path):
    """Longer than TCP's first time-outs; experiments of ten seconds and more end alike."""
    # TCP sends again after 0.2, 0.6, 1.4 and 3 s, and then only after 6.2 s
    cut = [
        {"at": f"{at_s}s", "links": ["w1"], "set": {"up": up}}
        for at_s, up in ((1, False), (3.5, True))
    ]
    methods = ["allreduce", {"name": "topk", "ratio": 0.1}, "netsense"]
    workload = {**WORKLOAD, "data": "digits", "stop": {"seconds": 7}}
    code, printed = run(tmp_path, workload=workload, schedule=cut, methods=methods)
    assert code in (0, 3), printed
    ended = testbed.load_run(only_run(tmp_path))
    assert set(ended.cells["status"]) == {"done"} and not any(ended.cells["earlier"])
    for _, steps in ended.steps.groupby("cell"):
        assert 2.5 < steps["step_s"].max() < 6 and steps["t_s"].max() > 6.5
        assert set(steps.groupby("step").size()) == {2}  # nobody left one out
    assert all(len(set(parameters.values())) == 1 for parameters in ended.cells["parameters"])


def test_a_slow_step_over_a_thin_link_is_no_standstill(tmp_path):
    """Five seconds for one exchange, in which nothing but gradients moves, and a time-out of
    three."""
    workload = {
        "model": {"name": "mlp", "hidden": [512]},
        "compute": {"pace": "20ms"},
        "stop": {"seconds": 1},
    }
    code, printed = run(
        tmp_path, network={"link": {"rate": "250kbit"}}, workload=workload, step_timeout="3s"
    )
    assert code in (0, 3), printed
    assert testbed.load_run(only_run(tmp_path)).steps["step_s"].max() > 4


def test_a_script_finds_what_lies_beside_it(tmp_path):
    (tmp_path / "nets.py").write_text("import helpers.shapes\nwidth = helpers.shapes.width\n")
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("")
    (tmp_path / "helpers" / "shapes.py").write_text("width = 64\n")
    (tmp_path / "unrelated.py").write_text("raise RuntimeError\n")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "deep.py").write_text("import os\n")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "notes.txt").write_text("no package, though it has the name of one\n")
    (tmp_path / "config.yaml").write_text("lr: 1\n")
    body = """
    import nets
    import plain.deep
    assert nets.width == 64
    assert Path(__file__).with_name("config.yaml").read_text() == "lr: 1\\n"
    train()
    done()
    """
    code, printed = run(tmp_path, script={**script(tmp_path, body), "files": ["config.yaml"]})
    assert code in (0, 3), printed
    assert "copied into the run: config.yaml, helpers/, nets.py, plain/, train.py" in printed


def test_a_run_has_one_owner_at_a_time(tmp_path):
    process = launch(tmp_path, workload={**WORKLOAD, "stop": {"steps": 150}})
    wait_until(lambda: rows_written(tmp_path, "allreduce-s0") > 10, 60)
    code, printed = resume(only_run(tmp_path))
    assert code == 2
    assert f"process {process.pid} is running it; wait for that to end, or end it" in printed
    assert len(testbed.load_run(only_run(tmp_path)).steps) > 10  # reading is always possible
    code, printed = finished(process)
    assert code in (0, 3), printed
    assert set(testbed.load_run(only_run(tmp_path)).steps.groupby("rank").size()) == {150}


def test_cells_that_are_not_valid_are_run_again_on_demand_and_another_machine_is_told_of(tmp_path):
    code, printed = run(
        tmp_path, workload={**WORKLOAD, "stop": {"steps": 5}}, methods=["allreduce", "bf16"]
    )
    assert code in (0, 3), printed
    directory = only_run(tmp_path)
    result = directory / "cells" / "bf16-s0" / "result.json"
    spoilt = {**json.loads(result.read_text()), "parameters": {"0": "x", "1": "y"}}
    result.write_text(json.dumps(spoilt))
    kept = (directory / "cells" / "allreduce-s0" / "result.json").stat().st_mtime_ns
    file = directory / "environment.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps({**before, "kernel": "4.9.0-elsewhere"}))
    code, printed = resume(directory)
    assert code == 3, printed
    assert "kernel: 4.9.0-elsewhere before" in printed
    assert [later["kernel"] for later in json.loads(file.read_text())["resumed"]] == [
        before["kernel"]
    ]
    code, printed = resume(directory, "--again")
    assert code in (0, 3), printed
    assert "elsewhere" not in printed
    assert json.loads(result.read_text())["parameters"] != spoilt["parameters"]
    if code == 0:
        assert (directory / "cells" / "allreduce-s0" / "result.json").stat().st_mtime_ns == kept


@pytest.mark.parametrize("size", ["600k"])
def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_when_there_is_room(tmp_path, size):
    (tmp_path / "faulty.yaml").write_text(
        yaml.safe_dump({**SPEC, "workload": {**WORKLOAD, "stop": {"steps": 300}}})
    )
    (tmp_path / "runs").mkdir()
    testbed_run = f"{sys.executable} -m testbed.cli run"
    steps = f"""
    mount -t tmpfs -o size={size} none runs
    {testbed_run} faulty.yaml --out runs; echo "first: $?"
    [ -e runs/*/cells/*/cell.json ] || exit
    mount -o remount,size=64m runs
    cp -r runs/* kept
    {testbed_run} --resume runs/*; echo "second: $?"
    """
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", textwrap.dedent(steps)],
        capture_output=True,
        text=True,
        env=ENV,
        cwd=tmp_path,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert "Traceback" not in printed, printed
    assert "first: 1\n" in printed, printed
    said = [line for line in printed.splitlines() if "no space left" in line.lower()]
    assert said, printed
    if size == "64k":  # not even the run directory could be made
        return
    assert any("make room, then: testbed run --resume" in line for line in said)
    assert "second: 0\n" in printed or "second: 3\n" in printed, printed
    assert list((tmp_path / "kept").rglob("result.json")) or list(
        (tmp_path / "kept").rglob("*.jsonl")
    )


FLOOD = """
def flood(step):
    if step != 5 or rank != 1:
        return
    def room():
        disk = os.statvfs(os.environ["NETSENSE_OUTPUT_DIR"])
        return disk.f_bavail * disk.f_frsize
    print("x" * (room() - (2 << 20)), flush=True)
    while room() > 0:
        print("x" * 10_000, flush=True)
        time.sleep(0.01)

train(before=flood)
done()
"""


def test_a_worker_that_floods_its_log_ends_its_cell_before_the_disk_is_full(tmp_path):
    (tmp_path / "faulty.yaml").write_text(
        yaml.safe_dump({**SPEC, "script": script(tmp_path, FLOOD)})
    )
    testbed_run = f"{sys.executable} -m testbed.cli run faulty.yaml"
    steps = (
        f"mkdir runs; mount -t tmpfs -o size=64m none runs; {testbed_run}; echo code $?; df -k runs"
    )
    namespaces = ["unshare", "--user", "--map-root-user", "--mount"]
    done = subprocess.run(
        [*namespaces, "sh", "-c", steps],
        capture_output=True,
        text=True,
        env=ENV,
        cwd=tmp_path,
        check=False,
    )
    printed = " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in printed and "code 1" in printed, printed
    assert "the disk is nearly full; w1 has written 6" in printed, printed
    assert "make room, then: testbed run --resume" in printed
    assert int(done.stdout.split()[-3]) > 100, "it was not filled to the end"


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a directory of another user")
def test_files_that_cannot_be_handed_over_are_a_note(tmp_path):
    prefix = ["setpriv", "--bounding-set=-chown", "--inh-caps=-chown"]
    (tmp_path / "runs").mkdir()
    os.chown(tmp_path / "runs", 4711, 4711)
    (tmp_path / "runs").chmod(0o777)
    code, printed = finished(launch(tmp_path, prefix=prefix, workload=WORKLOAD))
    assert code in (0, 3), printed
    assert "still belongs to root" in printed


def test_a_killed_fork_server_costs_one_try_of_one_cell(tmp_path):
    process = launch(
        tmp_path, workload={**WORKLOAD, "stop": {"steps": 100}}, methods=["allreduce", "bf16"]
    )
    wait_until(lambda: rows_written(tmp_path, "allreduce-s0") > 10, 60)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "testbed.labs.forkserver" in child.cmdline() and child.ppid() != process.pid:
            server = child
            break
    server.kill()
    code, printed = finished(process)
    assert code in (0, 3), printed
    cells = testbed.load_run(only_run(tmp_path)).cells
    assert set(cells["status"]) == {"done"}
    assert sum(map(len, cells["earlier"])) == 1
    wait_until(lambda: not descendants_of(tmp_path), 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_ends_a_run_in_order(tmp_path, number):
    """As timeout(1), Slurm and systemd send it; a terminal that closes hangs up."""
    process = launch(tmp_path, workload={**WORKLOAD, "stop": {"seconds": 60}})
    wait_until(lambda: rows_written(tmp_path, "allreduce-s0") > 10, 60)
    began = time.monotonic()
    os.killpg(process.pid, number)
    code, printed = finished(process, 20)
    assert code == 130, printed
    assert time.monotonic() - began < 6
    assert "interrupted; the records so far are in" in printed
    assert testbed.load_run(only_run(tmp_path)).cells["status"].tolist() == ["interrupted"]
    wait_until(lambda: not descendants_of(tmp_path), 2)
