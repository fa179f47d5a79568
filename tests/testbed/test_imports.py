"""The rule of the house: testbed without torch, netsenseml without testbed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imports(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield path, node.module


def test_netsenseml_never_imports_testbed():
    assert [place for place in imports("netsenseml") if place[1].split(".")[0] == "testbed"] == []


def test_testbed_takes_only_the_agent_from_netsenseml():
    taken = {name for _, name in imports("testbed") if name.split(".")[0] == "netsenseml"}
    assert taken <= {"netsenseml.agent", "testbed.protocol", "netsenseml.catalog"}
    assert [place for place in imports("testbed") if place[1].split(".")[0] == "torch"] == []


@pytest.mark.parametrize("package", ["testbed", "netsenseml.agent"])
def test_importing_everything_leaves_torch_out(package):
    code = (
        "import pkgutil, importlib, sys\n"
        f"package = importlib.import_module({package!r})\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
