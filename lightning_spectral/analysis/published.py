"""Tables that are no points: ranks at every step, exponents at every step, and exponents without their points.

Columns are known by their names, as those of points are (``tables``): a step column beside a width makes curves, beside
``beta`` an exponent over training; ``beta`` without a step is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.analysis.cells import Sheet, finite, read_sheet
from lightning_spectral.analysis.conditions import condition
from lightning_spectral.analysis.effects import EffectComparison, compare_effects
from lightning_spectral.analysis.points import Point, PointTable
from lightning_spectral.analysis.runs import Problem
from lightning_spectral.analysis.tables import BETA_NAMES, END_NAMES, STEP_NAMES, as_of_runs, ours, recognised
from lightning_spectral.analysis.trajectory import Trajectory, fit_windows

FloatArray = NDArray[np.float64]
Kind = Literal["points", "curves", "betas_over_training", "estimates"]
_RANKS: Final = ("soft_rank", "hard_rank")
_FACTORS: Final = ("head_count", "heads", "n_head", "norm", "positions", "architecture", "model_scale")
MEASURED: Final = ("site", "bucket", "metric")
Series = tuple[str, ...]


@dataclass(frozen=True)
class RankCurve:
    """Rank of one run over training.

    Attributes:
        series: (labels ..., site, bucket, metric).
        width: FFN width.
        seed: Seed, or empty.
        steps: (T,) ascending.
        values: (T,) ranks.
    """

    series: tuple[str, ...]
    width: float
    seed: str
    steps: NDArray[np.int64]
    values: FloatArray


@dataclass(frozen=True)
class Estimate:
    """One exponent without its points.

    Attributes:
        series: (label, site, bucket, metric).
        factor: Level of what else was varied (heads, norm, ...); empty if nothing was.
        beta: The exponent.
        low: Lower end of its interval; NaN if there is none.
        high: Upper end.
        std_err: Standard error, likewise.
        df: Degrees of freedom, likewise.
    """

    series: tuple[str, ...]
    factor: str
    beta: float
    low: float = math.nan
    high: float = math.nan
    std_err: float = math.nan
    df: float = math.nan


Drawn = TypeVar("Drawn", bound=RankCurve | Estimate | Trajectory)


def named_as(drawn: Sequence[Drawn], num_labels: int, known: Sequence[Series]) -> list[Drawn]:
    """The same with as many labels as the points beside them have, and under their name where it is the same.

    Args:
        drawn: Series (labels ..., site, bucket, metric).
        num_labels: Labels of the points.
        known: Labels of each series of points; ``Dion (1/16)`` is the one of ``Dion`` and ``1/16``.
    """
    names = {_plain(labels): labels for labels in known}

    def labels_of(series: Series) -> Series:
        labels = series[:-3]
        if len(labels) != num_labels:
            labels = (" ".join(filter(None, labels)), *[""] * (num_labels - 1))
        return names.get(_plain(labels), labels)

    return [replace(own, series=(*labels_of(own.series), *own.series[-3:])) for own in drawn]


def _plain(labels: Series) -> str:
    return " ".join(filter(None, labels)).replace("(", "").replace(")", "").lower()


def kind_of(table: str | Path | Sheet) -> Kind:
    """What a table holds, by its header, and whether it has several steps."""
    sheet = read_sheet(table)
    names = set(sheet.names)
    step, betas = _first(STEP_NAMES, names), "beta" in names or bool(names & set(BETA_NAMES))
    if step and betas:
        return "betas_over_training"
    if step and recognised(sorted(names)).x in names:
        several = "value" in names and len({row[step] for row in sheet.whole_rows}) > 1
        if names & set(_RANKS) or "metric" in names or several:
            return "curves"
    return "estimates" if betas and "value" not in names else "points"


def read_curves(
    table: str | Path | Sheet, where: Sequence[str] = (), problems: list[Problem] | None = None
) -> list[RankCurve]:
    """Ranks by width and step, from ``soft_rank`` and ``hard_rank`` columns, or ``value`` (and ``metric``).

    Args:
        table: The table.
        where: Conditions on rows.
        problems: Is given a sentence where a run has several ranks at one step, of which the last counts.

    Raises:
        ValueError: If no row holds a step, a width and a positive rank, or a step is no whole number.
    """
    rows, path = _rows(table, where)
    names = list(rows[0]) if rows else []
    columns = recognised(names)
    ranks: list[str] = [name for name in _RANKS if name in names]
    points = [
        Point(
            (
                *(row[name] for name in columns.by if name != "metric"),
                rank if ranks else row.get("metric", "hard_rank"),
            ),
            _number(row, columns.x),
            _number(row, rank),
            seed=row[columns.seed] if columns.seed else "",
            steps=(step,),
        )
        for row in rows
        for rank in ranks or ["value"]
        if (step := _step_of(row, path)) is not None and _number(row, columns.x) > 0 and _number(row, rank) > 0
    ]
    if not points:
        raise ValueError(f"`{path}` holds no row with a step, a width and a rank.")
    by = (*(name for name in columns.by if name != "metric"), "metric")
    found: dict[tuple[tuple[str, ...], float, str], dict[int, float]] = {}
    for point in as_of_runs(PointTable(by, tuple(points), columns.x), "value").points:
        found.setdefault((point.series[:-1], point.x, point.seed), {})[point.steps[0]] = point.value
    again = len(points) - sum(len(own) for own in found.values())
    if again and problems is not None:
        text = f"`{path}` has several ranks of one series, width and seed at one step ({again} more); the last counts."
        problems.append(Problem(str(path), "repeated_steps", text))
    return [
        RankCurve(series, width, seed, np.array(sorted(own)), np.array([own[at] for at in sorted(own)]))
        for (series, width, seed), own in found.items()
    ]


def _step_of(row: Mapping[str, str], path: Path) -> int | None:
    """The step of a row; ``None`` for a blank or a word.

    Raises:
        ValueError: If it lies between two steps.
    """
    name = _first(STEP_NAMES, row)
    step = None if name is None else finite(row[name])
    if step is not None and not step.is_integer():
        raise ValueError(f"`{path}` has the step `{row[name or '']}`: steps are whole numbers of optimizer steps.")
    return None if step is None else int(step)


def _number(row: Mapping[str, str], name: str) -> float:
    """A cell's number; 0 for a blank or a word."""
    return finite(row.get(name)) or 0.0


def paths_of(curves: Sequence[RankCurve]) -> list[Trajectory]:
    """The exponent at every step that all widths of a series share."""
    groups: dict[tuple[str, ...], list[RankCurve]] = {}
    for curve in curves:
        groups.setdefault(curve.series, []).append(curve)
    out = []
    for series, own in groups.items():
        steps = own[0].steps
        for curve in own[1:]:
            steps = np.intersect1d(steps, curve.steps)
        widths = np.log([curve.width for curve in own])
        if len(np.unique(widths)) > 1 and len(steps):
            values = np.stack([curve.values[np.searchsorted(curve.steps, steps)] for curve in own], axis=1)
            out.append(fit_windows(series, steps, widths, values))
    return out


def last_points(curves: Sequence[RankCurve], labels: Sequence[str]) -> PointTable:
    """The last rank of every curve, as the points of a fit."""
    points = (
        Point((*c.series, "median"), c.width, float(c.values[-1]), seed=c.seed, steps=(int(c.steps[-1]),))
        for c in curves
    )
    return PointTable((*labels, *MEASURED, "layer"), tuple(points))


def read_paths(table: str | Path | Sheet, where: Sequence[str] = ()) -> list[Trajectory]:
    """Exponents at every step: columns ``beta_soft`` and ``beta_hard``, or ``beta`` and ``metric``.

    Raises:
        ValueError: If no row holds a step and an exponent.
    """
    rows, path = _rows(table, where)
    found: dict[tuple[str, ...], list[tuple[int, float, float, float]]] = {}
    for row in rows:
        betas = {BETA_NAMES[name]: row[name] for name in BETA_NAMES if name in row}
        betas |= {row.get("metric", "hard_rank"): row["beta"]} if "beta" in row else {}
        for metric, cell in betas.items():
            at, beta = _step_of(row, path), finite(cell)
            if at is not None and beta is not None:
                found.setdefault(_series(row, metric), []).append((at, beta, *_ends_of(row)))
    if not found:
        raise ValueError(f"`{path}` holds no row with a step and an exponent.")
    out = []
    for series, values in found.items():
        steps, slopes, lows, highs = (np.array(column) for column in zip(*sorted(values), strict=True))
        widths = int(finite(rows[0].get("n_widths_hard") or rows[0].get("n_widths")) or 0)
        out.append(Trajectory(series, steps, slopes, lows, highs, widths if np.isfinite(lows).any() else 0, 1))
    return out


def read_estimates(table: str | Path | Sheet, where: Sequence[str] = ()) -> list[Estimate]:
    """Exponents without points, with interval or standard error where the table has them.

    Raises:
        ValueError: If no row holds an exponent.
    """
    rows, path = _rows(table, where)
    factor = next((name for name in _FACTORS if len({row.get(name, "") for row in rows}) > 1), None)
    out = []
    for row in rows:
        beta = finite(row.get("beta"))
        if beta is not None:
            low, high = _ends_of(row)
            std_err, widths = (finite(row.get(name)) for name in ("std_err", "n_widths"))
            level = row[factor] if factor else ""
            df = math.nan if widths is None else widths - 2
            se = math.nan if std_err is None else std_err
            out.append(Estimate(_series(row, row.get("metric", "hard_rank")), level, beta, low, high, se, df))
    if not out:
        raise ValueError(f"`{path}` holds no exponent in a column `beta`.")
    return out


def effect_of(estimates: Sequence[Estimate]) -> EffectComparison | None:
    """The first label's shift of beta against the factor's; ``None`` where a cell or a standard error is missing."""
    slopes = {(" ".join(own.series[:-3]), own.factor): (own.beta, own.std_err, own.df) for own in estimates}
    try:
        return compare_effects(slopes) if all(math.isfinite(se) for _, se, _ in slopes.values()) else None
    except ValueError:
        return None


def shifts_of(estimates: Sequence[Estimate]) -> tuple[float, float] | None:
    """Root mean square shift of beta between labels, and between levels of the factor; noise is not taken off."""
    labels = list(dict.fromkeys(own.series[:-3] for own in estimates))
    levels = list(dict.fromkeys(own.factor for own in estimates))
    grid = {(own.series[:-3], own.factor): own.beta for own in estimates}
    if len(labels) < 2 or len(levels) < 2 or len(grid) < len(labels) * len(levels):
        return None
    beta = np.array([[grid[label, level] for level in levels] for label in labels])

    def shift(values: FloatArray) -> float:
        a, b = np.triu_indices(len(values), k=1)
        return float(np.sqrt(((values[a] - values[b]) ** 2).mean()))

    return shift(beta), shift(beta.T)


def _series(row: Mapping[str, str], metric: str) -> tuple[str, ...]:
    label = row.get("optimizer_display_name") or row.get("optimizer") or row.get("series") or "all"
    return (label, row.get("site") or "post", ours(row.get("bucket") or "pooled"), ours(metric))


def _ends_of(row: Mapping[str, str]) -> tuple[float, float]:
    for low, high in END_NAMES:
        ends = finite(row.get(low)), finite(row.get(high))
        if None not in ends:
            return ends[0] or 0.0, ends[1] or 0.0
    return math.nan, math.nan


def _rows(table: str | Path | Sheet, where: Sequence[str]) -> tuple[list[dict[str, str]], Path]:
    sheet = read_sheet(table)
    kept: list[Callable[[Mapping[str, str]], bool]] = [condition(text) for text in where]
    return [row for row in sheet.whole_rows if all(holds(row) for holds in kept)], sheet.path


def _first(known: Sequence[str], names: object) -> str | None:
    return next((name for name in known if name in names), None)  # type: ignore[operator]
