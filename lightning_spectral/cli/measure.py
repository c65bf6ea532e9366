"""``lightning-spectral measure CHECKPOINT ... --data TEXT``: the ranks of finished models on any text."""

from __future__ import annotations

import argparse
import zipfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_spectral.cli.parser import VerbParser, at_least, data_files
from lightning_spectral.records import STATUSES, SpectralRecord
from lightning_spectral.text import CommandError
from lightning_spectral.text.tables import Column, Table, add_format_option, aside, print_table

if TYPE_CHECKING:
    from lightning_spectral.data.corpus import Corpus
    from lightning_spectral.training.measure import Measured

HINTS = """globs of down projections (and up projections) in blocks of which the structure is not understood; all others
are measured as without"""
_STEPS = """\
The step of a checkpoint is read from trainer_state.json, else from its name: step1000, step-8.ckpt, checkpoint-500,
global_step12, iter_100, stage1-step10000-tokens42B, or 1000 in a folder `steps`. Any other number is none
(revision-1000, 1000): link it as step-1000. Three or more in one folder with different steps are one curve."""
_BUCKETS = ("pooled", "head", "mid", "tail")


_FILE = "the text is read from a file: write it into one, `--data my.txt`."
_ELSEWHERE = {
    **dict.fromkeys(("--text", "--texts", "--prompt"), _FILE),
    **dict.fromkeys(("--dtype", "--precision"), "a model is measured in fp32, whatever its weights are saved in."),
    "--layers": "layers are chosen by the names of their modules, `--modules 'transformer.h.3.*'`.",
    **dict.fromkeys(("--context", "--max_length", "--block_size"), "it is called `--seq_length` here."),
    **dict.fromkeys(("--num_tokens", "--max_tokens"), "it is called `--tokens` here."),
    "--bucket": "every bucket is measured; `fit` and `report` choose, `--where bucket=tail`.",
}


def main(argv: list[str]) -> int:
    """Run the verb; 0 done, 2 bad input."""
    parser = VerbParser(
        "measure",
        epilog=_STEPS,
        elsewhere=_ELSEWHERE,
        description="Ranks of checkpoints on a text: no training loop, the records of a run. One or two are shown side "
        "by side; of more, every model (the folder around its steps) becomes a run folder, and a second call goes on.",
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a litgpt folder (lit_model.pth), a .ckpt of `pretrain`, a Hugging Face folder with safetensors; a glob "
        "or a folder of them",
    )
    parser.add_argument("--data", required=True, help="a .txt, .jsonl or .parquet file, a glob, or a folder")
    parser.add_argument("--out", type=Path, default=Path("out/measure"), metavar="DIR", help="default: out/measure")
    parser.add_argument("--counts", type=Path, help="token counts for HEAD, MID, TAIL (default: of the measured text)")
    parser.add_argument("--tokenizer_dir", type=Path, help="default: the checkpoint's own")
    parser.add_argument("--text_column", default="text", help="column or key of the text (default: text)")
    parser.add_argument("--tokens", type=at_least(1), default=65_536, help="how many to measure (default: 65536)")
    parser.add_argument("--seq_length", type=at_least(1), help="default: what the model takes, at most 512")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="sequences per forward pass (default: 8)")
    parser.add_argument("--sites", nargs="+", choices=["pre", "post"], default=["post"], help="default: post")
    parser.add_argument("--modules", nargs="+", help="globs of down projections to measure instead of all")
    parser.add_argument("--hints", nargs="+", metavar="DOWN[,UP]", help=HINTS)
    parser.add_argument(
        "--shards",
        type=at_least(1),
        default=2,
        help="of sequences: 2 for unbiased ranks (default), 8 for useful intervals",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--memory_limit_mib", type=float, help="of the rows (default: a quarter of what is free)")
    parser.add_argument(
        "--stream_weights", action="store_true", default=None, help="one block in memory (default: of large models)"
    )
    parser.add_argument("--workers", type=at_least(1), help="models side by side (default: 1; on Ray, what it takes)")
    parser.add_argument("--launcher", choices=["local", "ray"], default="local", help="of a series (default: local)")
    add_format_option(parser)
    options = parser.parse_args(argv)
    with parser.own_words():
        try:
            return _measured(options)
        except CommandError as error:
            raise CommandError(_of_measure(str(error))) from error


def _of_measure(said: str) -> str:
    """What concerns a training, in the words of this verb."""
    said = said.replace("or count the training's own tokens: `counts='stream'`", "or leave it out: then of this text")
    return said.replace("give another `dirpath` (of `observe`: `out`)", "give another folder as `out`")


def _measured(options: argparse.Namespace) -> int:
    """Measure and print."""
    data_files(options.data)
    checkpoints = _found(options.checkpoints)
    for path in checkpoints:
        _refuse_other_things(path)
    if len(checkpoints) > 2:
        return _series(checkpoints, options)
    if options.launcher != "local":
        raise CommandError(f"`--launcher {options.launcher}` is for a series of three checkpoints or more.")
    measured = _measure(checkpoints, options)
    print_table(table(measured[0]) if len(measured) == 1 else side_by_side(*measured), options.format)
    out = aside(options.format)
    for note in dict.fromkeys(note for one in measured for note in one.notes):
        print(f"note: {note}", file=out)
    for one in measured:
        print(f"records: {one.folder}", file=out)
    return 0


def _found(named: list[str]) -> list[Path]:
    """Checkpoints as they were named; globs and folders of checkpoints are looked into."""
    from lightning_spectral.training.checkpoint_names import find_checkpoints

    paths = [Path(name).expanduser() for name in named]
    if len(paths) <= 2 and all(path.is_file() or (path.is_dir() and not _holds_checkpoints(path)) for path in paths):
        return paths
    try:
        return find_checkpoints(named)
    except FileNotFoundError as error:
        raise CommandError(str(error)) from error


def _refuse_other_things(path: Path) -> None:
    """What is no checkpoint by its name is said before torch is imported."""
    marks = ("lit_model.pth", "config.json", "model_config.yaml")
    by_name = path.suffix in (".ckpt", ".safetensors") or path.name in marks
    if not (by_name if path.is_file() else any((path / mark).is_file() for mark in marks)):
        raise CommandError(
            f"`{path}` is no checkpoint that can be read: expected a litgpt folder (`lit_model.pth`, "
            "`model_config.yaml`), a Lightning `.ckpt` file of `lightning-spectral pretrain`, or a Hugging Face folder "
            "(`config.json`, `*.safetensors`)."
        )
    weights = path if path.is_file() else path / "lit_model.pth"
    if weights.suffix in (".pth", ".ckpt") and weights.is_file() and not _is_whole(weights):
        raise CommandError(f"`{weights}` cannot be read, it is incomplete or corrupted, or no file of `torch.save`.")


def _is_whole(file: Path) -> bool:
    """Whether it can be of ``torch.save``, by its first bytes; of the zip that it writes today, by its end, too."""
    with file.open("rb") as handle:
        start = handle.read(2)
    return zipfile.is_zipfile(file) if start == b"PK" else start[:1] == b"\x80"


def _holds_checkpoints(folder: Path) -> bool:
    from lightning_spectral.training.checkpoint_names import find_checkpoints

    try:
        return find_checkpoints([str(folder)]) != [folder]
    except FileNotFoundError:
        return False


def _corpus(options: argparse.Namespace) -> Corpus:
    from lightning_spectral.data.corpus import Corpus

    return Corpus(data_files(options.data).all, options.text_column)


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "counts": options.counts,
        "tokenizer_dir": options.tokenizer_dir,
        "num_tokens": options.tokens,
        "seq_length": options.seq_length,
        "batch_size": options.batch_size,
        "sites": options.sites,
        "modules": options.modules,
        "hints": options.hints,
        "num_jackknife_groups": options.shards,
        "device": options.device,
        "memory_limit_mib": options.memory_limit_mib,
        "stream_weights": options.stream_weights,
    }


def _series(checkpoints: list[Path], options: argparse.Namespace) -> int:
    """More than two: run folders that `fit` and `report` read, and one line per checkpoint."""
    from lightning_spectral.probe.guard import DeliberateError
    from lightning_spectral.records import read_spectral
    from lightning_spectral.sweep.launchers import calls_on_ray
    from lightning_spectral.training.checkpoint_names import why_no_curve
    from lightning_spectral.training.measure_series import measure_series

    out = aside(options.format)
    for sentence in why_no_curve(checkpoints):
        print(f"note: {sentence}", file=out)
    try:
        result = measure_series(
            checkpoints,
            _corpus(options),
            options.out,
            workers=options.workers or 1,
            spread=partial(calls_on_ray, workers=options.workers) if options.launcher == "ray" else None,
            report=lambda line: print(line, file=out, flush=True),
            **_arguments(options),
        )
    except (ValueError, FileNotFoundError, DeliberateError) as error:
        raise CommandError(str(error)) from error
    found = [(folder, record) for folder in result.folders for record in read_spectral(folder).records]
    print_table(series_table(found, options.out), options.format)
    for checkpoint, reason in result.failed:
        print(f"not measured: {checkpoint}: {reason}", file=out)
    print(f"records: {options.out} (`lightning-spectral fit {options.out}/*`, `report {options.out}/*`)", file=out)
    return 2 if result.failed else 0


def series_table(found: list[tuple[Path, SpectralRecord]], out: Path) -> Table:
    """One row per model, step and site: all tokens, medians over the layers."""
    rows = []
    for key in dict.fromkeys((folder, record.step, record.site) for folder, record in found):
        own = [r for folder, r in found if (folder, r.step, r.site) == key and r.bucket == "pooled"]
        medians = (_median(own, name) for name in ("soft_rank", "hard_rank", "tokens_per_dim"))
        rows.append([str(key[0].relative_to(out)), own[0].width, key[1], key[2], *medians, _worst(own)])
    columns = (
        *("model", "D", "step", "site"),
        Column("soft rank", ".2f", "soft_rank"),
        Column("hard rank", ".2f", "hard_rank"),
        Column("N/D", ".1f", "tokens_per_dim"),
        "status",
    )
    return Table(columns, rows, "all tokens, medians over layers")


def _measure(checkpoints: list[Path], options: argparse.Namespace) -> list[Measured]:
    from lightning_spectral.probe.guard import DeliberateError
    from lightning_spectral.training.measure import measure_checkpoint

    try:
        corpus, two = _corpus(options), len(checkpoints) == 2
        return [
            measure_checkpoint(
                checkpoint,
                corpus,
                options.out / f"{number}_{checkpoint.stem}" if two else options.out,
                **_arguments(options),
            )
            for number, checkpoint in enumerate(checkpoints, start=1)
        ]
    except (ValueError, FileNotFoundError, DeliberateError) as error:
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
