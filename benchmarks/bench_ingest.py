"""How fast do rows enter the moments, pooled and by bucket, against a plain GEMM and every peer?

One contestant is one block of rows of one layer (default 4,096 tokens, three buckets by an uneven draw). The symmetric
limit is half a GEMM's work at the GEMM rate of this machine, measured in the same rounds.

    python benchmarks/bench_ingest.py --quick
    python benchmarks/bench_ingest.py --threads 2
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness, peers
from lightning_spectral.functional.buckets import sort_by_group
from lightning_spectral.functional.covariance import Moments, empty_moments, update_
from lightning_spectral.functional.packed import packed_size, strip_views
from lightning_spectral.functional.products import BACKENDS, calibrate

BASE = "GEMM fp32, shifted"
BUCKETS, SHARES = 3, (0.33, 0.34, 0.33)


def contestants(width: int, num_tokens: int, device: str, with_slow: bool) -> dict[str, Callable[[], Any]]:
    rows = torch.randn(num_tokens, width, device=device) * torch.linspace(2, 1, width, device=device) + 0.3
    codes = torch.multinomial(torch.tensor(SHARES, device=device), num_tokens, replacement=True)
    chosen = calibrate(width, device=device)
    pooled, bucketed = (empty_moments(groups, width, device=device) for groups in (1, BUCKETS))
    full, shift = torch.zeros(width, width, device=device), rows[:512].mean(0)
    packed = strip_views(torch.zeros(packed_size(width), device=device), width)

    def gemm() -> None:
        shifted = rows - shift
        full.addmm_(shifted.mT, shifted)

    def ingest(state: Moments, codes: torch.Tensor) -> Callable[[], None]:
        return lambda: update_(state, rows, *sort_by_group(codes, state.num_groups), product=chosen.product)

    found: dict[str, Callable[[], Any]] = {
        BASE: gemm,
        f"ours, pooled ({chosen.name})": ingest(pooled, torch.zeros_like(codes)),
        f"ours, {BUCKETS} buckets and pooled ({chosen.name})": ingest(bucketed, codes),
        f"product alone ({chosen.name})": lambda: chosen.product(packed, rows),
    }
    for name, backend in BACKENDS.items():
        if name in chosen.errors and name != chosen.name:
            refused = "" if name in chosen.seconds else f" (refused: error {chosen.errors[name]:.0e})"
            found[f"product alone, {name}{refused}"] = lambda run=backend.run: run(packed, rows)
    buffering = peers.Buffering()

    def buffer_and_flush() -> None:
        buffering.update(rows, codes)
        buffering.covariances(BUCKETS)

    found["paper's buffering, buckets and pooled, at flush"] = buffer_and_flush
    if peers.HAS_TELEMETRY:
        for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
            theirs = peers.Telemetry(width, BUCKETS, dtype, device)
            found[f"spectral-telemetry {name}, buckets and pooled"] = lambda t=theirs: t.update(rows, codes)
            alone = peers.Telemetry(width, 0, dtype, device)
            found[f"spectral-telemetry {name}, pooled"] = lambda t=alone: t.update(rows, codes)
    if with_slow:
        found["RankMe-style svdvals, pooled only"] = lambda: peers.singular_value_rank(rows)
    return found


def findings(width: int, num_tokens: int, timings: list[harness.Timing], clock: str) -> dict[str, float]:
    """The ratios that issue 3 asks for."""
    ms = {t.name: getattr(t, f"{clock}_ms") for t in timings}
    ours = next(value for name, value in ms.items() if name.startswith(f"ours, {BUCKETS}"))
    pooled = next(value for name, value in ms.items() if name.startswith("ours, pooled"))
    product = next(value for name, value in ms.items() if name.startswith("product alone ("))
    found = {
        "buckets over pooled": ours / pooled,
        "useful GFLOP/s": 2 * num_tokens * width**2 / ours / 1e6,
        "of the symmetric limit, whole ingest": ms[BASE] / 2 / ours,
        "of the symmetric limit, product alone": ms[BASE] / 2 / product,
    }
    for name, value in ms.items():
        if name.startswith(("spectral-telemetry", "paper", "RankMe")):
            found[f"times faster than {name}"] = value / (pooled if name.endswith("pooled only") else ours)
    return found


def state_bytes(width: int) -> dict[str, float]:
    state = empty_moments(BUCKETS, width)
    ours = sum(v.numel() * v.element_size() for v in vars(state).values())
    found = {"ours, MiB": ours / 2**20}
    if peers.HAS_TELEMETRY:
        theirs = peers.Telemetry(width, BUCKETS, torch.float64, "cpu").state_bytes()
        found |= {"spectral-telemetry, MiB": theirs / 2**20, "share": ours / theirs}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__, rounds=7)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 3072])
    parser.add_argument("--num-rows", type=int, default=4096)
    options = parser.parse_args(argv)
    if options.quick:
        options.widths, options.num_tokens, options.rounds = [256, 512], 1024, 3
    about = harness.prepare(options)
    report: dict[str, Any] = {"rows": {}, "findings": {}, "state": {}}
    text = ["# Ingest: rows into moments", ""]
    for width in options.widths:
        with torch.no_grad():
            racers = contestants(width, options.num_tokens, options.device, with_slow=width <= 1024)
            timings = harness.race(racers, BASE, rounds=options.rounds, warm_up=2, device=options.device)
        found = {clock: findings(width, options.num_tokens, timings, clock) for clock in ("cpu", "wall")}
        report["rows"][width] = [asdict(t) for t in timings]
        report["findings"][width], report["state"][width] = found, state_bytes(width)
        text += [f"## D = {width}, N = {options.num_tokens}", "", *harness.table(timings, BASE), ""]
        text += [f"- {name}: {value:.2f} CPU, {found['wall'][name]:.2f} wall" for name, value in found["cpu"].items()]
        text += [f"- state, {name}: {value:.2f}" for name, value in report["state"][width].items()] + [""]
    harness.write(options, f"ingest_{options.threads}t", about, report, "\n".join(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
