"""What a careful reader checks before believing an exponent, done by machine for every fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lightning_spectral.analysis.points import Point, PointTable
from lightning_spectral.analysis.runs import Problem

ROWS_PER_RANK: Final = 50  # bias of a rank is about rank / N: 2 % here
SLOPE_BIAS: Final = 0.02  # of beta, from the number of rows, that a reader must hear of
_LONG_NUMBER: Final = 8  # significant digits that two different measurements do not share by chance
_MEASURES: Final = {"metric", "bucket", "site", "layer"}
_MANY_EQUAL: Final = 20

# flag -> what to tell people
FLAG_TEXT: Final = {
    "few_tokens": f"the rows are so few that the slope of plain ranks is off by more than {SLOPE_BIAS:g} (independent "
    "rows; more if tokens of a sequence are alike): measure more tokens, or num_jackknife_groups=4",
    "few_sequences": "fewer sequences than modes: what the tokens of a sequence share makes the rank too low; measure "
    "more sequences, or num_jackknife_groups=4",
    "mixed_windows": "the widths were measured at different training steps",
    "untrained_window": "a point takes in step 0, the untrained network: lower --last, or finish the run",
    "across_decay": "the last windows lie on both sides of the start of the learning-rate decay: lower --last",
    "mixed_conventions": "the points were measured under different conventions",
    "duplicate_values": "points under different ids have bit-identical values: one was probably copied",
    "repeated_rows": "one run gives several points to this fit: a `by` column is missing, or a row is there twice",
    "repeated_runs": "several runs have the same series, width and seed",
    "repeated_x": "several points share an x but no seed tells them apart; they count as independent (--seed COLUMN)",
    "unbalanced_seeds": "not every seed covers every width",
    "bent": "the points bend away from a straight line (p < .05): read the slopes at both ends, or fit --model floor",
    "missing_values": "some windows or points have no number",
}


REFUSAL_TEXT: Final = {
    "refused:fewer_than_3_widths": "a slope with an interval takes three widths or more: train others, or leave out of "
    "--by what tells them apart",
    "refused:non_positive_values": "a value or a width is zero or negative, and a power law has none: leave such rows "
    "out, e.g. --where 'value>0'",
    "refused:missing_values": "a point has no number: leave it out, or finish its run",
}


@dataclass(frozen=True)
class Duplicate:
    """Two ids whose values are bit-identical.

    Attributes:
        first: One id.
        second: The other.
        num_equal: Measurements that agree to the last bit (all that can be compared).
    """

    first: str
    second: str
    num_equal: int

    def sentence(self) -> str:
        """For people."""
        return f"`{self.first}` and `{self.second}` agree to the last bit in all {self.num_equal} comparable values"


@dataclass(frozen=True)
class Duplicates:
    """All duplicates of a table and the positions of the points they touch."""

    found: tuple[Duplicate, ...]
    points: frozenset[int]


def find_duplicates(table: PointTable) -> Duplicates:
    """Equal values under two ids.

    Two points are compared when they differ in more than what was measured (metric, bucket, site, layer). A pair of
    ids counts as duplicated when all values of the first equal their twins, and there are at least two of them or one
    with eight significant digits.
    """
    by_value: dict[float, list[int]] = {}
    for index, point in enumerate(table.points):
        if point.steps != (0,):  # untrained networks of one seed are equal by right
            by_value.setdefault(point.value, []).append(index)
    pairs: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[int, int]]] = {}
    for indices in by_value.values():
        for position, i in enumerate(indices[:_MANY_EQUAL]):
            for j in indices[position + 1 : _MANY_EQUAL]:
                names = _differing(table, table.points[i], table.points[j])
                if names:
                    first, second = sorted((i, j), key=lambda k: _cells(table, table.points[k], names))
                    key = (_cells(table, table.points[first], names), _cells(table, table.points[second], names))
                    pairs.setdefault(key, []).append((first, second))
    found: list[Duplicate] = []
    touched: set[int] = set()
    for (cells, _), matches in pairs.items():
        names = _differing(table, table.points[matches[0][0]], table.points[matches[0][1]])
        comparable = sum(_cells(table, point, names) == cells for point in table.points)
        firsts = {i for i, _ in matches}
        if len(firsts) < comparable or (len(firsts) == 1 and not _is_long(table.points[matches[0][0]].value)):
            continue
        a, b = (table.points[k] for k in matches[0])
        found.append(Duplicate(_id(table, a, names), _id(table, b, names), len(firsts)))
        touched |= {k for match in matches for k in match}
    return Duplicates(tuple(found), frozenset(touched))


def without_duplicates(table: PointTable) -> tuple[PointTable, list[Problem]]:
    """The table without the points of copied runs: both of a pair, for nobody can tell which is the copy."""
    duplicates = find_duplicates(table)
    kept = tuple(point for index, point in enumerate(table.points) if index not in duplicates.points)
    problems = [
        Problem(found.first, "duplicate_values", f"{found.sentence()}: both were left out.", refused=True)
        for found in duplicates.found
    ]
    return PointTable(table.by, kept, table.x_name), problems


def flags_by_series(table: PointTable, duplicates: Duplicates) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Flags of every series; empty when it is sound."""
    copied = {table.points[index].series for index in duplicates.points}
    return {
        series: (*flags_of(points), *(["duplicate_values"] if series in copied else []))
        for series, points in table.groups().items()
    }


def flags_of(points: Sequence[Point]) -> tuple[str, ...]:
    """Keys of :data:`FLAG_TEXT` that hold for one series (without duplicates, which need the whole table)."""
    sources = [point.source for point in points if point.source]
    cells = [(point.x, point.seed) for point in points]
    seeds = {point.seed for point in points}
    widths = {point.x for point in points}
    repeated_rows = len(set(sources)) < len(sources)
    repeats = len(set(cells)) < len(cells)
    checks = {
        "few_tokens": abs(slope_bias(points)) > SLOPE_BIAS,
        "few_sequences": any(point.num_sequences < point.rank and point.raw != point.raw for point in points),
        "mixed_windows": len({point.steps for point in points}) > 1,
        "untrained_window": any(0 in point.steps for point in points),
        "across_decay": any(_across_decay(point) for point in points),
        "mixed_conventions": len({point.conventions for point in points}) > 1
        or any(len(point.conventions) > 1 for point in points),
        "repeated_rows": repeated_rows,
        "repeated_runs": repeats and not repeated_rows and seeds != {""},
        "repeated_x": repeats and not repeated_rows and seeds == {""},
        "unbalanced_seeds": len(seeds) > 1 and len(set(cells)) < len(seeds) * len(widths),
        "missing_values": any(point.missing > 0 or point.value != point.value for point in points),
    }
    return tuple(name for name, holds in checks.items() if holds)


def slope_bias(points: Sequence[Point]) -> float:
    """Bias of the slope of plain ranks from the number of rows, for independent rows; 0 if it is not known.

    ``1 / R_N = 1 / R + 1 / N``: what is measured is ``R / (1 + R / N)``. Equal N / R at all widths bends nothing,
    however small N is; equal N takes the most from the widest.
    """
    known = [p for p in points if p.num_tokens > 0 and p.rank > 0 and p.x > 0 and p.raw != p.raw]
    if len(known) < len(points) or len({point.x for point in known}) < 2:
        return 0.0
    x, n, measured = (np.array([getattr(point, name) for point in known]) for name in ("x", "num_tokens", "rank"))
    x = np.log(x) - np.log(x).mean()
    with np.errstate(over="ignore"):
        share = np.minimum(measured / n, 0.99)
    return float(x @ np.log1p(-share) / (x @ x))


def _across_decay(point: Point) -> bool:
    """The state at the decay's start is the last one before it."""
    after = sum(step > point.decay_step for step in point.steps)
    return 0 < after < len(point.steps)


def _differing(table: PointTable, a: Point, b: Point) -> tuple[str, ...]:
    """Names of the columns in which two points differ, empty when they may rightly be equal."""
    if a.source and a.source == b.source:
        return ()
    names = [name for name, x, y in zip(table.by, a.series, b.series, strict=True) if x != y]
    if a.x != b.x:
        names.append(table.x_name)
    names += [name for name, x, y in (("seed", a.seed, b.seed), ("id", a.source, b.source)) if x != y]
    return () if set(names) <= _MEASURES or set(names) & _MEASURES else tuple(names)


def _cells(table: PointTable, point: Point, names: tuple[str, ...]) -> tuple[str, ...]:
    row = dict(zip(table.by, point.series, strict=True))
    row |= {table.x_name: repr(point.x), "seed": point.seed, "id": point.source}
    return tuple(row[name] for name in names)


def _id(table: PointTable, point: Point, names: tuple[str, ...]) -> str:
    if point.source:
        return point.source
    return " ".join(f"{name}={cell}" for name, cell in zip(names, _cells(table, point, names), strict=True))


def _is_long(value: float) -> bool:
    return len(repr(value).split("e")[0].replace(".", "").replace("-", "").strip("0")) >= _LONG_NUMBER
