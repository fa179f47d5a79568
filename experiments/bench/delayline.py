"""What the delay line adds, how much it carries, how late it is, and what that costs.

    python experiments/bench/delayline.py

Two hosts with one link between them: a TAP device at each, the delay line in the middle, htb on
both. Times are the kernel's own, of the same frame where it leaves the one interface and where it
enters the other (packet(7), PACKET_RX_RING): what they say more than the delay is what the delay
line, and the scheduler that runs it, add.
"""

import argparse
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from private_namespaces import enter_sandbox
from rich.console import Console
from rich.table import Table

from testbed.links.delayline import DelayLine, DirectionCounters, LineCounters
from testbed.links.netlink import back_to_own_namespace, setns, unshare_network
from testbed.links.qdiscs import Netem
from testbed.links.state import Loss
from testbed.links.tap import open_tap

SINK = """import socket, threading
def drain(connection):
    while connection.recv(1 << 20): pass
with socket.create_server(("0.0.0.0", 5001)) as server:
    while True: threading.Thread(target=drain, args=server.accept()[:1]).start()
"""
SOURCE = """import socket
with socket.create_connection(("10.0.0.2", 5001)) as s:
    while True: s.send(bytes(1 << 17))
"""
FLOOD = """import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect(("10.0.0.2", 9))
while True:
    try: s.send(bytes(SIZE))
    except OSError: pass
"""
COMPUTE = "while True: pass"
_SOL_PACKET, _PACKET_RX_RING, _PACKET_STATISTICS, _PACKET_VERSION = 263, 5, 6, 10
_TPACKET_V2, _OUTGOING, _ETH_P_ALL = 1, 4, 3
_SLOT_BYTES, _SLOTS = 128, 1 << 18
_LINE = ("link", "up"), ("link", "down")


class Host:
    """A network namespace with one end of the link."""

    def __init__(self, number: int) -> None:
        unshare_network()
        with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as setting:
            setting.write("1")
        self.tap = open_tap("eth0", 2)
        self._namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        for words in (
            "link set lo up",
            f"address add 10.0.0.{number}/24 dev eth0",
            "link set eth0 up",
        ):
            subprocess.run(["ip", *words.split()], check=True)

    @contextmanager
    def inside(self) -> Iterator[None]:
        with back_to_own_namespace():
            setns(self._namespace)
            yield

    @contextmanager
    def program(self, code: str, count: int = 1) -> Iterator[None]:
        """Run Python code on the host, nicer than the delay line, each program in a session of its
        own."""
        with self.inside():
            argv = ["nice", "-n", "5", sys.executable, "-S", "-c", code]
            programs = [subprocess.Popen(argv, start_new_session=True) for _ in range(count)]
        try:
            yield
        finally:
            for program in programs:
                program.kill()
                program.wait()

    def shape(self, rate_mbit: int) -> None:
        """Put htb on the interface, with a bucket of 4 ms; 0 takes it away."""
        commands = ["qdisc del dev eth0 root"]
        if rate_mbit:
            bucket = f"burst {max(rate_mbit * 500, 12112)} cburst 1514 quantum 65536"
            commands.append("qdisc add dev eth0 root handle 1: htb default 1")
            commands.append(
                f"class add dev eth0 parent 1: classid 1:1 htb rate {rate_mbit}mbit {bucket}"
            )
        with self.inside():
            for number, command in enumerate(commands):
                # There may be none to take away, which tc calls an error.
                subprocess.run(["tc", *command.split()], check=number > 0, capture_output=True)


class Capture:
    """The frames of an interface from now on: when each passed, and enough of it to know it
    again."""

    def __init__(self, host: Host) -> None:
        with host.inside():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V2)
        # struct tpacket_req
        ring = struct.pack("=4I", 1 << 20, _SLOTS * _SLOT_BYTES >> 20, _SLOT_BYTES, _SLOTS)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_RX_RING, ring)
        self._ring = mmap.mmap(self._socket.fileno(), _SLOTS * _SLOT_BYTES)
        self._socket.bind(("eth0", _ETH_P_ALL))

    def frames(self, outgoing: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(keys, times in ns) of the IPv4 frames that left, or of those that came in."""
        slots = np.frombuffer(self._ring, np.uint8).reshape(_SLOTS, _SLOT_BYTES)
        slots = slots[slots[:, 0] & 1 == 1]  # TP_STATUS_USER
        # struct tpacket2_hdr: status, len, snaplen, mac and net, s, ns
        head = slots[:, :32].copy().view("=u4")
        mac = int(head[0, 3] & 0xFFFF)
        # sll_pkttype, ETH_P_IP
        wanted = ((slots[:, 32 + 10] == _OUTGOING) == outgoing) & (slots[:, mac + 12] == 8)
        at_ns = head[:, 4].astype(np.int64) * 10**9 + head[:, 5]
        # Identification of the IP header and the four bytes that are TCP's sequence number or come
        # after ICMP's checksum.
        seen = slots[:, [mac + n for n in (18, 19, 38, 39, 40, 41)]].astype(np.int64)
        keys = (seen << np.array([40, 32, 24, 16, 8, 0])).sum(axis=1)
        return keys[wanted], at_ns[wanted]

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def crossings_ms(before: Capture, behind: Capture) -> Any:
    """How long each frame was between two interfaces."""
    (sent, sent_ns), (came, came_ns) = before.frames(True), behind.frames(False)
    sent, first = np.unique(sent, return_index=True)
    came, second = np.unique(came, return_index=True)
    _, x, y = np.intersect1d(sent, came, return_indices=True)
    return (came_ns[second[y]] - sent_ns[first[x]]) / 1e6


class Bench:
    def __init__(self, near: Host, far: Host, line: DelayLine) -> None:
        self.near, self.far, self.line = near, far, line

    def set(self, delay_ms: float = 0, rate_mbit: int = 0, duplicate: float = 0.0) -> None:
        for host in (self.near, self.far):
            host.shape(rate_mbit)
        netem = Netem(
            round(delay_ms * 1e6),
            0,
            "normal",
            Loss(),
            duplicate,
            0.0,
            0.0,
            limit_packets=1_000_000,
            seed=1,
        )
        assert self.line.apply(dict.fromkeys(_LINE, netem)) == dict.fromkeys(_LINE, netem)

    def ping(self, count: int, pause_s: float) -> NDArray[np.float64]:
        """Round-trip times (ms); the far kernel answers, the near one stamps the answer."""
        with self.near.inside():
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        raw.settimeout(2)
        raw.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS
        times = []
        with raw:
            for number in range(count):
                head = struct.pack("!BBHHH", 8, 0, 0, 7, number)
                total = sum(struct.unpack("!4H", head))
                sent_ns = time.time_ns()
                raw.sendto(
                    struct.pack("!BBHHH", 8, 0, ~(total + (total >> 16)) & 0xFFFF, 7, number),
                    ("10.0.0.2", 0),
                )
                while True:
                    answer, control, _, _ = raw.recvmsg(256, 256)
                    if answer[20] == 0 and answer[26:28] == head[6:]:
                        break
                seconds, ns = struct.unpack("=qq", control[0][2])
                times.append((seconds * 10**9 + ns - sent_ns) / 1e6)
                time.sleep(pause_s)
        return np.array(times)

    def watch(self, seconds: float) -> tuple[float, LineCounters, LineCounters]:
        before, begin = self.line.counters(), time.monotonic()
        time.sleep(seconds)
        after = self.line.counters()
        return time.monotonic() - begin, before, after


def percentiles(values: NDArray[np.float64]) -> list[str]:
    return [f"{value:.3f}" for value in (values.min(), *np.percentile(values, [50, 99]))]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=128).print(table)


def added_latency(bench: Bench) -> None:
    rows = []
    for delay_ms in (0, 1, 5, 20, 80):
        bench.set(delay_ms)
        bench.ping(3, 0.01)
        with Capture(bench.near) as near, Capture(bench.far) as far:
            rtt_ms = bench.ping(200, 0.003)
            one_way_ms = crossings_ms(near, far) - delay_ms
        rows.append(
            [f"{delay_ms} ms", *percentiles(one_way_ms), *percentiles(rtt_ms - 2 * delay_ms)]
        )
    columns = ["delay each way", "one way: min", "p50", "p99", "RTT: min", "p50", "p99"]
    show("What a crossing takes besides the delay (ms), 200 echo requests", columns, rows)


def ceilings(bench: Bench) -> None:
    def carried(counters: LineCounters, what: Callable[[DirectionCounters], int]) -> int:
        return sum(what(counters.directions[place]) for place in _LINE)

    rows = []
    cases: list[tuple[str, str, int, float]] = [
        ("TCP, whole GSO packets", SOURCE, 4, 0.0),
        ("TCP, cut into frames", SOURCE, 4, 1e-9),
        ("UDP, frames of 1442 bytes", FLOOD.replace("SIZE", "1400"), 1, 0.0),
        ("UDP, frames of 106 bytes", FLOOD.replace("SIZE", "64"), 1, 0.0),
        ("UDP, frames of 106 bytes, 1 % duplicates", FLOOD.replace("SIZE", "64"), 1, 0.01),
    ]
    for delay_ms in (0, 5):
        for name, code, count, duplicate in cases:
            bench.set(delay_ms, duplicate=duplicate)
            with bench.far.program(SINK), bench.near.inside():
                time.sleep(0.3)
                with bench.near.program(code, count):
                    time.sleep(0.7)
                    took_s, before, after = bench.watch(2)
            frames = carried(after, lambda c: c.frames) - carried(before, lambda c: c.frames)
            bits = 8 * (carried(after, lambda c: c.bytes) - carried(before, lambda c: c.bytes))
            cpu_s = after.cpu_s - before.cpu_s
            rows.append(
                [
                    f"{delay_ms} ms",
                    name,
                    f"{bits / took_s / 1e9:.2f}",
                    f"{frames / took_s / 1e3:.0f}",
                ]
            )
            rows[-1] += [
                f"{cpu_s / took_s:.0%}",
                f"{frames / cpu_s / 1e3:.0f}",
                f"{bits / cpu_s / 1e9:.1f}",
            ]
    columns = [
        "delay",
        "traffic without a rate",
        "Gbit/s",
        "1000 frames/s",
        "processor",
        "1000 frames per s of it",
        "Gbit",
    ]
    show("What it carries", columns, rows)


def lateness(bench: Bench) -> None:
    rows = []
    for computing in (0, 2):
        for rate_mbit in (100, 500, 900):
            bench.set(20, rate_mbit)
            with bench.near.program(COMPUTE, computing), bench.far.program(SINK):
                time.sleep(0.3)
                with bench.near.program(SOURCE, 4):
                    time.sleep(1)
                    with Capture(bench.near) as near, Capture(bench.far) as far:
                        took_s, before, after = bench.watch(3)
                        late_ms = crossings_ms(near, far) - 20
            a, b = before.directions["link", "up"], after.directions["link", "up"]
            frames, bits, cpu_s = (
                b.frames - a.frames,
                8 * (b.bytes - a.bytes),
                after.cpu_s - before.cpu_s,
            )
            rows.append(
                [
                    f"{rate_mbit}",
                    f"{computing}",
                    f"{bits / took_s / 1e6:.1f}",
                    f"{frames / took_s:.0f}",
                ]
            )
            rows[-1] += [
                *percentiles(late_ms),
                f"{np.mean(late_ms > 1):.2%}",
                f"{(b.late - a.late) / frames:.2%}",
            ]
            rows[-1] += [f"{cpu_s / took_s:.0%}"]
    columns = [
        "Mbit/s",
        "others computing",
        "carried",
        "packets/s",
        "min ms",
        "p50",
        "p99",
        "> 1 ms",
        "counted late",
        "processor",
    ]
    show(f"How late packets are at 20 ms, 4 TCP flows, {os.cpu_count()} processors", columns, rows)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    enter_sandbox()
    with back_to_own_namespace():
        near, far = Host(1), Host(2)
    with DelayLine({"link": (near.tap, far.tap)}) as line:
        bench = Bench(near, far, line)
        added_latency(bench)
        ceilings(bench)
        lateness(bench)


if __name__ == "__main__":
    main()
