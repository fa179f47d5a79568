"""Who gets a GPU, on machines that are made up: none of these tests has one."""

from pathlib import Path
from typing import Any

import pytest
import requests
from docker.errors import DockerException
from typer.testing import CliRunner

from testbed import gpus
from testbed.cli import app
from testbed.doctor import docker_gpus
from testbed.labs import docker
from testbed.labs.base import LabError
from testbed.spec.load import load_spec

pytestmark = pytest.mark.fast

WITH_RUNTIME: dict[str, Any] = {
    "Runtimes": {"runc": {"path": "runc"}, "nvidia": {"path": "nvidia-container-runtime"}}
}
WITHOUT: dict[str, Any] = {"Runtimes": {"runc": {"path": "runc"}}}
CARDS = ["NVIDIA H100", "NVIDIA H100"]
SPEC = """
name: gpu
lab: {lab}
workers: 2
network: {{link: {{rate: 50mbit}}}}
workload: {{model: mlp, data: digits, device: {device}, stop: {{steps: 5}}}}
methods: [allreduce]
"""


@pytest.mark.parametrize(
    ("device", "names", "daemon", "asked"),
    [
        ("cpu", CARDS, WITH_RUNTIME, False),
        ("auto", CARDS, WITH_RUNTIME, True),
        ("auto", CARDS, WITHOUT, False),
        ("auto", [], WITH_RUNTIME, False),
        ("cuda", CARDS, WITH_RUNTIME, True),
        ("auto", ["AMD"], {"Runtimes": None}, False),
    ],
)
def test_a_container_asks_for_gpus_where_its_workload_wants_them_and_the_daemon_has_them(
    device: str, names: list[str], daemon: dict[str, Any], asked: bool
) -> None:
    requests = docker.device_requests(device, names, daemon)
    assert [(one.count, one.capabilities[0][0]) for one in requests] == [(-1, "gpu")] * asked


@pytest.mark.parametrize(
    ("names", "daemon", "said"),
    [([], WITH_RUNTIME, "this machine has none"), (CARDS, WITHOUT, "nvidia-ctk runtime configure")],
)
def test_a_container_that_must_have_a_gpu_is_refused_with_the_mend(
    names: list[str], daemon: dict[str, Any], said: str
) -> None:
    with pytest.raises(LabError, match=said):
        docker.device_requests("cuda", names, daemon)


class Daemon:
    """A client of one that tells what it is told to."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told

    def info(self) -> dict[str, Any]:
        return self._told

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("lab", "device", "names", "daemon", "said"),
    [
        ("netns", "cuda", [], WITHOUT, "needs a GPU with its driver"),
        ("netns", "cuda", CARDS, WITHOUT, None),
        ("netns", "auto", [], WITHOUT, None),
        ("docker", "cuda", CARDS, WITHOUT, "needs NVIDIA's runtime"),
        ("docker", "cuda", CARDS, WITH_RUNTIME, None),
        ("docker", "auto", CARDS, WITHOUT, None),
    ],
)
def test_validate_says_that_a_good_spec_cannot_run_for_want_of_a_gpu(
    lab: str,
    device: str,
    names: list[str],
    daemon: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpus, "found", lambda: names)
    monkeypatch.setattr(docker, "connect", lambda: Daemon(daemon))
    spec = tmp_path / "gpu.yaml"
    spec.write_text(SPEC.format(lab=lab, device=device))
    result = CliRunner().invoke(app, ["validate", str(spec)])
    assert result.exit_code == 0, result.output
    assert ("but it cannot run here" in result.output) == (said is not None)
    assert (said or "good; 1 cell") in result.output


@pytest.mark.parametrize(
    "error", [DockerException("half an answer"), requests.ConnectionError("half an answer")]
)
def test_validate_says_in_one_line_that_the_daemon_has_not_answered(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaking(Daemon):
        def info(self) -> dict[str, Any]:
            raise error

    monkeypatch.setattr(gpus, "found", lambda: CARDS)
    monkeypatch.setattr(docker, "connect", lambda: Breaking({}))
    spec = tmp_path / "gpu.yaml"
    spec.write_text(SPEC.format(lab="docker", device="cuda"))
    result = CliRunner().invoke(app, ["validate", str(spec)])
    assert result.exit_code == 0, result.output
    assert "but it cannot run here: Docker refused: half an answer" in result.output


def test_what_a_lab_builds_knows_the_device(tmp_path: Path) -> None:
    from testbed.plan import make_plan

    spec = tmp_path / "gpu.yaml"
    spec.write_text(SPEC.format(lab="docker", device="auto"))
    assert [cell.lab.device for cell in make_plan(load_spec(spec)).cells] == ["auto"]


@pytest.mark.parametrize(
    ("names", "daemon", "verdicts"),
    [([], WITHOUT, []), (CARDS, WITHOUT, ["limited"]), (CARDS, WITH_RUNTIME, ["ok"])],
)
def test_doctor_tells_whether_containers_get_the_gpus(
    names: list[str], daemon: dict[str, Any], verdicts: list[str]
) -> None:
    findings = docker_gpus(names, daemon)
    assert [finding.verdict for finding in findings] == verdicts
    assert all(finding.verdict == "ok" or gpus.TOOLKIT in finding.fix for finding in findings)
