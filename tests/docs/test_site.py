"""The site: it is built strictly, has all that the code has, leads nowhere in vain, and can be read
on a telephone."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import netsenseml
import testbed
from netsenseml.catalog import METHODS
from testbed.cli import app
from testbed.results.columns import IDENTITY_COLUMNS, TABLES
from testbed.spec.load import read_yaml, validate

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "testbed"))
from browser import Browser  # noqa: E402
from synthetic_run import write_run  # noqa: E402

TOP = sorted(ROOT.glob("*.md"))
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "tutorials")
"""Tutorials are executed, by test_commands.py."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Built strictly a link or an anchor that is not there, and a page that no menu
    has, are errors."""
    place = tmp_path_factory.mktemp("site")
    # Not with --quiet: warnings that are not told are not counted.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "NO_MKDOCS_2_WARNING": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return place


class Reader(HTMLParser):
    """What a page shows as text, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.ids, self.loaded, self.links = "", set[str](), list[str](), list[str]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        self.text += " " * (tag == "br")
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        elif tag == "link" and found.get("rel") in ("canonical", "prev", "next"):
            pass
        else:
            self.loaded += [
                str(found[key])
                for key in ("src", "srcset", "href", "data", "poster")
                if found.get(key)
            ]

    def handle_data(self, data: str) -> None:
        self.text += data


def words(page: Path) -> set[str]:
    return set(re.findall(r"[\w.:-]+", Reader(page).text))


def keys_of(schema: Any) -> Iterator[str]:
    """Names of all properties, wherever they stand."""
    if isinstance(schema, list):
        for part in schema:
            yield from keys_of(part)
    elif isinstance(schema, dict):
        for key, part in schema.items():
            if key == "properties":
                yield from part
            if key not in ("if", "then", "else"):
                yield from keys_of(part)


def test_the_pages_have_every_key_command_column_and_method(site: Path) -> None:
    schema = json.loads((ROOT / "testbed/spec/schema.json").read_text())
    spec = words(site / "reference/spec.html")
    methods = {name: set(options) for name, options in METHODS.items()}
    of_methods = {"name", "label", "options"}.union(*methods.values())
    assert set(keys_of(schema)) - of_methods - spec == set()
    said = words(site / "reference/methods.html")
    assert set(methods) | set().union(*methods.values()) <= said
    ids = Reader(site / "reference/methods.html").ids
    assert set(methods) <= ids
    cli = Reader(site / "reference/cli.html")
    commands = [
        command.name or str(command.callback.__name__)
        for command in app.registered_commands
        if command.callback
    ]
    assert len(commands) > 10 and set(commands) <= cli.ids
    assert {"--set", "--json", "--resume", "--tolerance"} <= set(cli.text.replace(",", " ").split())
    columns = Reader(site / "reference/columns.html")
    assert set(TABLES) <= columns.ids
    names = set(IDENTITY_COLUMNS).union(*(table.columns for table in TABLES.values()))
    assert names <= set(re.findall(r"\w+", columns.text))
    python = Reader(site / "reference/python.html").text
    for package in (testbed, netsenseml):
        assert [
            name for name in package.__all__ if f"{package.__name__}.{name}" not in python
        ] == []


def test_the_site_needs_no_other_machine(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    away = {
        (page.name, what)
        for page in pages
        for what in Reader(page).loaded
        if re.match(r"(https?:)?//", what)
    }
    away |= {
        (sheet.name, what)
        for sheet in site.rglob("*.css")
        for what in re.findall(
            r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", sheet.read_text()
        )
    }
    assert away == set()


def test_links_and_anchors_within_the_site_lead_somewhere(site: Path) -> None:
    """mkdocs looks at what is written in Markdown; here is what has become of it, with menus and
    made pages."""
    pages = {page: Reader(page) for page in site.rglob("*.html")}
    broken = []
    for page, reader in pages.items():
        for link in reader.links:
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or page.name == "404.html":
                continue
            target = (page.parent / path).resolve() if path else page
            there = target in pages or target.is_file()
            if not there or (anchor and target in pages and anchor not in pages[target].ids):
                broken.append((str(page.relative_to(site)), link))
    assert broken == []


def without_code(text: str) -> str:
    return re.sub(r"^(```|~~~).*?^\1|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [*TOP, *sorted((ROOT / "experiments").rglob("*.md"))], ids=name)
def test_what_other_pages_refer_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", without_code(page.read_text()))
    assert [link for link in links if not (page.parent / link).exists()] == []


BASE: dict[str, Any] = {
    "workers": 4,
    "workload": {"stop": {"seconds": 60}, "compute": {"pace": "60ms"}},
    "methods": ["allreduce"],
}


@pytest.mark.parametrize("page", [*TOP, *PAGES], ids=name)
def test_every_spec_in_a_page_is_good(page: Path, tmp_path: Path) -> None:
    """A part of a spec is put into a whole one; a list has flows."""
    for block in re.findall(r"^```yaml.*\n([^`]*)^```", page.read_text(), re.MULTILINE):
        (tmp_path / "block.yaml").write_text(
            f"traffic:\n{block}" if block.startswith("- {from:") else block
        )
        raw = read_yaml(tmp_path / "block.yaml")
        validate(raw if "methods" in raw else {**BASE, **raw})


def test_the_lines_that_read_a_run_do(tmp_path: Path) -> None:
    """Of the README, but for what runs an experiment, and of reference/columns.md."""
    directory = write_run(tmp_path / "runs" / "smoke", methods=("allreduce", "netsense"))
    for page in (ROOT / "README.md", ROOT / "docs" / "reference/columns.md"):
        (block,) = re.findall(
            r"^```python\n(import testbed\n[^`]*)^```",
            page.read_text().replace("`testbed run`", ""),
            re.MULTILINE,
        )
        block = block.replace("runs/smoke-…", str(directory)).replace(
            'run.summary["comparisons"]', "run.summary"
        )
        names: dict[str, Any] = {}
        exec("\n".join(line for line in block.splitlines() if "run_experiment" not in line), names)
        assert len(names["run"].steps) > 100


CUT_OFF = """
    [...document.querySelectorAll("p, h1, h2, h3, h4, dt, li")]
        .filter(one => one.closest(".md-content") && !one.closest("table") && one.getBoundingClientRect().right > 361)
        .map(one => one.textContent.slice(0, 60))
"""


@pytest.mark.chromium
def test_the_longest_pages_fit_a_telephone(site: Path, tmp_path: Path) -> None:
    """What is wider than 360 px, a table or code, scrolls by itself; the page does not."""
    written = [page for page in site.rglob("*.html") if "files" not in page.relative_to(site).parts]
    longest = sorted(written, key=lambda page: page.stat().st_size)[-4:]
    with Browser(tmp_path / "profile") as browser:
        browser.tell(
            "Emulation.setDeviceMetricsOverride",
            width=360,
            height=800,
            deviceScaleFactor=1,
            mobile=True,
        )
        for page in [site / "index.html", *longest]:
            browser.tell("Page.navigate", url=page.as_uri())
            browser.wait_for(
                "document.readyState === 'complete' && !!document.querySelector('.md-content h1')"
            )
            assert browser.value("document.documentElement.scrollWidth") <= 360, page.name
            assert browser.value(CUT_OFF) == [], page.name
