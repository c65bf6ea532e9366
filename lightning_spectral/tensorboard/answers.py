"""What the page draws, as values that JSON can say. Medians and exponents are those of ``analysis``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.points import nanmedian
from lightning_spectral.analysis.spectra import read_spectrum, spectrum_files
from lightning_spectral.records import STATUSES
from lightning_spectral.records.looks import METRIC_NAMES, bucket_colors, bucket_name, optimizer_colors, ordered_buckets
from lightning_spectral.tensorboard.reader import LOSS_METRICS, LOSS_SITE, METRICS, Columns, RunReader

MAX_SPECTRA: Final = 200  # windows of one slider
MAX_MODES: Final = 240  # points of one spectrum, evenly spaced on a log axis
SMALLEST_SHARE: Final = 1e-9  # what is below it is rounding of the fp32 products

Answer = dict[str, Any]


def overview(name: str, reader: RunReader) -> Answer:
    """One line of the list of runs."""
    info = reader.info
    labels = dict(info.labels) if info else {}
    return {
        "name": name,
        "width": reader.width,
        "run_id": info.run_id if info else "",
        "optimizer": labels.get("optimizer") or (info.optimizer if info else ""),
        "seed": labels.get("seed", info.seed if info else None),
        "finished": info.finished if info else None,
    }


def choices(reader: RunReader) -> Answer:
    """Stages, sites, metrics and layers that the run has."""
    ranks = {key: rows for key, rows in reader.columns.items() if key[1] != LOSS_SITE}
    measured = {name for rows in ranks.values() for name, column in rows.values.items() if not _is_empty(column)}
    known = [name for name in METRICS if name in measured]
    losses = {name for (_, site), rows in reader.columns.items() if site == LOSS_SITE for name in rows.values}
    return {
        "stages": list(dict.fromkeys(stage for stage, _ in ranks)),
        "sites": sorted({site for _, site in ranks}),
        "metrics": known + sorted(measured - set(METRICS)) + [name for name in LOSS_METRICS if name in losses],
        "layers": sorted({name for rows in ranks.values() for name in rows.layer_names}),
        "buckets": ordered_buckets(name for rows in reader.columns.values() for name in rows.bucket_names),
    }


def curves(reader: RunReader, stage: str, site: str, metric: str) -> Answer:
    """Median over layers by bucket and window, with the smallest and largest layer and the worst status.

    Returns:
        ``steps`` (T), ``tokens`` (T, null where not counted), ``buckets``: name -> ``median``, ``low``, ``high``,
        ``status`` (T each), ``alarms`` of this metric, the ``stage`` that the numbers are of, and :func:`choices`.
    """
    key = _loss_key(reader, stage) if metric in LOSS_METRICS else (stage, site)
    rows = reader.columns.get(key) or Columns()
    steps, tokens, values, statuses = rows.dense(metric)
    buckets = {}
    for name, place in rows.bucket_names.items():
        buckets[name] = {
            "median": _numbers(nanmedian(values[place], axis=-1)),
            "low": _numbers(_over_layers(values[place], np.nanmin)),
            "high": _numbers(_over_layers(values[place], np.nanmax)),
            "status": _worst(statuses[place], list(rows.status_names)),
        }
    alarms = [
        {"step": alarm.step, "bucket": alarm.bucket, "message": alarm.message}
        for alarm in reader.alarms
        if (alarm.stage, alarm.site, alarm.metric) == (stage, site, metric)
    ]
    return {
        "steps": steps.tolist(),
        "tokens": _numbers(tokens),
        "width": reader.width,
        "buckets": {name: buckets[name] for name in ordered_buckets(buckets)},
        "alarms": alarms,
        "stage": key[0],
        "skipped": reader.skipped,
        "choices": choices(reader),
    }


def layers(reader: RunReader, stage: str, site: str, metric: str, bucket: str) -> Answer:
    """One bucket by layer and window: ``steps`` (T), ``tokens``, ``layers`` (L), ``values`` and ``status`` (L, T)."""
    rows = reader.columns.get((stage, site)) or Columns()
    steps, tokens, values, statuses = rows.dense(metric)
    if bucket not in rows.bucket_names:
        return {"steps": [], "tokens": [], "layers": [], "values": [], "status": []}
    place = rows.bucket_names[bucket]
    order = sorted(rows.layer_names)
    index = [rows.layer_names[name] for name in order]
    names = [*rows.status_names, ""]  # -1: there is no record
    return {
        "steps": steps.tolist(),
        "tokens": _numbers(tokens),
        "layers": order,
        "values": [_numbers(values[place, :, layer]) for layer in index],
        "status": [[names[code] for code in statuses[place, :, layer]] for layer in index],
    }


def spectra(folder: Path, stage: str, site: str, bucket: str, layer: str) -> Answer:
    """Normalised eigenvalues of one layer at every window that saved them.

    Returns:
        ``steps`` (T), ``modes`` (T, M) counted from 1, ``shares`` (T, M) of the variance, ``soft``, ``hard`` rank (T).
    """
    files = spectrum_files(folder, stage)
    steps = list(files)
    if len(steps) > MAX_SPECTRA:
        steps = [steps[place] for place in np.unique(np.linspace(0, len(steps) - 1, MAX_SPECTRA).astype(int))]
    out: Answer = {"steps": [], "modes": [], "shares": [], "soft": [], "hard": []}
    stack, _, place = layer.rpartition(" ")  # a model's second and further stacks are named
    for step in steps:
        eigs = read_spectrum(files[step], place, site, bucket, stack=stack)
        if eigs is None:
            continue
        p = eigs / eigs.sum()
        modes = np.unique(np.geomspace(1, len(p), MAX_MODES).round().astype(int))
        shares = p[modes - 1]
        seen = shares > SMALLEST_SHARE
        positive = p[p > 0]
        out["steps"].append(step)
        out["modes"].append(modes[seen].tolist())
        out["shares"].append(shares[seen].tolist())
        out["soft"].append(float(np.exp(-(positive * np.log(positive)).sum())))
        out["hard"].append(float(1 / (p**2).sum()))
    return out


def exponents(folders: Sequence[Path], stage: str, site: str, metric: str) -> Answer:
    """Width exponent at every window, for each optimizer (and other label) that has two widths; nothing is smoothed.

    Returns:
        ``series``: ``name``, ``color``, ``bucket``, ``steps``, ``beta``, ``low``, ``high`` (95 % over widths),
        ``widths``, ``seeds``; and ``message``, why there is none.
    """
    from lightning_spectral.analysis.reading import load_runs
    from lightning_spectral.analysis.trajectory import beta_trajectories

    try:
        runs = load_runs(folders, stage)
        paths = beta_trajectories(runs, metrics=(metric,), smoothing=1)
    except (ValueError, OSError) as error:
        return {"series": [], "message": str(error)}
    out = []
    for path in paths:
        *series, own_site, bucket, _ = path.series
        if own_site != site or not np.isfinite(path.beta).any():
            continue
        out.append(
            {
                "name": " ".join(filter(None, series)),
                "bucket": bucket,
                "steps": path.steps.tolist(),
                "beta": _numbers(path.beta),
                "low": _numbers(path.low),
                "high": _numbers(path.high),
                "widths": path.num_widths,
                "seeds": path.num_seeds,
            }
        )
    colors = optimizer_colors(one["name"] for one in out)
    for one in out:
        one["color"] = colors[one["name"]]
    widths = sorted({run.width for run in runs.runs})
    message = "" if out else f"An exponent needs runs of two widths that share windows; selected: {_words(widths)}."
    return {"series": out, "message": message}


def looks(buckets: Sequence[str]) -> Answer:
    """Names and colours."""
    names = {bucket: bucket_name(bucket) for bucket in buckets}
    return {"colors": bucket_colors(buckets), "buckets": names, "metrics": METRIC_NAMES}


def _words(widths: Sequence[int]) -> str:
    return ", ".join(f"D = {width}" for width in widths) or "none"


def _loss_key(reader: RunReader, stage: str) -> tuple[str, str]:
    """Losses of the stage, else of the first stage that has some: ranks may be of training, losses of validation."""
    known = [key for key in reader.columns if key[1] == LOSS_SITE]
    return (stage, LOSS_SITE) if (stage, LOSS_SITE) in known or not known else known[0]


def _worst(statuses_TL: NDArray[np.int64], names: list[str]) -> list[str]:
    severity = [STATUSES.index(name) if name in STATUSES else len(STATUSES) for name in names]
    out = []
    for row in statuses_TL:
        present = [names[code] for code in set(row.tolist()) if code >= 0]
        out.append(min(present, key=lambda name: severity[names.index(name)]) if present else "")
    return out


def _over_layers(values_TL: NDArray[np.float64], reduce: Any) -> NDArray[np.float64]:
    out = np.full(values_TL.shape[0], np.nan)
    known = np.isfinite(values_TL).any(axis=-1) if values_TL.shape[-1] else np.zeros(values_TL.shape[0], dtype=bool)
    if known.any():
        out[known] = reduce(values_TL[known], axis=-1)
    return out


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.tolist()]


def _is_empty(column: Any) -> bool:
    return bool(np.isnan(np.frombuffer(column, dtype=np.float64)).all())
