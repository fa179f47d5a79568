"""Every command and every snippet of the pages below docs/, by the rules of ``pages``: they do what
the page says.

Pages with commands are run from the installed wheel, outside of the checkout.
"""

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml
from installed import Installation
from pages import (
    DOCS,
    PAGES,
    SHELLS,
    Block,
    Command,
    blocks,
    commands,
    comments_that_belong_to_no_block,
    first_missing,
    indented_commands,
    run,
    run_by,
)
from typer.testing import CliRunner

from testbed.cli import app
from testbed.examples import copy_examples
from testbed.spec.models import Spec
from testbed.spec.schema import SCHEMA_FILE

ROOT = DOCS.parent
BLOCKS = [block for page in PAGES for block in blocks(page)]
MOST_NOT_RUN = 16
KEYS = {field.alias or name for name, field in Spec.model_fields.items()}


def names(page: Path) -> str:
    return str(page.relative_to(DOCS))


def first_key(block: Block) -> str:
    lines = [line for line in block.text.splitlines() if line and not line.startswith("#")]
    return lines[0].partition(":")[0] if block.language == "yaml" and lines else ""


SPECS = [
    block
    for block in BLOCKS
    if first_key(block) == "name" or (first_key(block) in KEYS and not block.title)
]


@pytest.mark.fast
def test_what_is_not_run_has_a_reason_and_is_little():
    left_out = [(block.place, block.words) for block in BLOCKS if block.rule == "not run"]
    print(*(f"{place}: {reason}" for place, reason in left_out), sep="\n")
    assert [place for place, reason in left_out if len(reason.split()) < 3] == []
    assert len(left_out) <= MOST_NOT_RUN, left_out


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=names)
def test_no_command_and_no_comment_escapes_the_rules(page):
    assert comments_that_belong_to_no_block(page) == [], (
        "write it right before a block, as tests/docs/pages.py says"
    )
    if page.parent != DOCS or page.name == "index.md":
        assert indented_commands(page) == [], "fence it as ```sh"
    for block in blocks(page):
        assert not block.title.startswith("/") and ".." not in Path(block.title).parts, block.place
        assert block.rule != "test with" or block.language in ("console", *SHELLS), block.place
    if test := run_by(page):
        assert any(names(page) in path.read_text() for path in (ROOT / test).parent.glob("*.py")), (
            f"{test} does not name it"
        )


@pytest.mark.fast
def test_outputs_are_compared_by_words_in_order():
    printed = "w0 trained 7.6× as many\n\nmethod  samples/s\nnetsense  1,375  valid\ndone in 3 s\n"
    assert first_missing(["w9 trained 2× as many", "…", "netsense  9  valid"], printed) is None
    assert first_missing(["… as many", "method …", "", "done in 5 s"], printed) is None
    assert first_missing(["netsense … failed"], printed) == "netsense … failed"
    assert first_missing(["method samples/s …", "done … more"], printed) == "done … more"
    assert first_missing(["netsense 1 valid", "method samples/s"], printed) == "method samples/s"


@pytest.mark.fast
def test_a_session_fails_where_a_page_lies(tmp_path):
    here = {"PATH": "/usr/bin:/bin"}
    honest = [
        Command("x=5; false", ""),
        Command("echo $?", "", ["1"]),
        Command("echo value $x", "", ["value 4"]),
    ]
    run(honest, tmp_path, here, 9)
    for lie in (
        [Command("false", "p"), Command("true", "p")],
        [Command("true", "p"), Command("echo $?", "p", ["1"])],
        [Command("echo truth", "p", ["lies"])],
        [Command("exit 0", "p"), Command("true", "p")],
    ):
        with pytest.raises(AssertionError, match="p: "):
            run(lie, tmp_path, here, 9)


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """The shipped specs, and what the pages write beside their own."""
    folder = tmp_path_factory.mktemp("experiments")
    copy_examples("all", folder)
    return folder


@pytest.mark.fast
@pytest.mark.parametrize("block", SPECS, ids=lambda block: block.place)
def test_specs_and_parts_of_specs_are_good(block, experiments, tmp_path):
    folder = shutil.copytree(experiments, tmp_path / "experiments")
    for other in blocks(block.page):
        if other.title:
            folder.joinpath(other.title).write_text(other.text)
    text = block.text
    if first_key(block) != "name":
        text = yaml.safe_dump(
            {**yaml.safe_load((folder / "smoke.yaml").read_text()), **yaml.safe_load(text)}
        )
    path = folder / "block.yaml"
    path.write_text(text)
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 0, result.output
    assert jsonschema.Draft7Validator(json.loads(SCHEMA_FILE.read_text())).is_valid(
        yaml.safe_load(text)
    )


@pytest.mark.netns
@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=names)
def test_what_a_page_says_to_type_does_what_it_says(
    page: Path, installation: Installation, tmp_path: Path
) -> None:
    # As on a machine whose name nothing resolves, and in a terminal that is wide enough for a
    # table.
    here = {
        **installation.environment,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "110",
    }
    run(list(commands(page)), tmp_path, here, timeout_s=180)
    for block in blocks(page):
        modeline = re.match(r"# yaml-language-server: \$schema=(\S+)\n", block.text)
        if block.title and modeline:  # by which the reader's editor completes it
            validator = jsonschema.Draft7Validator(json.loads((tmp_path / modeline[1]).read_text()))
            validator.check_schema(validator.schema)
            raw = yaml.safe_load(block.text)
            assert validator.is_valid(raw) and not validator.is_valid({**raw, "wokers": 4}), (
                block.place
            )
