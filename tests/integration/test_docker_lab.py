"""The Docker lab as a real lab: what workers may do, what links carry, and that nothing is left,
whatever ended it."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from docker.models.containers import Container
from docker.models.networks import Network, NetworkCollection

from testbed.labs import docker as lab_module
from testbed.labs.base import HostFailed, LabError, LabPlan, Process
from testbed.labs.docker import LABEL, OWNER, DockerHost, DockerLab, clean, connect
from testbed.labs.owner import owner_lives, owner_mark
from testbed.links.delayline import DelayLineDied
from testbed.links.routes import Tcp
from testbed.links.state import LinkParameters, LinkState

pytestmark = pytest.mark.docker

RUNS = Path(__file__).parents[2] / "runs"
LINK = LinkState(LinkParameters(rate_bps=50_000_000), LinkParameters(rate_bps=20_000_000))


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not tmp_path: the tests may run in a container, and then only runs is a directory that the
    # daemon can see.
    path = Path(tempfile.mkdtemp(prefix="test-", dir=RUNS))
    (path / "cells").mkdir()
    yield path
    shutil.rmtree(path)


def plan(hosts: int) -> LabPlan:
    return LabPlan({f"w{n}": LINK for n in range(hosts)})


def wait_for(condition: Callable[[], object], seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def finish(process: Process, seconds: float = 15) -> int | None:
    wait_for(lambda: process.poll() is not None, seconds)
    return process.poll()


def run(host: DockerHost, directory: Path, code: str) -> str:
    log = directory / "cells" / "program.log"
    log.unlink(missing_ok=True)
    assert finish(host.start(["python", "-c", code], {"GREETING": "hello"}, log)) == 0, (
        log.read_text()
    )
    return log.read_text()


def left(label: str = LABEL) -> list[str]:
    client = connect()
    try:
        everything = [
            *client.containers.list(all=True, filters={"label": label}),
            *client.networks.list(filters={"label": label}),
        ]
        return [str(one.name) for one in everything]
    finally:
        client.close()


@pytest.fixture
def orchestrator(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that says "ready", opens a lab of two hosts and says "open"; what it makes carries
    its PID."""
    program = f"""
        import signal, sys, time
        from pathlib import Path
        from testbed.labs.base import LabPlan
        from testbed.labs.docker import DockerLab
        from testbed.links.state import LinkState, LinkParameters
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
        print("ready", flush=True)
        plan = LabPlan({{"w0": LinkState(LinkParameters(10**7), LinkParameters(10**7)), "w1": LinkState()}})
        with DockerLab(plan, Path({str(directory)!r})) as lab:
            lab.hosts["w0"].start(["sleep", "600"], {{}}, Path({str(directory / "cells" / "log")!r}))
            print("open", flush=True)
            time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def made_by(process: subprocess.Popen[str]) -> list[str]:
    client = connect()
    try:
        containers = client.containers.list(all=True, filters={"label": OWNER}, ignore_removed=True)
        mine = [one.name for one in containers if one.labels[OWNER].startswith(f"{process.pid}:")]
        networks = client.networks.list(filters={"label": OWNER})
        return mine + [
            one.name for one in networks if one.attrs["Labels"][OWNER].startswith(f"{process.pid}:")
        ]
    finally:
        client.close()


def test_programs_read_the_folders_of_the_plan_and_cannot_change_them(directory: Path) -> None:
    folder = directory / "data"
    folder.mkdir()
    (folder / "train").write_text("seven")
    with DockerLab(replace(plan(1), folders=(folder,)), directory) as lab:
        host = lab.hosts["w0"]
        assert run(host, directory, f"print(open({str(folder / 'train')!r}).read())") == "seven\n"
        refused = (
            f"import errno\ntry: open({str(folder / 'x')!r}, 'w')\nexcept OSError as e:"
            " print(errno.errorcode[e.errno])"
        )
        assert run(host, directory, refused) == "EROFS\n"


def test_programs_run_without_any_privilege_and_write_to_the_run_directory_only(
    directory: Path,
) -> None:
    with DockerLab(plan(1), directory) as lab:
        host = lab.hosts["w0"]
        assert (
            run(host, directory, "import os; print(os.environ['GREETING'], os.environ['HOME'])")
            == "hello /tmp\n"
        )
        status = run(host, directory, "print(open('/proc/self/status').read())")
        assert "CapEff:\t0000000000000000" in status
        assert "CapBnd:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        uid, gid = lab.user
        assert uid != 0
        assert f"Uid:\t{uid}\t" in status
        target = directory / "cells" / "made"
        run(
            host,
            directory,
            f"open({host.path_on_host(target)!r}, 'w').write('x'); open('/tmp/x', 'w').write('x')",
        )
        assert (target.stat().st_uid, target.stat().st_gid) == (uid, gid)
        refused = (
            "import errno\ntry: open('/opt/x', 'w')\nexcept OSError as e:"
            " print(errno.errorcode[e.errno])"
        )
        assert run(host, directory, refused) == "EROFS\n"
        with closing(connect()) as client:  # as a daemon sees it
            granted = client.containers.get(host.nsenter_target["container"]).attrs["HostConfig"]
            assert (
                granted["CapDrop"] == ["ALL"]
                and not granted["CapAdd"]
                and not granted["Privileged"]
            )
            assert (
                granted["ReadonlyRootfs"]
                and 0 < granted["PidsLimit"] <= 4096
                and granted["PidMode"] == ""
            )
            assert not any("docker.sock" in mount.get("Source", "") for mount in granted["Mounts"])
    assert not left(f"{LABEL}={lab._token}")


def test_a_program_of_ours_gets_into_a_host_of_a_live_run(directory: Path) -> None:
    with DockerLab(plan(2), directory) as lab, closing(connect()) as client:
        for host in lab.hosts.values():
            container = client.containers.get(host.nsenter_target["container"])
            assert host.address in container.exec_run(["cat", "/proc/net/fib_trie"]).output.decode()


def test_process_reports_its_end_and_can_be_killed(directory: Path) -> None:
    with DockerLab(plan(1), directory) as lab:
        host, log = lab.hosts["w0"], directory / "cells" / "log"
        assert finish(host.start(["python", "-c", "raise SystemExit(7)"], {}, log)) == 7
        assert finish(host.start(["no-such-program"], {}, log)) == 127
        assert "no-such-program" in log.read_text()
        sleeper = host.start(["sleep", "600"], {}, log)
        assert sleeper.poll() is None
        sleeper.kill()
        assert finish(sleeper) == -signal.SIGKILL
        sleeper.kill()
        said = directory / "cells" / "family"
        said.touch()
        os.chown(said, *lab.user)
        family = host.start(["sh", "-c", "sleep 600 & echo $!; wait"], {}, said)
        assert wait_for(said.read_text)
        family.kill()
        assert finish(family) == -signal.SIGKILL
        child = int(said.read_text())
        assert wait_for(
            lambda: (
                run(host, directory, f"import os; print(os.path.exists('/proc/{child}'))")
                == "False\n"
            )
        )


def test_links_carry_their_rate_and_not_more(directory: Path) -> None:
    """w1 sends to w0: its way up has 50 Mbit/s, the way down to w0 20 Mbit/s."""
    with DockerLab(plan(2), directory) as lab:
        receiver, sender = lab.hosts["w0"], lab.hosts["w1"]
        receive = (
            "import socket\nc = socket.create_server(('', 5000)).accept()[0]\nwhile c.recv(1 <<"
            " 20): pass"
        )
        send = (
            "import socket, sys, time\nwhile True:\n try: s ="
            " socket.create_connection((sys.argv[1], 5000)); break\n except ConnectionRefusedError:"
            " time.sleep(0.05)\ns.sendall(bytes(8_000_000)); s.close()"
        )
        sink = receiver.start(["python", "-c", receive], {}, directory / "cells" / "sink")
        source = sender.start(
            ["python", "-c", send, receiver.address], {}, directory / "cells" / "source"
        )
        assert wait_for(lambda: lab.links.counters()["w0", "down"].bytes > 1_000_000)
        first, begin = lab.links.counters()["w0", "down"].bytes, time.monotonic()
        time.sleep(1.5)
        last, end = lab.links.counters()["w0", "down"].bytes, time.monotonic()
        rate = (last - first) * 8 / (end - begin)
        assert 16e6 < rate < 20.4e6  # one TCP flow that meets a full queue now and then
        assert (finish(sink), finish(source)) == (0, 0)
        counters = lab.links.counters()
        assert counters["w1", "up"].bytes > 8_000_000
        assert counters["w1", "down"].bytes < 1_000_000


ECHO = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 5001))
while True:
    data, sender = s.recvfrom(100); s.sendto(data, sender)
"""
ROUND_TRIPS = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1)
taken = []
while len(taken) < 20:
    begin = time.monotonic(); s.sendto(b'x', (sys.argv[1], 5001))
    try: s.recv(100); taken.append(time.monotonic() - begin)
    except TimeoutError: pass
print(min(taken), sorted(taken)[10])
"""


def test_a_delay_line_takes_the_place_of_the_veth_pair_and_leaves_with_the_lab(
    directory: Path,
) -> None:
    state = LinkState(
        LinkParameters(rate_bps=50_000_000), LinkParameters(rate_bps=20_000_000, delay_s=0.02)
    )
    impaired = frozenset({("w0", "down"), ("w1", "down")})
    lined = LabPlan({"w0": state, "w1": state, "w2": LINK}, impaired=impaired, engine="userspace")
    with DockerLab(lined, directory) as lab:
        log = directory / "cells" / "trips"
        assert [lab.hosts[name].interface for name in lined.hosts] == ["eth1", "eth1", "eth0"]
        echo = lab.hosts["w1"].start(["python", "-c", ECHO], {}, directory / "cells" / "echo")
        for source, least_s in (("w0", 0.04), ("w2", 0.02)):  # w2 has no delay of its own
            log.unlink(missing_ok=True)
            trips = lab.hosts[source].start(
                ["python", "-c", ROUND_TRIPS, lab.hosts["w1"].address], {}, log
            )
            assert finish(trips) == 0, log.read_text()
            fastest_s, median_s = map(float, log.read_text().split())
            assert least_s <= fastest_s < least_s + 0.003 and median_s < least_s + 0.005
        echo.kill()
        lab.links.apply({"w1": replace(state, down=replace(state.down, delay_s=0.05))})
        before, target = lab.links.counters()["w1", "down"].bytes, (lab.hosts["w1"].address, 9)
        send = f"for _ in range(100): s.sendto(bytes(1000), {target})"
        run(
            lab.hosts["w0"],
            directory,
            f"import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n{send}",
        )
        # Ethernet, IP and UDP have 42 bytes; a bridge sends a few small packets of its own at any
        # time.
        assert wait_for(lambda: (lab.links.counters()["w1", "down"].bytes - before) // 1042 == 100)
        assert lab.links.line is not None
        assert lab.links.line.counters().directions["w1", "down"].held > 0
        assert wait_for(
            lambda: lab.links.line and lab.links.line.counters().directions["w1", "down"].held == 0
        )
        taps = [name for _, name in socket.if_nameindex() if lab._token in name]
        assert len(taps) == 2
    assert wait_for(lambda: not [name for _, name in socket.if_nameindex() if lab._token in name])
    assert not left(f"{LABEL}={lab._token}")


def test_a_killed_delay_line_ends_with_its_devices(directory: Path) -> None:
    state = LinkState(
        LinkParameters(rate_bps=50_000_000), LinkParameters(rate_bps=20_000_000, delay_s=0.02)
    )
    lined = LabPlan({"w0": state}, impaired=frozenset({("w0", "down")}), engine="userspace")
    with DockerLab(lined, directory) as lab:
        assert lab.links.line is not None
        os.kill(lab.links.line.pid, signal.SIGKILL)
        with pytest.raises(DelayLineDied, match="signal 9"):
            lab.links.line.counters()
        assert wait_for(
            lambda: not [name for _, name in socket.if_nameindex() if lab._token in name]
        )
    assert not left(f"{LABEL}={lab._token}")


def test_time_outs_of_tcp_are_slowed_down(directory: Path) -> None:
    with DockerLab(replace(plan(2), tcp=Tcp(min_rto_s=0.8)), directory) as lab:
        receive = (
            "import socket\nc = socket.create_server(('', 5000)).accept()[0]\nwhile c.recv(1 <<"
            " 20): pass"
        )
        lab.hosts["w1"].start(["python", "-c", receive], {}, directory / "cells" / "sink")
        probe = (
            "import socket, struct, time\nwhile True:\n try: s ="
            f" socket.create_connection(({lab.hosts['w1'].address!r}, 5000)); break\n except"
            " ConnectionRefusedError: time.sleep(0.05)\ns.send(bytes(1000));"
            " time.sleep(0.3)\nprint(struct.unpack_from('=I', s.getsockopt(socket.IPPROTO_TCP,"
            " socket.TCP_INFO, 104), 8)[0])"
        )
        assert 800_000 <= int(run(lab.hosts["w0"], directory, probe)) < 1_000_000  # tcpi_rto in µs


def test_name_look_ups_do_not_stall(directory: Path) -> None:
    code = (
        "import socket, time\nbegin = time.monotonic()\ntry:"
        " socket.gethostbyaddr('10.1.2.3')\nexcept OSError: pass\nprint(time.monotonic() - begin)"
    )
    with DockerLab(plan(1), directory) as lab:
        assert float(run(lab.hosts["w0"], directory, code)) < 0.5


def test_killed_orchestrator_leaves_no_container_and_clean_removes_the_network(
    orchestrator: subprocess.Popen[str],
) -> None:
    assert orchestrator.stdout is not None
    assert [orchestrator.stdout.readline() for _ in range(2)] == [
        "ready\n",
        "open\n",
    ], orchestrator.communicate()
    made = made_by(orchestrator)
    assert len(made) == 3
    assert not set(clean(dry_run=False)[0]) & {f"container {name}" for name in made}
    assert made_by(orchestrator) == made, "clean touched a living lab"
    orchestrator.kill()
    orchestrator.communicate()
    assert wait_for(lambda: len(made_by(orchestrator)) == 1), made_by(orchestrator)
    (network,) = made_by(orchestrator)
    assert f"network {network}" in clean(dry_run=True)[0]
    assert made_by(orchestrator) == [network]
    assert f"network {network}" in clean(dry_run=False)[0]
    assert not made_by(orchestrator)


@pytest.mark.parametrize("delay_s", [0.2, 0.6, 1.2, None])
def test_interrupt_leaves_nothing(
    orchestrator: subprocess.Popen[str], delay_s: float | None
) -> None:
    """At some moment of the start, or (None) when the lab is open."""
    assert orchestrator.stdout is not None
    assert orchestrator.stdout.readline() == "ready\n"
    if delay_s is None:
        assert orchestrator.stdout.readline() == "open\n"
    else:
        time.sleep(delay_s)
    orchestrator.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, errors = orchestrator.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert time.monotonic() - begin < 5
    assert wait_for(lambda: not made_by(orchestrator)), made_by(orchestrator)


def test_interrupt_while_the_daemon_makes_the_network_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = NetworkCollection.create

    def create_and_be_interrupted(*args: object, **options: object) -> object:
        interrupt = functools.partial(
            signal.pthread_kill, threading.main_thread().ident, signal.SIGINT
        )
        threading.Timer(0.01, interrupt).start()
        return create(*args, **options)

    monkeypatch.setattr(NetworkCollection, "create", create_and_be_interrupted)
    lab = DockerLab(plan(1), directory)
    with pytest.raises(KeyboardInterrupt), lab:
        pass
    time.sleep(1)  # for what the daemon may still be at
    assert not left(f"{LABEL}={lab._token}")


def test_missing_image_says_how_to_build_it(directory: Path) -> None:
    with (
        pytest.raises(LabError, match="docker compose build"),
        DockerLab(plan(1), directory, image="no-such-image:x"),
    ):
        pass


def test_a_container_killed_too_early_is_no_fault_of_the_machine(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = DockerLab._wire

    def kill_first(lab: DockerLab, network: Network, containers: dict[str, Container]) -> None:
        containers["w1"].kill()
        wire(lab, network, containers)

    monkeypatch.setattr(DockerLab, "_wire", kill_first)
    lab = DockerLab(plan(2), directory)
    with pytest.raises(HostFailed, match="the container of w1 ended with exit code 137"), lab:
        pass
    assert not left(f"{LABEL}={lab._token}")


def test_topology_that_needs_another_lab_is_refused(directory: Path) -> None:
    trunk = LabPlan(
        {"w0": LINK, "w1": LINK, "t": LINK}, {"a": ("w0",), "b": ("w1",)}, {"t": ("a", "b")}
    )
    with pytest.raises(LabError, match="--lab netns"), DockerLab(trunk, directory):
        pass


def test_partition_stops_a_link_and_ends(directory: Path) -> None:
    send = (
        "import socket, sys, time\ns = socket.socket(type=socket.SOCK_DGRAM)\n"
        "while True: s.sendto(b'x', (sys.argv[1], 5000)); time.sleep(0.01)"
    )
    receive = (
        "import socket, sys\ns = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 5000))\n"
        "while True: s.recv(9); print('x', end='', flush=True)"
    )
    with DockerLab(plan(2), directory) as lab:
        log = directory / "cells" / "received"
        lab.hosts["w0"].start(["python", "-c", receive], {}, log)
        lab.hosts["w1"].start(
            ["python", "-c", send, lab.hosts["w0"].address], {}, directory / "cells" / "sender"
        )
        assert wait_for(lambda: log.exists() and log.stat().st_size > 20)
        assert lab.links.apply({"w0": replace(LINK, connected=False)})["w0"].verified
        time.sleep(0.3)
        cut = log.stat().st_size
        time.sleep(0.5)
        assert log.stat().st_size == cut
        assert lab.links.apply({"w0": LINK})["w0"].verified
        assert wait_for(lambda: log.stat().st_size > cut + 20)


def test_container_that_cannot_start_is_reported_and_removed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_module, "INTERFACE", "eth7")
    lab = DockerLab(plan(2), directory)
    with pytest.raises(LabError, match="cannot see the container"), lab:
        pass
    assert not left(f"{LABEL}={lab._token}")


def test_unprivileged_user_is_told_what_would_help(directory: Path) -> None:
    code = f"""
        import ctypes
        from pathlib import Path
        from testbed.labs.base import LabPlan
        from testbed.labs.docker import DockerLab
        # capset(2), version 3: root without any capability
        assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
        DockerLab(LabPlan({{}}), Path({str(directory)!r})).__enter__()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert (
        "LabError: shaping containers needs NET_ADMIN, NET_RAW, SYS_PTRACE, SYS_ADMIN"
        in done.stderr
    )
    assert "docker compose up experiment" in done.stderr


def test_owner_is_known_by_more_than_its_pid() -> None:
    mark = owner_mark()
    pid, started, boot, namespace = mark.split(":")
    lives = owner_lives
    assert lives(mark)
    assert not lives(f"{pid}:{int(started) + 1}:{boot}:{namespace}")
    assert not lives(f"{pid}:{started}:another-boot:{namespace}")
    assert lives(f"999999999:1:{boot}:1"), "a PID of another namespace says nothing"
    assert not lives(f"999999999:1:{boot}:{namespace}")
    assert lives("something else")
