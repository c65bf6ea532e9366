"""The pages of the reference can be read as Markdown: a table of what the code has, as it is today."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import lightning_spectral
from tools.reference_docs import BEGIN, END, PAGES, on_page_markdown, section

FILES = sorted(PAGES.glob("*.md"))


def table_of(text: str) -> str:
    return text.partition(BEGIN)[2].partition(END)[0].strip()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_table_is_what_the_code_says(file: Path) -> None:
    text = file.read_text()
    assert table_of(text) == section(text), "run `python tools/reference_docs.py`"
    prose = text.partition(BEGIN)[0].split("\n\n", 1)[1].strip()
    assert prose.endswith("."), "a page begins with what it is about"


def test_every_row_says_something_and_links_to_a_source() -> None:
    rows = [row for file in FILES for row in table_of(file.read_text()).splitlines()[2:]]
    assert len(rows) > 90
    for row in rows:
        found = re.fullmatch(r"\| \[`([\w.]+)`\]\(([^)]+)\) \| (.+) \|", row)
        assert found is not None, row
        assert (PAGES / found[2]).is_file(), row
        assert len(found[3].split()) > 2, row
        assert not re.search(r":\w+:`|``", found[3]), row  # roles of Sphinx are no Markdown
    named = set(re.findall(r"\[`lightning_spectral\.(\w+)`\]", "\n".join(rows)))
    assert set(lightning_spectral.__all__) - {"__version__"} <= named


def test_on_the_site_the_rows_lead_to_the_entries_below() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="reference/records.md"))
    text = on_page_markdown((PAGES / "records.md").read_text(), page)
    assert "../../" not in text
    assert "[`lightning_spectral.SpectralRecord`](#lightning_spectral.records.schema.SpectralRecord)" in text
    assert "[`lightning_spectral.records.schema`](#lightning_spectral.records.schema)" in text
    other = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    assert on_page_markdown("[`a`](../../b.py)", other) == "[`a`](../../b.py)"
