"""Write the table of metrics in docs/numbers.md from ``RANK_METRICS``; ``tests/test_one_table.py`` compares them."""

from __future__ import annotations

from pathlib import Path

from lightning_spectral.functional.rank import RANK_METRICS
from lightning_spectral.text.tables import Table, render

BEGIN, END = "<!-- metrics: made by tools/metric_docs.py -->", "<!-- end of metrics -->"


def section() -> str:
    """One Markdown row per metric."""
    rows = [(f"`{row.name}`", row.doc, row.unit or "none", row.range) for row in RANK_METRICS.values()]
    return render(Table(("field", "what it is", "unit", "range"), rows), "markdown")


def main() -> None:
    """Replace the rows between the marks."""
    file = Path(__file__).parent.parent / "docs" / "numbers.md"
    before, _, rest = file.read_text().partition(BEGIN)
    file.write_text(f"{before}{BEGIN}\n\n{section()}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
