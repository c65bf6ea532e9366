"""How much of an exponent is its learning rate: runs whose recipes differ in nothing else.

A sweep is one configuration (optimizer, architecture, data) at several learning rates. Its points are compared on the
widths and seeds that ALL of them have, so that a point with three widths is not set against one with six.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_spectral.analysis.fit_methods import choose_method
from lightning_spectral.analysis.fits import PowerLawFit, fit_series
from lightning_spectral.analysis.matched import loss_curve
from lightning_spectral.analysis.points import LAYER_MEDIAN, Point, PointTable
from lightning_spectral.analysis.recipe_facts import learning_rate, task_key
from lightning_spectral.analysis.runs import Run, RunSet
from lightning_spectral.analysis.trajectory import group_runs

Groups = Mapping[tuple[str, ...], list[Point]]  # series -> points


@dataclass(frozen=True)
class LearningRatePoint:
    """One learning rate of a sweep.

    Attributes:
        rate: The learning rate.
        series: Optimizer label and other labels of its runs.
        runs: Its runs at the common widths and seeds.
    """

    rate: float
    series: tuple[str, ...]
    runs: tuple[Run, ...]

    def points(self, groups: Groups, rest: Sequence[str]) -> list[Point]:
        """Points of these runs in the series ``(*self.series, *rest)``."""
        own = {run.run_id for run in self.runs}
        return [point for point in groups.get((*self.series, *rest), []) if point.source in own]

    def fit(self, groups: Groups, rest: Sequence[str]) -> PowerLawFit | None:
        """Exponent of those points; ``None`` if there are none."""
        points = self.points(groups, rest)
        return fit_series(points, method=choose_method(points), extras=False) if points else None

    def loss(self, width: int) -> float:
        """Mean last loss at one width; NaN without losses, or where a run diverged."""
        if self.diverged(width):
            return float("nan")
        last = [losses[-1] for run in self.runs if run.width == width and len(losses := loss_curve(run)[1])]
        return float(np.mean(last)) if last else float("nan")

    def diverged(self, width: int) -> bool:
        """Whether a run of this width ended in numbers that are none."""
        return any(run.diverged_from is not None for run in self.runs if run.width == width)


@dataclass(frozen=True)
class LearningRateSweep:
    """One configuration at several learning rates.

    Attributes:
        name: What the labels of its series have in common.
        points: By learning rate, at least two.
        widths: Widths that every learning rate has.
        seeds: Seeds that every learning rate has there.
    """

    name: str
    points: tuple[LearningRatePoint, ...]
    widths: tuple[int, ...]
    seeds: tuple[str, ...]

    @property
    def where(self) -> str:
        """What the points have in common, for people."""
        widths = ", ".join(map(str, self.widths))
        seeds = ", ".join(seed for seed in self.seeds if seed)
        return f"D = {widths}" + (f", seed {seeds}" if seeds else "")


def learning_rate_sweeps(runs: RunSet) -> list[LearningRateSweep]:
    """All configurations that were run at two or more learning rates with a width and seed in common."""
    families: dict[str, dict[tuple[float, tuple[str, ...]], list[Run]]] = {}
    for series, group in group_runs(runs).items():
        keys = {task_key(run, without_rate=True) for run in group}
        rates = {learning_rate(run) for run in group}
        key, rate = next(iter(keys)), next(iter(rates))
        if len(keys) == 1 and key is not None and len(rates) == 1 and rate is not None:
            families.setdefault(key, {})[rate, series] = group
    out = []
    for family in families.values():
        cells = set.intersection(*({(run.width, run.seed) for run in group} for group in family.values()))
        if len({rate for rate, _ in family}) < 2 or not cells:
            continue
        points = tuple(
            LearningRatePoint(rate, series, tuple(run for run in group if (run.width, run.seed) in cells))
            for (rate, series), group in sorted(family.items(), key=lambda item: item[0])
        )
        largest = max(family, key=lambda key: (len(family[key]), -len(" ".join(key[1]))))
        name = _common_name([" ".join(filter(None, series)) for _, series in family]) or " ".join(largest[1]).strip()
        out.append(
            LearningRateSweep(name, points, tuple(sorted({w for w, _ in cells})), tuple(sorted({s for _, s in cells})))
        )
    return out


def _common_name(names: Sequence[str]) -> str:
    """``Muon lr=0.006``, ``Muon lr=0.02`` -> ``Muon``."""
    return min((re.sub(r"\s*\b(?:lr|learning.?rate)\b.*$", "", name).strip() for name in names), key=len)


def learning_rate_table(sweeps: Sequence[LearningRateSweep], table: PointTable) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of ``learning_rates.csv``: one row per learning rate and measurement, layer median."""
    header = ["sweep", "series", "learning_rate", "site", "bucket", "metric", "beta", "ci_low", "ci_high", "n"]
    header += ["widths", "seeds", "value_narrowest", "value_widest", "loss_narrowest", "loss_widest", "status"]
    labels = len(sweeps[0].points[0].series) if sweeps else 0
    groups = table.groups()
    rests = list(dict.fromkeys(series[labels:] for series in groups if series[-1] == LAYER_MEDIAN))
    rows = []
    for sweep in sweeps:
        for point in sweep.points:
            for rest in rests:
                fit = point.fit(groups, rest)
                if fit is None:
                    continue
                ends = [level(point.points(groups, rest), width) for width in (sweep.widths[0], sweep.widths[-1])]
                losses = [point.loss(width) for width in (sweep.widths[0], sweep.widths[-1])]
                widths, seeds = ";".join(map(str, sweep.widths)), ";".join(sweep.seeds)
                name = " ".join(filter(None, point.series))
                numbers = [fit.beta, fit.ci_low, fit.ci_high, fit.n]
                rows.append(
                    [sweep.name, name, point.rate, *rest[:3], *numbers, widths, seeds, *ends, *losses, fit.status]
                )
    return header, rows


def level(points: Sequence[Point], width: int) -> float:
    """Geometric mean over seeds of the values at one width; NaN without any."""
    values = [point.value for point in points if point.x == width and point.value > 0]
    return float(np.exp(np.mean(np.log(values)))) if values else float("nan")
