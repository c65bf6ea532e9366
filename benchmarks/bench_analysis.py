"""How long do `fit`, `compare` and `report` take on a whole study: 40 runs x 60 windows x 12 layers x 4 buckets?

And a curve of 143,000 rows handed to `fit`, and 1,000 run folders listed and loaded. The runs are written with known
slopes; the commands run as a user runs them, a process each, interpreter included. The only benchmark of absolute
times: limits in seconds and MiB stand beside them. On a machine that others use CPU seconds are what to read.

    python benchmarks/bench_analysis.py
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from tests.analysis.synthetic import write_study

SLOPES = {"adamw": 0.4, "muon": 1.0}
LIMITS_S = {"fit": 3.0, "compare": 4.0, "report": 9.0, "curve of 143,000 rows": 5.0, "1,000 run folders": 20.0}
LIMITS_MIB = {"curve of 143,000 rows": 500.0}
COMMANDS = {
    "fit": ["fit", "{runs}", "--out", "{out}"],
    "compare": ["compare", "{runs}", "--out", "{out}"],
    "report": ["report", "{runs}", "--out", "{out}"],
    "curve of 143,000 rows": ["fit", "{curve}", "--x", "step", "--y", "loss"],
    "1,000 run folders": ["records", "{many}", "--out", "{out}.csv"],
}
# VmHWM: what `getrusage` calls the largest of a process includes its parent's at the start
_MEASURED = """
import re, sys
from lightning_spectral.cli import main
code = main(sys.argv[1:])
print("peak_kib", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""


def timed(words: list[str]) -> tuple[float, float, float]:
    """(CPU seconds, wall seconds, peak MiB) of one process."""
    command = [sys.executable, "-c", _MEASURED, *words]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    peak = int(done.stderr.rpartition("peak_kib")[2]) / 1024
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall, peak


def write_curve(path: Path, rows: int) -> None:
    """A loss that falls to a floor, with noise: what a training log holds."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, rows + 1)
    loss = 1.7 + 8.0 * steps**-0.3 * np.exp(0.02 * rng.standard_normal(rows))
    lines = (f"{step},{value!r}" for step, value in zip(steps.tolist(), loss.tolist(), strict=True))
    path.write_text("step,loss\n" + "\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, rounds=3).parse_args(argv)
    about = harness.prepare(options)
    seeds, windows, layers = (range(1), 6, 3) if options.quick else (range(5), 60, 12)
    report: dict[str, Any] = {"rows": {}, "limits_s": LIMITS_S, "limits_mib": LIMITS_MIB}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        paths = write_study(runs, SLOPES, seeds=seeds, steps=range(0, 100 * windows, 100), layers=layers, recipes=True)
        size = sum(path.stat().st_size for path in runs.rglob("*") if path.is_file()) / 2**20
        curve, many = Path(folder) / "curve.csv", Path(folder) / "many"
        write_curve(curve, 2_000 if options.quick else 143_000)
        write_study(many, SLOPES, seeds=range(2 if options.quick else 125), steps=(0, 100, 200), layers=2)
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in COMMANDS}
        for turn in range(options.rounds):
            for name, words in COMMANDS.items():
                places = {"runs": runs, "curve": curve, "many": many, "out": Path(folder) / f"{name}_{turn}"}
                times[name].append(timed([word.format(**places) for word in words]))
    text = [
        f"# Analysis of {len(paths)} runs x {windows} windows x {layers} layers x 4 buckets ({size:.0f} MiB)",
        "",
        "| command | CPU s, median | wall s, median | slowest | limit s | peak MiB | limit MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, taken in times.items():
        cpu, wall, peak = (statistics.median(column) for column in zip(*taken, strict=True))
        slowest = max(w for _, w, _ in taken)
        report["rows"][name] = {"cpu_s": cpu, "wall_s": wall, "slowest_wall_s": slowest, "peak_mib": peak}
        limits = f"{LIMITS_S[name]:g} | {peak:.0f} | {LIMITS_MIB.get(name, '')}"
        text.append(f"| {name} | {cpu:.2f} | {wall:.2f} | {slowest:.2f} | {limits} |")
    how = "Seconds of one command from its start to its end; the commands take turns."
    harness.write(options, "analysis", about, report, "\n".join(text), how)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
