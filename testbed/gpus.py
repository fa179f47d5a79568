"""The GPUs of this machine, as its driver names them, and whether containers get them; nothing here
loads the driver."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NVIDIA, _NVIDIA_NODES, _AMD_NODE = (
    Path("/proc/driver/nvidia/gpus"),
    "nvidia[0-9]*",
    Path("/dev/kfd"),
)
TOOLKIT = "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"
"""Tells the Docker daemon of NVIDIA's runtime, once the package nvidia-container-toolkit is
installed."""


def found() -> list[str]:
    """A name for each; empty if PyTorch would find no device of the type cuda here."""
    names = []
    for information in sorted(_NVIDIA.glob("*/information")):
        lines = information.read_text(errors="replace").splitlines()
        names.append(
            next(
                (line.partition(":")[2].strip() for line in lines if line.startswith("Model:")),
                "NVIDIA",
            )
        )
    names = names or ["NVIDIA" for _ in Path("/dev").glob(_NVIDIA_NODES)]
    return names or (["AMD"] if _AMD_NODE.exists() else [])


def why_not(device: str, names: list[str], daemon: Mapping[str, Any] | None = None) -> str | None:
    """What keeps programs from computing on a device ("cpu", "cuda", "auto"), in one line with the
    mend; None if nothing does.

    names: as ``found``. daemon: what the Docker daemon tells of itself, where containers are to
    have the GPUs. With "auto" they may do without.
    """
    if device != "cuda":
        return None
    if not names:
        return (
            "workload.device: cuda needs a GPU with its driver, and this machine has none; use"
            " device: cpu"
        )
    if daemon is not None and not reach_containers(names, daemon):
        return (
            "workload.device: cuda needs NVIDIA's runtime in the Docker daemon, which has none;"
            f" install nvidia-container-toolkit, then: {TOOLKIT}; or use --lab netns"
        )
    return None


def reach_containers(names: list[str], daemon: Mapping[str, Any]) -> bool:
    """Whether containers of a Docker daemon can have the GPUs."""
    return bool(names) and "nvidia" in (daemon.get("Runtimes") or {})
