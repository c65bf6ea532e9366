"""``results.jsonl`` of the memory commands: read it, put rows together, fit exponents.

A line of ``results.jsonl`` is one run: ``kind`` (``one-step``, ``batch``, ``steps``, ``newton-schulz``), every input,
every output; ``lightning-spectral memory fields`` lists them.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.text import parse_json

RESULTS_FILE = "results.jsonl"
Row = dict[str, Any]
_DRAWS = 4000


@dataclass(frozen=True)
class Exponent:
    """Slope of ln(mean count) on ln(x) with a 95 % interval.

    Attributes:
        slope: Least squares.
        low: Lower end; a bootstrap that draws the mean at each x from its standard error.
        high: Upper end.
        xs: Distinct x values.
        means: Mean at each.
        errors: Standard error at each.
        error: Standard error of the slope.
    """

    slope: float
    low: float
    high: float
    xs: tuple[float, ...]
    means: tuple[float, ...]
    errors: tuple[float, ...]
    error: float


def read_results(path: str | Path) -> list[Row]:
    """Rows of a ``results.jsonl`` or of the folder that holds it; broken lines are left out with one warning.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"`{path}` does not exist; run `lightning-spectral memory one-step --out DIR` first.")
    rows: list[Row] = []
    broken: list[int] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict) or "kind" not in row:
                raise ValueError
            rows.append(row)
        except ValueError:
            broken.append(number)
    if broken:
        warnings.warn(f"`{path}`: {len(broken)} broken lines left out, the first is line {broken[0]}.", stacklevel=2)
    return rows


def fit_exponent(
    xs: Sequence[float], counts: Sequence[Sequence[float]], spreads: Sequence[float] | None = None, seed: int = 0
) -> Exponent:
    """Slope of ln(mean) on ln(x).

    Args:
        xs: Distinct positive values.
        counts: Counts of the seeds at each x.
        spreads: Standard deviation of one count at each x as predicted; the larger of it and the sample's is used, so
            that one or two seeds do not pretend to know their own spread.
        seed: Of the bootstrap.

    Raises:
        ValueError: Fewer than two distinct x, or a mean of zero (its logarithm does not exist).
    """
    if len(set(xs)) < 2 or len(set(xs)) != len(xs):
        raise ValueError(f"`xs` must be at least two distinct values to fit an exponent, got {list(xs)}.")
    means = np.array([np.mean(values) for values in counts], dtype=np.float64)
    for x, mean in zip(xs, means, strict=True):
        if not mean > 0:
            raise ValueError(f"The mean count at x={x:g} is {mean:g}: no logarithm. Leave that x out, or add seeds.")
    own = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in counts]
    single = np.maximum(np.array(own), np.array(spreads if spreads is not None else 0.0))
    errors = single / np.sqrt([len(values) for values in counts])
    log_x = np.log(np.asarray(xs, dtype=np.float64))
    rng = np.random.default_rng(seed)
    drawn = means + errors * rng.standard_normal((_DRAWS, len(means)))
    slopes = _slopes(log_x, np.log(np.maximum(drawn, 0.05 * means)))
    low, high = np.quantile(slopes, [0.025, 0.975])
    return Exponent(
        slope=float(_slopes(log_x, np.log(means)[None])[0]),
        low=float(low),
        high=float(high),
        xs=tuple(float(x) for x in xs),
        means=tuple(means.tolist()),
        errors=tuple(errors.tolist()),
        error=float(np.std(slopes)),
    )


def local_slopes(xs: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Slope between neighbouring points on log scales: (geometric middles, slopes); zero counts are left out."""
    points = sorted((x, y) for x, y in zip(xs, values, strict=True) if y > 0)
    middles = [math.sqrt(a[0] * b[0]) for a, b in pairwise(points)]
    slopes = [math.log(b[1] / a[1]) / math.log(b[0] / a[0]) for a, b in pairwise(points)]
    return middles, slopes


def group(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of ``fields``, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(field) for field in fields)].append(row)
    return dict(groups)


def ok(row: Row) -> bool:
    """Whether the run was made; rows of the first versions do not say."""
    return bool(row.get("status", "ok") == "ok")


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    """Rows of one kind, without runs that could not be made."""
    return [row for row in rows if row["kind"] == kind and ok(row)]


# what tells experiments apart, beside the rule; short names for titles
CASE_FIELDS = {
    "mode": "", "alpha": "alpha", "d": "d", "d_out": "d_out", "n_items": "N", "batch_size": "B", "anisotropy": "beta",
    "dtype": "", "steps": "T", "step_scale": "c", "schedule": "",
}  # fmt: skip
_ALWAYS_NAMED = ("alpha", "n_items")


def case_value(row: Row, field: str) -> Any:
    """The value of a case field; ``d_out`` of a square map is no field of its own, whatever d is."""
    value = row.get(field)
    return None if field == "d_out" and value == row.get("d") else value


def cases(rows: Sequence[Row], *axes: str) -> dict[str, list[Row]]:
    """Rows by experiment: two rows are put together only if they differ in nothing but rule, seed and ``axes``.

    Args:
        rows: Of one kind.
        axes: Fields that vary within a case.

    Returns:
        Rows by the case's name, which has alpha, N, and every other field that varies over the rows.
    """
    fields = [name for name in CASE_FIELDS if name not in axes]
    named = [
        name
        for name in fields
        if (name in _ALWAYS_NAMED and any(name in row for row in rows))
        or len({repr(case_value(row, name)) for row in rows}) > 1
    ]
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(case_value(row, name) for name in named)].append(row)

    def order(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple((value is None, isinstance(value, str), value if value is not None else 0) for value in key)

    return {", ".join(filter(None, map(_named, named, key))): found[key] for key in sorted(found, key=order)}


def _named(name: str, value: Any) -> str:
    if value is None:
        return "population" if name == "batch_size" else ""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{CASE_FIELDS[name]} = {text}" if CASE_FIELDS[name] else text


def by_size(rows: Sequence[Row], axis: str, value: str) -> tuple[list[float], list[list[float]]]:
    """Sorted values of ``axis`` and the values of the seeds at each."""
    sizes = {key[0]: [row[value] for row in members] for key, members in group(rows, axis).items() if key[0]}
    xs = sorted(sizes)
    return [float(x) for x in xs], [sizes[x] for x in xs]


def _slopes(log_x: NDArray[np.float64], log_y: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = log_x - log_x.mean()
    return np.asarray(log_y @ centred / (centred @ centred))
