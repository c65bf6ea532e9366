"""``lightning-spectral measure CHECKPOINT [CHECKPOINT2] --data TEXT``: the ranks of finished models on any text."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_spectral.cli.parser import VerbParser, data_files
from lightning_spectral.records import STATUSES, SpectralRecord
from lightning_spectral.text import CommandError
from lightning_spectral.text.tables import Column, Table, add_format_option, aside, print_table

if TYPE_CHECKING:
    from lightning_spectral.training.measure import Measured

HINTS = """globs of down projections (and up projections) in blocks of which the structure is not understood; all others
are measured as without"""
_BUCKETS = ("pooled", "head", "mid", "tail")


def main(argv: list[str]) -> int:
    """Run the verb; 0 done, 2 bad input."""
    parser = VerbParser(
        "measure",
        description="Ranks of one or two checkpoints on a text: no training loop, the records of a run.",
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a litgpt folder (lit_model.pth), a .ckpt of `pretrain`, or a Hugging Face folder with safetensors",
    )
    parser.add_argument("--data", required=True, help="a .txt, .jsonl or .parquet file, a glob, or a folder")
    parser.add_argument("--out", type=Path, default=Path("out/measure"), metavar="DIR", help="default: out/measure")
    parser.add_argument("--counts", type=Path, help="token counts for HEAD, MID, TAIL (default: of the measured text)")
    parser.add_argument("--tokenizer_dir", type=Path, help="default: the checkpoint's own")
    parser.add_argument("--text_column", default="text", help="column or key of the text (default: text)")
    parser.add_argument("--tokens", type=int, default=65_536, help="how many to measure (default: 65536)")
    parser.add_argument("--seq_length", type=int, help="default: what the model takes, at most 512")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per forward pass (default: 8)")
    parser.add_argument("--sites", nargs="+", choices=["pre", "post"], default=["post"], help="default: post")
    parser.add_argument("--modules", nargs="+", help="globs of down projections to measure instead of all")
    parser.add_argument("--hints", nargs="+", metavar="DOWN[,UP]", help=HINTS)
    parser.add_argument("--shards", type=int, default=1, help="> 1: 95 %% intervals from sequences (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add_format_option(parser)
    options = parser.parse_args(argv)
    with parser.own_words():
        return _measured(options)


def _measured(options: argparse.Namespace) -> int:
    """Measure and print."""
    if len(options.checkpoints) > 2:
        raise CommandError(
            f"one or two checkpoints, got {len(options.checkpoints)}: measure them one by one, each with its own `out`,"
            " and `report` the folders."
        )
    for checkpoint in options.checkpoints:
        if not Path(checkpoint).expanduser().exists():
            raise CommandError(f"no checkpoint at `{checkpoint}`.")
    measured = _measure(options)
    print_table(table(measured[0]) if len(measured) == 1 else side_by_side(*measured), options.format)
    out = aside(options.format)
    for note in dict.fromkeys(note for one in measured for note in one.notes):
        print(f"note: {note}", file=out)
    for one in measured:
        print(f"records: {one.folder}", file=out)
    return 0


def _measure(options: argparse.Namespace) -> list[Measured]:
    from lightning_spectral.data.corpus import Corpus
    from lightning_spectral.training.measure import measure_checkpoint

    try:
        corpus = Corpus(data_files(options.data).all, options.text_column)
        two = len(options.checkpoints) == 2
        return [
            measure_checkpoint(
                checkpoint,
                corpus,
                options.out / f"{number}_{Path(checkpoint).stem}" if two else options.out,
                counts=options.counts,
                tokenizer_dir=options.tokenizer_dir,
                num_tokens=options.tokens,
                seq_length=options.seq_length,
                batch_size=options.batch_size,
                sites=options.sites,
                modules=options.modules,
                hints=options.hints,
                num_jackknife_groups=options.shards,
                device=options.device,
            )
            for number, checkpoint in enumerate(options.checkpoints, start=1)
        ]
    except (ValueError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error


def table(measured: Measured) -> Table:
    """One row per site and bucket, medians over the layers."""
    rows = [
        [
            *(site, bucket),
            *(_median(found, name) for name in ("soft_rank", "hard_rank", "tokens_per_dim")),
            *(_loss(measured, bucket), _worst(found)),
        ]
        for (site, bucket), found in _cells(measured).items()
    ]
    columns = (
        *("site", "bucket"),
        Column("soft rank", ".2f", "soft_rank"),
        Column("hard rank", ".2f", "hard_rank"),
        Column("N/D", ".1f", "tokens_per_dim"),
        Column("loss", ".3f"),
        "status",
    )
    return Table(columns, rows, _title(measured))


def side_by_side(first: Measured, second: Measured) -> Table:
    """Both checkpoints and the ratio second / first."""
    rows: list[list[Any]] = []
    cells = _cells(first), _cells(second)
    for key in (key for key in cells[0] if key in cells[1]):
        found = cells[0][key], cells[1][key]
        statuses = f"{_worst(found[0])}, {_worst(found[1])}"
        rows += [
            [*key, metric, *_pair(_median(found[0], metric), _median(found[1], metric)), statuses]
            for metric in ("soft_rank", "hard_rank")
        ]
        if key[0] == "post":
            rows.append([*key, "loss", *_pair(_loss(first, key[1]), _loss(second, key[1])), ""])
    columns = (
        "site",
        "bucket",
        "metric",
        Column("1", ".3f"),
        Column("2", ".3f"),
        Column("2 / 1", ".3f"),
        "status 1, 2",
    )
    return Table(columns, rows, "\n".join(f"{number}: {_title(one)}" for number, one in enumerate((first, second), 1)))


def _title(measured: Measured) -> str:
    layers = len({record.layer for record in measured.spectral})
    return f"{measured.checkpoint}: FFN width D = {measured.spectral[0].width}, medians over {layers} layers"


def _cells(measured: Measured) -> dict[tuple[str, str], list[SpectralRecord]]:
    return {
        (site, bucket): rows
        for site in ("post", "pre")
        for bucket in _BUCKETS
        if (rows := [r for r in measured.spectral if (r.site, r.bucket) == (site, bucket)])
    }


def _pair(first: float | None, second: float | None) -> tuple[float | None, float | None, float | None]:
    return first, second, second / first if first and second is not None else None


def _loss(measured: Measured, bucket: str) -> float | None:
    return next((record.loss for record in measured.losses if record.bucket == bucket), None)


def _worst(rows: list[SpectralRecord]) -> str:
    return min((record.status for record in rows), key=STATUSES.index)


def _median(rows: list[SpectralRecord], name: str) -> float | None:
    known = [value for record in rows if (value := getattr(record, name)) is not None]
    return median(known) if known else None
