"""What does one spectrum cost, and how wrong is the approximate soft rank?

All contestants see one layer's covariance (power law, N = 4 D rows). `measure` is our whole report of one bucket: exact
with every rank and early enrichment, or approximate, or the hard ranks alone.
The last table compares `soft="approx"` with known spectra.

    python benchmarks/bench_spectrum.py --quick
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness, peers
from lightning_spectral.functional.approximate import approximate_entropy
from lightning_spectral.functional.covariance import covariance, empty_moments, update_
from lightning_spectral.functional.rank import soft_rank
from lightning_spectral.functional.sample import sample
from lightning_spectral.probe.ranks_of import measure

BASE = "torch eigvalsh fp64"
ALPHAS, SEEDS = (0.6, 0.8, 1.0, 1.2, 1.5, 2.0), 3
SVD_UP_TO = 1024  # beyond, the singular values of the rows take longer than everything else together


def reflected(matrix: torch.Tensor, seed: int) -> torch.Tensor:
    """The rows in another orthonormal basis."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        v = torch.nn.functional.normalize(torch.randn(matrix.shape[1], generator=generator), dim=0).to(matrix)
        matrix = matrix - 2 * torch.outer(matrix @ v, v)
    return matrix


def contestants(width: int, device: str, seed: int) -> dict[str, Callable[[], Any]]:
    scale = torch.arange(1, width + 1) ** -0.5
    rows = reflected(torch.randn(4 * width, width) * scale, seed).to(device)
    moments = empty_moments(1, width, device=device)
    update_(moments, rows, [len(rows)])
    matrix = covariance(moments)
    found: dict[str, Callable[[], Any]] = {
        BASE: lambda: torch.linalg.eigvalsh(matrix),
        "ours, exact report": lambda: measure(moments),
        "ours, approximate report": lambda: measure(moments, soft="approx"),
        "ours, approximate entropy alone": lambda: approximate_entropy(matrix.float()),
        "ours, hard ranks alone": lambda: sample(moments),
    }
    if peers.HAS_TELEMETRY:
        theirs = peers.Telemetry(width, 0, torch.float64, device)
        theirs.pooled.update(rows)
        found["spectral-telemetry, metrics()"] = lambda: theirs.pooled.metrics()
    if width <= SVD_UP_TO:
        found["RankMe-style svdvals of 4 D rows"] = lambda: peers.singular_value_rank(rows)
    return found


def errors(width: int, device: str, seed: int) -> dict[str, float]:
    """Signed relative errors of the approximate soft rank against known spectra, the worst of the seeds, in percent."""
    found = {}
    for alpha in ALPHAS:
        eigs = torch.arange(1, width + 1, dtype=torch.float64) ** -alpha
        exact = float(soft_rank(eigs))
        matrix = reflected(reflected(torch.diag(eigs), seed).mT, seed)
        matrix = ((matrix + matrix.mT) / 2).float().to(device)
        off = [100 * (math.exp(approximate_entropy(matrix, seed=k)) / exact - 1) for k in range(SEEDS)]
        found[f"{alpha:g}"] = max(off, key=abs)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__, rounds=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 3072])
    options = parser.parse_args(argv)
    if options.quick:
        options.widths, options.rounds = [256, 1024], 3
    about = harness.prepare(options)
    report: dict[str, Any] = {"rows": {}, "error_percent": {}}
    text = ["# Spectrum: one report", ""]
    for width in options.widths:
        with torch.no_grad():
            racers = contestants(width, options.device, options.seed)
            timings = harness.race(racers, BASE, rounds=options.rounds, warm_up=1, device=options.device)
            off = errors(width, options.device, options.seed)
        report["rows"][width], report["error_percent"][width] = [asdict(t) for t in timings], off
        cpu = {t.name: t.cpu_ms for t in timings}
        text += [f"## D = {width}", "", *harness.table(timings, BASE), ""]
        faster = cpu[BASE] / cpu["ours, approximate entropy alone"]
        text += [f"Approximate entropy: {faster:.1f}x faster than {BASE} (CPU).", ""]
        text += ["| eigenvalues i^-alpha, alpha | " + " | ".join(off) + " |", "|---|" + "---:|" * len(off)]
        text += [f"| worst error of {SEEDS} seeds, % | " + " | ".join(f"{e:+.3f}" for e in off.values()) + " |", ""]
    harness.write(options, f"spectrum_{options.threads}t", about, report, "\n".join(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
