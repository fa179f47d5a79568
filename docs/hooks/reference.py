"""A hook of mkdocs: where a page has ``<!-- made: NAME -->`` comes what the code itself says.

Sources of torch's and pandas' users are read and not imported, which would take seconds.
"""

import ast
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

import netsenseml
import testbed
from netsenseml import catalog
from testbed import cli
from testbed.results import columns

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Raises KeyError for a name that is not in ``MADE``."""
    return re.sub(
        r"^<!-- made: (\w+) -->$", lambda mark: MADE[mark[1]](), markdown, flags=re.MULTILINE
    )


# The spec, from its schema


SCHEMA: Json = json.loads((ROOT / "testbed/spec/schema.json").read_text())
DEFINITIONS: Mapping[str, Json] = SCHEMA["definitions"]
TITLES = {
    "Spec": "The experiment",
    "LinkSpec": "Links",
    "MethodSpec": "methods",
    "Entry": "schedule",
}
"""Of sections, where it is not the definition's own name or, of a pattern of a schedule, the key
that it has."""


def spec() -> str:
    """Every key, in the order in which one comes to it, and how quantities are written."""
    names = list(_met("Spec", {}))
    sections = [_section(name) for name in names if name[0].isupper()]
    quantities = [name for name in names if name[0].islower()]
    return "\n\n".join(
        [*sections, "### How values are written { #values }", *map(_quantity, quantities)]
    )


def _definition(name: str) -> Json:
    return (
        {key: value for key, value in SCHEMA.items() if key != "definitions"}
        if name == "Spec"
        else DEFINITIONS[name]
    )


def _met(name: str, seen: dict[str, None]) -> dict[str, None]:
    """Add the names of a definition and of all that it refers to, in the order in which they are
    first mentioned."""
    if name not in seen:
        seen[name] = None
        if name != "MethodSpec":  # which has a page of its own
            for other in _references(_definition(name)):
                _met("LinkSpec" if _is_of_links(other) else other, seen)
    return seen


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for part in node:
            yield from _references(part)
    elif isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for key, part in node.items():
            if key not in ("if", "then", "else", "$ref"):  # rules, which mention what is known
                yield from _references(part)


def _is_of_links(name: str) -> bool:
    """Whether its keys are those of a link, or some of them."""
    return name != "LinkSpec" and name.endswith(("Change", "Pairs", "LinkParametersSpec"))


def _title(name: str) -> str:
    if {"$ref": f"#/definitions/{name}"} in DEFINITIONS["Entry"]["anyOf"]:
        return f"schedule: {next(key for key in DEFINITIONS[name]['required'] if key != 'at')}"
    return TITLES.get(name, name.removesuffix("Spec").lower())


def _anchor(name: str) -> str:
    return (
        _title(name).replace(": ", "-").replace(" ", "-").lower()
        if name[0].isupper()
        else name.replace("_", "-")
    )


def _section(name: str) -> str:
    definition = _definition(name)
    title = _title(name)
    head = f"### {title if name in ('Spec', 'LinkSpec') else f'`{title}`'} {{ #{_anchor(name)} }}"
    text = [head, _markdown(definition.get("description", ""))]
    variants = definition.get("anyOf", [])
    if name == "Entry":
        text.append("\n".join(f"- {_kind(variant)}" for variant in variants))
    elif name == "MethodSpec":
        text.append(
            "A name, or a mapping of `name`, its options and a `label`; both are in"
            " [Methods](methods.md)."
        )
    elif name in ("ModelSpec", "DataSpec", "OptimizerSpec"):
        text += _named_choices(name, variants)
    else:
        objects = [variant for variant in variants if "properties" in variant]
        short = [
            variant for variant in variants if variant not in objects and "required" not in variant
        ]
        if short:
            text.append(f"Written as {' or '.join(map(_kind, short))}; or with these keys:")
        for one in objects or [definition]:
            text += _keys(name, one)
    return "\n\n".join(filter(None, text))


def _named_choices(name: str, variants: Iterable[Json]) -> Iterator[str]:
    yield "A name, or a mapping of `name` and its options; or your own, `package.module:attribute`."
    for variant in variants:
        chosen = variant.get("properties", {}).get("name", {}).get("const")
        if chosen is None:
            continue
        options = {
            key: option
            for key, option in variant["properties"].items()
            if key not in ("name", "label", "options")
        }
        yield f"#### `{chosen}` {{ #{_anchor(name)}-{chosen} }}"
        entries = (
            _entry(key, _about(option), _sentence(option["description"]))
            for key, option in options.items()
        )
        yield "\n\n".join(entries) or "Has no options."


def _keys(name: str, definition: Json) -> Iterator[str]:
    required = definition.get("required", [])
    for key, schema in definition["properties"].items():
        yield f"#### `{key}` {{ #{_anchor(name)}-{key.replace('_', '-')} .key }}"
        yield _about(schema, required=key in required) + "\n{ .about }"
        shared = _definition(_name_of(schema)) if "$ref" in schema else {}
        yield _markdown(schema.get("description") or shared.get("description", ""))


def _entry(key: str, about: str, text: str) -> str:
    return _term(key, f"{about}\n{{ .about }}\n\n{_markdown(text)}")


def _sentence(text: str) -> str:
    """What the catalogue says of an option, which is no sentence, as it stands in others."""
    return f"{text[0].upper()}{text[1:]}."


def _term(name: str, text: str) -> str:
    return f"`{name}`\n:   {textwrap.indent(text, '    ').strip()}"


def _about(schema: Json, *, required: bool = False) -> str:
    """What may stand behind a key, its default, and an example, in one line."""
    told = [_kind(schema), *(["required"] if required else [])]
    if "default" in schema:
        told.append(f"default `{_written(schema['default'])}`")
    examples = schema.get("examples") or (
        _definition(_name_of(schema)).get("examples") if "$ref" in schema else None
    )
    if examples and "enum" not in schema and schema.get("type") != "boolean":
        told.append(f"for example `{_written(examples[0])}`")
    return " · ".join(told)


def _name_of(schema: Json) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def _written(value: Any) -> str:
    """As in YAML; a name with options is written with these beside it."""
    if isinstance(value, dict) and set(value) <= {"name", "options"}:
        value = {"name": value["name"], **value["options"]} if "options" in value else value["name"]
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _kind(schema: Json) -> str:
    """What a value is, in words."""
    if "$ref" in schema:
        return _reference(_name_of(schema))
    if "const" in schema:
        return f"`{_written(schema['const'])}`"
    if "enum" in schema:
        return _alternatives([f"`{_written(value)}`" for value in schema["enum"]])
    for several in ("anyOf", "allOf"):
        if several in schema:
            return _alternatives(
                list(
                    dict.fromkeys(
                        _kind(one) for one in schema[several] if "$ref" in one or "type" in one
                    )
                )
            )
    if "type" not in schema:
        return "any value"
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return _alternatives([_simple(kind, schema) for kind in kinds])


def _simple(kind: str, schema: Json) -> str:
    match kind:
        case "boolean":
            return "`true` or `false`"
        case "string":
            return "a text"
        case "integer" | "number":
            return ("a whole number" if kind == "integer" else "a number") + _bounds(schema)
        case "array":
            count = "two" if schema.get("maxItems") == schema.get("minItems") == 2 else "a list"
            return f"{count}: {_kind(schema['items'])}"
    of = schema.get("additionalProperties")
    if isinstance(of, dict):
        return f"by name: {_kind(of)}"
    return "a mapping" + "".join(f" with `{key}`" for key in schema.get("properties", {}))


def _bounds(schema: Json) -> str:
    told = [
        f"{sign} {_number(schema[key])}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("exclusiveMaximum", "<"),
            ("maximum", "≤"),
        )
        if key in schema
    ]
    return f" {' and '.join(told)}" if told else ""


def _number(value: float) -> str:
    return "2³¹" if value == 2**31 else f"{value:,.10g}".replace(",", " ")


def _reference(name: str) -> str:
    if _is_of_links(name):
        pairs = ", two values for each" if name.endswith("Pairs") else ""
        missing = [
            key
            for key in DEFINITIONS["LinkSpec"]["properties"]
            if key not in _definition(name)["properties"]
        ]
        without = f" but {_alternatives([f'`{key}`' for key in missing], 'and')}" if missing else ""
        return f"[keys of a link](#links){without}{pairs}"
    title = name.replace("_", " ") if name[0].islower() else _title(name)
    return f"[{title}](#{_anchor(name)})"


def _alternatives(texts: list[str], word: str = "or") -> str:
    return f" {word} ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def _quantity(name: str) -> str:
    definition = DEFINITIONS[name]
    examples = ", ".join(f"`{_written(example)}`" for example in definition.get("examples", []))
    text = [
        f"#### {name.replace('_', ' ')} {{ #{_anchor(name)} }}",
        _markdown(definition["description"]),
    ]
    return "\n\n".join([*text, *([f"For example {examples}."] if examples else [])])


# The command line, from its commands


def commands() -> str:
    """Every command with its arguments and options, as its --help has them."""
    group = typer.main.get_command(cli.app)
    parts = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        context = typer.Context(command, info_name=f"testbed {name}")
        usage = " ".join(command.get_usage(context).split()).removeprefix("Usage: ")
        parts += [
            f"### `{name}` {{ #{name} }}",
            _markdown(command.help or ""),
            f"```text\n{usage}\n```",
        ]
        told = (parameter.get_help_record(context) for parameter in command.params)
        parts += [
            _term(_one(word), re.sub(r"\.?\s*\[(.*)\]$", r"; \1", text))
            for word, text in filter(None, told)
        ]
    return "\n\n".join(parts)


def _one(word: str) -> str:
    """The type of a value, also of one of several."""
    return re.sub(r"<(?:list\[)?(\w+)(?:\]| range)?>", r"<\1>", word)


# The tables of a run, from testbed.results.columns and its neighbours


def tables() -> str:
    """Every table of a run with its columns, types and units."""
    sources = ("testbed/results/columns.py", "netsenseml/records.py", "testbed/protocol.py")
    about = {
        name: text
        for path in sources
        for name, text in _texts_below(ast.parse((ROOT / path).read_text()).body)
    }
    identity = {
        name: ("int64" if name == "seed" else "str", text)
        for name, text in columns.IDENTITY_COLUMNS.items()
    }
    parts = ["### Every table { #identity }", _table(identity)]
    for name, table in columns.TABLES.items():
        own = next(key for key in about if getattr(columns, key, None) is table.columns)
        files = " and ".join(f"`{pattern}`" for pattern in table.records)
        parts += [f"### `{name}` {{ #{name} }}", f"{_markdown(about[own])} Written to {files}."]
        parts.append(
            _table({column: (table.dtype(column), text) for column, text in table.columns.items()})
        )
    return "\n\n".join(parts)


def metrics() -> str:
    """What the numbers of summary.json are."""
    tree = ast.parse((ROOT / "testbed/results/summary.py").read_text())
    values = {
        node.target.id: node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and node.value is not None
    }
    return "\n".join(
        ["| number | meaning |", "|---|---|"]
        + [
            f"| `{name}` | {_cell(text)} |"
            for name, text in ast.literal_eval(values["METRICS"]).items()
        ]
    )


def _table(rows: Mapping[str, tuple[str, str]]) -> str:
    lines = [f"| `{name}`<br>{kind} | {_cell(text)} |" for name, (kind, text) in rows.items()]
    return "\n".join(["| column, type | meaning |", "|---|---|", *lines])


def _cell(text: str) -> str:
    return _markdown(text).replace("|", "\\|")


# Methods, from the catalogue and their classes


def methods() -> str:
    """Every method: what its class says of itself, and its options."""
    registry = _assigned(ROOT / "netsenseml/methods/__init__.py", "METHODS")
    classes = {
        name.value: value.id for name, value in zip(registry.keys, registry.values, strict=True)
    }
    found = {
        node.name: node
        for path in sorted((ROOT / "netsenseml/methods").glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    parts = []
    for name, options in catalog.METHODS.items():
        parts += [f"### `{name}` {{ #{name} }}", _docstring(found[classes[name]])]
        for key, option in options.items():
            values = [f"`{value}`" for value in option.choices]
            kind = _alternatives(values) if values else option.expected
            kind = kind.replace(">=", "≥").replace("<=", "≤")
            parts.append(
                _entry(
                    key, f"{kind} · default `{_written(option.default)}`", _sentence(option.help)
                )
            )
    return "\n\n".join(parts)


def _assigned(path: Path, name: str) -> Any:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name:
            return node.value
    raise LookupError(name)


# The public names of the two packages, from their sources


MORE = {
    "Method": "netsenseml.methods.base",
    "StepStatistics": "netsenseml.statistics",
    "Listener": "netsenseml.listener",
}
"""What one's own methods and loggers meet, beside what the package exports."""


def python_testbed() -> str:
    """What ``testbed`` exports."""
    return "\n\n".join(
        _public(f"testbed.{testbed._WHERE[name]}", name, "testbed") for name in testbed.__all__
    )


def python_netsenseml() -> str:
    """What ``netsenseml`` exports."""
    order = sorted(netsenseml.__all__, key=lambda name: (list(netsenseml._WHERE).index(name), name))
    return "\n\n".join(
        _public(f"netsenseml.{netsenseml._WHERE[name]}", name, "netsenseml") for name in order
    )


def python_more() -> str:
    """What one implements or is handed in a method of one's own."""
    return "\n\n".join(
        _public(module, name, module.removesuffix(".base")) for name, module in MORE.items()
    )


def _public(module: str, name: str, package: str) -> str:
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    node = next(one for one in tree.body if getattr(one, "name", None) == name)
    head = f"### `{package}.{name}` {{ #{name.lower().replace('_', '-')} }}"
    if isinstance(node, ast.FunctionDef):
        return "\n\n".join([head, _signature(node, name), _docstring(node)])
    assert isinstance(node, ast.ClassDef)
    init = next(
        (one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"),
        None,
    )
    return "\n\n".join(
        [
            head,
            *_made_by(node, init),
            _docstring(node),
            *([_docstring(init)] if init else []),
            *_members(node),
        ]
    )


def _made_by(node: ast.ClassDef, init: ast.FunctionDef | None) -> Iterator[str]:
    """How an object of the class is made, unless nobody makes one."""
    if init is not None:
        yield _signature(init, node.name)
    elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = [
            one
            for one in node.body
            if isinstance(one, ast.AnnAssign) and "ClassVar" not in ast.unparse(one.annotation)
        ]
        yield _python(node.name, map(ast.unparse, fields))


def _members(node: ast.ClassDef) -> Iterator[str]:
    for name, text in _attributes(node):
        yield _term(name, text)
    for one in node.body:
        if (
            isinstance(one, ast.FunctionDef)
            and not one.name.startswith("_")
            and ast.get_docstring(one)
        ):
            anchor = f"{node.name}-{one.name}".lower().replace("_", "-")
            decorators = [ast.unparse(decorator) for decorator in one.decorator_list]
            if "property" in decorators:
                yield _term(one.name, _docstring(one))
            else:
                yield f"#### `{node.name}.{one.name}` {{ #{anchor} }}"
                yield _signature(one, one.name)
                yield _docstring(one)


def _attributes(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Public attributes with a text below them, in the class or where they are set."""
    bodies = [node.body, *(one.body for one in node.body if isinstance(one, ast.FunctionDef))]
    for body in bodies:
        for target, text in _texts_below(body):
            if not (name := target.removeprefix("self.")).startswith("_"):
                yield name, _markdown(text)


def _texts_below(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for before, text in itertools.pairwise(body):
        if (
            isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            targets = (
                before.targets
                if isinstance(before, ast.Assign)
                else [getattr(before, "target", None)]
            )
            yield from (
                (ast.unparse(target), inspect.cleandoc(text.value.value))
                for target in targets
                if target is not None
            )


def _signature(node: ast.FunctionDef, name: str) -> str:
    parameters = node.args
    if parameters.args and parameters.args[0].arg in ("self", "cls"):
        parameters.args = parameters.args[1:]
    returns = (
        f" -> {ast.unparse(node.returns)}"
        if node.returns is not None and node.name != "__init__"
        else ""
    )
    return _python(name, _split(ast.unparse(parameters)), returns)


def _split(text: str) -> list[str]:
    """At the commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _python(name: str, arguments: Iterable[str], returns: str = "") -> str:
    """A call, in one line or with a line for each argument. Types in quotes are there for Python
    alone."""
    told = [re.sub(r"^(\**\w+: .+?)=(?=\S)", r"\1 = ", argument) for argument in arguments]
    text = f"{name}({', '.join(told)}){returns}"
    if len(text) > 80:
        text = "\n".join([f"{name}(", *(f"    {argument}," for argument in told), f"){returns}"])
    text = re.sub(r"'([A-Z]\w*)'", r"\1", text)
    return f"```python\n{text}\n```"


def _docstring(node: ast.ClassDef | ast.FunctionDef) -> str:
    return _markdown(ast.get_docstring(node) or "")


def _markdown(text: str) -> str:
    """A text of the code's as Markdown: names in single quotes of code, samples in fences,
    arguments as terms."""
    return "\n\n".join(map(_paragraph, re.split(r"\n\n", text.replace("``", "`"))))


ARGUMENT = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if all(line.startswith("    ") for line in lines):
        sample = inspect.cleandoc(text)
        if " <- " in sample:  # a formula
            sample = sample.replace(",  ", ",\n")
            return f"```text\n{sample}\n```"
        return f"```python\n{sample}\n```"
    if lines[0].startswith("===="):
        return f"```text\n{text}\n```"
    text = re.sub(r"(?<=\d)\*\*(?=-?\d)", r"\*\*", text)  # a power
    if not ARGUMENT.match(text):
        return text
    parts = ARGUMENT.split(text)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return "\n\n".join(_term(names, " ".join(about.split())) for names, about in pairs)


MADE: Mapping[str, Callable[[], str]] = {
    "spec": spec,
    "commands": commands,
    "tables": tables,
    "metrics": metrics,
    "methods": methods,
    "python_testbed": python_testbed,
    "python_netsenseml": python_netsenseml,
    "python_more": python_more,
}
"""By the name in the mark."""
