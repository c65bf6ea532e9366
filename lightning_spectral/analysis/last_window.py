"""The last training window of a run as a table: what ``pretrain`` prints and a notebook shows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from lightning_spectral import records
from lightning_spectral.text.tables import Column, Table

_COLUMNS = (
    "bucket",
    Column("soft rank", ".2f", "soft_rank"),
    Column("hard rank", ".2f", "hard_rank"),
    Column("N/D", ".1f", "tokens_per_dim"),
    Column("loss", ".3f"),
    "status",
)


def summary(run_folder: Path) -> Table | None:
    """The last training window: one row per bucket, ranks as medians over the layers; ``None`` without records."""
    records_of_window = _last_window(run_folder)
    if not records_of_window:
        return None
    losses = _last_losses(run_folder)
    step, width = records_of_window[0].step, records_of_window[0].width
    layers = len({record.layer for record in records_of_window})
    title = f"last window: step {step}, FFN width D = {width}, after the nonlinearity, medians over {layers} layers"
    rows = []
    known = [records.POOLED, *records.BUCKETS]
    others = [r.bucket for r in records_of_window if r.bucket not in known]  # positions, or the user's own
    for bucket in dict.fromkeys([*known, *others]):
        mine = [record for record in records_of_window if record.bucket == bucket]
        if mine:
            medians = [_median(getattr(r, name) for r in mine) for name in ("soft_rank", "hard_rank", "tokens_per_dim")]
            worst = min((r.status for r in mine), key=records.STATUSES.index)
            rows.append([bucket, *medians, losses.get(bucket), worst])
    return Table(_COLUMNS, rows, title)


def _last_window(run_folder: Path) -> list[records.SpectralRecord]:
    path = run_folder / records.SPECTRAL_FILE
    if not path.is_file():
        return []
    found = [r for r in records.read_spectral(path).records if r.stage == "train" and r.site == "post"]
    last = max((record.step or 0 for record in found), default=None)
    return [record for record in found if record.step == last]


def _last_losses(run_folder: Path) -> dict[str, float | None]:
    path = run_folder / records.LOSSES_FILE
    if not path.is_file():
        return {}
    found = [record for record in records.read_losses(path).records if record.stage == "train"]
    last = max((record.step or 0 for record in found), default=None)
    return {record.bucket: record.loss for record in found if record.step == last}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
