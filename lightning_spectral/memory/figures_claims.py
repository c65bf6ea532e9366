"""The picture of ``memory claims``: a panel per sentence; points measured, lines predicted, dotted the asymptote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from lightning_spectral.memory.claims import Claim
from lightning_spectral.memory.critical_batch import critical_batches
from lightning_spectral.memory.estimates import of
from lightning_spectral.memory.fit import Row, by_size, group, of_kind
from lightning_spectral.memory.scene import (
    ASYMPTOTE,
    LIMIT,
    MEASURED,
    PREDICTED,
    RULE_LOOKS,
    finish,
    log_log,
    make_panels,
    name_ends,
    ticks,
)
from lightning_spectral.report.style import RC

End = tuple[float, float, str, str]


def draw_claims(rows: Sequence[Row], made: Sequence[Claim], folder: str | Path) -> Path:
    """Write ``claims.png``."""
    with matplotlib.rc_context(RC):
        figure, axes = make_panels(len(_PANELS), columns=4)
        mine = [row for row in rows if row.get("part") and row.get("status", "ok") == "ok"]
        for axis, draw, claim in zip(axes, _PANELS, made, strict=True):
            draw(axis, mine)
            if not axis.has_data():
                axis.annotate("not reached in this budget", (0.5, 0.5), xycoords="axes fraction", ha="center")
                axis.set(xticks=[], yticks=[])
            axis.set_title(f"{claim.number}. {claim.verdict}: {_SHORT[claim.number]}", fontsize=9)
        finish(figure, "What the abstract says, measured", [MEASURED, PREDICTED, ASYMPTOTE, LIMIT])
        path = Path(folder) / "claims.png"
        figure.savefig(path, dpi=150)
    return path


_SHORT = {
    1: "one step stores more", 2: "as many as Newton", 3: "larger critical batch", 4: "faster at the beginning",
    5: "comparable speed later", 6: "the information limit", 7: "signal amplification", 8: "anisotropy: Newton wins",
}  # fmt: skip


def _line(axis: Axes, rows: Sequence[Row], rule: str, x: str = "d", exponent: float | None = None) -> list[End]:
    """One rule's counts against ``x``, with prediction and, through the last point, the limiting slope."""
    color, marker, name = RULE_LOOKS[rule]
    xs, counts = by_size(rows, x, "count")
    if not xs:
        return []
    means = [float(np.mean(values)) for values in counts]
    spread = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in counts]
    axis.errorbar(xs, means, yerr=spread, color=color, marker=marker, linestyle="none", markersize=4, capsize=2)
    predictions = by_size(rows, x, "predicted_count")[1]
    if all(value is not None for values in predictions for value in values):
        axis.plot(xs, [float(np.mean(values)) for values in predictions], color=color)
    if exponent is not None:
        axis.plot(xs, [means[-1] * (at / xs[-1]) ** exponent for at in xs], color=color, linestyle=":")
    return [(xs[-1], means[-1], name, color)]


def _counts_of(part: str, rules: tuple[str, ...], step: int | None = None) -> Callable[[Axes, Sequence[Row]], None]:
    def draw(axis: Axes, rows: Sequence[Row]) -> None:
        ends: list[End] = []
        for rule in rules:
            mine = [row for row in of(rows, part, rule) if step is None or row["step"] == step]
            ends += _line(axis, mine, rule, exponent=mine[0]["asymptotic_exponent"] if mine else None)
        if ends:
            log_log(axis, [row["d"] for row in of(rows, part) if row["rule"] in rules])
            _thin(axis)
            name_ends(axis, ends)
        axis.set(xlabel="d", ylabel="items recovered")

    return draw


def _thin(axis: Axes) -> None:
    """Tick labels turned where there are many sizes."""
    axis.tick_params(axis="x", labelrotation=60, labelsize=7)


def _batches(axis: Axes, rows: Sequence[Row]) -> None:
    ends: list[End] = []
    for rule in ("sgd", "muon"):
        points = critical_batches(of(rows, "batch", rule))
        color, marker, name = RULE_LOOKS[rule]
        if not points:
            continue
        xs, batches = [point.d for point in points], [point.batch for point in points]
        errors = [min(point.log_error, 2.0) * point.batch for point in points]
        axis.errorbar(xs, batches, yerr=errors, color=color, marker=marker, linestyle="none", markersize=4, capsize=2)
        if all(point.predicted for point in points):
            axis.plot(xs, [float(point.predicted or 0) for point in points], color=color)
        exponent = next(row["asymptotic_critical_batch_exponent"] for row in of(rows, "batch", rule))
        axis.plot(xs, [batches[-1] * (x / xs[-1]) ** exponent for x in xs], color=color, linestyle=":")
        ends.append((xs[-1], batches[-1], name, color))
    if ends:
        log_log(axis, [row["d"] for row in of(rows, "batch")])
        _thin(axis)
        name_ends(axis, ends)
    axis.set(xlabel="d", ylabel="critical batch (90 %)")


def _steps(axis: Axes, rows: Sequence[Row]) -> None:
    deflation = of(rows, "deflation")
    if deflation:
        d = max(row["d"] for row in deflation)
        ends: list[End] = []
        for rule in ("sgd", "muon"):
            ends += _line(axis, [row for row in of(deflation, "deflation", rule) if row["d"] == d], rule, "step")
        axis.set_yscale("log")
        name_ends(axis, ends)
        axis.set(xlabel=f"step t, d = {d}, deflation", ylabel="items recovered, d_t")


def _limit(axis: Axes, rows: Sequence[Row]) -> None:
    exact = of_kind(of(rows, "exact"), "steps")
    if not exact:
        return
    last = max(row["step"] for row in exact)
    ended = [{**row, "predicted_count": None} for row in exact if row["step"] == last]
    ends = [end for rule in ("sgd", "muon") for end in _line(axis, [r for r in ended if r["rule"] == rule], rule)]
    sizes = sorted({(row["d"], row["information_limit"]) for row in ended})
    axis.plot(*zip(*sizes, strict=True), color="#999999", linestyle="--", linewidth=1)
    log_log(axis, [row["d"] for row in ended])
    name_ends(axis, ends)
    axis.set(xlabel=f"d, after {last} exact steps", ylabel="items recovered")


def _amplification(axis: Axes, rows: Sequence[Row]) -> None:
    mine = of(rows, "amplification")
    if mine:
        _line(axis, mine, "muon", exponent=mine[0]["asymptotic_exponent"])
        log_log(axis, [row["d"] for row in mine])
    axis.set(xlabel="d", ylabel="signal over noise, Muon / SGD")


def _anisotropy(axis: Axes, rows: Sequence[Row]) -> None:
    mine = of(rows, "anisotropy")
    if not mine:
        return
    d = max(row["d"] for row in mine)
    ends: list[End] = []
    for rule in ("muon", "newton"):
        color, marker, name = RULE_LOOKS[rule]
        same = {
            key[0]: at
            for key, at in group([r for r in mine if r["rule"] == rule and r["d"] == d], "anisotropy").items()
        }
        betas = sorted(same)
        means = [float(np.mean([row["count"] for row in same[beta]])) for beta in betas]
        axis.plot(betas, means, color=color, marker=marker, linestyle="none", markersize=4)
        axis.plot(
            betas, [float(np.mean([row["predicted_count"] for row in same[beta]])) for beta in betas], color=color
        )
        ends.append((betas[-1], means[-1], name, color))
    axis.set_yscale("log")
    ticks(axis, [row["anisotropy"] for row in mine])
    name_ends(axis, ends)
    axis.set(xlabel=f"beta of the inputs, d = {d}", ylabel="items recovered")


_PANELS: tuple[Callable[[Axes, Sequence[Row]], None], ...] = (
    _counts_of("capacity", ("sgd", "muon")),
    _counts_of("capacity", ("muon", "newton")),
    _batches,
    _counts_of("deflation", ("sgd", "muon"), step=1),
    _steps,
    _limit,
    _amplification,
    _anisotropy,
)
