"""How long do `fit`, `compare` and `report` take on a whole study: 40 runs x 60 windows x 12 layers x 4 buckets?

The runs are written with known slopes; the commands run as a user runs them, a process each, interpreter included. The
only benchmark of absolute times: issue 5 asks for seconds (fit 5, report 60).

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

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from tests.analysis.synthetic import write_study

SLOPES = {"adamw": 0.4, "muon": 1.0}
LIMITS_S = {"fit": 5.0, "report": 60.0}
COMMANDS = {
    "fit": ["fit", "{runs}", "--out", "{out}"],
    "compare": ["compare", "{runs}", "--out", "{out}"],
    "report": ["report", "{runs}", "--out", "{out}"],
}


def timed(command: list[str]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, rounds=3).parse_args(argv)
    about = harness.prepare(options)
    seeds, windows, layers = (range(1), 6, 3) if options.quick else (range(5), 60, 12)
    report: dict[str, Any] = {"rows": {}, "limits_s": LIMITS_S}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        paths = write_study(runs, SLOPES, seeds=seeds, steps=range(0, 100 * windows, 100), layers=layers, recipes=True)
        size = sum(path.stat().st_size for path in runs.rglob("*") if path.is_file()) / 2**20
        text = [
            f"# Analysis of {len(paths)} runs x {windows} windows x {layers} layers x 4 buckets ({size:.0f} MiB)",
            "",
            "| command | wall s, median | slowest | CPU s, median | limit s |",
            "|---|---:|---:|---:|---:|",
        ]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
        for turn in range(options.rounds):
            for name, words in COMMANDS.items():
                given = [word.format(runs=runs, out=Path(folder) / f"{name}_{turn}") for word in words]
                times[name].append(timed([sys.executable, "-m", "lightning_spectral", *given]))
    for name, taken in times.items():
        cpu, wall = statistics.median(c for c, _ in taken), [w for _, w in taken]
        report["rows"][name] = {"cpu_s": cpu, "wall_s": statistics.median(wall), "slowest_wall_s": max(wall)}
        limit = f"{LIMITS_S[name]:g}" if name in LIMITS_S else ""
        text.append(f"| {name} | {statistics.median(wall):.2f} | {max(wall):.2f} | {cpu:.2f} | {limit} |")
    how = "Seconds of one command from its start to its end; the commands take turns."
    harness.write(options, "analysis", about, report, "\n".join(text), how)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
