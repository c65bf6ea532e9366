"""The last window of a run as a table: what ``pretrain`` prints and a notebook shows."""

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
    """The last window: one row per bucket, ranks as medians over the layers; ``None`` without records.

    It is one of training, where training was measured, else of validation, of test, and so on; after the nonlinearity,
    where that was measured.
    """
    records_of_window = _last_window(run_folder)
    if not records_of_window:
        return None
    step, width, stage = records_of_window[0].step, records_of_window[0].width, records_of_window[0].stage
    losses = _last_losses(run_folder, stage)
    layers = len({record.layer for record in records_of_window})
    where = "after" if records_of_window[0].site == "post" else "before"
    title = (
        f"last window{'' if stage == 'train' else f' of {stage}'}: step {step}, FFN width D = {width}, "
        f"{where} the nonlinearity, medians over {layers} layers"
    )
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
    found = records.read_spectral(path).records
    shown = min(map(_precedence, found), default=None)
    found = [record for record in found if _precedence(record) == shown]
    last = max((record.step or 0 for record in found), default=None)
    return [record for record in found if record.step == last]


def _precedence(record: records.SpectralRecord) -> tuple[int, bool]:
    stage = records.STAGES.index(record.stage) if record.stage in records.STAGES else len(records.STAGES)
    return stage, record.site != "post"


def _last_losses(run_folder: Path, stage: str) -> dict[str, float | None]:
    path = run_folder / records.LOSSES_FILE
    if not path.is_file():
        return {}
    found = [record for record in records.read_losses(path).records if record.stage == stage]
    last = max((record.step or 0 for record in found), default=None)
    return {record.bucket: record.loss for record in found if record.step == last}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
