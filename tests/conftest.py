"""What a test needs from the machine, and what happens where it is missing.

A test that needs a lab is skipped where that lab cannot be had.
NETSENSE_REQUIRE=netns,docker,compose turns such a skip into a failure; CI sets it, so that nothing
is skipped there unseen.
"""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from installed import Installation, install_wheel

# Shared machines stall at will; a slow example is no fault of the code. NETSENSE_FUZZ: how many
# examples, instead of a hundred.
settings.register_profile(
    "shared", deadline=None, max_examples=int(os.environ.get("NETSENSE_FUZZ", "100"))
)
settings.load_profile("shared")

REQUIRED = frozenset(filter(None, os.environ.get("NETSENSE_REQUIRE", "").split(",")))


@cache
def missing(need: str) -> str | None:
    """Why a need is not met on this machine; None if it is met."""
    if need == "netns":
        from testbed.labs.base import LabError
        from testbed.labs.netns import sandbox_command

        try:
            sandbox_command()
        except LabError as error:
            return str(error)
    elif need == "docker":
        import docker
        from docker.errors import DockerException, ImageNotFound

        try:
            docker.from_env().images.get(os.environ.get("TESTBED_IMAGE", "netsense-testbed:local"))
        except ImageNotFound:
            return "the image is not built; build it with: docker compose build"
        except DockerException as error:
            return f"no Docker daemon answers ({error}); start it with: sudo systemctl start docker"
        if os.geteuid() != 0:
            return "shaping containers from the host needs root"
    elif need == "compose":
        done = (
            subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
            if shutil.which("docker")
            else None
        )
        if done is None or done.returncode != 0:
            return (
                "Docker Compose v2 is missing; install it with: sudo apt-get install"
                " docker-compose-plugin"
            )
    elif need == "netem":
        if os.environ.get("NETSENSE_ENGINE") == "userspace":
            return None  # make test-delayline
        if "User Mode Linux" not in Path("/proc/cpuinfo").read_text():
            return "these tests run under User-Mode Linux; run them with: make test-netem"
        from testbed.links.kernel_support import missing_kinds

        if missing_kinds(["netem"]):
            return "this kernel of User-Mode Linux has no netem"
    elif need == "swarm":
        if os.geteuid() != 0 or not shutil.which("dockerd"):
            return (
                "three Docker daemons on this machine need root and dockerd; install it with:"
                " apt-get install docker.io"
            )
    elif need in ("chromium", "iperf3") and not shutil.which(need):
        return f"{need} is missing; install it with: sudo apt-get install {need}"
    return None


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel where there is no checkout. Its first worker compiles kernels for some seconds."""
    return install_wheel(tmp_path_factory.mktemp("installed"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for need in ("netns", "docker", "compose", "chromium", "iperf3", "netem", "swarm"):
        if item.get_closest_marker(need) and (reason := missing(need)):
            if need in REQUIRED:
                pytest.fail(f"{need} is required here: {reason}", pytrace=False)
            pytest.skip(reason)
