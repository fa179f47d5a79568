"""The GPUs of this machine, as its driver names them; nothing here loads it."""

from pathlib import Path

_NVIDIA, _NVIDIA_NODES, _AMD_NODE = Path("/proc/driver/nvidia/gpus"), "nvidia[0-9]*", Path("/dev/kfd")


def found() -> list[str]:
    """A name for each; empty if PyTorch would find no device of the type cuda here."""
    names = []
    for information in sorted(_NVIDIA.glob("*/information")):
        lines = information.read_text(errors="replace").splitlines()
        names.append(next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "NVIDIA"))
    names = names or ["NVIDIA" for _ in Path("/dev").glob(_NVIDIA_NODES)]
    return names or (["AMD"] if _AMD_NODE.exists() else [])
