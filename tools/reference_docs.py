"""Write the tables of docs/reference from the docstrings; ``tests/docs/test_reference.py`` compares them.

A page lists modules, classes and functions as mkdocstrings directives, which only the site shows. The table above them
says the same on one line each, with a link to the source, wherever Markdown is read. As a hook of MkDocs this module
makes the links to sources, which no site has, links to what mkdocstrings has written below.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "reference"
BEGIN, END = "<!-- names: made by tools/reference_docs.py -->", "<!-- end of names -->"
_DIRECTIVE = re.compile(r"^::: ([\w.]+)", re.MULTILINE)
_LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./\.\./([\w/]+)\.py\)")


def section(page: str) -> str:
    """One Markdown row for each name of a page: how it is imported, its first sentence, and its source."""
    rows = [f"| {_link(name, thing)} | {_sentence(thing)} |" for name, thing in _names(page)]
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


def _names(page: str) -> Iterator[tuple[str, Any]]:
    for path in _DIRECTIVE.findall(page):
        thing = _found(path)
        yield path, thing
        if isinstance(thing, ModuleType):
            own = [(name, value) for name, value in vars(thing).items() if _is_public(name, value, thing)]
            for name, value in sorted(own, key=lambda pair: inspect.getsourcelines(pair[1])[1]):
                yield f"{path}.{name}", value


def _found(path: str) -> Any:
    """The module of this path, or what the module holds."""
    home, _, name = path.rpartition(".")
    module = import_module(home)
    return getattr(module, name) if hasattr(module, name) else import_module(path)


def _is_public(name: str, value: Any, module: ModuleType) -> bool:
    is_code = inspect.isclass(value) or inspect.isfunction(value)
    return is_code and not name.startswith("_") and value.__module__ == module.__name__ and bool(value.__doc__)


def _link(path: str, thing: Any) -> str:
    """The name as it is imported, with its file."""
    import lightning_spectral

    name = path.rpartition(".")[2]
    public = name in lightning_spectral.__all__ and getattr(lightning_spectral, name) is thing
    file = Path(inspect.getsourcefile(thing) or "").resolve().relative_to(ROOT)
    return f"[`{f'lightning_spectral.{name}' if public else path}`](../../{file.as_posix()})"


def _sentence(thing: Any) -> str:
    """The first paragraph of a docstring up to its first full stop, as Markdown in a table."""
    first = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", first).replace("``", "`")
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", text)[0].replace("|", "\\|")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page: links of the tables lead to the entries on the same page."""
    if not page.file.src_uri.startswith("reference/"):
        return markdown

    def to_entry(found: re.Match[str]) -> str:
        shown, module, name = found[1], found[2].replace("/", "."), found[1].rpartition(".")[2]
        return f"[`{shown}`](#{module if shown == module else f'{module}.{name}'})"

    return _LINK.sub(to_entry, markdown)


def main() -> None:
    """Replace the rows between the marks of every page."""
    for file in sorted(PAGES.glob("*.md")):
        before, _, rest = file.read_text().partition(BEGIN)
        file.write_text(f"{before}{BEGIN}\n\n{section(file.read_text())}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
