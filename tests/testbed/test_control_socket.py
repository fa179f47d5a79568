"""What comes to the control socket from workers, odd workers and strangers."""

import contextlib
import json
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed import protocol
from testbed.run import messages
from testbed.run.control import (
    MOST_MESSAGES_PER_S,
    ControlServer,
    Disconnected,
    ProtocolViolation,
    Received,
)


class Member:
    """Whoever speaks on a control socket."""

    def __init__(self, directory: Path, token: str | None) -> None:
        self.socket = protocol.connect_unix(directory / protocol.SOCKET_FILE)
        if token is not None:
            self.say({"type": "hello", "token": token})

    def say(self, message: Any) -> None:
        self.send(json.dumps(message).encode() + b"\n")

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it may have been shut out already
            self.socket.sendall(data)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    with ControlServer(tmp_path / protocol.SOCKET_FILE, [0, 1, ("bg0-w1", "send")]) as control:
        yield control


def heard(server: ControlServer) -> Received:
    return server.inbox.get(timeout=5)


HEARTBEAT = {"type": "heartbeat", "step": 3}


def test_a_message_is_of_the_member_whose_token_was_shown(
    server: ControlServer, tmp_path: Path
) -> None:
    for member, token in server.tokens.items():
        Member(tmp_path, token).say(HEARTBEAT)
        got = heard(server)
        assert (got.member, got.message) == (member, messages.Heartbeat(type="heartbeat", step=3))
        assert isinstance(heard(server).message, Disconnected)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"type": "heartbeat"},
        {"type": "heartbeat", "step": "3"},
        {"type": "heartbeat", "step": True},
        {"type": "heartbeat", "step": -1},
        {"type": "heartbeat", "step": 10**30},
        {"type": "heartbeat", "step": 3, "rank": 1},
        {"type": "nonsense"},
        {"type": ["heartbeat"]},
        {"type": "failed", "error": "x" * (1 << 17)},
        {"type": "done", "steps": 1, "parameters": "x", "accuracy": "good", "loss": None},
        [],
        3,
        None,
    ],
    ids=lambda wrong: json.dumps(wrong)[:40],
)
def test_what_is_no_message_is_a_fault_of_its_sender_alone(
    server: ControlServer, tmp_path: Path, wrong: Any
) -> None:
    odd, good = Member(tmp_path, server.tokens[0]), Member(tmp_path, server.tokens[1])
    odd.say(wrong)
    got = heard(server)
    assert got.member == 0
    assert isinstance(got.message, ProtocolViolation)
    assert len(got.message.error) < 300 and "\n" not in got.message.error
    assert isinstance(heard(server).message, Disconnected)
    good.say(HEARTBEAT)
    assert heard(server).member == 1


@pytest.mark.parametrize(
    "data",
    [b"{\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"x" * (protocol.MessageBuffer.LIMIT + 2)],
    ids=len,
)
def test_bytes_that_are_no_lines_of_json_are_a_fault(
    server: ControlServer, tmp_path: Path, data: bytes
) -> None:
    Member(tmp_path, server.tokens[0]).send(data)
    assert isinstance(heard(server).message, ProtocolViolation)


def test_strangers_are_shut_out_without_a_word(server: ControlServer, tmp_path: Path) -> None:
    for hello in (
        {"type": "hello", "token": "guessed"},
        {"type": "hello", "token": 3},
        HEARTBEAT,
        {"type": "hello"},
        [],
    ):
        stranger = Member(tmp_path, None)
        stranger.say(hello)
        stranger.socket.settimeout(5)
        assert stranger.socket.recv(1) == b""
    with pytest.raises(queue.Empty):
        server.inbox.get_nowait()


def test_strangers_in_numbers_keep_no_member_out(server: ControlServer, tmp_path: Path) -> None:
    silent = [Member(tmp_path, None) for _ in range(200)]
    member = Member(tmp_path, server.tokens[0])
    member.say(HEARTBEAT)
    assert heard(server).member == 0
    for stranger in silent:
        stranger.socket.close()


def test_a_flood_is_a_fault(server: ControlServer, tmp_path: Path) -> None:
    Member(tmp_path, server.tokens[0]).send(
        b'{"type": "heartbeat", "step": 1}\n' * (2 * MOST_MESSAGES_PER_S)
    )
    while isinstance((got := heard(server)).message, messages.Heartbeat):
        pass
    assert isinstance(got.message, ProtocolViolation)
    assert "messages a second" in got.message.error


def test_who_does_not_read_delays_nobody(server: ControlServer, tmp_path: Path) -> None:
    deaf, good = Member(tmp_path, server.tokens[0]), Member(tmp_path, server.tokens[1])
    for member in (deaf, good):
        member.say(HEARTBEAT)
        heard(server)
    good.socket.settimeout(5)
    began = time.monotonic()
    for _ in range(200):
        server.broadcast({"type": "padding", "text": "x" * 10_000})
        read = 0
        while read < 10_000:
            read += len(good.socket.recv(1 << 16))
    assert time.monotonic() - began < 5
    assert (got := heard(server)).member == 0 and isinstance(got.message, Disconnected)


def test_a_reset_is_an_end_and_no_fault(server: ControlServer, tmp_path: Path) -> None:
    """A program that fails has not read the heartbeats that came meanwhile, and the kernel then
    says "reset by peer"."""
    member = Member(tmp_path, server.tokens[0])
    member.say(HEARTBEAT)
    heard(server)
    server.broadcast({"type": "heartbeat"})
    time.sleep(0.1)
    member.socket.close()
    assert isinstance(heard(server).message, Disconnected)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
keys = st.sampled_from(
    [
        "type",
        "step",
        "steps",
        "token",
        "error",
        "parameters",
        "accuracy",
        "loss",
        "t_s",
        "by_peer",
        "pid",
    ]
)
kinds = st.sampled_from(["hello", "ready", "heartbeat", "holding", "eval", "done", "failed"])


@given(st.dictionaries(keys, json_values, max_size=6), kinds | json_values)
def test_any_object_is_a_message_or_refused_in_one_line(content: dict[str, Any], kind: Any) -> None:
    try:
        messages.parse_message({**content, "type": kind})
    except ValueError as error:
        assert len(str(error)) < 400 and "\n" not in str(error)


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_any_bytes_are_messages_or_a_value_error(pieces: list[bytes]) -> None:
    buffer = protocol.MessageBuffer()
    with contextlib.suppress(ValueError):
        for piece in pieces:
            list(buffer.feed(piece))
