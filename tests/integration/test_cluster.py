"""A sweep on a Dask cluster: every cell comes home once, whatever becomes of a machine, and nothing
is left on any."""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

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


BRIDGE = "10.91.0.254"
"""Here; the machines are 10.91.0.1 and so on."""


@contextlib.contextmanager
def network():
    """What puts a command into a network namespace with a bridge, to which machines are joined."""
    root = os.geteuid() == 0
    own = ["unshare", "--net", *([] if root else ["--user", "--map-root-user"])]
    with subprocess.Popen([*own, "sleep", "infinity"]) as holder:
        enter = ["nsenter", f"--target={holder.pid}", "--net"]
        enter += [] if root else ["--user", "--preserve-credentials"]
        here, there = Path("/proc/self/ns/net"), Path(f"/proc/{holder.pid}/ns/net")
        wait_until(lambda: there.readlink() != here.readlink(), 10)
        make = f"ip link set lo up && ip link add br0 up type bridge && ip addr add {BRIDGE}/24 dev br0"
        subprocess.run([*enter, "sh", "-c", make], check=True)
        try:
            yield enter
        finally:
            holder.kill()


def sweep(tmp_path, address, *options, enter=(), **changes):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**SPEC, **changes}))
    command = [sys.executable, "-m", "testbed.cli", "run", "sweep.yaml", "--on", address, *options]
    return subprocess.Popen(
        [*enter, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        cwd=tmp_path,
        preexec_fn=heed_signals,
    )


@contextlib.contextmanager
def cluster(tmp_path, machines=2):
    """(what enters the network, address, machines): a scheduler, and workers as their users start
    them, each with a network namespace and a host name of its own."""
    environment = {**ENV, "TMPDIR": str(tmp_path)}
    address = f"tcp://{BRIDGE}:8786"
    python = [sys.executable, "-m"]
    scheduler = [*python, "distributed.cli.dask_scheduler", "--host", BRIDGE, "--port", "8786"]
    offer = ["--nthreads", "1", "--resources", "testbed=1", "--no-dashboard", "--no-nanny"]
    worker = shlex.join([*python, "distributed.cli.dask_worker", address, *offer])
    with contextlib.ExitStack() as held, open(tmp_path / "cluster.log", "w") as log:
        enter = held.enter_context(network())

        def start(*command):
            process = subprocess.Popen(
                [*enter, *command], stdout=log, stderr=log, env=environment, cwd=tmp_path
            )
            held.callback(process.wait)
            held.callback(process.kill)
            return process

        start(*scheduler, "--no-dashboard")
        started = []
        for number in range(1, machines + 1):
            script = f"""
                hostname machine{number}
                until ip addr add 10.91.0.{number}/24 dev eth0; do sleep 0.05; done
                ip link set lo up && ip link set eth0 up && exec {worker}"""
            started.append(start("unshare", "--net", "--uts", "sh", "-c", script))
            pid = started[-1].pid
            join = f"""
                until [ "$(readlink /proc/{pid}/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
                ip link add m{number} up type veth peer name eth0 netns {pid} && ip link set m{number} master br0"""
            wait_until(lambda pid=pid: Path(f"/proc/{pid}/comm").read_text() != "nsenter\n", 10)
            subprocess.run([*enter, "sh", "-c", join], check=True)
        yield enter, address, started


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
    with cluster(tmp_path) as (enter, address, machines):
        process = sweep(tmp_path, address, enter=enter)
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
    # of the two that ran on each at first, those of the lost one were run again
    assert {cell["machine"] for cell in run.cells["machine"]} == {"machine2"}


@pytest.mark.netns
def test_an_interrupt_ends_it_everywhere_and_resume_goes_on(tmp_path):
    with cluster(tmp_path, machines=1) as (enter, address, machines):
        process = sweep(tmp_path, address, enter=enter, matrix={})
        wait_until(lambda: rows_at(tmp_path), 60)
        process.send_signal(signal.SIGINT)
        code, printed = finished(process, timeout_s=30)
        assert code == 130 and "interrupted; the records so far are in" in printed
        assert not parts_of(machines[0]) and not list(tmp_path.glob("netsense-*"))
        directory = only_run(tmp_path)
        again = ["run", "--resume", str(directory), "--on", address]
        command = [*enter, sys.executable, "-m", "testbed.cli", *again]
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
