"""A sweep on a Dask cluster: every cell comes home once, whatever becomes of a machine, and nothing
is left on any."""

import contextlib
import io
import re
import signal
import socket
import subprocess
import sys
import tarfile

import psutil
import pytest
import yaml
from test_faults_netns import ENV, finished, heed_signals
from test_run_netns import only_run, wait_until

import testbed
from testbed.run.cluster import unpack

SPEC = {
    "name": "sweep",
    "workers": 2,
    "calibrate": False,
    "network": {"link": {"rate": "20mbit"}},
    "workload": {
        "model": {"name": "mlp", "hidden": [64]},
        "stop": {"seconds": 1},
        "compute": {"pace": "100ms"},
    },
    "matrix": {"network.link.rate": ["20mbit", "50mbit"]},
    "methods": ["allreduce", "topk"],
}


def sweep(tmp_path, address, *options, **changes):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**SPEC, **changes}))
    command = [sys.executable, "-m", "testbed.cli", "run", "sweep.yaml", "--on", address, *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        cwd=tmp_path,
        preexec_fn=heed_signals,
    )


@contextlib.contextmanager
def cluster(tmp_path, machines=2):
    """(address, machines): a scheduler and workers as their users start them, each of which stands
    for a machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**ENV, "TMPDIR": str(tmp_path)}
    address = f"tcp://127.0.0.1:{port}"
    python = [sys.executable, "-m"]
    scheduler = [
        *python,
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-dashboard",
    ]
    offer = ["--nthreads", "1", "--resources", "testbed=1", "--no-dashboard", "--no-nanny"]
    commands = [scheduler, *[[*python, "distributed.cli.dask_worker", address, *offer]] * machines]
    with open(tmp_path / "cluster.log", "w") as log:
        started = [
            subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
            for command in commands
        ]
        try:
            yield address, started[1:]
        finally:
            for process in reversed(started):
                process.kill()
                process.wait()


def parts_of(machine):
    """The processes of the part that a machine runs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(machine.pid).children(recursive=True)
    return []


def rows_at(tmp_path):
    return [
        path
        for path in tmp_path.glob("netsense-*/run/cells/*/hosts/w0/steps.jsonl")
        if path.stat().st_size
    ]


@pytest.mark.netns
def test_cells_of_a_machine_that_is_lost_run_elsewhere(tmp_path):
    with cluster(tmp_path) as (address, machines):
        process = sweep(tmp_path, address)
        wait_until(lambda: len(rows_at(tmp_path)) == 2, 60)
        lost = parts_of(machines[0])
        machines[0].kill()
        code, printed = finished(process)
        wait_until(
            lambda: (
                not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in lost)
            ),
            15,
        )
    run = testbed.load_run(only_run(tmp_path))
    # The two machines are one here, and their cells take time from each other; nothing else is wrong.
    problems = [line for line in run.summary["problems"] if "was too busy: other" not in line]
    assert problems == [] and code == (0 if run.summary["valid"] else 3), printed
    assert sorted(run.cells["cell"]) == sorted(
        f"{method}-rate-{rate}-s0"
        for method in SPEC["methods"]
        for rate in SPEC["matrix"]["network.link.rate"]
    )
    assert set(run.cells["status"]) == {"done"}
    assert len(re.findall(r"^\[\d/4\]", printed, re.MULTILINE)) == 4, printed
    assert not run.steps.duplicated(["cell", "rank", "step"]).any()
    assert all(cell["machine"] == socket.gethostname() for cell in run.cells["machine"])


@pytest.mark.netns
def test_an_interrupt_ends_it_everywhere_and_resume_goes_on(tmp_path):
    with cluster(tmp_path, machines=1) as (address, machines):
        process = sweep(tmp_path, address, matrix={})
        wait_until(lambda: rows_at(tmp_path), 60)
        process.send_signal(signal.SIGINT)
        code, printed = finished(process, timeout_s=30)
        assert code == 130 and "interrupted; the records so far are in" in printed
        assert not parts_of(machines[0]) and not list(tmp_path.glob("netsense-*"))
        directory = only_run(tmp_path)
        command = [
            sys.executable,
            "-m",
            "testbed.cli",
            "run",
            "--resume",
            str(directory),
            "--on",
            address,
        ]
        code, printed = finished(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
            )
        )
        assert code == 0, printed
    assert set(testbed.load_run(directory).cells["status"]) == {"done"}


def test_what_comes_home_can_lie_nowhere_else(tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, kind in (
            ("cell/a", tarfile.REGTYPE),
            ("../b", tarfile.REGTYPE),
            (f"{tmp_path}/c", tarfile.REGTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = kind, 3
            tar.addfile(entry, io.BytesIO(b"abc"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            entry = tarfile.TarInfo("cell/link")
            entry.type, entry.linkname = kind, str(tmp_path)
            tar.addfile(entry)
    home = tmp_path / "home"
    home.mkdir()
    unpack(packed.getvalue(), home)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert found == ["home", "home/cell", "home/cell/a"]


def test_without_machines_nothing_is_made(tmp_path):
    code, printed = finished(sweep(tmp_path, "here"))
    assert (code, printed.strip().count("\n")) == (
        2,
        0,
    ) and "'here' is no address of a Dask scheduler" in printed
    code, printed = finished(sweep(tmp_path, "tcp://127.0.0.1:1"))
    assert (
        code == 4 and "no Dask scheduler can be reached there" in printed.strip().splitlines()[-1]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]
