"""``lightning-spectral measure CHECKPOINT [CHECKPOINT2] --data TEXT``: the ranks of finished models on any text."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lightning_spectral.records import STATUSES, SpectralRecord
from lightning_spectral.text import CommandError

if TYPE_CHECKING:
    from lightning_spectral.training.measure import Measured

_BUCKETS = ("pooled", "head", "mid", "tail")


def main(argv: list[str]) -> int:
    """Run the verb; 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="lightning-spectral measure",
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
    parser.add_argument("--batch_size", type=int, default=8, help="sequences a forward pass (default: 8)")
    parser.add_argument("--sites", nargs="+", choices=["pre", "post"], default=["post"], help="default: post")
    parser.add_argument("--modules", nargs="+", help="globs of down projections, for a model of no known family")
    parser.add_argument("--shards", type=int, default=1, help="> 1: 95 %% intervals from sequences (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    options = parser.parse_args(argv)
    if len(options.checkpoints) > 2:
        raise CommandError(f"one or two checkpoints, got {len(options.checkpoints)}: use `report` for many runs.")
    measured = _measure(options)
    if len(measured) == 1:
        print("\n".join(table(measured[0])))
    else:
        print("\n".join(side_by_side(*measured)))
    for note in dict.fromkeys(note for one in measured for note in one.notes):
        print(f"note: {note}")
    for one in measured:
        print(f"records: {one.folder}")
    return 0


def _measure(options: argparse.Namespace) -> list[Measured]:
    from lightning_spectral.data.corpus import Corpus
    from lightning_spectral.data.files import find_files
    from lightning_spectral.training.measure import measure_checkpoint

    try:
        corpus = Corpus(find_files(options.data).all, options.text_column)
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
                num_jackknife_groups=options.shards,
                device=options.device,
            )
            for number, checkpoint in enumerate(options.checkpoints, start=1)
        ]
    except (ValueError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error


def table(measured: Measured) -> Iterable[str]:
    """One row a site and bucket, medians over the layers."""
    first = measured.spectral[0]
    layers = len({record.layer for record in measured.spectral})
    yield f"{measured.checkpoint}: FFN width D = {first.width}, medians over {layers} layers"
    yield f"{'site':<6}{'bucket':<8}{'soft rank':>11}{'hard rank':>11}{'N/D':>9}{'loss':>9}  status"
    for (site, bucket), rows in _cells(measured).items():
        loss = _loss(measured, bucket)
        yield (
            f"{site:<6}{bucket:<8}{_text(_median(rows, 'soft_rank'), 2):>11}{_text(_median(rows, 'hard_rank'), 2):>11}"
            f"{_text(_median(rows, 'tokens_per_dim'), 1):>9}{_text(loss, 3):>9}  {_worst(rows)}"
        )


def side_by_side(first: Measured, second: Measured) -> Iterable[str]:
    """Both checkpoints and the ratio second / first."""
    for number, one in enumerate((first, second), start=1):
        layers = len({record.layer for record in one.spectral})
        yield f"{number}: {one.checkpoint}: FFN width D = {one.spectral[0].width}, medians over {layers} layers"
    yield f"{'site':<6}{'bucket':<8}{'metric':<11}{'1':>10}{'2':>10}{'2 / 1':>9}  status 1, 2"
    cells = _cells(first), _cells(second)
    for key in (key for key in cells[0] if key in cells[1]):
        rows = cells[0][key], cells[1][key]
        statuses = f"{_worst(rows[0])}, {_worst(rows[1])}"
        for metric in ("soft_rank", "hard_rank"):
            values = _median(rows[0], metric), _median(rows[1], metric)
            yield f"{key[0]:<6}{key[1]:<8}{metric:<11}{_pair(values, 2)}  {statuses}"
        if key[0] == "post":
            yield f"{key[0]:<6}{key[1]:<8}{'loss':<11}{_pair((_loss(first, key[1]), _loss(second, key[1])), 3)}"


def _cells(measured: Measured) -> dict[tuple[str, str], list[SpectralRecord]]:
    return {
        (site, bucket): rows
        for site in ("post", "pre")
        for bucket in _BUCKETS
        if (rows := [r for r in measured.spectral if (r.site, r.bucket) == (site, bucket)])
    }


def _pair(values: tuple[float | None, float | None], digits: int) -> str:
    first, second = values
    ratio = second / first if first and second is not None else None
    return f"{_text(first, digits):>10}{_text(second, digits):>10}{_text(ratio, 3):>9}"


def _loss(measured: Measured, bucket: str) -> float | None:
    return next((record.loss for record in measured.losses if record.bucket == bucket), None)


def _worst(rows: list[SpectralRecord]) -> str:
    return min((record.status for record in rows), key=STATUSES.index)


def _median(rows: list[SpectralRecord], name: str) -> float | None:
    known = [value for record in rows if (value := getattr(record, name)) is not None]
    return median(known) if known else None


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
