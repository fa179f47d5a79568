"""The delay line with real TAP devices and real traffic; run inside the sandbox as a child
process."""

import errno
import json
import os
import textwrap

import pytest
from sandbox import run_in_sandbox

from testbed.links.tap import NoTapError, open_tap

pytestmark = pytest.mark.netns

PRELUDE = """
import json, os, signal, socket, struct, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from testbed.links.delayline import DelayLine, DelayLineDied
from testbed.links.netlink import back_to_own_namespace, setns, unshare_network
from testbed.links.qdiscs import Netem
from testbed.links.state import Loss
from testbed.links.tap import open_tap

PLACES = ("wire", "up"), ("wire", "down")

def netem(**changes):
    zero = dict(delay_ns=0, jitter_ns=0, distribution="normal", loss=Loss(), duplicate=0.0, corrupt=0.0, reorder=0.0,
                limit_packets=10_000, seed=1)
    return Netem(**zero | changes)

def both(line, **changes):
    wanted = dict.fromkeys(PLACES, netem(**changes))
    assert line.apply(wanted) == wanted

def host(number):
    unshare_network()
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")  # it would be counted
    fd = open_tap("eth0", 2)
    for command in ("link set lo up", f"address add 10.0.0.{number}/24 dev eth0", "link set eth0 up"):
        subprocess.run(["ip", *command.split()], check=True)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), fd

with back_to_own_namespace():
    (near, first), (far, second) = host(1), host(2)

@contextmanager
def at(namespace):
    with back_to_own_namespace():
        setns(namespace)
        yield

def udp(namespace, port=0):
    with at(namespace):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS
        s.bind(("0.0.0.0", port))
        return s

sender, sink = udp(near), udp(far, 9000)

def send(count, pause_s=0.0001, payload=bytes(100)):
    '''(number, one-way delay in ms) of what arrives of numbered datagrams, in the order of arrival'''
    sent, came = [], []
    def read(wait_s):
        sink.settimeout(wait_s)
        try:
            while True:
                data, control, _, _ = sink.recvmsg(4096, 256)
                number, (seconds, ns) = struct.unpack_from("=q", data)[0], struct.unpack("=qq", control[0][2])
                came.append((number, (seconds * 10**9 + ns - sent[number]) / 1e6))
        except (BlockingIOError, TimeoutError):
            pass
    for number in range(count):
        sent.append(time.time_ns())
        sender.sendto(struct.pack("=q", number) + payload, ("10.0.0.2", 9000))
        time.sleep(pause_s)
        read(0)
    read(0.5)
    return came

def udp_errors():
    with at(far):
        lines = [l.split()[1:] for l in Path("/proc/thread-self/net/snmp").read_text().splitlines() if l.startswith("Udp:")]
    return int(dict(zip(*lines))["InCsumErrors"])

def transfer(size):
    with at(far):
        server = socket.create_server(("0.0.0.0", 9001))
    program = "import socket; socket.create_connection(('10.0.0.2', 9001)).sendall(bytes(%d))" % size
    with at(near):
        source = subprocess.Popen([sys.executable, "-S", "-c", program])
    connection, _ = server.accept()
    while size:
        size -= len(connection.recv(1 << 20))
    source.wait()
    connection.close(); server.close()
"""


def inside(tmp_path, body):
    """Run Python code in private namespaces, with a link between two hosts; it prints one JSON
    value."""
    code = PRELUDE + f"tmp = Path({str(tmp_path)!r})\n" + textwrap.dedent(body)
    return json.loads(run_in_sandbox(code, tmp_path).splitlines()[-1])


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (errno.EACCES, "sudo chmod 666 /dev/net/tun"),
        (errno.EPERM, "docker run --device /dev/net/tun"),
        (errno.ENOENT, "sudo modprobe tun"),
    ],
)
def test_a_machine_without_tap_devices_is_one_line_with_the_mend(monkeypatch, code, mend):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(NoTapError) as raised:
        open_tap("eth0", 2)
    assert str(raised.value).startswith("/dev/net/tun cannot be opened (")
    assert str(raised.value).endswith(mend)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("delay_ms", [1, 5, 20, 80])
def test_the_delay_is_exact_and_never_short(tmp_path, delay_ms):
    delays_ms, counters = inside(
        tmp_path,
        f"""
        with DelayLine({{"wire": (first, second)}}) as line:
            both(line, delay_ns={delay_ms} * 10**6)
            send(1)  # finds the address
            came = send(100, 0.003)
            counted = line.counters().directions["wire", "up"]
            print(json.dumps([[ms for _, ms in came], [counted.frames, counted.held, counted.lost, counted.overflowed]]))
        """,
    )
    assert len(delays_ms) == 100
    assert counters == [102, 0, 0, 0]  # with the question for the address
    # it knows when a frame came, but for some 10 us once in a long while
    assert delay_ms - 0.02 <= min(delays_ms)
    # One crossing may add half of the 0.3 ms that two may. Not the median: on a busy machine most
    # timers are late.
    assert sorted(delays_ms)[10] <= delay_ms + 0.15


def test_order_is_kept_and_a_change_lets_what_is_held_keep_its_time(tmp_path):
    steady, changed, in_order = inside(
        tmp_path,
        """
        with DelayLine({"wire": (first, second)}) as line:
            both(line, delay_ns=20_000_000)
            send(1)
            steady = send(2000)
            for number in range(10):
                sender.sendto(struct.pack("=q", number), ("10.0.0.2", 9000))
            both(line, delay_ns=1_000_000)
            for number in range(10, 20):
                sender.sendto(struct.pack("=q", number), ("10.0.0.2", 9000))
            sink.settimeout(1)
            changed = [struct.unpack("=q", sink.recv(100))[0] for _ in range(20)]
            both(line, delay_ns=20_000_000, jitter_ns=5_000_000, in_order=True)
            in_order = send(500, 0.0005)
            print(json.dumps([[number for number, _ in steady], changed, [number for number, _ in in_order]]))
        """,
    )
    assert steady == list(range(2000))
    assert changed == [*range(10, 20), *range(10)]
    assert in_order == list(range(500))


def test_gso_packets_stay_whole_until_single_frames_have_a_fate(tmp_path):
    sizes = inside(
        tmp_path,
        """
        def mean_bytes(line):
            before = line.counters().directions["wire", "up"]
            transfer(20_000_000)
            after = line.counters().directions["wire", "up"]
            return (after.bytes - before.bytes) / (after.frames - before.frames)

        with DelayLine({"wire": (first, second)}) as line:
            sizes = [mean_bytes(line)]
            both(line, delay_ns=1_000_000); sizes.append(mean_bytes(line))
            both(line, delay_ns=1_000_000, duplicate=1e-9); sizes.append(mean_bytes(line))
            both(line); sizes.append(mean_bytes(line))
            print(json.dumps(sizes))
        """,
    )
    untouched, delayed, cut, again = sizes
    assert min(untouched, delayed, again) > 5000
    assert 1400 < cut <= 1514


def test_the_receiver_finds_every_corruption_by_its_checksum(tmp_path):
    came, corrupted, rejected = inside(
        tmp_path,
        """
        with DelayLine({"wire": (first, second)}) as line:
            send(1)
            both(line, corrupt=0.1)
            before = udp_errors()
            payload = bytes(range(256)) * 5
            numbers = [number for number, _ in send(2000, payload=payload)]
            print(json.dumps([len(numbers), line.counters().directions["wire", "up"].corrupted, udp_errors() - before]))
        """,
    )
    assert 140 < corrupted < 260
    # Nearly all bits are payload; those of the other headers are found elsewhere or, in the
    # sender's address, not at all.
    assert corrupted * 0.9 < rejected <= corrupted
    assert rejected <= 2000 - came <= corrupted


def test_loss_duplicates_and_overtaking(tmp_path):
    came, early, counted = inside(
        tmp_path,
        """
        with DelayLine({"wire": (first, second)}) as line:
            send(1)
            both(line, delay_ns=20_000_000, loss=Loss(0.1), duplicate=0.1, reorder=0.1)
            came = send(3000)
            counted = line.counters().directions["wire", "up"]
            early = sum(ms < 10 for _, ms in came)
            print(json.dumps([len(came), early, [counted.lost, counted.duplicated, counted.reordered, counted.held]]))
        """,
    )
    lost, duplicated, reordered, held = counted
    assert held == 0
    assert came == 3000 + duplicated - lost
    assert all(230 < number < 400 for number in (lost, duplicated, reordered))
    assert early == reordered


def test_what_is_beyond_the_limit_is_dropped_and_counted(tmp_path):
    came, overflowed = inside(
        tmp_path,
        """
        with DelayLine({"wire": (first, second)}) as line:
            send(1)
            both(line, delay_ns=200_000_000, limit_packets=10)
            came = send(100)
            print(json.dumps([len(came), line.counters().directions["wire", "up"].overflowed]))
        """,
    )
    assert came == 10
    assert overflowed == 90


def test_an_interface_that_goes_down_ends_nothing(tmp_path):
    while_down, after = inside(
        tmp_path,
        """
        with DelayLine({"wire": (first, second)}) as line:
            both(line, delay_ns=1_000_000)
            send(1)
            with at(far): subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
            down = len(send(10))
            with at(far): subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)
            time.sleep(0.1)
            print(json.dumps([down, len(send(10))]))
        """,
    )
    assert (while_down, after) == (0, 10)


def test_a_killed_line_is_noticed_at_once_and_its_devices_vanish(tmp_path):
    words, took_s, devices = inside(
        tmp_path,
        """
        with DelayLine({"wire": (first, second)}) as line:
            os.kill(line.pid, signal.SIGKILL)
            begin, words = time.monotonic(), []
            for ask in (line.counters, lambda: both(line), line.counters):
                try: ask()
                except DelayLineDied as died: words.append(str(died))
            took_s = time.monotonic() - begin
            with at(near): devices = Path("/proc/thread-self/net/dev").read_text()
            print(json.dumps([words, took_s, devices]))
        """,
    )
    assert words == ["the delay line was ended by signal 9"] * 3
    assert took_s < 1
    assert "eth0" not in devices


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_program_leaves_with_its_parent(tmp_path, end):
    assert (
        inside(
            tmp_path,
            f"""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            line = DelayLine({{"wire": (first, second)}}).__enter__()
            os.write(writing, str(line.pid).encode())
            {end}
        pid = int(os.read(reading, 20))
        os.waitpid(child, 0)
        left_at = time.monotonic() + 5
        def running():
            try: return "Z" not in Path(f"/proc/{{pid}}/stat").read_text().rsplit(")")[-1].split()[0]
            except FileNotFoundError: return False
        while running() and time.monotonic() < left_at: time.sleep(0.01)
        print(json.dumps(running()))
        """,
        )
        is False
    )


def test_one_that_dies_while_a_lab_is_made_is_no_fault_of_the_machine(tmp_path):
    """Only this try has failed; a LabError would end the whole sweep."""
    seen = inside(
        tmp_path,
        """
        from testbed.labs.base import LabPlan
        from testbed.labs.forkserver import ForkServer
        from testbed.labs.netns import NetnsLab
        from testbed.links.state import LinkState, LinkParameters
        late = LinkState(LinkParameters(rate_bps=10_000_000, delay_s=0.01), LinkParameters(rate_bps=10_000_000, delay_s=0.01))
        impaired = frozenset((name, direction) for name in ("w0", "w1") for direction in ("up", "down"))
        plan = LabPlan({"w0": late, "w1": late}, impaired=impaired, engine="userspace")
        with ForkServer() as server:
            python, sys.executable = sys.executable, "/bin/false"
            try: NetnsLab(plan, server).__enter__()
            except DelayLineDied as died: words = str(died)
            sys.executable = python
            with NetnsLab(plan, server) as lab: print(json.dumps([words, len(lab.hosts)]))
        """,
    )
    assert seen == ["the delay line ended with exit code 1", 2]
