"""How far off is beta when every width is measured on few rows of sequences whose rows are alike?

Spectra of known rank at four widths, 1,350 rows each (a quickstart batch) in sequences of 128: independent rows, rows
of unlike length, or rows that share a fifth of their variance with their sequence, in all directions or in the largest
ones. Recorded by the
code that records a window; the slope of each rank minus that of the true ranks, mean over draws.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import harness
import numpy as np
import torch

from lightning_spectral.analysis.linear import least_squares
from lightning_spectral.functional.covariance import empty_moments, update_
from lightning_spectral.functional.rank import hard_rank, soft_rank
from lightning_spectral.probe.ranks_of import HARD_RANK_ACROSS, measure

WIDTHS, LENGTH, GROUPS = (128, 256, 512, 1024), 128, 2
SPECTRA = {
    "rank ~ D": lambda d, i: torch.exp(-i / (0.12 * d)),
    "rank ~ D^.44": lambda d, i: torch.exp(-i / (1.9 * d**0.44)),
    "i^-.7": lambda d, i: i**-0.7,
}
UNEVEN = "nothing, but their lengths differ"  # log-normal with sigma = .7
SHARED = {
    "nothing": 0.0,
    UNEVEN: 0.0,
    "all directions": 0.2,
    "the largest, half of each": 0.5,
    "the largest, .8 of each": 0.8,
}
NAMES = ("hard, raw", "hard, across", "soft, raw", "soft, extrapolated")


def share_of(spectrum: torch.Tensor, kind: str) -> torch.Tensor:
    """Share of each direction's variance that the rows of a sequence have in common; a fifth in all."""
    share = SHARED[kind]
    if share <= 0.2:
        return torch.full_like(spectrum, share)
    before = spectrum.cumsum(0) - spectrum
    left = 0.2 * spectrum.sum() - share * before
    return (left / spectrum).clamp(0, share)


def ranks(
    spectrum: torch.Tensor, share: torch.Tensor, sigma: float, rows: int, generator: torch.Generator
) -> list[float]:
    """One window's raw and corrected ranks."""
    count = math.ceil(rows / LENGTH)
    own = torch.randn(rows, len(spectrum), generator=generator) * (1 - share).sqrt()
    common = torch.randn(count, len(spectrum), generator=generator).repeat_interleave(LENGTH, 0)[:rows]
    moments = empty_moments(GROUPS, len(spectrum))
    group = torch.arange(rows) // LENGTH % GROUPS
    order = torch.cat([(group == k).nonzero().flatten() for k in range(GROUPS)])
    sizes = [int((group == k).sum()) for k in range(GROUPS)]
    lengths = (torch.randn(rows, 1, generator=generator) * sigma).exp() if sigma else 1.0
    update_(moments, (own + common * share.sqrt()) * lengths * spectrum.sqrt(), sizes, order)
    found = measure(moments, range(GROUPS), num_sequences=count)
    across = found.values[HARD_RANK_ACROSS]
    return [found.hard_rank or math.nan, across, found.soft_rank or math.nan, found.soft_rank_debiased or math.nan]


def biases(name: str, kind: str, rows: int, draws: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mean over draws of beta minus the true one, and its standard error, for each of :data:`NAMES`."""
    spectra = [SPECTRA[name](d, torch.arange(1, d + 1, dtype=torch.float64)) for d in WIDTHS]
    true = np.array([[float(hard_rank(s))] * 2 + [float(soft_rank(s))] * 2 for s in spectra])
    sigma = 0.7 if kind == UNEVEN else 0.0
    found = np.array(
        [[ranks(s.float(), share_of(s, kind).float(), sigma, rows, generator) for s in spectra] for _ in range(draws)]
    )
    slopes = least_squares(np.log(WIDTHS), np.log(found / true).swapaxes(1, 2)).slope
    return slopes.mean(0), slopes.std(0, ddof=1) / math.sqrt(draws)


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, rounds=8).parse_args(argv)
    about = harness.prepare(options)
    draws, rows = (2, 1350) if options.quick else (options.rounds, 1350)
    generator = torch.Generator().manual_seed(options.seed)
    report: dict[str, Any] = {"rows": rows, "draws": draws, "bias": {}}
    text = [
        f"# Bias of beta: {rows:,} rows in {-(-rows // LENGTH)} sequences at each width, {WIDTHS[0]} to {WIDTHS[-1]}",
        "",
        f"| spectrum | rows of a sequence share | {' | '.join(NAMES)} |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name in SPECTRA:
        for kind in SHARED:
            mean, error = biases(name, kind, rows, draws, generator)
            report["bias"][f"{name}, {kind}"] = dict(zip(NAMES, mean.tolist(), strict=True))
            cells = [f"{m:+.3f} ({e:.3f})" for m, e in zip(mean, error, strict=True)]
            text.append(f"| {name} | {kind} | {' | '.join(cells)} |")
            print(text[-1], file=sys.stderr, flush=True)
    how = f"Slope of ln(rank) minus that of the true ranks, mean of {draws} draws (its standard error)."
    harness.write(options, "finite_rows", about, report, "\n".join(text), how)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
