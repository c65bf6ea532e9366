"""What does one Muon step of the associative memory cost, all N items tested, and how does the cost grow with d and N?

Per phase: wall seconds, and the time that the very products it made (counted as they ran, by type) would take at this
machine's own GEMM rate, as a share of those seconds. An inversion counts 8/3 d^3: LU, then two triangular solves.
One fresh process per size, so that the peak memory is its own. A size is repeated while its share of time lasts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from harness import arguments, prepare, timed, write
from torch.utils._python_dispatch import TorchDispatchMode

PHASES = ("embeddings", "gradient", "polar", "recovery")
SIZES = [*((d, 30_000) for d in (256, 512, 1024, 2048, 4096)), *((64, n) for n in (10_000, 100_000, 1_000_000))]
QUICK = [(64, 5_000), (128, 5_000)]
SECONDS_PER_SIZE = 30.0  # repeats stop after it; the largest size runs once
LIMITS_S = {1024: 2.5, 2048: 10.0, 4096: 60.0}  # issue 6, N = 30000, two idle cores


class Operations(TorchDispatchMode):
    """Floating-point operations of the matrix products and inversions made inside, by type."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.count[str(left.dtype)] += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        elif name == "linalg_inv_ex":
            self.count[str(args[0].dtype)] += 8 * args[0].shape[0] ** 3 // 3
        return result


def step(d: int, n_items: int, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One step, phase by phase: wall and CPU seconds, operations."""
    from lightning_spectral.theory.embeddings import Embeddings
    from lightning_spectral.theory.gradient import negative_gradient_at_zero
    from lightning_spectral.theory.problem import MemoryProblem
    from lightning_spectral.theory.recovery import recovered_mask
    from lightning_spectral.theory.rules import Gradient, direction

    problem = MemoryProblem(d=d, n_items=n_items, alpha=options.alpha, seed=seed)
    embeddings, weights = Embeddings(problem, options.device), problem.gradient_weights()
    made: dict[str, Any] = {}

    def draw() -> None:
        for side in ("u", "v"):
            embeddings.rows(side, 0, 1)  # type: ignore[arg-type]

    def gradient() -> None:
        made["gradient"] = Gradient(negative_gradient_at_zero(embeddings, weights), weights, embeddings)

    def polar() -> None:
        made["update"] = direction("muon", made["gradient"])

    def recovery() -> None:
        made["count"] = int(recovered_mask(embeddings, made["update"]).sum())

    row: dict[str, Any] = {}
    for phase, run in zip(PHASES, (draw, gradient, polar, recovery), strict=True):
        with Operations() as operations:
            cpu, wall = timed(run, options.device)
        row[phase] = {"wall_s": wall, "cpu_s": cpu, "operations": dict(operations.count)}
    return {**row, "count": made["count"]}


def measure(d: int, n_items: int, options: argparse.Namespace) -> dict[str, Any]:
    """Repeats of one size, summarised; called in a process of its own."""
    torch.set_num_threads(options.threads)
    step(48, 1_500, options, 0)  # libraries awake, imports done
    runs: list[dict[str, Any]] = []
    begun = time.perf_counter()
    while len(runs) < options.rounds and (not runs or time.perf_counter() - begun < SECONDS_PER_SIZE):
        runs.append(step(d, n_items, options, options.seed + len(runs)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    rates = gemm_rates(options.device)
    totals = [sum(run[phase]["wall_s"] for phase in PHASES) for run in runs]
    phases = {phase: _phase([run[phase] for run in runs], rates) for phase in PHASES}
    return {
        "d": d,
        "n_items": n_items,
        "repeats": len(runs),
        "total_s": statistics.median(totals),
        "total_s_all": totals,
        "cpu_s": statistics.median(sum(run[phase]["cpu_s"] for phase in PHASES) for run in runs),
        "phases": phases,
        "peak_mib": peak,
        "embeddings_mib": 8 * n_items * d / 2**20,
        "count": statistics.median(run["count"] for run in runs),
        "gemm_gflops": {name.removeprefix("torch."): rate / 1e9 for name, rate in rates.items()},
    }


def _phase(runs: list[dict[str, Any]], rates: dict[str, float]) -> dict[str, Any]:
    wall = statistics.median(run["wall_s"] for run in runs)
    operations = runs[-1]["operations"]
    ideal = sum(count / rates[dtype] for dtype, count in operations.items())
    share = ideal / wall if operations else None
    return {"wall_s": wall, "gemm_share": share, "gigaops": {k: v / 1e9 for k, v in operations.items()}}


def gemm_rates(device: str) -> dict[str, float]:
    """Operations per second of a 2048 x 2048 product, best of four after one warm-up, by type."""
    rates = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048, device=device).to(dtype)
        best = min(timed(lambda a=a: a @ a, device)[1] for _ in range(5))  # type: ignore[misc]
        rates[str(dtype)] = 2 * 2048**3 / best
    return rates


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: seconds of each phase, with the share of GEMM peak in brackets."""
    lines = [
        "| d | N | total s | range s | CPU s | " + " | ".join(f"{phase} s" for phase in PHASES) + " | polar ops / d^3 "
        "| peak MiB | embeddings MiB | items stored |",
        "|---:" * (9 + len(PHASES)) + "|",
    ]
    for row in rows:
        cells = []
        for phase in PHASES:
            found = row["phases"][phase]
            share = "" if found["gemm_share"] is None else f" ({100 * found['gemm_share']:.0f} %)"
            cells.append(f"{found['wall_s']:.3f}{share}")
        polar = sum(row["phases"]["polar"]["gigaops"].values()) * 1e9 / row["d"] ** 3
        low, high = min(row["total_s_all"]), max(row["total_s_all"])
        lines.append(
            f"| {row['d']} | {row['n_items']} | {row['total_s']:.2f} | {low:.2f}-{high:.2f} ({row['repeats']}) | "
            f"{row['cpu_s']:.2f} | {' | '.join(cells)} | {polar:.1f} | {row['peak_mib']:.0f} | "
            f"{row['embeddings_mib']:.0f} | {row['count']:.0f} |"
        )
    return lines


def findings(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Growth with d at one N and with N at one d, and the share of issue 6's limits that is used."""
    found: dict[str, float] = {}
    for key, other in (("d", "n_items"), ("n_items", "d")):
        for fixed in dict.fromkeys(row[other] for row in rows):
            same = sorted((row for row in rows if row[other] == fixed), key=lambda row: row[key])
            for a, b in pairwise(same):
                slope = math.log(b["total_s"] / a["total_s"]) / math.log(b[key] / a[key])
                found[f"time ~ {key}^e, {key} {a[key]} to {b[key]}, {other} {fixed}"] = slope
    for row in rows:
        if row["n_items"] == 30_000 and row["d"] in LIMITS_S:
            found[f"share of the limit, d {row['d']}"] = row["total_s"] / LIMITS_S[row["d"]]
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.set_defaults(threads=os.cpu_count())
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return
    about = prepare(options)
    rows: list[dict[str, Any]] = []
    passed = ["--threads", str(options.threads), "--rounds", str(2 if options.quick else options.rounds)]
    passed += ["--seed", str(options.seed), "--device", options.device, "--alpha", str(options.alpha)]
    for d, n_items in QUICK if options.quick else SIZES:
        command = [sys.executable, __file__, "--one", str(d), str(n_items), *passed]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(table(rows)[-1], flush=True)
    found = findings(rows)
    text = ["# Associative memory: one Muon step from W = 0, all items tested", "", *table(rows), ""]
    text += [f"- {name}: {value:.2f}" for name, value in found.items()]
    how = "In brackets: the share of this process's own GEMM rate, over all products of the phase."
    report = {"rows": rows, "findings": found}
    write(options, f"memory_{options.threads}t", {**about, "alpha": options.alpha}, report, "\n".join(text), how)


if __name__ == "__main__":
    main()
