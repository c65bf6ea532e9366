"""Matched loss: do two optimizers at the SAME validation loss still have different spectra?

Two runs of one width and seed are paired. Their common yardstick is a validation loss that both reached; each run's
rank is read off, by interpolation, where the falling curve through its losses reaches it. On the ``step`` or ``tokens``
axis both are read off at the same amount of training instead, and the loss gap that remains is reported with the ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from lightning_spectral.analysis.compare import Comparison, Ratio, with_holm
from lightning_spectral.analysis.linear import seed_means, t_quantile, two_sided_p
from lightning_spectral.analysis.points import DEFAULT_METRICS, nanmedian
from lightning_spectral.analysis.runs import Run, RunSet
from lightning_spectral.analysis.strata import seed_design, width_design
from lightning_spectral.analysis.trajectory import group_runs
from lightning_spectral.records import POOLED

FloatArray = NDArray[np.float64]
TOLERANCE: Final = 0.02  # nats
Axis = Literal["loss", "step", "tokens"]


@dataclass(frozen=True)
class Curve:
    """What one run did: windows with their loss and ranks.

    Attributes:
        steps: (T,) optimizer steps.
        tokens: (T,) tokens seen; NaN if not counted.
        loss: (T,) loss interpolated to those steps, as it was measured.
        ranks: (T,) layer median of a metric.
    """

    steps: FloatArray
    tokens: FloatArray
    loss: FloatArray
    ranks: FloatArray


@dataclass(frozen=True)
class MatchedPair:
    """Ranks of two runs of one width (and seed) at one loss, step or token count.

    Attributes:
        a: Series of the first run.
        b: Series of the second.
        site: Site of the ranks.
        bucket: Bucket of the ranks.
        metric: Metric of the ranks.
        width: FFN width.
        seed: Seed.
        at: The loss, step or token count at which they were read.
        loss_a: Loss of the first run there.
        loss_b: Loss of the second.
        rank_a: Its rank.
        rank_b: Rank of the second.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    site: str
    bucket: str
    metric: str
    width: int
    seed: str
    at: float
    loss_a: float
    loss_b: float
    rank_a: float
    rank_b: float


def loss_curve(
    run: Run, bucket: str = POOLED, stages: Sequence[str] = ("validation", "train")
) -> tuple[FloatArray, FloatArray]:
    """(steps, losses) of the first of the stages that the run has; empty if it has none of them."""
    for stage in stages:
        found = [
            (float(record.step or 0), record.loss)
            for record in run.losses
            if record.stage == stage and record.bucket == bucket and record.step is not None
            if record.loss is not None and math.isfinite(record.loss)
        ]
        if found:
            steps, losses = np.array(sorted(found)).T
            return steps, losses
    return np.empty(0), np.empty(0)


def curve(run: Run, site: str, bucket: str, metric: str) -> Curve | None:
    """The run's windows on the loss axis, or ``None`` without losses or ranks."""
    steps, losses = loss_curve(run, stages=("validation",))  # a training batch's own loss is too noisy to match on
    if len(steps) < 2 or site not in run.sites or bucket not in run.buckets:
        return None
    s, b = run.sites.index(site), run.buckets.index(bucket)
    ranks = nanmedian(run.cube(metric)[s, b], axis=-1)
    at = run.steps.astype(np.float64)
    usable = np.isfinite(ranks) & (ranks > 0) & (at >= steps[0]) & (at <= steps[-1])
    if usable.sum() < 2:
        return None
    at = at[usable]
    tokens = nanmedian(run.cube("tokens_seen")[s, b], axis=-1)[usable]
    return Curve(at, tokens, np.interp(at, steps, losses), ranks[usable])


def falling(loss: FloatArray) -> FloatArray:
    """The falling curve nearest to a noisy one (isotonic regression: pool adjacent violators).

    The lowest loss so far would be the noise's lowest: a run of noisy losses would reach a target before it does.
    """
    return np.asarray(-isotonic_regression(-loss).x, dtype=np.float64)


def match(a: Curve, b: Curve, axis: Axis = "loss", tolerance: float = TOLERANCE) -> tuple[float, ...] | None:
    """(at, loss a, loss b, rank a, rank b) where the two runs can be compared, or ``None`` if they cannot.

    On the ``loss`` axis that is the lowest loss both reached; a run counts as having reached it when its windows come
    within ``tolerance`` nats. On the other axes it is the last common step or token count.
    """
    if axis == "loss":
        a, b = replace(a, loss=falling(a.loss)), replace(b, loss=falling(b.loss))
        target = max(float(a.loss[-1]), float(b.loss[-1]))
        one, two = _at_loss(a, target, tolerance), _at_loss(b, target, tolerance)
        return None if one is None or two is None else (target, one[0], two[0], one[1], two[1])
    x_a, x_b = (a.steps, b.steps) if axis == "step" else (a.tokens, b.tokens)
    if not (np.isfinite(x_a).all() and np.isfinite(x_b).all()):
        return None
    at = min(float(x_a[-1]), float(x_b[-1]))
    if at < max(float(x_a[0]), float(x_b[0])):
        return None
    ranks = [math.exp(float(np.interp(at, x, np.log(c.ranks)))) for x, c in ((x_a, a), (x_b, b))]
    losses = [float(np.interp(at, x, c.loss)) for x, c in ((x_a, a), (x_b, b))]
    return at, losses[0], losses[1], ranks[0], ranks[1]


def _at_loss(own: Curve, target: float, tolerance: float) -> tuple[float, float] | None:
    """(loss, rank) where the falling curve crosses ``target``, between the windows on either side of it."""
    reached = np.flatnonzero(own.loss <= target)
    if not len(reached):
        return (float(own.loss[-1]), float(own.ranks[-1])) if own.loss[-1] - target <= tolerance else None
    k = int(reached[0])
    if k == 0:
        return (float(own.loss[0]), float(own.ranks[0])) if target - own.loss[0] <= tolerance else None
    share = float((own.loss[k - 1] - target) / (own.loss[k - 1] - own.loss[k]))
    ln_rank = (1 - share) * math.log(own.ranks[k - 1]) + share * math.log(own.ranks[k])
    return target, math.exp(ln_rank)


def matched_pairs(
    runs: RunSet,
    *,
    axis: Axis = "loss",
    tolerance: float = TOLERANCE,
    metrics: Sequence[str] = DEFAULT_METRICS,
    site: str = "post",
) -> tuple[list[MatchedPair], int]:
    """All pairs of series at every width and seed that both have, and how many could not be matched.

    Raises:
        ValueError: If the axis is unknown or the tolerance negative.
    """
    if axis not in ("loss", "step", "tokens"):
        raise ValueError(f"unknown axis `{axis}`; choose loss, step or tokens.")
    if tolerance < 0:
        raise ValueError(f"`tolerance` is in nats and must be >= 0, got {tolerance}.")
    curves = {
        (run.run_id, bucket, metric): curve(run, site, bucket, metric)
        for run in runs.runs
        for bucket in run.buckets
        for metric in metrics
    }
    pairs: list[MatchedPair] = []
    unmatched = 0
    for key_a, key_b, run, twin in _twins(runs):
        for bucket, metric in itertools.product(run.buckets, metrics):
            one, two = curves[run.run_id, bucket, metric], curves.get((twin.run_id, bucket, metric))
            found = match(one, two, axis, tolerance) if one and two else None
            if found is None:
                unmatched += 1
            else:
                pairs.append(MatchedPair(key_a, key_b, site, bucket, metric, run.width, run.seed, *found))
    return pairs, unmatched


def _twins(runs: RunSet) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Run, Run]]:
    """(series a, series b, run of a, run of b) at every width and seed that two series share."""
    for (key_a, runs_a), (key_b, runs_b) in itertools.combinations(group_runs(runs).items(), 2):
        of_b = {(run.width, run.seed): run for run in runs_b if run.diverged_from is None}
        for run in runs_a:
            if (run.width, run.seed) in of_b and run.diverged_from is None:
                yield key_a, key_b, run, of_b[run.width, run.seed]


def compare_matched(pairs: Sequence[MatchedPair]) -> list[Comparison]:
    """ln(rank_a / rank_b) at matched loss: per width (t over seeds), and its slope over ln width."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...], str, str, str], list[MatchedPair]] = {}
    for pair in pairs:
        groups.setdefault((pair.a, pair.b, pair.site, pair.bucket, pair.metric), []).append(pair)
    out: list[Comparison] = []
    for (a, b, site, bucket, metric), own in groups.items():
        where = {"site": site, "bucket": bucket, "metric": metric}
        base = Comparison(where, "matched_loss", " ".join(filter(None, a)), " ".join(filter(None, b)))
        x = np.log([pair.width for pair in own])
        y = np.log([pair.rank_a / pair.rank_b for pair in own])
        for width in sorted({pair.width for pair in own}):
            here = y[[pair.width == width for pair in own]]
            gap = np.mean([pair.loss_a - pair.loss_b for pair in own if pair.width == width])
            se = float(here.std(ddof=1)) / math.sqrt(len(here)) if len(here) > 1 else math.nan
            note = f"width {width}; loss gap left {gap:+.4f} nats"
            out.append(_t(replace(base, note=note), float(here.mean()), se, len(here) - 1, "t_over_seeds"))
        if len(np.unique(x)) < 3:
            out.append(replace(base, kind="matched_loss_slope", status="refused:fewer_than_3_widths"))
            continue
        design, method = seed_design(x, [pair.seed for pair in own]), "mixed_of_ln_ratio"
        if design is None:
            x, y = seed_means(x, y)
            design, method = width_design(x), "ols_of_ln_ratio"
        ratio = Ratio(design.fit(y), method)
        out.append(ratio.estimate(replace(base, kind="matched_loss_slope"), design.slope))
    return with_holm(out)


def _t(base: Comparison, estimate: float, se: float, df: int, method: str) -> Comparison:
    if not (df > 0 and se > 0):
        return replace(base, estimate=estimate, df=df, method=method)
    half = float(t_quantile(df)) * se
    p = float(two_sided_p(estimate / se, df))
    return replace(base, estimate=estimate, ci_low=estimate - half, ci_high=estimate + half, p=p, df=df, method=method)


def matched_table(pairs: Sequence[MatchedPair]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of ``matched_loss.csv``."""
    header = ["a", "b", "site", "bucket", "metric", "width", "seed", "at", "loss_a", "loss_b", "rank_a", "rank_b"]
    return header, [
        [" ".join(filter(None, pair.a)), " ".join(filter(None, pair.b)), *(getattr(pair, name) for name in header[2:])]
        for pair in pairs
    ]
