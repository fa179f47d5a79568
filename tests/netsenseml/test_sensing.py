"""The kernel's view of real connections."""

import os
import socket
import threading
from pathlib import Path

import pytest

from netsenseml.sensing import tcp


@pytest.fixture
def connection():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()
        with peer:
            yield client, peer


def test_reads_what_the_kernel_knows(connection: tuple[socket.socket, socket.socket]) -> None:
    client, peer = connection
    sent = 3_000_000
    reader = threading.Thread(target=lambda: [peer.recv(1 << 16) for _ in iter(lambda: peer.recv(1, socket.MSG_PEEK), b"")])
    reader.start()
    client.sendall(bytes(sent))
    client.shutdown(socket.SHUT_WR)
    reader.join()
    info = tcp.read(client.fileno())
    assert info is not None
    assert sent <= info.bytes_acked <= sent + 2  # SYN and FIN count
    assert 0 < info.min_rtt_s <= info.rtt_s < 1
    assert info.retransmits == 0


def test_borrowing_leaves_the_connection_open(connection: tuple[socket.socket, socket.socket]) -> None:
    client, peer = connection
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        assert tcp.read(client.fileno())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    client.sendall(b"still here")
    assert peer.recv(100) == b"still here"


def test_only_connections_that_leave_the_host_count(connection: tuple[socket.socket, socket.socket]) -> None:
    a, b = socket.socketpair()
    with a, b:
        assert tcp.TcpMonitor().sample() is None


def test_descriptors_that_are_gone_or_no_connection() -> None:
    with open(os.devnull) as file:
        assert tcp.read(file.fileno()) is None
    assert tcp.read(1 << 20) is None


def test_an_old_kernel_is_told_apart() -> None:
    with pytest.raises(ValueError, match="has 100 bytes"):
        tcp.TcpInfo.parse(bytes(100))
