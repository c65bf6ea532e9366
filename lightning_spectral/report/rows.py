"""What the page says besides its figures: first sentences, cards and the rows of its tables."""

from __future__ import annotations

import math
from typing import Any, Final

from lightning_spectral.analysis.compare import Comparison, with_holm
from lightning_spectral.analysis.fits import PowerLawFit
from lightning_spectral.analysis.points import LAYER_MEDIAN
from lightning_spectral.analysis.recipe_facts import learning_rate
from lightning_spectral.analysis.runs import Run
from lightning_spectral.records.looks import bucket_name, metric_name
from lightning_spectral.report.scene import ReportData, beta_text, joined
from lightning_spectral.report.style import shown_name

_SHOWN_KINDS: Final = (
    "slope_difference",
    "slope_difference_pre_decay",
    "level_difference",
    "crossover_width",
    "decay_change",
    "matched_loss_slope",
    "effect",
)

# differences of the headline table
_GAPS: Final = ("slope_difference", "slope_difference_pre_decay")


def summary_sentences(scene: ReportData) -> list[str]:
    """The first sentences: the exponents of the headline bucket, and the difference clearest against its noise."""
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    what = f"{focus_name(scene)} {metric_name(metric)}"
    fits = [(scene.looks[key].name, scene.fit(key, scene.focus, metric)) for key in scene.series]
    plain = {scene.looks[key].name for key in scene.plain}
    if len(scene.runs.runs) == 1:
        return ["One run: how its ranks grow with width is not known until it is run at other widths (last section)."]
    if not scene.fitted.fits:
        return ["Exponents as they were published: there are no points to fit, so their intervals are the table's."]
    parts = [f"{name} {beta_text(fit)}" for name, fit in fits if fit and not fit.refused and name in plain]
    if not parts:
        return [f"No exponent of {what} could be fitted: {joined(sorted({_reason(fit) for _, fit in fits if fit}))}."]
    return [f"{what} grows with width as D^beta: {joined(parts)}.", comparison_headline(scene)]


def _reason(fit: PowerLawFit) -> str:
    return fit.status.removeprefix("refused:").replace("_", " ")


def comparison_headline(scene: ReportData) -> str:
    """Which slopes are separated, with interval and p."""
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    # learning rates beside the main one are no claims: a section of their own shows them
    plain = {" ".join(filter(None, key)) for key in scene.plain}
    compared = [c for c in scene.compared("slope_difference", scene.focus, metric) if set(scene.sides(c)) <= plain]
    found = with_holm([c for c in compared if math.isfinite(c.p)])
    if not found:
        return "No two series could be compared."
    best = min(found, key=lambda c: c.p)
    names = {" ".join(filter(None, key)): look.name for key, look in scene.looks.items()}
    a, b = (names.get(side, shown_name(side)) for side in scene.sides(best))
    a, b, sign = (a, b, 1) if best.estimate >= 0 else (b, a, -1)
    low, high = sorted((sign * best.ci_low, sign * best.ci_high))
    corrected = f" (corrected for {len(found)} pairs: {best.p_holm:.2g})" if len(found) > 1 else ""
    gap = f"by {sign * best.estimate:.2f} [{low:.2f}, {high:.2f}], p = {best.p:.2g}{corrected}"
    separated = sum(c.separated for c in found)
    if not best.separated:
        return f"No slopes are separated; the clearest gap, {a} above {b} {gap}, may be noise."
    more = f"; {separated} of {len(found)} pairs are separated" if len(found) > 1 else ""
    return f"The slope of {a} exceeds that of {b} {gap}{more}."


def headline_rows(scene: ReportData) -> list[dict[str, Any]]:
    """One row per series: its headline exponent, and everything it must be read with.

    Differences are against the first series (AdamW, if there is one): no choice among pairs, nothing is the best of
    many.
    """
    if not scene.any_fit:
        return []
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    rows = {fit.series: row for row, fit in enumerate(scene.fitted.fits)}
    gaps = {kind: _gaps(scene, metric, kind) for kind in _GAPS}
    out = []
    for key in scene.series:
        fit, look = scene.fit(key, scene.focus, metric), scene.looks[key]
        if fit is None:
            continue
        seeds = f", {fit.num_seeds} seeds" if fit.num_seeds > 1 else ""
        own = {"name": look.name, "color": look.text_color, "row": rows[fit.series], "status": _status(fit)}
        own |= {f"gap_{k}": gaps[kind].get(" ".join(filter(None, key)), "-") for k, kind in enumerate(_GAPS)}
        out.append(_numbers(fit) | own | {"n": f"{fit.num_widths} widths{seeds}"})
    return out


def _gaps(scene: ReportData, metric: str, kind: str) -> dict[str, str]:
    """Series -> its slope minus the first series', with interval."""
    reference = " ".join(filter(None, scene.series[0]))
    out = {reference: ""}
    for c in scene.compared(kind, scene.focus, metric):
        a, b = scene.sides(c)
        if reference in (a, b) and math.isfinite(c.ci_low):
            other, sign = (b, -1) if a == reference else (a, 1)
            low, high = sorted((sign * c.ci_low, sign * c.ci_high))
            out[other] = f"{sign * c.estimate:+.2f} [{low:.2f}, {high:.2f}]"
    return out


def _status(fit: PowerLawFit) -> str:
    return fit.status.replace("_", " ").replace("+", " + ")


def fit_rows(scene: ReportData) -> list[dict[str, Any]]:
    """Rows of the table of exponents: layer medians at the headline's site."""
    by = scene.fitted.table.by
    out = []
    last = None
    order = {key: k for k, key in enumerate(scene.all_series)}
    labels = len(scene.series[0])
    numbered = [(row, fit) for row, fit in enumerate(scene.fitted.fits) if fit.series[-1] == LAYER_MEDIAN]
    for row, fit in sorted(numbered, key=lambda pair: order[pair[1].series[:labels]]):
        cells = dict(zip(by, fit.series, strict=True))
        if cells["site"] != scene.site:
            continue
        shown = {name: cells[name] for name in by if name not in ("layer", "site")}
        look = scene.looks[fit.series[:labels]]
        shown |= {
            "bucket": bucket_name(cells["bucket"]),
            "metric": metric_name(cells["metric"]),
        }
        out.append(
            _numbers(fit)
            | {
                "cells": list(shown.values()),
                "color": look.color,
                "row": row,
                "new": cells[by[0]] != last,
                "n": str(fit.n),
                "method": fit.method,
                "status": _status(fit),
                "widths": f"{fit.x_min:g} to {fit.x_max:g} ({fit.num_widths})",
            }
        )
        last = cells[by[0]]
    return out


def _numbers(fit: PowerLawFit) -> dict[str, Any]:
    return {
        "beta": _text(fit.beta),
        "ci": f"{_text(fit.ci_low)} to {_text(fit.ci_high)}" if math.isfinite(fit.ci_low) else "-",
        "ci_low": _text(fit.ci_low),
        "ci_high": _text(fit.ci_high),
        "ln_a": _text(fit.ln_a),
        "r2": _text(fit.r2),
        "null": _text(fit.null_beta),
        "seeds": f"{_text(fit.seed_low)} to {_text(fit.seed_high)}" if math.isfinite(fit.seed_low) else "-",
        "before": _interval(fit.before_beta, fit.before_low, fit.before_high),
        "before_step": f"{fit.before_step:.0f}" if math.isfinite(fit.before_step) else "",
        "layers": f"{_text(fit.layer_low)} to {_text(fit.layer_high)}" if math.isfinite(fit.layer_low) else "-",
        "loo": f"{_text(fit.loo_low)} to {_text(fit.loo_high)}" if math.isfinite(fit.loo_low) else "-",
        "wide": not fit.refused and fit.wide,
    }


def comparison_rows(scene: ReportData) -> list[dict[str, Any]]:
    """Rows of the table of differences, in the headline's bucket."""
    wanted = {"bucket": scene.focus, "site": scene.site, "layer": LAYER_MEDIAN}
    shown = [
        (row, c)
        for row, c in enumerate(scene.comparisons)
        if c.kind in _SHOWN_KINDS and all(c.where.get(name, value) == value for name, value in wanted.items())
    ]
    # pairs that cannot be compared (too few widths) say nothing: comparisons.csv has them
    useful = [(row, c) for row, c in shown if not c.status.startswith("refused")]
    return [_comparison_row(scene, row, c) for row, c in useful or shown[:20]]


def _comparison_row(scene: ReportData, row: int, c: Comparison) -> dict[str, Any]:
    a, b = scene.sides(c)
    digits = 0 if c.kind == "crossover_width" and c.estimate >= 10 else 3
    ci = f"{_text(c.ci_low, digits)} to {_text(c.ci_high, digits)}" if math.isfinite(c.ci_low) else "-"
    return {
        "a": a,
        "b": b,
        "metric": metric_name(c.where.get("metric", "")),
        "kind": c.kind.replace("_", " "),
        "estimate": _text(c.estimate, digits),
        "ci": ci,
        "p": _text(c.p),
        "p_holm": _text(c.p_holm),
        "status": c.status.replace("_", " "),
        "note": c.note,
        "row": row,
    }


def _interval(value: float, low: float, high: float) -> str:
    return f"{_text(value, 2)} [{_text(low, 2)}, {_text(high, 2)}]" if math.isfinite(value) else ""


def _text(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def headline_name(scene: ReportData) -> str:
    """What the headline is about: TAIL hard rank, where both were measured."""
    metric = "hard_rank" if "hard_rank" in scene.metrics else scene.metrics[0]
    return f"{focus_name(scene)} {metric_name(metric)}"


def focus_name(scene: ReportData) -> str:
    """The headline's bucket, for people."""
    return bucket_name(scene.focus)


def run_summary(run: Run) -> dict[str, Any]:
    """What the provenance table says about one run."""
    return {
        "run_id": run.run_id,
        "optimizer": run.optimizer,
        "width": run.width,
        "seed": run.seed,
        "learning_rate": "" if (rate := learning_rate(run)) is None else rate,
        "windows": len(run.steps),
        "last_step": int(run.steps[-1]),
        "layers": len(run.layers),
        "status": "; ".join(f"{name} {count}" for name, count in sorted(run.status_counts.items())),
        "cpu_s": run.progress.get("cpu_s", ""),
        "wall_s": run.progress.get("wall_s", ""),
        "train_data": run.data_digests.get("train", ""),
        "validation_data": run.data_digests.get("validation", ""),
        "sha256": run.digest,
        "folder": str(run.folder),
    }
