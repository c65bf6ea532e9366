"""What every measurement benchmark shares: interleaved timing, paired ratios, results that say where they are from."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """One contestant: medians of its times, and of the ratios ``its time / base's time`` of the same round."""

    name: str
    cpu_ms: float
    wall_ms: float
    cpu_ratio: float
    cpu_ratio_iqr: tuple[float, float]
    wall_ratio: float
    wall_ratio_iqr: tuple[float, float]


def race(
    contestants: Mapping[str, Callable[[], Any]], base: str, *, rounds: int, warm_up: int, device: str
) -> list[Timing]:
    """Time A B C, A B C, ...: a busy machine is busy for all of them."""
    for _ in range(warm_up):
        for run in contestants.values():
            run()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(timed(run, device))
    return [summary(name, times[name], times[base]) for name in contestants]


def timed(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """(CPU seconds of this process, wall seconds) of one call; a GPU is waited for."""
    _wait(device)
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    _wait(device)
    return time.process_time() - cpu, time.perf_counter() - wall


def summary(name: str, times: list[tuple[float, float]], base: list[tuple[float, float]]) -> Timing:
    """Medians and quartiles over rounds."""
    ratios = [[own[k] / other[k] for own, other in zip(times, base, strict=True)] for k in (0, 1)]
    return Timing(
        name,
        1e3 * statistics.median(cpu for cpu, _ in times),
        1e3 * statistics.median(wall for _, wall in times),
        statistics.median(ratios[0]),
        quartiles(ratios[0]),
        statistics.median(ratios[1]),
        quartiles(ratios[1]),
    )


def quartiles(values: list[float]) -> tuple[float, float]:
    """First and third quartile."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def importable(name: str) -> bool:
    """Whether a peer is installed."""
    return find_spec(name) is not None


def arguments(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The options that all of them have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: does it run?")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved repeats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and Markdown")
    return parser


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Set threads and seed; what the result says about the machine, as it is before the run."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return {**machine(), "cpu_seconds": cpu_seconds()}


def machine() -> dict[str, Any]:
    """Hardware, versions, commit, date and load."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    folder = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder)
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "scipy", "lightning", "litgpt", "spectral-telemetry"):
        versions[name] = version(name)
    return {
        "cpu": cpu,
        "amx_bf16": any("amx_bf16" in line for line in lines),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git.stdout.strip(),
        "versions": versions,
    }


def cpu_seconds() -> tuple[float, float] | None:
    """(busy, stolen) seconds of this machine's cores since it started; stolen ones the host gave to other guests."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, stolen = map(int, stat.read_text().split()[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, stolen / tick


def stolen_share(before: tuple[float, float] | None) -> float | None:
    """Of the time that programs wanted to run since ``before``, the share that the host did not give them."""
    now = cpu_seconds()
    if before is None or now is None:
        return None
    busy, stolen = (after - start for after, start in zip(now, before, strict=True))
    return round(stolen / max(busy + stolen, 1e-9), 3)


def version(name: str) -> str:
    """Of a package, as its metadata says."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "importable, no version" if importable(name) else "not installed"


def table(timings: list[Timing], base: str) -> list[str]:
    """Markdown rows."""
    lines = [
        f"| what | CPU ms | wall ms | CPU, of `{base}` | wall, of `{base}` |",
        "|---|---:|---:|---:|---:|",
    ]
    for t in timings:
        cpu, wall = t.cpu_ratio_iqr, t.wall_ratio_iqr
        lines.append(
            f"| {t.name} | {t.cpu_ms:.1f} | {t.wall_ms:.1f} | {t.cpu_ratio:.3f} [{cpu[0]:.3f}, {cpu[1]:.3f}] "
            f"| {t.wall_ratio:.3f} [{wall[0]:.3f}, {wall[1]:.3f}] |"
        )
    return lines


def write(
    options: argparse.Namespace,
    stem: str,
    about: dict[str, Any],
    report: dict[str, Any],
    text: str,
    how: str = "Median [quartiles] of paired ratios over interleaved rounds.",
) -> None:
    """JSON and Markdown side by side, ``how`` to read the numbers below; a quick run never overwrites a full one."""
    stem = f"{stem}_{options.device}{'_quick' if options.quick else ''}"
    ran = {"load_average_after": os.getloadavg(), "cpu_stolen_by_host": stolen_share(about.pop("cpu_seconds"))}
    about = {**about, **ran, "seed": options.seed, "rounds": options.rounds}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{stem}.json").write_text(json.dumps({"about": about, **report}, indent=1) + "\n")
    notes = "\n".join(f"- {key}: {value}" for key, value in about.items())
    whole = f"{text}\n\n{how}\n\n{notes}\n"
    (options.out / f"{stem}.md").write_text(whole)
    print(whole)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
