"""Tests that a CUDA device runs; others skip them. ``python -m pytest tests/gpu`` needs torch,
numba and hypothesis only."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "netsenseml"))  # groups, small_models


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")
            interpreted = (
                os.environ.get("TRITON_INTERPRET") == "1" and item.path.stem == "test_gpu_codec"
            )
            if not torch.cuda.is_available() and not interpreted:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
