"""A hook of mkdocs: files of the repository to which a page refers become pages of the site, below
files/.

So one link is right in a checkout and in the site, and the site says nothing of where the
repository is.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
"""The path in a link of Markdown that leads to no other site."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml"}
HIDDEN = "---\nsearch: {exclude: true}\n---\n\n"
"""The search is for the pages that were written to be read."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file that a page refers to, directly or by others; pictures as they
    are."""
    pending = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    known = set(pending)
    while pending:
        for target in _targets(pending.pop()):
            if target in known or _is_source(target):
                continue
            known.add(target)
            if _is_picture(target):
                files.append(
                    File.generated(config, _in_site(target), abs_src_path=str(ROOT / target))
                )
            else:
                files.append(File.generated(config, _in_site(target), content=_page(target)))
                pending.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where the files are in the site; one that leads nowhere is left for mkdocs to
    find."""
    source = _in_repository(page.file.src_uri)
    if source is None:
        return markdown
    here = PurePosixPath(page.file.src_uri).parent

    def led(link: re.Match[str]) -> str:
        target = _resolved(source, link[1])
        return link[1] if target is None else os.path.relpath(_in_site(target), here)

    return LINK.sub(led, markdown)


def _targets(source: str) -> Iterator[str]:
    """Paths in the repository of what a file, or the list of a directory, refers to."""
    path = ROOT / source
    if path.is_dir():
        yield from (f"{source}/{name}" for name in _listed(path))
    elif path.suffix == ".md":
        found = (_resolved(source, link[1]) for link in LINK.finditer(path.read_text()))
        yield from (target for target in found if target is not None)


def _resolved(source: str, link: str) -> str | None:
    """The path in the repository to which a link in a file leads; a directory's README stands for
    it. None: there is none."""
    folder = source if (ROOT / source).is_dir() else str(PurePosixPath(source).parent)
    target = os.path.normpath(f"{folder}/{link}")
    if target.startswith("..") or not (ROOT / target).exists():
        return None
    return f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target


def _is_source(target: str) -> bool:
    """Whether it is in the site anyway."""
    return target.startswith("docs/") and not target.startswith("docs/hooks/")


def _in_site(target: str) -> str:
    """Where a file of the repository is among the sources of the site."""
    if _is_source(target):
        return target.removeprefix("docs/")
    shown = re.sub(r"(^|/)\.", r"\1", target)  # what begins with a dot is no source of the site
    if (ROOT / target).is_dir():
        return f"files/{shown}/index.md"
    return (
        f"files/{shown}" if target.endswith(".md") or _is_picture(target) else f"files/{shown}.md"
    )


def _in_repository(uri: str) -> str | None:
    """The opposite, of pages in which links may have to be led; None: those made of a program have
    none."""
    if not uri.startswith("files/"):
        return f"docs/{uri}"
    path = uri.removeprefix("files/")
    return next(
        (one for one in (path, path.removesuffix("/index.md")) if (ROOT / one).exists()), None
    )


def _is_picture(target: str) -> bool:
    return target.endswith((".png", ".svg"))


def _listed(folder: Path) -> list[str]:
    found = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))
    return [path.name for path in found if path.is_file() and not _is_picture(path.name)]


def _page(target: str) -> str:
    path = ROOT / target
    if path.is_dir():
        return (
            f"{HIDDEN}# {target}\n\n"
            + "\n".join(f"- [{name}]({name})" for name in _listed(path))
            + "\n"
        )
    text = path.read_text()
    if path.suffix == ".md":
        return HIDDEN + text
    language = LANGUAGES.get(path.suffix, "text")
    fence = "~" * 8
    return f'{HIDDEN}# {path.name}\n\n{fence} {{.{language} title="{target}"}}\n{text}\n{fence}\n'
