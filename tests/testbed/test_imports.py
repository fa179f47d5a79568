"""The rule of the house: the testbed takes only what is light from netsenseml, and torch only into
its workers."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
ASKED_FOR = dict.fromkeys(("spec", "timeline", "traffic"), "what is asked for")
LIGHT = {"netsenseml.catalog", "netsenseml.records", "netsenseml.listener"}


def imports(package: str) -> Iterator[tuple[Path, str]]:
    """(file, full name) of every import in a package, wherever it stands; of
    ``from netsenseml import x``, netsenseml.x."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = (
                    [alias.name for alias in node.names]
                    if node.module in ("netsenseml", "testbed")
                    else [""]
                )
                yield from ((path, f"{node.module}.{name}".rstrip(".")) for name in names)


def of_workers(path: Path) -> bool:
    return path.is_relative_to(ROOT / "testbed" / "worker")


def test_netsenseml_never_imports_the_testbed() -> None:
    assert [place for place in imports("netsenseml") if place[1].split(".")[0] == "testbed"] == []


def test_outside_its_workers_the_testbed_takes_only_what_is_light() -> None:
    found = [(path, name) for path, name in imports("testbed") if not of_workers(path)]
    assert {name for _, name in found if name.split(".")[0] == "netsenseml"} <= LIGHT
    assert [place for place in found if place[1].split(".")[0] in ("torch", "numba")] == []


def test_what_records_on_each_machine_knows_neither_labs_nor_the_orchestrator() -> None:
    above = ("testbed.labs", "testbed.run", "testbed.agent", "testbed.plan")
    found = [
        place
        for place in imports("testbed")
        if place[0].parent.name == "recording" and place[1].startswith(above)
    ]
    assert found == []


def test_outside_its_workers_nothing_of_the_testbed_imports_these() -> None:
    found = [
        place
        for place in imports("testbed")
        if not of_workers(place[0]) and place[1].startswith("testbed.worker")
    ]
    assert found == []


def test_importing_all_of_the_testbed_but_its_workers_leaves_torch_out() -> None:
    code = (
        "import pkgutil, importlib, sys\n"
        "package = importlib.import_module('testbed')\n"
        "for module in pkgutil.walk_packages(package.__path__, 'testbed.'):\n"
        "    if not module.name.startswith('testbed.worker.'):\n"
        "        importlib.import_module(module.name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_documents_name_files_that_exist() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [
        (path, link)
        for path in documents
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", path.read_text())
    ]
    assert len(links) > 40
    assert [(path.name, link) for path, link in links if not (path.parent / link).exists()] == []


def test_no_room_of_the_testbed_takes_from_one_above_it() -> None:
    """Rooms are the folders and the single files of testbed/; what a spec, a schedule and traffic
    may be is said in one."""
    takes: dict[str, set[str]] = {}
    for path, name in imports("testbed"):
        if name.startswith("testbed."):
            parts = (
                path.relative_to(ROOT / "testbed").parts[0].removesuffix(".py"),
                name.split(".")[1],
            )
            room, other = (ASKED_FOR.get(part, part) for part in parts)
            takes.setdefault(room, set()).update({other} - {room})
    list(TopologicalSorter(takes).static_order())  # raises CycleError, which names the circle
