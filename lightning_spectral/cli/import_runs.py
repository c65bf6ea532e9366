"""``lightning-spectral import LOGS --out RUNS``: logs of others as run folders, to fit, compare and report."""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_spectral.cli import inputs
from lightning_spectral.cli.parser import VerbParser
from lightning_spectral.records import RUN_FILE
from lightning_spectral.text import CommandError, as_name, folders_below

if TYPE_CHECKING:
    from lightning_spectral.analysis.foreign import ForeignRun

_EPILOG = """\
examples:
  lightning-spectral import paper_run_logs --manifest run_metadata.csv --out out/paper
  lightning-spectral import tb_logs --width-from "d(\\d+)" --optimizer AdamW --out out/tb
  lightning-spectral import export.csv --width 3072 --tag "ranks/(?P<metric>hard_rank)/(?P<layer>\\d+)" --out out/wandb

Known without --tag: the tags that our callbacks log, `loss`, `train_loss`, `val/loss` and the like. A manifest is a CSV
with a row per run: run_id, name or log_dir, ffn_hidden_dim (or width), optimizer, seed; other columns become labels
where they differ."""

_WIDTHS = ("width", "ffn_hidden_dim", "ffn_width", "intermediate_size", "d_ff")
_NO_LABEL = {"run_id", "name", "log_dir", "notes", "config_path", "seed", "optimizer", "width_multiplier", *_WIDTHS}


def main(argv: list[str]) -> int:
    """Read logs, and write a run folder for each run."""
    parser = VerbParser(
        "import",
        description="Write run folders from the paper's raw logs, TensorBoard event files or exports of W&B.",
        epilog=_EPILOG,
    )
    parser.add_argument("inputs", nargs="+", metavar="LOGS", help="files, or folders that hold them at any depth")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write the run folders")
    parser.add_argument("--manifest", metavar="FILE", help="CSV that says what each run is")
    parser.add_argument("--width", type=int, metavar="D", help="FFN hidden size of all runs")
    parser.add_argument("--width-from", metavar="REGEX", help="expression whose first group is the width in a name")
    parser.add_argument("--optimizer", default="", help="optimizer of all runs")
    parser.add_argument("--seed", type=int, help="seed of all runs")
    parser.add_argument("--tag", metavar="REGEX", help="what a tag is: groups metric, stage, site, bucket, layer")
    options = parser.parse_args(argv)
    folder = inputs.out_folder(options.out)
    assert folder is not None

    from lightning_spectral.analysis.foreign import manifest_rows, read_foreign

    rows = inputs.guarded(lambda: manifest_rows(options.manifest)) if options.manifest else []
    below = (folder for path in options.inputs if Path(path).is_dir() for folder in folders_below(Path(path)))
    ours = next((folder for folder in below if (folder / RUN_FILE).is_file()), None)
    if ours is not None:
        raise CommandError(f"`{ours}` is a run folder already: give it to `fit`, `compare` or `report` as it is.")
    found = [run for path in options.inputs for run in inputs.guarded(partial(read_foreign, path, options.tag))]
    names = [run.name for run in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CommandError(f"two of the inputs hold a run `{twice}`: import them into folders of their own.")
    about = [about_of(run, rows, options) for run in found]
    for run in found:  # all of them before the first is written
        inputs.guarded(partial(refuse_unwritable, run, folder))
    for run, (width, labels) in zip(found, about, strict=True):
        inputs.guarded(partial(write, run, folder, width, labels))
    print_left_out(found)
    steps = len({number.step for run in found for number in run.numbers})
    print(f"wrote {len(found)} run folders to {folder} ({steps} steps); next: lightning-spectral report {folder}")
    return 0


def print_left_out(found: list[ForeignRun]) -> None:
    """What of the logs is in no record, on stderr."""
    for why, count in sum((run.left_out for run in found), Counter[str]()).items():
        print(f"note: {count} numbers were left out: {why}.", file=sys.stderr)
    names = list(dict.fromkeys(name for run in found for name in run.unread))
    if names:
        more = ", ..." if len(names) > 6 else ""
        some = ", ".join(f"`{name}`" for name in names[:6])
        print(f"note: not known here and left out: {some}{more} (--tag says what a tag is).", file=sys.stderr)


def about_of(run: ForeignRun, rows: list[dict[str, str]], options: argparse.Namespace) -> tuple[int, dict[str, str]]:
    """Width and labels of a run, by the options or the manifest.

    Raises:
        CommandError: If nothing says how wide it is.
    """
    from lightning_spectral.analysis.foreign import row_of

    row: Mapping[str, str] = row_of(run, rows) or {}
    width = options.width or next((int(row[name]) for name in _WIDTHS if row.get(name, "").isdigit()), None)
    if width is None and options.width_from:
        match = inputs.guarded(lambda: _search(options.width_from, run))
        width = int(match) if match and match.isdigit() else None
    if width is None:
        known = "no row of the manifest is about it" if rows else "give --width, --width-from or --manifest"
        raise CommandError(f"the FFN width of `{run.name}` is not known: {known}.")
    # `optimizer_folder`, `optimizer_display_name`, ... are other names of the optimizer
    free = [name for name in row if name not in _NO_LABEL and not name.startswith("optimizer_")]
    labels = {name: row[name] for name in free if row[name] and len({other.get(name) for other in rows}) > 1}
    optimizer = options.optimizer or row.get("optimizer", "")
    seed = str(options.seed) if options.seed is not None else row.get("seed", "")
    return width, labels | {"optimizer": optimizer} | ({"seed": seed} if seed.isdigit() else {})


def _search(pattern: str, run: ForeignRun) -> str | None:
    try:
        found = re.search(pattern, f"{run.place}/{run.name}")
        return found[1] if found else None
    except (re.error, IndexError) as error:
        raise ValueError(f"--width-from `{pattern}` is no expression with a group: {error}.") from error


def refuse_unwritable(run: ForeignRun, folder: Path) -> None:
    """A run that is there already, or has no rank.

    Raises:
        ValueError: If it is one of these.
    """
    own = folder / as_name(run.name)
    if (own / RUN_FILE).exists():
        raise ValueError(f"`{own}` already holds a run; give another --out.")
    if all(number.metric in ("loss", "accuracy") for number in run.numbers):
        raise ValueError(f"`{run.place}` holds losses of `{run.name}`, but no rank: there is nothing to fit (--tag).")


def write(run: ForeignRun, folder: Path, width: int, labels: dict[str, str]) -> None:
    """One run folder."""
    from lightning_spectral.analysis.foreign import loss_records, spectral_records
    from lightning_spectral.records import (
        LOSSES_FILE,
        SPECTRAL_FILE,
        RunInfo,
        append_records,
        write_run,
    )

    own = folder / as_name(run.name)
    records, losses = spectral_records(run, width), loss_records(run)
    created = datetime.datetime.fromtimestamp(run.place.stat().st_mtime, datetime.timezone.utc)
    conventions = {"imported_from": run.source}
    info = RunInfo(
        run.name,
        created.isoformat(timespec="seconds"),
        labels.get("optimizer", ""),
        int(labels["seed"]) if "seed" in labels else None,
        labels={name: value for name, value in labels.items() if name != "seed" and value},
        conventions=conventions,
    )
    own.mkdir(parents=True, exist_ok=True)
    append_records(own / SPECTRAL_FILE, records)
    append_records(own / LOSSES_FILE, losses)
    write_run(own, info)  # last: a folder without it is no run
