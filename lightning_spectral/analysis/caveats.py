"""Warnings for readers of an exponent: one sentence each, the same in ``fit``, ``compare`` and ``report``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from lightning_spectral.analysis.fits import PowerLawFit
from lightning_spectral.analysis.learning_rates import learning_rate_sweeps
from lightning_spectral.analysis.points import LAYER_MEDIAN
from lightning_spectral.analysis.recipe_facts import decay_step, is_whole, num_steps, seed_meaning
from lightning_spectral.analysis.runs import RunSet
from lightning_spectral.analysis.study import Fitted
from lightning_spectral.analysis.tables import WIDTH_NAMES

FEW_WIDTHS: Final = 4
_FOCUS: Final = {"site": "post", "bucket": "tail", "metric": "hard_rank", "layer": LAYER_MEDIAN}


def median_fits(fitted: Fitted) -> list[PowerLawFit]:
    """Fits of layer medians; all of them when there is no layer column."""
    by = fitted.table.by
    return [fit for fit in fitted.fits if "layer" not in by or fit.series[by.index("layer")] == LAYER_MEDIAN]


def caveats_of(fitted: Fitted, runs: RunSet | None, *, listed: bool = True) -> list[str]:
    """Everything that qualifies the numbers, beyond bad inputs and flags.

    Args:
        fitted: Points and fits.
        runs: The runs behind them; ``None`` for a table.
        listed: Give the exponents before the decay; not needed where a table of them stands beside.
    """
    known = [fit for fit in median_fits(fitted) if not fit.refused]
    out = [interval_meaning(known, runs)] if known else []
    if known and min(fit.num_widths for fit in known) < FEW_WIDTHS:
        out.append(_few_widths(known, fitted.table.by))
    wide = [fit for fit in known if fit.wide]
    if wide:
        out.append(
            f"Wide interval (half-width of beta above 0.3, or none at all) in {len(wide)} of {len(known)} fits: "
            "compare optimizers by their difference and its interval (`compare`), not by two point estimates."
        )
    windows = {(fit.x_min, fit.x_max) for fit in known}
    if len(windows) > 1:
        shown = ", ".join(f"{low:g} to {high:g}" for low, high in sorted(windows))
        out.append(f"The fits cover different widths ({shown}): a slope over other widths is another quantity.")
    if runs is None:
        if known:
            out.append("A table holds no untrained network: whose slope training must be judged against is not known.")
        return [_over(fitted.table.x_name, text) for text in out]
    return [
        *out,
        *_null_caveats(known),
        *_decay_caveats(fitted, runs, listed),
        *_rate_caveats(fitted, runs),
        *_runs(runs),
    ]


def _few_widths(fits: Sequence[PowerLawFit], by: Sequence[str]) -> str:
    """How few, and of which series where others have more."""
    few = [fit for fit in fits if fit.num_widths < FEW_WIDTHS]
    text = f"Few widths: {min(fit.num_widths for fit in few)}"
    if len(few) < len(fits):
        places = [k for k, name in enumerate(by) if name not in ("site", "bucket", "metric", "layer")]
        names = dict.fromkeys(" ".join(filter(None, (fit.series[k] for k in places))) for fit in few)
        text += f" ({', '.join(names)})"
    return f"{text}. An interval over so few says little."


def _over(x_name: str, text: str) -> str:
    """A sentence about widths as one about another column of a table."""
    if x_name in WIDTH_NAMES:
        return text
    text = text.replace("an effect a width", f"an effect a value of `{x_name}`").replace("other widths", "other ones")
    return text.replace("Few widths", f"Few values of `{x_name}`").replace("widths", f"values of `{x_name}`")


def interval_meaning(fits: Sequence[PowerLawFit], runs: RunSet | None) -> str:
    """What the 95 % intervals are intervals over."""
    seeds = seed_meaning(runs.runs) if runs is not None else ""
    if max(fit.num_seeds for fit in fits) < 2:
        return "No seeds are told apart: the intervals are over widths (Student's t), not over seeds."
    if any(fit.method == "mixed" for fit in fits):
        few = min(fit.num_seeds for fit in fits if fit.method == "mixed")
        text = "Intervals are over widths and seeds (a mixed model: level and slope a seed, an effect a width)"
        text += "; with two seeds they are wide, for two seeds cannot show that seeds do not matter" if few == 2 else ""
    else:
        text = "Intervals are over widths (Student's t); no interval is over seeds"
    return text + (f" ({seeds})." if seeds else ".")


def decay_sentences(fitted: Fitted, **where: str) -> list[str]:
    """``AdamW: before decay beta 0.10 [-0.2, 0.4] (step 416), after 0.20 [0.0, 0.4]``: TAIL hard rank by default."""
    names, wanted = fitted.table.by, {**_FOCUS, **where}
    out = []
    for fit in fitted.fits:
        cells = dict(zip(names, fit.series, strict=True))
        if math.isfinite(fit.before_beta) and all(cells.get(name, value) == value for name, value in wanted.items()):
            label = " ".join(cell for name, cell in cells.items() if name not in wanted and cell)
            out.append(
                f"{label}: before decay beta {fit.before_beta:.2f} [{fit.before_low:.2f}, {fit.before_high:.2f}] "
                f"(step {fit.before_step:.0f}), after {fit.beta:.2f} [{fit.ci_low:.2f}, {fit.ci_high:.2f}]"
            )
    return out


def missing_runs(series: dict[str, list[tuple[int, str]]]) -> list[str]:
    """Widths and seeds that some series have and others lack.

    Args:
        series: Name of each series -> (width, seed) of its runs.
    """
    cells = {cell for own in series.values() for cell in own}
    lacking: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for name, own in series.items():
        lacking.setdefault(tuple(sorted(cells - set(own))), []).append(name)
    out = []
    for lack, names in lacking.items():
        if lack:
            parts = [f"D = {width}" + (f" seed {seed}" if seed else "") for width, seed in lack]
            shown = ", ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")
            verb = "has" if len(names) == 1 else "have"
            out.append(f"{', '.join(names)} {verb} no run at {shown}, where others have one.")
    return out


def _null_caveats(fits: Sequence[PowerLawFit]) -> list[str]:
    if any(math.isfinite(fit.null_beta) for fit in fits) or not fits:
        return []
    return ["No null: the runs have no window at step 0 or 1, so the slope of the untrained network is not known."]


def _decay_caveats(fitted: Fitted, runs: RunSet, listed: bool) -> list[str]:
    if fitted.before is not None:
        shown = decay_sentences(fitted) if listed else []
        text = "The state before the learning-rate decay is another state than the final one: read both"
        return [f"{text}. TAIL hard rank, {'; '.join(shown)}." if shown else f"{text} (before_beta in fits.csv)."]
    steps = {decay_step(run) for run in runs.runs}
    known = sorted(step for step in steps if step is not None)
    if not known and len(runs.runs) == 1:
        return []  # one run has no slope that the decay could change
    if not known:
        return ["No state before the learning-rate decay: no run records a schedule that holds the rate, then decays."]
    last = max(step for point in fitted.table.points for step in point.steps) if fitted.table.points else 0
    if last <= known[-1]:
        return [f"All windows lie before the learning-rate decay (step {known[-1]}): the final state is another one."]
    return [f"The learning rate decays after step {known[-1]}; no window lies before it: what that does is unknown."]


def _rate_caveats(fitted: Fitted, runs: RunSet) -> list[str]:
    """How far the headline's exponent moves with the learning rate alone."""
    by = fitted.table.by
    place = [by.index(name) for name in by if name in _FOCUS]
    if not place or set(by[: place[0]]) != {"optimizer", *runs.series_labels}:
        return []
    rest = tuple(_FOCUS[name] for name in by[place[0] :])
    groups = fitted.table.groups()
    out = []
    for sweep in learning_rate_sweeps(runs):
        fits = [(point.rate, point.fit(groups, rest)) for point in sweep.points]
        shown = [f"{rate:g}: {fit.beta:.2f}" for rate, fit in fits if fit is not None and not fit.refused]
        if len(shown) > 1:
            text = f"The learning rate alone moves {sweep.name}'s beta of TAIL hard rank ({sweep.where})"
            out.append(f"{text}: {', '.join(shown)}.")
    return out


def _runs(runs: RunSet) -> list[str]:
    """Runs cut short, and runs that saw other data."""
    out = []
    short = [(run, num_steps(run) or "an unknown number") for run in runs.runs if is_whole(run) is False]
    if short:
        run, steps = short[0]
        more = f" and {len(short) - 1} more" if len(short) > 1 else ""
        out.append(f"Not finished: {run.run_id} (last window at step {run.steps[-1]} of {steps}){more}.")
    cut = {run.run_id for run, _ in short}
    for name, what in (("train", "training data"), ("validation", "held-out tokens")):
        seen = [run for run in runs.runs if name in run.data_digests and run.run_id not in cut]
        digests = {run.data_digests[name] for run in seen}
        one_a_seed = len({(run.seed, run.data_digests[name]) for run in seen}) == len({run.seed for run in seen})
        if len(digests) > 1 and not one_a_seed:
            out.append(f"The runs saw different {what}: {len(digests)} digests.")
    return out
