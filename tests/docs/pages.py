"""What the pages below docs/ tell a reader to type, and how a test does the same.

All rules can be seen in a page's source. Of fenced blocks:

- console: commands behind ``$ ``, continued behind ``> ``, and below each what it prints. sh:
  commands alone, a line each, continued behind a backslash. A page is one session of bash, from top
  to bottom, in an empty directory.
- A command ends with exit code 0, or else the next one is ``echo $?``.
- Printed lines are compared by their words of three letters and more, in order, since figures
  differ from run to run. ``…`` stands for anything, alone in a line for any lines; lines that are
  not shown may come between.
- A block with ``title="FILE"`` is written to that file before what follows is run.
- yaml that begins with ``name:`` is a spec; without a title, and with another key of a spec in
  front, it stands in place of that part of experiments/smoke.yaml. ``testbed validate`` and the
  schema have to take either.
- python without a title is a program of its own, run where it stands. On a page that says
  ``<!-- run by: TEST -->`` that test runs it.
- ``<!-- not run: REASON -->`` before a block leaves it out. ``<!-- test with: OPTIONS -->`` adds
  options to each ``testbed run`` in it; with ``--dry-run`` what it prints is not compared.
- All others are to be read only.
"""

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
SHELLS = ("sh", "bash", "shell")

_NOTE = r"(?:^[ ]*<!--[ ]*(?P<rule>not run|test with):(?P<words>[^>]*)-->[ ]*\n(?:[ ]*\n)?)?"
_BLOCK = re.compile(
    _NOTE + r"^(?P<indent>[ ]*)```(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_LEFT_OVER = re.compile(r"<!--[ ]*(?:not|test|run)\b[^>]*-->")
_RUN_BY = re.compile(r"^<!--[ ]*run by:[ ]*(\S+)[ ]*-->$", re.MULTILINE)
_INDENTED = re.compile(
    r"^ {4}(?:testbed|torchrun|python|pip|make|docker|dask|export|accelerate) .*", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. number: of its page. rule, words: of the comment before it, empty if there is
    none."""

    page: Path
    number: int
    language: str
    title: str
    text: str
    rule: str
    words: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(DOCS)}, block {self.number}"

    @property
    def file(self) -> str:
        """Where the session finds its text."""
        return (
            self.title
            or f".block-{self.number}.{'py' if self.language == 'python' else self.language}"
        )


@dataclass(frozen=True, slots=True)
class Command:
    """expected: the lines that the page shows below it; None if these are not compared."""

    text: str
    place: str
    expected: Sequence[str] | None = None


def blocks(page: Path) -> list[Block]:
    found = []
    for number, match in enumerate(_BLOCK.finditer(page.read_text()), start=1):
        width = len(match["indent"])
        text = "".join(
            line[width:] if line.strip() else line
            for line in match["text"].splitlines(keepends=True)
        )
        language = re.match(r"\s*\{?\s*\.?([\w+-]*)", match["info"])
        title = re.search(r'\btitle="([^"]+)"', match["info"])
        words = (match["words"] or "").strip()
        name = language[1] if language else ""
        found.append(
            Block(page, number, name, title[1] if title else "", text, match["rule"] or "", words)
        )
    return found


def comments_that_belong_to_no_block(page: Path) -> list[str]:
    kept = [match.group() for match in _LEFT_OVER.finditer(_BLOCK.sub("", page.read_text()))]
    return [comment for comment in kept if not _RUN_BY.fullmatch(comment)]


def indented_commands(page: Path) -> list[str]:
    return _INDENTED.findall(_BLOCK.sub("", page.read_text()))


def run_by(page: Path) -> str | None:
    """The test that runs a page's Python, as a path from the repository's root."""
    found = _RUN_BY.search(page.read_text())
    return found[1] if found else None


def commands(page: Path) -> Iterator[Command]:
    """Everything that is run of a page, in order; files come first in the block's place."""
    elsewhere = run_by(page) is not None
    for block in blocks(page):
        if block.rule == "not run":
            continue
        program = block.language == "python" and not elsewhere
        if block.title or program:
            yield _file(block)
        if program and not block.title:
            yield Command(f"python {block.file}", block.place)
        elif block.language == "console" or block.language in SHELLS:
            for command in _typed(block):
                yield _shortened(command, block) if block.rule == "test with" else command


def _file(block: Block) -> Command:
    mark = "END-OF-BLOCK"
    target = shlex.quote(block.file)
    return Command(
        f"mkdir -p $(dirname {target}) && cat >{target} <<'{mark}'\n{block.text}{mark}", block.place
    )


def _typed(block: Block) -> Iterator[Command]:
    if block.language in SHELLS:
        lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
        yield from (
            Command(line, block.place)
            for line in lines
            if line.strip() and not line.lstrip().startswith("#")
        )
        return
    text, expected = "", list[str]()
    for line in [*block.text.splitlines(), "$ "]:
        if line.startswith("$ "):
            if text:
                yield Command(text, block.place, expected)
            text, expected = line[2:], []
        elif line.startswith("> ") and not expected:
            text += "\n" + line[2:]
        else:
            expected.append(line)


def _shortened(command: Command, block: Block) -> Command:
    if not re.match(r"(\w+=\S* )*testbed run\b", command.text):
        return command
    program, hash_, comment = command.text.partition("  #")
    text = f"{program} {block.words}{hash_}{comment}"
    return replace(
        command, text=text, expected=None if "--dry-run" in block.words else command.expected
    )


def run(
    typed: Sequence[Command], folder: Path, environment: Mapping[str, str], timeout_s: float
) -> None:
    """Type the commands into one bash, in a folder; raises AssertionError that names the first that
    does not do as its page says, with what it printed."""
    parts = []
    for command, after in zip(typed, [*typed[1:], None], strict=True):
        may_fail = after is not None and after.text == "echo $?"
        ends = "" if may_fail else "[ $code = 0 ] || exit"
        parts.append(
            f"{command.text}\ncode=$?; printf '\\001%s\\001' $code; {ends}\n(exit $code)\n"
        )
    process = subprocess.Popen(
        ["bash", "-c", "".join(parts)],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
    *printed, rest = re.split(r"\x01(\d+)\x01", out.decode(errors="replace"))
    outputs, codes = printed[::2], printed[1::2]
    for command, output in zip(typed, outputs, strict=False):
        told = f"{command.place}: {command.text}\n{output}"
        if command.text == "echo $?":
            assert command.expected == output.split(), told
            continue
        missing = first_missing(command.expected or [], output)
        assert missing is None, f"the page says {missing!r}; {told}"
    done = len(codes)
    assert done == len(typed) and process.returncode == 0, (
        f"exit code {codes[-1] if codes else process.returncode}: {typed[max(done - 1, 0)].place}: "
        f"{typed[max(done - 1, 0)].text}\n{outputs[-1] if outputs else ''}\n{rest}"
    )


def first_missing(expected: Sequence[str], output: str) -> str | None:
    """The first expected line that the output lacks, or has not behind those before it; None if it
    has all."""
    printed = iter([_words(line) for line in output.splitlines()])
    for line in expected:
        pattern = ".*".join(re.escape(_words(part)) for part in line.split("…"))
        if not pattern.strip(".*"):
            continue
        if not any(re.fullmatch(re.sub(r"(\.\*)+", ".*", pattern), words) for words in printed):
            return line
    return None


def _words(line: str) -> str:
    return "".join(f"{word} " for word in re.findall(r"[^\W\d_]{3,}", line))
