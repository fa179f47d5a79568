"""Who imports what: the agent stays light, and the library knows nothing of the testbed."""

import ast
import subprocess
import sys
from pathlib import Path

import netsenseml

PACKAGE = Path(netsenseml.__file__).parent


def test_the_agent_loads_no_torch() -> None:
    code = """
import sys
import netsenseml, netsenseml.catalog, testbed.worker.client, testbed.protocol
assert "attach" in dir(netsenseml)
assert not {"torch", "numpy", "sklearn"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_imports_the_testbed() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "testbed" for name in names), path
