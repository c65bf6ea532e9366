"""``lightning-spectral records RUNS``: all records as one table, in JSON, CSV or Parquet."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lightning_spectral.cli import inputs
from lightning_spectral.cli.parser import VerbParser
from lightning_spectral.text import CommandError, write_text
from lightning_spectral.text.packages import why_missing

FORMATS = ("json", "csv", "parquet")


_ALL = "all records are given; choose among them with `lightning_spectral.load(RUNS)`, a data frame."


def main(argv: list[str]) -> int:
    """Write the records; to standard output unless --out names a file."""
    parser = VerbParser(
        "records",
        description="All records of run folders as a table.",
        elsewhere=dict.fromkeys(("--where", "--bucket", "--stage", "--optimizer", "--filter"), _ALL),
    )
    parser.add_argument("inputs", nargs="+", metavar="RUNS", help="run folders at any depth, or patterns (out/**)")
    parser.add_argument("--kind", default="spectral", help="spectral, losses or weights (default: spectral)")
    parser.add_argument("--format", choices=FORMATS, help="default: by the name of --out, else csv")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: standard output)")
    options = parser.parse_args(argv)
    with parser.own_words():
        return _write(options)


def _write(options: argparse.Namespace) -> int:
    """Read and write."""
    from lightning_spectral.analysis.load import rows

    found = inputs.guarded(lambda: rows(options.inputs, options.kind))
    style = options.format or Path(options.out or "").suffix.lstrip(".") or "csv"
    if style not in FORMATS:
        raise CommandError(f"--out `{options.out}` ends in no known format: give --format {', '.join(FORMATS)}.")
    if style == "parquet":
        inputs.guarded(lambda: _parquet(found, options.out))
    else:
        _text(found, style, options.out)
    print(f"{len(found)} records", file=sys.stderr)
    return 0


def _text(found: list[dict[str, Any]], style: str, out: str | None) -> None:
    from lightning_spectral.analysis.tidy import csv_text

    header = list(found[0]) if found else []
    cells = [["" if cell is None else cell for cell in row.values()] for row in found]
    text = json.dumps(found, indent=1) + "\n" if style == "json" else csv_text(header, cells)
    if out is None:
        sys.stdout.write(text)
    else:
        inputs.guarded(lambda: write_text(Path(out), text))


def _parquet(found: list[dict[str, Any]], out: str | None) -> None:
    if out is None:
        raise CommandError("Parquet is no text: give --out FILE.parquet.")
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise CommandError(f"--format parquet: {why_missing('pyarrow')}") from None
    parquet.write_table(pyarrow.Table.from_pylist(found), out)
