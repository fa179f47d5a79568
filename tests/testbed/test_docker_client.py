"""What is said of a Docker daemon that cannot be had, refuses something, or does not let go of a
network."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from testbed.cli import app
from testbed.doctor import System, docker_lab
from testbed.labs.docker import LABEL, OWNER

pytestmark = pytest.mark.fast

NETWORK = {
    "Name": "netsense-left",
    "Id": "left",
    "Labels": {LABEL: "left", OWNER: "1:1:another boot:1"},
}
ANSWERS: dict[str, Any] = {
    "_ping": {},
    "version": {"Version": "1", "ApiVersion": "1.41"},
    "info": {"Swarm": {"LocalNodeState": "inactive", "ControlAvailable": False}},
    "containers/json": [],
    "networks": [NETWORK],
}


class Daemon(BaseHTTPRequestHandler):
    """As much of Docker's API as is asked for here; its network is in use."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self._answer(200, ANSWERS[path if path in ANSWERS else path.partition("/")[2]])

    def do_DELETE(self) -> None:
        self._answer(403, {"message": "network netsense-left has active endpoints"})

    def _answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Daemon) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("DOCKER_TLS_VERIFY", raising=False)
        yield
        server.shutdown()


@pytest.mark.usefixtures("daemon")
def test_clean_says_only_what_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.labs.docker.time.sleep", lambda _: None)
    result = CliRunner().invoke(app, ["clean", "--dry-run"])
    assert (result.exit_code, "would remove network netsense-left" in result.stdout) == (0, True)
    result = CliRunner().invoke(app, ["clean"])
    assert result.exit_code == 1
    assert "network netsense-left" not in result.stdout
    (line,) = result.stderr.splitlines()
    assert (
        "could not remove network netsense-left (network netsense-left has active endpoints)"
        in line
    )


@pytest.mark.usefixtures("daemon")
def test_what_the_client_refuses_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTBED_IMAGE", "")
    (finding,) = docker_lab(System.of_this_machine())
    assert (finding.name, finding.verdict) == ("lab docker", "missing")
    assert "Docker refused" in finding.found


def test_why_no_daemon_can_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "nonsense://here")
    result = CliRunner().invoke(app, ["clean"])
    assert result.exit_code == 4
    (line,) = result.stderr.splitlines()
    assert "DOCKER_HOST=nonsense://here" in line and "nvalid" in line
    (finding,) = docker_lab(System.of_this_machine())
    assert "start" not in finding.fix
