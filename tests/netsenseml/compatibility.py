"""Makes docs/reference/compatibility.md of what pytest says of the tests.

NETSENSE_HUGE=1 python -m pytest tests/netsenseml --junitxml results.xml
python tests/netsenseml/compatibility.py results.xml > docs/reference/compatibility.md
"""

import platform
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from itertools import chain
from pathlib import Path


def table_lines(page: str) -> list[str]:
    """The first column of a page's table."""
    rows = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    return rows[2:]


def results(junit: Sequence[Path]) -> dict[str, str]:
    """By test, FILE.py::NAME[parameters]: "passed", or else what pytest says."""
    found = {}
    for case in chain.from_iterable(ET.parse(path).iter("testcase") for path in junit):
        file = case.attrib["classname"].rpartition(".")[2]
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        said = (
            "passed"
            if bad is None
            else f"{bad.tag}: {bad.attrib.get('message', '').splitlines()[0]}"
        )
        found[f"{file}.py::{case.attrib['name']}"] = said
    return found


def verdict(tests: list[str], said: dict[str, str], passed: str) -> str:
    """Of the tests of a line, which may be named without their parameters."""
    told = []
    for test in tests:
        own = [
            result for name, result in said.items() if name == test or name.startswith(f"{test}[")
        ]
        told += own or ["not run"]
    return next((result for result in told if result != "passed"), passed)


def page(junit: Sequence[Path]) -> str:
    import torch
    from test_matrix import LINES, test_as_without_a_hook

    said = results(junit)
    rows = []
    for line in LINES:
        own = (
            [f"test_matrix.py::{test_as_without_a_hook.__name__}[{line.name}]"]
            if line.run is not None
            else []
        )
        rows.append(
            (
                line.name,
                verdict([*own, *line.elsewhere], said, line.passed),
                [*own, *line.elsewhere],
            )
        )
    names = "\n".join(
        f"| {name} | {result} | {'<br>'.join(tests)} |" for name, result, tests in rows
    )
    return f"""# What NetSenseML works together with

Made by tests/netsenseml/compatibility.py of the tests that passed with torch {torch.__version__} and Python
{platform.python_version()} on a CPU. A test trains with plain DDP, with `allreduce`, and with methods that code, and compares.

| with | result | tests |
| --- | --- | --- |
{names}
"""


if __name__ == "__main__":
    sys.stdout.write(page([Path(path) for path in sys.argv[1:]]))
