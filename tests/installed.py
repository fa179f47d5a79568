"""The wheel in an environment of its own, as those have it who have no checkout."""

import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Installation:
    """packages: where the wheel was unpacked. environment: in which its programs are found, and
    nothing of the checkout."""

    python: Path
    packages: Path
    environment: Mapping[str, str]


def install_wheel(place: Path) -> Installation:
    """Build the wheel and install it below ``place``.

    The packages that it needs are those of this environment: to install torch again takes minutes.
    A path file within a directory that a path file names is not read, so that an editable install
    of the checkout does not come along.
    """
    build = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--target",
        "wheel",
        "--directory",
        str(place / "dist"),
    ]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (place / "dist").glob("*.whl")
    home = place / "environment"
    venv.create(home, symlinks=True)
    programs = home / "bin"
    (packages,) = home.glob("lib/*/site-packages")
    packages.joinpath("packages.pth").write_text(
        "\n".join(
            path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")
        )
    )
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", *options],
        check=True,
    )
    # torch's own would start the Python of this environment.
    torchrun = programs / "torchrun"
    torchrun.write_text(
        f"#!{programs / 'python'}\nfrom torch.distributed.run import main\n\nmain()\n"
    )
    torchrun.chmod(0o755)
    bare = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return Installation(
        programs / "python", packages, {**bare, "PATH": f"{programs}:{os.environ['PATH']}"}
    )
