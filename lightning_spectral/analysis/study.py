"""One call from inputs to everything that ``fit``, ``compare`` and ``report`` show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_spectral.analysis.compare import Comparison, asymmetries, compare_fits, decay_changes
from lightning_spectral.analysis.effects import compare_effects
from lightning_spectral.analysis.fits import PowerLawFit, fit_series
from lightning_spectral.analysis.health import Duplicates, find_duplicates, flags_by_series, flags_of
from lightning_spectral.analysis.points import LAYER_MEDIAN, PointTable
from lightning_spectral.analysis.recipe_facts import is_whole, num_steps
from lightning_spectral.analysis.runs import Problem, Run, RunSet
from lightning_spectral.analysis.trajectory import beta_trajectories


@dataclass(frozen=True)
class Fitted:
    """A table of points with a fit for each series.

    Attributes:
        table: The points.
        fits: One for each series, in order of appearance.
        duplicates: Bit-identical values under two ids.
        problems: What was wrong with the inputs, duplicates included.
        before: The same for the state just before the learning rate decays, where that was measured.
    """

    table: PointTable
    fits: tuple[PowerLawFit, ...]
    duplicates: Duplicates
    problems: tuple[Problem, ...]
    before: Fitted | None = None


def fit_points(
    table: PointTable,
    *,
    method: str = "auto",
    problems: Iterable[Problem] = (),
    nulls: dict[tuple[str, ...], tuple[float, int]] | None = None,
    before: PointTable | None = None,
) -> Fitted:
    """Fit every series of a table, with flags, duplicates and nulls attached.

    Args:
        table: Points with their ``by`` columns.
        method: As in :func:`~lightning_spectral.analysis.fits.fit_series`.
        problems: What reading the points found.
        nulls: Slope and step of the untrained network by series.
        before: The points just before the learning rate decays.
    """
    duplicates = find_duplicates(table)
    flags = flags_by_series(table, duplicates)
    earlier = _fit_before(before, method) if before is not None and before.points else None
    known = {fit.series: fit for fit in earlier.fits} if earlier else {}
    fits = []
    for series, points in table.groups().items():
        fit = fit_series(points, method=method, flags=flags[series])
        if nulls and series in nulls:
            fit = replace(fit, null_beta=nulls[series][0], null_step=float(nulls[series][1]))
        if earlier and series in known:
            was = known[series]
            step = float(max(point.steps[-1] for point in earlier.table.groups()[series]))
            fit = replace(fit, before_beta=was.beta, before_low=was.ci_low, before_high=was.ci_high, before_step=step)
        fits.append(fit)
    copies = [Problem(found.first, "duplicate_values", found.sentence() + ".") for found in duplicates.found]
    return Fitted(table, _with_layer_range(table.by, fits), duplicates, (*problems, *copies), earlier)


def _fit_before(table: PointTable, method: str) -> Fitted:
    fits = tuple(
        fit_series(points, method=method, flags=flags_of(points), extras=False) for points in table.groups().values()
    )
    return Fitted(table, fits, Duplicates((), frozenset()), ())


def _with_layer_range(by: Sequence[str], fits: Sequence[PowerLawFit]) -> tuple[PowerLawFit, ...]:
    """Give each fit of a layer median the smallest and largest exponent among its layers."""
    if "layer" not in by:
        return tuple(fits)
    place = list(by).index("layer")
    layers: dict[tuple[str, ...], list[float]] = {}
    for fit in fits:
        if fit.series[place] != LAYER_MEDIAN and not fit.refused:
            layers.setdefault((*fit.series[:place], *fit.series[place + 1 :]), []).append(fit.beta)
    out = []
    for fit in fits:
        own = layers.get((*fit.series[:place], *fit.series[place + 1 :]))
        median = fit.series[place] == LAYER_MEDIAN and own
        out.append(replace(fit, layer_low=min(own), layer_high=max(own)) if median and own else fit)
    return tuple(out)


def finished_only(runs: RunSet) -> RunSet:
    """Leave out unfinished runs when others have reached the end of their recipe.

    The last window of a run cut short is another state of training than that of a whole one. When no run has reached
    its end (or none says how long it is), all are kept: they can still be compared with one another.
    """
    short = [run for run in runs.runs if is_whole(run) is False]
    if not any(is_whole(run) for run in runs.runs):
        return runs
    out = {run.run_id for run in short}
    problems = [
        Problem(
            str(run.folder),
            "unfinished",
            f"`{run.run_id}` was left out: its last window is at step {run.steps[-1]}{_of_steps(run)} (finish it, or "
            "compare all runs at a common step with --until-step).",
            refused=True,
        )
        for run in short
    ]
    return RunSet(tuple(run for run in runs.runs if run.run_id not in out), (*runs.problems, *problems))


def said_of_diverged(runs: RunSet, until_step: int | None = None) -> RunSet:
    """The runs, with a sentence about each that has no points since it diverged."""
    problems = [
        Problem(
            str(run.folder),
            "diverged",
            f"`{run.run_id}` was left out: it diverged, from step {run.diverged_from} on its activations are NaN or "
            "infinite.",
            refused=True,
        )
        for run in runs.runs
        if run.diverged_from is not None and (until_step is None or until_step >= run.diverged_from)
    ]
    return replace(runs, problems=(*runs.problems, *problems))


def _of_steps(run: Run) -> str:
    steps = num_steps(run)
    return "" if steps is None else f" of {steps}"


def nulls_of_runs(runs: RunSet, by: Sequence[str], metrics: Sequence[str]) -> dict[tuple[str, ...], tuple[float, int]]:
    """Slope of the first window at step 0 or 1, for every series of layer medians."""
    out: dict[tuple[str, ...], tuple[float, int]] = {}
    names = ("optimizer", *runs.series_labels, "site", "bucket", "metric")
    if not set(names) - {"site"} <= set(by):
        return {}
    for path in beta_trajectories(runs, metrics=metrics, smoothing=1):
        row = dict(zip(names, path.series, strict=True)) | {"layer": LAYER_MEDIAN}
        if path.null is not None and (row["site"] == "post" or "site" in by):
            out[tuple(row[name] for name in by)] = path.null
    return out


def comparisons_of(fitted: Fitted, architecture: str | None = None) -> list[Comparison]:
    """Pairs, asymmetries, what the decay changed and, if ``architecture`` names a column, optimizer against it.

    Raises:
        ValueError: If ``architecture`` is not a ``by`` column, or ``optimizer`` is not one.
    """
    found = [*compare_fits(fitted.table, fitted.fits), *asymmetries(fitted.table, fitted.fits)]
    if fitted.before is not None:
        found += decay_changes(fitted.table, fitted.before.table)
        earlier = compare_fits(fitted.before.table, fitted.before.fits)
        found += [replace(c, kind=f"{c.kind}_pre_decay") for c in earlier if c.kind.startswith("slope_difference")]
    return [*found, *effects_of(fitted, architecture)] if architecture else found


def effects_of(fitted: Fitted, architecture: str) -> list[Comparison]:
    """Mean squared shift of beta by optimizer minus that by architecture, for everything measured."""
    by = fitted.table.by
    for name in ("optimizer", architecture):
        if name not in by:
            raise ValueError(f"optimizer against architecture needs the column `{name}`; `by` is {', '.join(by)}.")
    one, two = by.index("optimizer"), by.index(architecture)
    grids: dict[tuple[str, ...], dict[tuple[str, str], tuple[float, float, float]]] = {}
    for fit in fitted.fits:
        rest = tuple(cell for k, cell in enumerate(fit.series) if k not in (one, two))
        if not fit.refused:
            cell = (fit.series[one], fit.series[two])
            grids.setdefault(rest, {})[cell] = (fit.beta, fit.std_err, fit.df)
    names = [name for name in by if name not in ("optimizer", architecture)]
    out = []
    for rest, slopes in grids.items():
        base = Comparison(dict(zip(names, rest, strict=True)), "effect", "optimizer", architecture)
        try:
            effect = compare_effects(slopes)
        except ValueError as error:
            out.append(replace(base, status=f"refused:{error}"))
            continue
        out.append(
            replace(
                base,
                estimate=effect.difference,
                ci_low=effect.ci_low,
                ci_high=effect.ci_high,
                p=effect.p,
                method="mean_squared_shift_all_pairs",
                note=f"root mean square shift of beta: optimizer {effect.row_shift:.3f}, "
                f"{architecture} {effect.column_shift:.3f}",
            )
        )
    return out


def is_table(path: str | Path) -> bool:
    """Whether an input is a tidy table rather than a run folder."""
    return Path(path).name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
