"""Time and memory of one Muon step of the associative memory, all N items tested, against d and N.

Per phase the share of this machine's own GEMM rate (measured in the same process) is given, counted in the operations
that the phase cannot do without: gradient 2 N d^2 (fp32), polar factor 20 d^3 (fp64), recovery 2 N d^2 + 2 count N d
(screening type). One fresh process per size, so that the peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--n-items", type=int, nargs="+", default=[30000])
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="d = 128 and 256, two repeats: does the script work?")
    parser.add_argument("--out", default="benchmarks/results", help="folder for JSON and Markdown")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return 0
    if options.quick:
        options.d, options.repeats = [128, 256], 2
    rates = gemm_rates()
    rows = []
    for n_items in options.n_items:
        for d in options.d:
            command = [sys.executable, __file__, "--one", str(d), str(n_items)]
            command += ["--alpha", str(options.alpha), "--repeats", str(options.repeats), "--seed", str(options.seed)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(line(rows[-1], rates), flush=True)
    write(options, rates, rows)
    return 0


def measure(d: int, n_items: int, options: argparse.Namespace) -> dict[str, Any]:
    from lightning_spectral.theory.one_step import OneStep
    from lightning_spectral.theory.problem import MemoryProblem

    runs = []
    OneStep(MemoryProblem(d=64, n_items=2000, alpha=1.5)).run("muon")  # libraries awake
    for repeat in range(options.repeats):
        problem = MemoryProblem(d=d, n_items=n_items, alpha=options.alpha, seed=options.seed + repeat)
        start = time.perf_counter()
        result = OneStep(problem).run("muon")
        runs.append({**result.seconds, "total": time.perf_counter() - start, "count": result.stats.count})
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    totals = sorted(run["total"] for run in runs)
    quarter = len(totals) // 4
    return {
        "d": d,
        "n_items": n_items,
        "median": median,
        "iqr_s": totals[-1 - quarter] - totals[quarter],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "embeddings_mib": 8 * n_items * d / 2**20,
    }


def gemm_rates() -> dict[str, float]:
    """Operations per second of a 2048 x 2048 product, best of five after one warm-up, by type."""
    import torch

    rates = {}
    for name in ("float64", "float32", "bfloat16"):
        a = torch.randn(2048, 2048).to(getattr(torch, name))
        times = []
        for _ in range(6):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        rates[name] = 2 * 2048**3 / min(times[1:])
    return rates


def shares(row: dict[str, Any], rates: dict[str, float]) -> dict[str, float]:
    d, n_items, median = row["d"], row["n_items"], row["median"]
    screen = rates["bfloat16"] if rates["bfloat16"] > rates["float32"] else rates["float32"]
    return {
        "gradient": 2 * n_items * d**2 / rates["float32"] / median["gradient"],
        "direction": 20 * d**3 / rates["float64"] / median["direction"],
        "recovery": (2 * n_items * d**2 + 2 * median["count"] * n_items * d) / screen / median["recovery"],
    }


def line(row: dict[str, Any], rates: dict[str, float]) -> str:
    median = row["median"]
    phases = " | ".join(f"{median[phase]:.2f} ({100 * share:.0f} %)" for phase, share in shares(row, rates).items())
    return (
        f"| {row['d']} | {row['n_items']} | {median['total']:.2f} | {row['iqr_s']:.2f} | {median['embeddings']:.2f} | "
        f"{phases} | {row['peak_mib']:.0f} | {row['embeddings_mib']:.0f} | {median['count']:.0f} |"
    )


def write(options: argparse.Namespace, rates: dict[str, float], rows: list[dict[str, Any]]) -> None:
    import torch

    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        "load": os.getloadavg(),
        "gemm_gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "alpha": options.alpha,
        "repeats": options.repeats,
    }
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench_memory.json").write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    header = (
        "| d | N | total s | IQR s | embeddings s | gradient s (of fp32 GEMM) | polar s (of fp64) | recovery s (of "
        "screening type) | peak MiB | embeddings MiB | count |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    text = "\n".join([header, *(line(row, rates) for row in rows)])
    notes = "\n".join(f"- {key}: {value}" for key, value in about.items())
    (folder / "bench_memory.md").write_text(f"# One Muon step, all items tested\n\n{notes}\n\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
