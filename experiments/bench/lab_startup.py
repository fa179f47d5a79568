"""Time of a netns lab of 64 shaped hosts, up and down, against the same lab made with ip and tc.

    python experiments/bench/lab_startup.py [HOSTS] [REPETITIONS]

Both ways make the same namespaces, veth pairs, addresses and tbf on both ends of every pair, in the
same private namespaces, in turn. The ratio is what counts; the machine may be busy.
"""

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable

from private_namespaces import enter_sandbox

from testbed.labs.base import LabPlan
from testbed.labs.forkserver import ForkServer
from testbed.labs.netns import NetnsLab
from testbed.links.qdiscs import compile_tree, tc_commands
from testbed.links.state import LinkParameters, LinkState

PARAMETERS = LinkParameters(rate_bps=100_000_000)


def ours(server: ForkServer, hosts: int) -> tuple[float, float]:
    """(seconds up, seconds down) of our lab, every qdisc read back."""
    plan = LabPlan({f"w{i}": LinkState(PARAMETERS, PARAMETERS) for i in range(hosts)})
    begin = time.perf_counter()
    with NetnsLab(plan, server) as lab:
        up = time.perf_counter()
        assert len(lab.links.counters()) == 2 * hosts
        closing = time.perf_counter()
    return up - begin, time.perf_counter() - closing


def with_programs(hosts: int) -> tuple[float, float]:
    """(seconds up, seconds down) with one call of ip or tc after another."""

    def call(command: str) -> None:
        subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)

    begin = time.perf_counter()
    call("ip netns add switch")
    call("ip -n switch link add br0 type bridge")
    call("ip -n switch link set br0 up")
    for i in range(hosts):
        call(f"ip netns add w{i}")
        call(f"ip -n switch link add w{i} type veth peer name eth0 netns w{i}")
        call(f"ip -n switch link set w{i} master br0 up")
        call(f"ip -n w{i} address add 10.77.{i // 250}.{i % 250 + 1}/16 dev eth0")
        call(f"ip -n w{i} link set lo up")
        call(f"ip -n w{i} link set eth0 up")
        for command in tc_commands(compile_tree(PARAMETERS), "eth0"):
            call(command.replace("tc ", f"tc -n w{i} ", 1))
        for command in tc_commands(compile_tree(PARAMETERS), f"w{i}"):
            call(command.replace("tc ", "tc -n switch ", 1))
    up = time.perf_counter()
    for name in ["switch", *(f"w{i}" for i in range(hosts))]:
        call(f"ip netns delete {name}")
    return up - begin, time.perf_counter() - up


def report(name: str, measure: Callable[[], tuple[float, float]], repetitions: int) -> float:
    """Print the median of some repetitions; returns up + down in seconds."""
    times = [measure() for _ in range(repetitions)]
    up, down = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{name:24} up {up:6.3f} s   down {down:6.3f} s   both {up + down:6.3f} s")
    return up + down


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hosts", type=int, nargs="?", default=64)
    parser.add_argument("repetitions", type=int, nargs="?", default=5)
    given = parser.parse_args()
    hosts, repetitions = given.hosts, given.repetitions
    enter_sandbox()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    print(f"{hosts} hosts, tbf on both ends of each veth pair, median of {repetitions}")
    with ForkServer() as server:
        mine = report("testbed (netlink batches)", lambda: ours(server, hosts), repetitions)
    theirs = report("ip and tc programs", lambda: with_programs(hosts), repetitions)
    print(f"ratio {theirs / mine:.1f}")


if __name__ == "__main__":
    main()
