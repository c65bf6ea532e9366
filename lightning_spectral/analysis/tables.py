"""Which columns of a table are which: our own tables and the published ones are known without options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from lightning_spectral.analysis.points import LAYER_MEDIAN, Point, PointTable
from lightning_spectral.records.looks import BUCKET_NAMES, METRIC_NAMES

WIDTH_NAMES: Final = ("width", "ffn_hidden_dim", "ffn_width", "intermediate_size", "d_ff")
_SEED_NAMES: Final = ("seed",)
_ROWS_NAMES: Final = ("num_tokens", "num_rows")  # the second until schema 2
_OWN: Final = {"value", "spread", "steps", "run_id"}
ALSO: Final = ("raw", "error", "num_sequences")  # fields of a point that our tables have, where runs have them
# columns that make a series where they are there
_LABELS: Final = (
    *("optimizer", "model", "dion_rank_fraction", "rank_fraction", "heads", "n_head", "norm", "positions"),
    *("learning_rate", "lr", "site", "bucket", "metric", "layer"),
)
_OF_A_TABLE: Final = ("model_scale",)  # a label where tables of several are read together
_OTHER_NAMES: Final = {"all": "pooled", "global": "pooled", "soft": "soft_rank", "hard": "hard_rank"}
STEP_NAMES: Final = ("step", "global_step", "optimizer_step")
BETA_NAMES: Final = {"beta_soft": "soft_rank", "beta_hard": "hard_rank"}
END_NAMES: Final = (("beta_lower", "beta_upper"), ("ci_low", "ci_high"), ("beta_low", "beta_high"))
# every column that is known without being asked for
KNOWN: Final = frozenset(
    (
        *(*WIDTH_NAMES, *_SEED_NAMES, *_ROWS_NAMES, *_OWN, *ALSO, *_LABELS, *_OF_A_TABLE, *STEP_NAMES, *BETA_NAMES),
        *(name for ends in END_NAMES for name in ends),
        *(*METRIC_NAMES, "beta", "std_err", "id"),
    )
)
_SEARCHED: Final = 10_000  # rows in which two columns that tell them apart are looked for
_SAME: Final = 1e-9  # of two tables of one run: the last bits of a median depend on who took it
_MEASURED: Final = {"site": "post", "bucket": "pooled", "metric": "hard_rank", "layer": LAYER_MEDIAN}


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table by what they are for; ``None`` where there is none.

    Attributes:
        x: Width.
        by: Columns that make a series.
        seed: Seed.
        spread: One standard deviation of the value.
        rows: Rows N behind the value.
        steps: Windows behind the value, separated by semicolons.
        also: Further fields of a point, under their own names.
    """

    x: str
    by: tuple[str, ...]
    seed: str | None
    spread: str | None
    rows: str | None
    steps: str | None
    also: tuple[str, ...] = ()


def recognised(names: Sequence[str], x: str | None = None, by: Sequence[str] | None = None) -> Columns:
    """What the columns of a table are for, as far as the caller does not say.

    Args:
        names: Columns of the table.
        x: Column of the width, if it is known.
        by: Columns that make a series, if they are known.
    """
    first = next((name for name in WIDTH_NAMES if name in names), WIDTH_NAMES[0])
    chosen = x or first
    own = set(names) >= _OWN and chosen in names
    if by is None:
        labels = list(names[: list(names).index(chosen)]) if own else [name for name in _LABELS if name in names]
        by = [name for name in labels if name != chosen]
    free = [name for name in names if name not in by]
    seed = next((name for name in _SEED_NAMES if name in free), None)
    rows = next((name for name in _ROWS_NAMES if name in free), None)
    spread, steps = ("spread" if own else None), ("steps" if own else None)
    also = tuple(name for name in ALSO if own and name in names)
    return Columns(chosen, tuple(by), seed, spread, rows, steps, also)


def differing(tables: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """Columns that say what a table is about, as the size of the model, where not all rows of all tables agree.

    Args:
        tables: Rows of each table.
    """
    rows = [row for table in tables for row in table]
    return [name for name in _OF_A_TABLE if all(name in row for row in rows) and len({row[name] for row in rows}) > 1]


def one_table(tables: Sequence[PointTable]) -> PointTable:
    """The points of several tables: labels that a table has not are empty, a point that two have is one."""
    by = tuple(dict.fromkeys(name for own in tables for name in own.by))
    by = (*(name for name in by if name not in _MEASURED), *(name for name in _MEASURED if name in by))
    if len(tables) == 1 and by == tables[0].by:
        return tables[0]
    points: list[Point] = []
    seen: dict[tuple[object, ...], list[float]] = {}
    for own in tables:
        of_own: dict[tuple[object, ...], list[float]] = {}
        for point in own.points:
            cells = dict(zip(own.by, point.series, strict=True))
            series = tuple(cells.get(name, _MEASURED.get(name, "")) for name in by)
            key: tuple[object, ...] = (series, point.x, point.seed, point.source)
            of_own.setdefault(key, []).append(point.value)
            same = point.source and any(math.isclose(point.value, value, rel_tol=_SAME) for value in seen.get(key, []))
            if not same:
                points.append(replace(point, series=series))
        for known, values in of_own.items():
            seen.setdefault(known, []).extend(values)
    return PointTable(by, tuple(points), tables[0].x_name)


def telling_apart(rows: Sequence[Mapping[str, str]], columns: Columns, used: Sequence[str]) -> tuple[str, ...]:
    """The first unused column, or two, without which rows are one series, width and seed; empty if none repeats."""
    key = [name for name in (*columns.by, columns.x, columns.seed) if name]
    cells = [tuple(row[name] for name in key) for row in rows]
    if len(set(cells)) == len(cells):
        return ()
    most = max(2, len(rows) // 3)  # a label repeats
    free = [name for name in rows[0] if name not in (*key, *used) and 1 < len({row[name] for row in rows}) <= most]
    pairs = itertools.combinations(free, 2) if len(rows) <= _SEARCHED else ()
    for names in (*((name,) for name in free), *pairs):
        told = {(*cell, *(row[name] for name in names)) for cell, row in zip(cells, rows, strict=True)}
        if len(told) == len(cells):
            return names
    return ()


def with_layers(table: PointTable) -> PointTable:
    """Give each layer median the values of its layers, where the table has them."""
    if "layer" not in table.by:
        return table
    place = table.by.index("layer")
    layers: dict[tuple[object, ...], list[tuple[str, float]]] = {}

    def key(point: Point) -> tuple[object, ...]:
        return (*point.series[:place], *point.series[place + 1 :], point.x, point.seed, point.source)

    for point in table.points:
        if point.series[place] != LAYER_MEDIAN:
            layers.setdefault(key(point), []).append((point.series[place], point.value))
    out = [
        replace(point, layers=tuple(value for _, value in sorted(layers.get(key(point), []))))
        if point.series[place] == LAYER_MEDIAN
        else point
        for point in table.points
    ]
    return PointTable(table.by, tuple(out), table.x_name)


def ours(name: str) -> str:
    """A bucket or metric under the name that it has here (``TAIL`` is ``tail``); another name as it is."""
    known = name.lower()
    if known in _OTHER_NAMES:
        return _OTHER_NAMES[known]
    return known if known in BUCKET_NAMES or known in METRIC_NAMES else name


def as_of_runs(table: PointTable, y_name: str) -> PointTable:
    """The table in the columns that a report has: labels, then site, bucket, metric and layer."""
    labels = [name for name in table.by if name not in _MEASURED]
    defaults = {**_MEASURED, "metric": y_name if y_name != "value" else _MEASURED["metric"]}
    by = (*(labels or ["series"]), *_MEASURED)
    if "optimizer" in labels:
        by = ("optimizer", *(name for name in by if name != "optimizer"))
    points = []
    for point in table.points:
        cells = {"series": "all", **defaults, **dict(zip(table.by, point.series, strict=True))}
        cells |= {name: ours(cells[name]) for name in ("bucket", "metric")}
        points.append(replace(point, series=tuple(cells[name] for name in by)))
    return PointTable(by, tuple(points), table.x_name)
