"""The kernel's view of connections: real ones over loopback, and a made-up kernel where time must
pass."""

import os
import random
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from netsenseml.sensing import tcp
from netsenseml.sensing.tcp import TcpInfo, TcpMonitor

pytestmark = pytest.mark.fast

PEER = "10.0.0.2"
PACKED = socket.inet_aton(PEER)


def connected():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    return client, peer


@pytest.fixture
def connection():
    client, peer = connected()
    with client, peer:
        yield client, peer


def carry(source, target, size):
    """Send, receive, and wait until all of it is acknowledged."""
    wanted = tcp.read(source.fileno()).bytes_acked + size
    sender = threading.Thread(target=source.sendall, args=(bytes(size),))
    sender.start()
    while size:
        size -= len(target.recv(min(size, 1 << 20)))
    sender.join()
    end_s = time.monotonic() + 5
    while tcp.read(source.fileno()).bytes_acked < wanted:
        assert time.monotonic() < end_s
        time.sleep(0.001)


def test_reads_what_the_kernel_knows(connection):
    client, peer = connection
    carry(client, peer, 3_000_000)
    info = tcp.read(client.fileno())
    assert 3_000_000 <= info.bytes_acked <= 3_000_001  # SYN counts
    assert 0 < info.min_rtt_s <= info.rtt_s < 1
    # A peer that gets no processor for a while is probed, even over loopback; the kernel counts
    # that.
    raw = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
    assert info.retransmits == struct.unpack_from("=I", raw, 100)[0]  # tcpi_total_retrans


def test_borrowing_leaves_the_connection_open(connection):
    client, peer = connection
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        assert tcp.read(client.fileno())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    client.sendall(b"still here")
    assert peer.recv(100) == b"still here"


@pytest.fixture
def default_timeout():
    yield lambda: socket.setdefaulttimeout(5)
    socket.setdefaulttimeout(None)


def test_no_socket_becomes_non_blocking_where_a_default_timeout_is_set(
    connection, leaving, default_timeout
):
    client, peer = connection
    leaving.add(client.fileno())
    unix = socket.socketpair()
    default_timeout()
    with unix[0], unix[1]:
        assert TcpMonitor([PEER]).sample() is not None
        for one in (client, peer, *unix):
            assert os.get_blocking(one.fileno())


def test_looking_for_peers_leaves_other_sockets_as_they_are(connection, default_timeout):
    default_timeout()
    assert TcpMonitor([PEER]).sample() is None
    assert tcp.read(connection[0].fileno())
    assert all(os.get_blocking(one.fileno()) for one in connection)


@pytest.mark.parametrize("prefix", ["", "::ffff:"])
def test_only_connections_that_leave_the_host_count(prefix):
    a, b = socket.socketpair()
    with (
        a,
        b,
        socket.create_server(("127.0.0.2", 0)) as server,
        socket.create_connection(server.getsockname()),
    ):
        assert TcpMonitor([prefix + "127.0.0.1", prefix + "127.0.0.2", "::1"]).sample() is None


@pytest.mark.parametrize("peers", [[PEER], ["::ffff:" + PEER], ["fe80::1%eth0", "192.0.2.1", PEER]])
def test_peers_are_named_in_any_spelling(connection, leaving, peers):
    leaving.add(connection[0].fileno())
    assert TcpMonitor(peers).sample() is not None
    assert TcpMonitor(["192.0.2.1"]).sample() is None


def test_without_peers_nothing_is_looked_for(monkeypatch):
    monkeypatch.setattr(tcp, "_descriptors", lambda: pytest.fail("looked for descriptors"))
    assert TcpMonitor([]).sample() is None


def test_a_peer_that_is_no_address_is_refused():
    with pytest.raises(ValueError, match="'localhost' does not appear to be"):
        TcpMonitor([PEER, "localhost"])


@pytest.mark.parametrize("prefix", ["", "::ffff:"])
def test_a_peer_is_known_by_its_address_also_where_ipv6_wraps_it(prefix):
    if prefix and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    with (
        socket.create_server(("127.0.0.2", 0)) as server,
        socket.create_connection((prefix + "127.0.0.2", server.getsockname()[1])) as client,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unconnected,
    ):
        assert tcp._other_host(client.fileno()) == bytes([127, 0, 0, 2])
        assert tcp._other_host(server.fileno()) is None
        assert tcp._other_host(unconnected.fileno()) is None


@pytest.mark.parametrize("name", ["127.0.0.1", "192.0.2.1", "x" * 70])
def test_a_name_of_loopback_or_of_another_host_or_of_none_tells_no_address(monkeypatch, name):
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    assert tcp.local_address(None) is None
    assert tcp.local_address("") is None


def test_loopback_and_an_interface_that_is_missing_tell_no_address():
    assert tcp.local_address("lo") is None
    assert tcp.local_address("missing0,lo") is None


def test_descriptors_that_are_gone_or_no_connection():
    with open(os.devnull) as file:
        assert tcp.read(file.fileno()) is None
    assert tcp.read(1 << 20) is None


def test_an_answer_that_is_too_short_is_refused():
    draw = random.Random(0)
    for size in range(152):
        with pytest.raises(ValueError, match=f"has {size} bytes, 152 are needed"):
            TcpInfo.parse(draw.randbytes(size))


def test_fields_lie_where_the_kernel_puts_them():
    draw = random.Random(0)
    for _ in range(100):
        raw = draw.randbytes(draw.randrange(192, 300))
        # from tcpi_rto, _pacing_rate, _segs_out, _delivery_rate on
        numbers = struct.unpack_from("=8x24I4Q6I4Q", raw)
        info = TcpInfo.parse(raw)
        assert (info.rtt_s, info.min_rtt_s) == (numbers[15] / 1e6, numbers[31] / 1e6)
        assert (info.bytes_acked, info.retransmits) == (numbers[26], numbers[23])


@pytest.fixture
def leaving(monkeypatch):
    """Descriptors that the monitor takes for connections to another host, as loopback never
    counts."""
    chosen = set()
    monkeypatch.setattr(tcp, "_other_host", lambda fd: PACKED if fd in chosen else None)
    monkeypatch.setattr(tcp, "_SEARCH_S", 0.0)
    monkeypatch.setattr(tcp, "_SEARCH_FACTOR", 0.0)
    return chosen


def test_a_sample_covers_the_time_since_the_one_before(connection, leaving):
    client, peer = connection
    leaving.add(client.fileno())
    monitor = TcpMonitor([PEER])
    assert monitor.sample().acked_bytes <= 1
    carry(client, peer, 50_000)
    sample = monitor.sample()
    assert sample.acked_bytes == 50_000
    assert 0 < sample.min_rtt_s <= sample.rtt_s
    stale = monitor.sample()
    assert stale.acked_bytes == 0
    assert stale.min_rtt_s == sample.min_rtt_s


def test_connections_come_and_go(connection, leaving):
    client, peer = connection
    leaving.add(client.fileno())
    monitor = TcpMonitor([PEER])
    assert monitor.sample() is not None
    newer, newer_peer = connected()
    with newer, newer_peer:
        leaving.add(newer.fileno())
        carry(newer, newer_peer, 70_000)
        assert monitor.sample().acked_bytes == 70_001
        carry(client, peer, 1_000)
        assert monitor.sample().acked_bytes == 1_000
    assert monitor.sample().acked_bytes == 0
    leaving.clear()
    client.close()
    assert monitor.sample() is None


def test_a_descriptor_that_was_given_to_another_socket_is_another_connection(
    connection, leaving, monkeypatch
):
    client, peer = connection
    fd = client.fileno()
    leaving.add(fd)
    monitor = TcpMonitor([PEER])
    carry(client, peer, 100_000)
    assert monitor.sample().acked_bytes >= 100_000
    monkeypatch.setattr(tcp, "_other_host", lambda fd: None)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as other,
    ):
        os.dup2(other.fileno(), fd)
        assert monitor.sample() is None


class MadeUpKernel:
    """Two connections to one peer whose figures the test sets, and a clock that it turns."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        self.infos = {fd: TcpInfo(0.001, 0.001, 0, 0) for fd in (7, 8)}
        monkeypatch.setattr(tcp, "monotonic_s", lambda: self.now_s)
        monkeypatch.setattr(tcp, "_descriptors", lambda: list(self.infos))
        monkeypatch.setattr(tcp, "_inode", lambda fd: fd)
        monkeypatch.setattr(tcp, "_other_host", lambda fd: PACKED)
        monkeypatch.setattr(tcp, "read", self.infos.get)

    def passes(self, seconds, fd=7, *, acked=0, rtt_s=None, retransmits=0):
        self.now_s += seconds
        old = self.infos[fd]
        self.infos[fd] = old._replace(
            rtt_s=old.rtt_s if rtt_s is None else rtt_s,
            min_rtt_s=old.min_rtt_s if rtt_s is None else min(old.min_rtt_s, rtt_s),
            bytes_acked=old.bytes_acked + acked,
            retransmits=old.retransmits + retransmits,
        )


@pytest.fixture
def kernel(monkeypatch):
    return MadeUpKernel(monkeypatch)


def test_a_longer_route_is_noticed_within_seconds_though_the_kernel_remembers_the_shorter_one(
    kernel,
):
    monitor = TcpMonitor([PEER])
    kernel.passes(0.1, acked=1000)
    assert monitor.sample().min_rtt_s == 0.001
    for _ in range(43):  # 4 s and two steps
        kernel.passes(0.1, acked=1000, rtt_s=0.021)
        sample = monitor.sample()
    assert sample.min_rtt_s == sample.rtt_s == 0.021
    assert kernel.infos[7].min_rtt_s == 0.001
    kernel.passes(0.1, acked=1000, rtt_s=0.0005)
    assert monitor.sample().min_rtt_s == 0.0005


def test_the_smallest_rtt_may_come_from_another_connection_to_the_same_peer_but_not_from_an_idle_one(
    kernel,
):
    monitor = TcpMonitor([PEER])
    monitor.sample()
    kernel.now_s += 10
    for _ in range(3):
        kernel.passes(0.1, acked=1_000_000, rtt_s=0.030)
        assert monitor.sample().min_rtt_s == 0.030
    kernel.passes(0.0, fd=8, acked=100, rtt_s=0.002)
    kernel.passes(0.1, acked=1_000_000)
    sample = monitor.sample()
    assert (sample.rtt_s, sample.min_rtt_s, sample.acked_bytes) == (0.030, 0.002, 1_000_000)


def test_retransmits_are_counted_once_and_stay_when_the_connection_goes(kernel):
    monitor = TcpMonitor([PEER])
    monitor.sample()
    kernel.passes(0.1, acked=10, retransmits=3)
    kernel.passes(0.1, fd=8, acked=10, retransmits=2)
    assert monitor.sample().retransmits == 5
    del kernel.infos[8]
    kernel.passes(0.1, acked=10, retransmits=1)
    assert monitor.sample().retransmits == 6


def test_looking_for_connections_takes_at_most_a_thousandth_of_the_time(kernel, monkeypatch):
    searches = []

    def slow():
        searches.append(kernel.now_s)
        kernel.now_s += 0.005
        return []

    monkeypatch.setattr(tcp, "_descriptors", slow)
    monitor = TcpMonitor([PEER])
    for _ in range(1000):
        kernel.now_s += 0.05
        monitor.sample()
    assert len(searches) == 10
