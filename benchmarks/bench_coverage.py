"""Do the 95 % intervals of `fit` and `compare` cover, and how often is the report's first sentence false?

Every row simulates studies whose truth is known and runs what a user runs (`fit_series`, `compare_pair`, Holm):
share of studies in which the interval holds the true slope, difference of slopes, difference of levels and crossover.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np

from lightning_spectral.analysis.compare import Comparison, compare_pair, ratio_of, with_holm
from lightning_spectral.analysis.fits import fit_series
from lightning_spectral.analysis.points import Point, PointTable

SLOPES = (0.75, 0.5)
SIX = (1, 2, 3, 4, 6, 8)
KINDS = ("slope", "slope_difference", "level_difference", "crossover_width")


@dataclass(frozen=True)
class Row:
    """Standard deviations, in ln(value), of what makes two runs of one optimizer differ.

    Attributes:
        name: For the table.
        seeds: Seeds of each optimizer.
        widths: Multiples of the smallest width.
        noise: Of a run.
        level: Level of a seed.
        slope: Slope of a seed.
        width: Effect of a width on all its runs, of each optimizer.
        shared: Effect of a width on all runs of both optimizers.
        half_done: Later seeds have only the first three widths.
    """

    name: str
    seeds: int
    widths: tuple[float, ...] = SIX
    noise: float = 0.12
    level: float = 0.0
    slope: float = 0.0
    width: float = 0.0
    shared: float = 0.0
    half_done: bool = False


ROWS = (
    *(Row(f"1 seed, {len(w)} widths", 1, w) for w in ((1, 2, 4), (1, 2, 4, 8), SIX)),
    *(
        Row(f"{seeds} seeds, {name}", seeds, **what)
        for seeds in (2, 3)
        for name, what in (
            ("independent", {}),
            ("seed levels .2", {"level": 0.2}),
            ("seed slopes .1", {"slope": 0.1}),
            ("seed slopes .1, noise .05", {"slope": 0.1, "noise": 0.05}),
            ("width effects .12", {"width": 0.12}),
            ("shared width effects .12", {"shared": 0.12}),
            ("seed slopes .1, width effects .12", {"slope": 0.1, "width": 0.12}),
        )
    ),
    Row("3 seeds, half done", 3, half_done=True),
    Row("3 seeds, half done, seed levels .3", 3, level=0.3, half_done=True),
)


def study(row: Row, rng: np.random.Generator) -> list[list[Point]]:
    """Points of two optimizers; levels equal in the middle."""
    x = np.log(128.0 * np.array(row.widths))
    u, shared = x - x.mean(), rng.normal(0, row.shared, len(x))
    out = []
    for name, beta in zip("ab", SLOPES, strict=True):
        common = shared + rng.normal(0, row.width, len(x))
        points = []
        for seed in range(row.seeds):
            y = 3 + rng.normal(0, row.level) + (beta + rng.normal(0, row.slope)) * u + common
            y = y + rng.normal(0, row.noise, len(x))
            last = 3 if row.half_done and seed else len(x)
            points += [
                Point((name,), math.exp(x[k]), math.exp(y[k]), f"{name}{k}{seed}", str(seed)) for k in range(last)
            ]
        out.append(points)
    return out


def covered(row: Row, studies: int, seed: int) -> dict[str, float]:
    """Share of studies that each interval covers; of crossovers, the open sets too, and how many are bounded."""
    rng, hits = np.random.default_rng(seed), dict.fromkeys((*KINDS, "bounded"), 0)
    middle = float(np.log(128.0 * np.array(row.widths)).mean())
    truth = dict(zip(KINDS, (SLOPES[0], SLOPES[0] - SLOPES[1], 0.0, math.exp(middle)), strict=True))
    for _ in range(studies):
        pair = study(row, rng)
        fits = [fit_series(points, extras=False) for points in pair]
        hits["slope"] += fits[0].ci_low <= truth["slope"] <= fits[0].ci_high
        for c in compare_pair(("optimizer",), ["optimizer"], *fits, *pair):
            if "if anywhere" in c.note:  # all but a stretch in the middle
                low, high = (float(word) for word in c.note.replace(",", "").split() if word[0].isdigit())
                hits[c.kind] += not low < truth[c.kind] < high
            else:
                hits[c.kind] += c.ci_low <= truth[c.kind] <= c.ci_high
            hits["bounded"] += c.kind == "crossover_width" and 0 < c.ci_low < c.ci_high < math.inf
    return {name: 100.0 * count / studies for name, count in hits.items()}


def slope_difference(a: list[Point], b: list[Point], name: str) -> Comparison:
    """What `compare` says of two slopes, without level and crossover."""
    ratio = ratio_of(a, b)
    assert ratio is not None
    return ratio.estimate(Comparison({}, "slope_difference", name, ""), ratio.fit.design.slope)


def false_headlines(optimizers: int, studies: int, seed: int) -> float:
    """Percent of studies of equal optimizers in which some slope is said to exceed another, corrected by Holm."""
    rng, wrong, x = np.random.default_rng(seed), 0, np.log(128.0 * np.array(SIX))
    for _ in range(studies):
        points = [
            Point(
                (str(o),), math.exp(at), math.exp(3 + 0.5 * (at - x.mean()) + rng.normal(0, 0.12)), f"{o}{k}{s}", str(s)
            )
            for o, (k, at), s in itertools.product(range(optimizers), enumerate(x), range(3))
        ]
        series = list(PointTable(("optimizer",), tuple(points)).groups().values())
        found = [slope_difference(a, b, f"{i} {j}") for (i, a), (j, b) in itertools.combinations(enumerate(series), 2)]
        wrong += any(c.separated for c in with_holm(found))
    return 100.0 * wrong / studies


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, rounds=800).parse_args(argv)
    about = harness.prepare(options)
    studies = 20 if options.quick else options.rounds
    report: dict[str, Any] = {"studies": studies, "coverage": {}, "false_headlines": {}}
    text = [
        f"# Coverage of 95 % intervals, % of {studies} simulated studies",
        "",
        "| runs | slope | difference of slopes | of levels | crossover (open sets too) | bounded crossovers |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for k, row in enumerate(ROWS):
        found = report["coverage"][row.name] = covered(row, studies, k)
        text.append(f"| {row.name} | {' | '.join(f'{value:.1f}' for value in found.values())} |")
        print(text[-1], file=sys.stderr, flush=True)
    text += ["", "| equal optimizers | false headline, % of studies |", "|---|---:|"]
    for count in (2, 4, 8):
        share = report["false_headlines"][str(count)] = false_headlines(count, max(studies // 4, 10), count)
        text.append(f"| {count} | {share:.1f} |")
        print(text[-1], file=sys.stderr, flush=True)
    how = "Shares of simulated studies; the standard error of 95 % is "
    how += f"{100 * math.sqrt(0.95 * 0.05 / studies):.1f} points. The seed of each row is its number."
    harness.write(options, "coverage", about, report, "\n".join(text), how)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
