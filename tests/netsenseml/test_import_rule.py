"""Who imports what: the library knows nothing of the testbed, needs few others, and what is light
stays so."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import netsenseml

PACKAGE = Path(netsenseml.__file__).parent
NEEDED = {"torch", "numpy", "numba", "llvmlite"}
HEAVY = {*NEEDED, "sklearn", "testbed"}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""


def test_it_imports_nothing_but_the_standard_library_and_what_it_declares() -> None:
    allowed = {*sys.stdlib_module_names, *NEEDED, "netsenseml"}
    found = {(str(path), name) for path in PACKAGE.rglob("*.py") for name in imports(path)}
    # loaded only where torch has brought Triton along
    kernels = str(PACKAGE / "compress" / "device_kernels.py")
    found -= {(kernels, "triton"), (kernels, "triton.language")}
    assert {(path, name) for path, name in found if name.partition(".")[0] not in allowed} == set()


def loaded_by(code: str) -> set[str]:
    """Packages that are loaded after ``code`` in a fresh interpreter."""
    told = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sorted(sys.modules))"],
        check=True,
        capture_output=True,
        text=True,
    )
    return {name.partition(".")[0] for name in told.stdout.split()}


def test_the_light_modules_load_nothing_heavy() -> None:
    code = """
import netsenseml, netsenseml.catalog, netsenseml.records, netsenseml.listener
assert {"attach", "all_reduce_mean", "Mesh"} <= set(dir(netsenseml))
netsenseml.listener.Recorder("/dev/null")
netsenseml.catalog.check_method("netsense")
"""
    loaded = loaded_by(code)
    assert "netsenseml" in loaded and not HEAVY & loaded


@pytest.mark.parametrize("name", netsenseml.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(netsenseml, name).__name__ == name


def test_the_library_works_without_the_testbed() -> None:
    modules = sorted(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.stem != "__init__"
        and (path.stem != "device_kernels" or importlib.util.find_spec("triton"))
    )
    loaded = loaded_by("\n".join(f"import {module}" for module in modules))
    assert "torch" in loaded and not {"testbed", "sklearn", "pydantic"} & loaded


@pytest.mark.parametrize("method", ["topk", "qsgd", "netsense"])
def test_kernels_are_loaded_when_a_method_is_attached_and_not_in_its_first_step(
    method: str,
) -> None:
    """They took the first step of every method but netsense a second and a half, and so its time to
    a target.

    Numba takes most of a second, and is there to compile them only.
    """
    import netsenseml.compress.kernels  # noqa: F401  compiled now, if they were not

    loaded = loaded_by(f"""
import torch, netsenseml
from torch import distributed, nn
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
session = netsenseml.attach(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), {method!r})
distributed.destroy_process_group()
""")
    assert "llvmlite" in loaded and "numba" not in loaded
