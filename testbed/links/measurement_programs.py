"""Programs that measure from inside hosts. Each prints one JSON object when it ends.

The text of this file is sent to the hosts (``command``), so it needs nothing there but Python, and
starts in some milliseconds. All times are seconds on CLOCK_MONOTONIC of the machine that the host
is on.
"""

import itertools
import json
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

UDP_HEADERS_BYTES = 14 + 20 + 8
"""Ethernet, IPv4 and UDP: what a datagram weighs on a link beyond its payload."""
SMALLEST_DATAGRAM_BYTES = UDP_HEADERS_BYTES + 38
"""On the wire; with either IP it has payload for a number, and as much as Ethernet's shortest
frame."""
LARGEST_FLOOD_BYTES = 44 * 1514
"""On the wire: what the kernel takes in one call, 64 KiB of payload."""

_TCP_PORT, _FLOOD_PORT, _ECHO_PORT = 29401, 29402, 29403
_CHUNK_BYTES = 1 << 18
_PATIENCE_S = 10.0
_NUMBER = struct.Struct("=I")
_UDP_SEGMENT, _UDP_GRO = 103, 104  # <linux/udp.h>
_FLOOD_SOCKETS = 32
_BUFFER_BYTES = 1 << 21
"""What a socket may have under way, so that a link stays full while the program is not scheduled
for some ms."""


def command(program: str, *arguments: object) -> list[str]:
    """The argv that runs one of ``PROGRAMS`` on a host."""
    return ["python", "-I", "-S", "-c", Path(__file__).read_text(), program, *map(str, arguments)]


def sink(warm_s: str, seconds: str, streams: str = "1") -> dict[str, Any]:
    """Receive TCP streams and count what arrives in ``seconds`` after the first ``warm_s``, in
    which TCP finds its speed.

    The clock runs from one arrival to another, so a segment that is cut by an end of the interval
    costs no accuracy.
    """
    with _server(_TCP_PORT) as server:
        server.settimeout(_PATIENCE_S)
        connections = [server.accept()[0] for _ in range(int(streams))]
    buffer = bytearray(_CHUNK_BYTES)
    total, begin_s, end_s = 0, 0.0, 0.0
    warm_until_s = time.monotonic() + float(warm_s)
    while not begin_s or end_s - begin_s <= float(seconds):
        ready = select.select(connections, [], [], _PATIENCE_S)[0]
        if not ready:
            raise TimeoutError("nothing arrives")
        for connection in ready:
            received = connection.recv_into(buffer)
            now_s = time.monotonic()
            if not received:
                return {"bytes": total, "seconds": end_s - begin_s}
            if begin_s:
                total, end_s = total + received, now_s
            elif now_s >= warm_until_s:
                begin_s = end_s = now_s
    return {"bytes": total, "seconds": end_s - begin_s}


def source(address: str, congestion: str, streams: str = "1") -> dict[str, Any]:
    """Send TCP streams until the other end has enough."""
    threads = [
        threading.Thread(target=_stream, args=(address, congestion)) for _ in range(int(streams))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {}


def _stream(address: str, congestion: str) -> None:
    """One of them, with a congestion control, or the host's own if it may not choose."""
    deadline_s = time.monotonic() + _PATIENCE_S
    payload = bytes(_CHUNK_BYTES)
    while True:
        with socket.socket(_family(address), socket.SOCK_STREAM) as sock:
            sock.settimeout(_PATIENCE_S)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
            except OSError:
                pass
            try:
                sock.connect((address, _TCP_PORT))
                while True:
                    sock.send(payload)
            except ConnectionRefusedError:  # the other end is still starting
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)
            except (BrokenPipeError, ConnectionResetError):
                return


def flood(
    address: str,
    at_s: str,
    seconds: str,
    rate_bps: str,
    datagram_bytes: str,
    segments: str = "1",
    number: str = "inf",
) -> dict[str, Any]:
    """Send datagrams at a rate on the wire, from a moment on, until the time is over or so many are
    sent.

    datagram_bytes: size on the wire. segments: how many go to the kernel in one call, and through
        it as one packet (UDP GSO); if only one, it carries its number.
    A link that is slower than the rate slows this down, once as much waits in its queue as the
    socket may have under way.
    """
    payload = bytearray((int(datagram_bytes) - headers_bytes(address)) * int(segments))
    gap_s = int(datagram_bytes) * int(segments) * 8 / float(rate_bps)
    # What waits in a queue anywhere on the way counts as under way of the socket that sent it,
    # which may have little.
    sockets = itertools.cycle(
        [socket.socket(_family(address), socket.SOCK_DGRAM) for _ in range(_FLOOD_SOCKETS)]
    )
    for sock in itertools.islice(sockets, _FLOOD_SOCKETS):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        if int(segments) > 1:
            sock.setsockopt(
                socket.IPPROTO_UDP, _UDP_SEGMENT, int(datagram_bytes) - headers_bytes(address)
            )
        sock.connect((address, _FLOOD_PORT))
    time.sleep(max(0.0, float(at_s) - time.monotonic()))
    begin_s = due_s = time.monotonic()
    sent = 0
    while sent < float(number) and (now_s := time.monotonic()) - begin_s < float(seconds):
        if due_s > now_s:
            time.sleep(min(due_s - now_s, 0.1))
            continue
        if int(segments) == 1:
            _NUMBER.pack_into(payload, 0, sent)
        for sock in itertools.islice(sockets, _FLOOD_SOCKETS):
            try:
                sock.send(payload)
                break
            except BlockingIOError:
                continue
            except ConnectionRefusedError:
                break  # word of an earlier one: nobody listened yet
        else:
            time.sleep(0.0005)
            continue
        sent += 1
        due_s += gap_s
    return {"sent": sent, "begin_s": begin_s, "end_s": time.monotonic()}


def ignore() -> dict[str, Any]:
    """Be the target of a flood, so that no host answers it with complaints; runs until it is
    killed."""
    with _bound(_FLOOD_PORT) as sock:
        # or the kernel would cut the packets up only to drop them
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        while True:
            time.sleep(60)


def tally(quiet_s: str) -> dict[str, Any]:
    """Receive numbered datagrams until none comes for some seconds; the lengths of the runs that
    are missing, and how many.

    runs: {length: how many}, between the first and the last number that came. received: datagrams,
    without copies.
    """
    numbers = set()
    with _bound(_FLOOD_PORT) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        sock.settimeout(_PATIENCE_S)
        while True:
            try:
                numbers.add(_NUMBER.unpack_from(sock.recv(2048))[0])
            except TimeoutError:
                break
            sock.settimeout(float(quiet_s))
    runs: dict[int, int] = {}
    before = None
    for number in sorted(numbers):
        if before is not None and number > before + 1:
            runs[number - before - 1] = runs.get(number - before - 1, 0) + 1
        before = number
    return {"received": len(numbers), "runs": runs}


def echo() -> dict[str, Any]:
    """Send every datagram back; runs until it is killed."""
    with _bound(_ECHO_PORT) as sock:
        while True:
            sock.sendto(*sock.recvfrom(2048))


def ping(address: str, number: str, interval_s: str, timeout_s: str) -> dict[str, Any]:
    """RTTs of numbered datagrams that are sent at regular times; ends when all are back or
    ``timeout_s`` after the last."""
    sent_s: list[float] = []
    rtts_s: dict[int, float] = {}
    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        sock.connect((address, _ECHO_PORT))
        due_s = time.monotonic()
        while len(rtts_s) < int(number):
            now_s = time.monotonic()
            if len(sent_s) < int(number) and now_s >= due_s:
                sent_s.append(now_s)
                due_s += float(interval_s) if len(sent_s) < int(number) else float(timeout_s)
                try:
                    sock.send(_NUMBER.pack(len(sent_s) - 1))
                except ConnectionRefusedError:
                    pass  # word of an earlier one: the other end is still starting
            elif now_s >= due_s:
                break
            elif select.select([sock], [], [], due_s - now_s)[0]:
                now_s = time.monotonic()
                try:
                    (reply,) = _NUMBER.unpack(sock.recv(2048))
                except ConnectionRefusedError:
                    continue
                rtts_s.setdefault(reply, now_s - sent_s[reply])
    return {"sent": len(sent_s), "rtts_s": list(rtts_s.values())}


def headers_bytes(address: str) -> int:
    """Ethernet, IP and UDP: what a datagram to an address weighs on a link beyond its payload."""
    return UDP_HEADERS_BYTES + (20 if _family(address) == socket.AF_INET6 else 0)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _server(port: int) -> socket.socket:
    """Listens for both versions of IP, as far as the host has them."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _bound(port: int) -> socket.socket:
    if not socket.has_dualstack_ipv6():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("", port))
        return sock
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    return sock


PROGRAMS: Mapping[str, Callable[..., dict[str, Any]]] = {
    program.__name__: program for program in (sink, source, flood, ignore, tally, echo, ping)
}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])), flush=True)
