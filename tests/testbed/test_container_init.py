"""The first process of a container, as the orchestrator speaks to it."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.labs import container_init

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "words", [["/no/such/program"], ["true", "a\0b"], ["true", "x" * (1 << 17)]]
)
def test_what_cannot_be_started_ends_nothing_else(tmp_path: Path, words: list[str]) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server,
        open(tmp_path / "log", "wb") as log,
    ):
        server.bind(str(tmp_path / "sock"))
        server.listen()
        init = subprocess.Popen(
            [sys.executable, container_init.__file__, str(tmp_path / "sock"), "w0"],
            stderr=subprocess.DEVNULL,
        )
        channel, _ = server.accept()
        with init, channel, channel.makefile("rb") as lines:
            assert json.loads(lines.readline()) == {"host": "w0"}
            for number, argv in enumerate((words, ["true"])):
                start = {"start": number, "argv": argv, "env": {}}
                socket.send_fds(channel, [json.dumps(start).encode() + b"\n"], [log.fileno()])
                assert json.loads(lines.readline()) == {
                    "exited": number,
                    "code": 0 if argv == ["true"] else 127,
                }
            channel.shutdown(socket.SHUT_RDWR)
    assert (tmp_path / "log").read_text().startswith(f"cannot start {words[0]}: ")
