"""What is shipped to begin with: a starter spec, the experiments of the repository, and the schema
beside them for editors."""

import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml

from netsenseml.catalog import is_import_path, registered_methods
from testbed.spec.errors import did_you_mean
from testbed.spec.files import script_files, trace_files
from testbed.spec.load import load_spec
from testbed.spec.models import Spec
from testbed.spec.schema import MARK, schema_text

STARTER = "experiment"
ALL = "all"
SCHEMA_NAME = "testbed.schema.json"
"""Beside the specs, where it stays valid wherever they are moved together, and whichever Python an
editor knows."""
_PACKAGE = Path(__file__).parent
_MODELINE = "# yaml-language-server: $schema="
_NAME = re.compile(str(Spec.model_fields["name"].metadata[0].pattern))


class Refused(ValueError):
    """Nothing was written. The message is one line."""


def write_starter(name: str) -> Path:
    """Write a commented spec to ``name``.yaml, and the schema beside it; raises Refused, and writes
    nothing over."""
    path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if not _NAME.fullmatch(path.stem):
        raise Refused(
            f"{path.stem!r:.80} cannot be the name of an experiment, which has letters, digits,"
            " '_', '-' and '.'"
        )
    # What YAML would take for a number, a date or a truth value stands in quotes.
    plain = path.stem[0].isalpha() and yaml.safe_load(path.stem) == path.stem
    text = (_PACKAGE / "starter.yaml").read_text()
    text = text.replace(
        f"name: {STARTER} ", f"name: {path.stem if plain else json.dumps(path.stem)} ", 1
    )
    if path != Path(f"{STARTER}.yaml"):
        shown = shlex.quote(str(path))
        text = text.replace("testbed validate", f"testbed validate {shown}").replace(
            "testbed run", f"testbed run {shown}"
        )
    text = text.replace(f"runs/{STARTER}-", f"runs/{path.stem}-")
    fix = f"name another one: testbed init {path.stem}-2"
    if path.exists() or path.is_symlink():
        raise Refused(f"{path} exists already, and is left as it is; {fix}")
    _write({path: _pointing(text, path, path.parent)}, path.parent, fix)
    return path


def examples_folder() -> Path:
    """Where the shipped experiments lie: in the installed package, or in the checkout that the
    package is part of."""
    installed = _PACKAGE / "experiments"
    return installed if installed.is_dir() else _PACKAGE.parent / "experiments"


def examples() -> dict[str, str]:
    """What each shipped experiment is about, in one line, by its name: its path below the folder,
    without an ending."""
    folder = examples_folder()
    paths = [
        path
        for path in folder.rglob("*.yaml")
        if path.relative_to(folder).parts[0] not in ("bench", "data")
    ]
    return {
        _name(path): _about(path)
        for path in sorted(paths, key=lambda path: (len(path.parts), path))
    }


def copy_examples(name: str, destination: Path) -> list[Path]:
    """Copy an example, or ``all``, with what it needs; returns the specs. Raises Refused, and
    writes nothing over.

    Folders within the destination are those of the repository, so that specs find their traces.
    """
    known = examples()
    if name not in known and name != ALL:
        raise Refused(f"there is no example {name!r:.60}; {did_you_mean(name, [*known, ALL])}")
    folder = examples_folder()
    texts: dict[Path, str] = {}
    specs = []
    for chosen in known if name == ALL else [name]:
        for file in dict.fromkeys(_files(folder / f"{chosen}.yaml")):
            target = destination / file.resolve().relative_to(folder.resolve())
            texts[target] = file.read_text()
            if file.suffix == ".yaml":
                texts[target] = _pointing(texts[target], target, destination)
                specs.append(target)
    _write(texts, destination, f"copy to another place: testbed examples {name} DIRECTORY")
    return specs


def command(spec: Path) -> str:
    """What runs a spec, with the modules beside it that have its methods."""
    beside = any(path.suffix == ".py" for path in _files(spec)) and load_spec(spec).script is None
    path = f"PYTHONPATH={shlex.quote(str(spec.parent))} " if beside else ""
    return f"{path}testbed run {shlex.quote(str(spec))}"


def _name(path: Path) -> str:
    return str(path.relative_to(examples_folder()).with_suffix(""))


def _about(path: Path) -> str:
    """The first sentence of the comment at the head of a spec."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    comment = " ".join(
        line.removeprefix("#").strip() for line in lines if not line.startswith(_MODELINE)
    )
    return re.split(r"(?<=[.?!]) ", comment, maxsplit=1)[0]


def _files(path: Path) -> Iterator[Path]:
    """A spec and all files that it needs."""
    spec = load_spec(path)
    yield path
    for name in trace_files(spec):
        yield path.parent / name
    if spec.script:
        yield from script_files(path.parent / spec.script.file, spec.script.files)
    for method in spec.methods:
        module = path.parent / f"{method.name.partition(':')[0]}.py"
        if is_import_path(method.name) and module.is_file():
            yield module


def _pointing(text: str, spec: Path, folder: Path) -> str:
    """The text of a spec whose first line names the schema in a folder."""
    rest = text.partition("\n")[2] if text.startswith(_MODELINE) else text
    return f"{_MODELINE}{os.path.relpath(folder / SCHEMA_NAME, spec.parent)}\n{rest}"


def _write(texts: dict[Path, str], folder: Path, fix: str) -> None:
    """Write files that are not there yet, and the schema into their folder, where an older one of
    ours may lie."""
    for path, text in texts.items():
        if path.is_symlink() or (
            path.exists() and (not path.is_file() or path.read_text(errors="replace") != text)
        ):
            raise Refused(f"{path} exists already, and is left as it is; {fix}")
    schema = folder / SCHEMA_NAME
    if schema.is_symlink() or (
        schema.exists() and (not schema.is_file() or MARK not in schema.read_text(errors="replace"))
    ):
        raise Refused(
            f"{schema} exists already, and is not the schema that editors check specs by; move it"
            " away"
        )
    for path, text in {**texts, schema: schema_text(registered_methods())}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
