"""How long is one optimizer step on the hidden matrices of a GPT, against torch.optim.Muon and every installed peer?

All contestants hold the same matrices (qkv, proj, fc, fc2 per layer) with the same gradients and step in turn, round
after round, so that a busy machine is busy for all of them. Ratios are torch's time over theirs, per round: > 1 is
faster. `--ranks 2` adds the distributed questions: DDP sharing against repeating the work, FSDP2 against torch on
DTensors.

    python benchmarks/bench_optimizer_step.py --quick
    python benchmarks/bench_optimizer_step.py --ranks 2
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from lightning_spectral.optim import AdamW, Dion, Muon, NorMuon

CASES = {"d128": (128, 12), "d256": (256, 8), "d768": (768, 2)}
QUICK = {"d64": (64, 2)}
BASE = "torch.optim.Muon"
LR = 1e-3
Contestant = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Row:
    """One contestant in one case; milliseconds, and ratios of the baseline's time over its own in the same round."""

    case: str
    name: str
    cpu_ms: float
    wall_ms: float
    cpu_ratio: float
    cpu_ratio_iqr: tuple[float, float]
    wall_ratio: float
    wall_ratio_iqr: tuple[float, float]
    extra_mib: float


def hidden_matrices(width: int, layers: int, device: str, seed: int) -> nn.ModuleList:
    torch.manual_seed(seed)
    shapes = {"qkv": (width, 3 * width), "proj": (width, width), "fc": (width, 4 * width), "fc2": (4 * width, width)}

    def layer() -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(n, m, bias=False, device=device) for name, (n, m) in shapes.items()})

    model = nn.ModuleList(layer() for _ in range(layers))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def ours() -> dict[str, Contestant]:
    return {
        "Muon, Polar Express": lambda m: Muon(m, lr=LR),
        "Muon, quintic": lambda m: Muon(m, lr=LR, orthogonalize="muon"),
        "NorMuon": lambda m: NorMuon(m, lr=LR),
        "Dion 1/4": lambda m: Dion(m, lr=LR, rank_fraction=0.25),
        "Dion 1/16": lambda m: Dion(m, lr=LR, rank_fraction=1 / 16),
    }


def peers() -> dict[str, Contestant]:
    """Every peer that can be imported here; a missing one is left out and named in the result."""
    found: dict[str, Contestant] = {}
    if importable("pytorch_optimizer"):
        import pytorch_optimizer

        grouped = lambda m: [{"params": list(m.parameters()), "use_muon": True}]  # noqa: E731
        found["pytorch_optimizer.Muon"] = lambda m: pytorch_optimizer.Muon(grouped(m), lr=LR)
    if importable("heavyball"):
        import heavyball

        heavyball.utils.compile_mode = None
        found["heavyball.MuonAdamW"] = lambda m: heavyball.MuonAdamW(m.parameters(), lr=LR)
    if importable("dion"):
        import dion

        found["dion.Muon"] = lambda m: dion.Muon(list(m.parameters()), lr=LR)
        found["dion.NorMuon"] = lambda m: dion.NorMuon(list(m.parameters()), lr=LR)
    return found


def importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def race(
    case: str,
    contestants: dict[str, Contestant],
    make_model: Callable[[], nn.Module],
    rounds: int,
    warm_up: int,
    base: str,
    failures: list[str],
) -> list[Row]:
    """Step all contestants in turn; see the module's first lines. What a peer failed with is added to ``failures``."""
    stepping: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    for name, make in contestants.items():
        model = make_model()
        try:
            stepping[name] = (model, make(model))
            for _ in range(warm_up):
                timed_step(*stepping[name])
        except Exception as error:  # a peer that does not run here is a finding, not the end of the benchmark
            if name == base or not name.startswith(("pytorch_optimizer", "heavyball", "dion")):
                raise
            failures.append(f"{case}: {name} does not run: {type(error).__name__}: {error}")
            stepping.pop(name, None)
    cpu: dict[str, list[float]] = {name: [] for name in stepping}
    wall: dict[str, list[float]] = {name: [] for name in stepping}
    for _ in range(rounds):
        for name, pair in stepping.items():
            seconds = timed_step(*pair)
            cpu[name].append(seconds[0])
            wall[name].append(seconds[1])
    rows = []
    for name in stepping:
        cpu_ratios = [b / t for b, t in zip(cpu[base], cpu[name], strict=True)]
        wall_ratios = [b / t for b, t in zip(wall[base], wall[name], strict=True)]
        rows.append(
            Row(
                case,
                name,
                1e3 * statistics.median(cpu[name]),
                1e3 * statistics.median(wall[name]),
                statistics.median(cpu_ratios),
                quartiles(cpu_ratios),
                statistics.median(wall_ratios),
                quartiles(wall_ratios),
                extra_memory_mib(*stepping[name]),
            )
        )
    return rows


def timed_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """(CPU seconds of this process, wall seconds) of one step; a GPU is waited for."""
    first = next(model.parameters())
    kept = [p.grad for p in model.parameters()]
    if first.device.type == "cuda":
        torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    optimizer.step()
    if first.device.type == "cuda":
        torch.cuda.synchronize()
    result = time.process_time() - cpu, time.perf_counter() - wall
    for p, grad in zip(model.parameters(), kept, strict=True):
        p.grad = grad  # heavyball drops gradients
    return result


def extra_memory_mib(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Peak memory of a step above what is held before it, as torch's allocator of this device sees it."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def distributed_rows(ranks: int, cases: dict[str, tuple[int, int]], rounds: int, warm_up: int, seed: int) -> list[Row]:
    """DDP sharing against repeating, and FSDP2 against torch on DTensors, in forked gloo processes on this machine."""
    from tests.distributed.harness import run_ranks

    rows = run_ranks(_distributed_child, ranks, cases, rounds, warm_up, seed, timeout_s=3600)[0]
    return [Row(**row) for row in rows]


def _distributed_child(
    rank: int, ranks: int, cases: dict[str, tuple[int, int]], rounds: int, warm_up: int, seed: int
) -> list[dict[str, Any]]:
    from torch.distributed.fsdp import fully_shard

    quiet()
    rows: list[Row] = []
    for case, (width, layers) in cases.items():

        def replicated(width: int = width, layers: int = layers) -> nn.Module:
            model = hidden_matrices(width, layers, "cpu", seed)
            return nn.parallel.DistributedDataParallel(model)

        def sharded(width: int = width, layers: int = layers) -> nn.Module:
            model = hidden_matrices(width, layers, "cpu", seed)
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    fully_shard(layer)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            return model

        repeated, shared = "DDP, every rank all", "DDP, shared"
        contestants: dict[str, Contestant] = {
            repeated: lambda m: Muon(m, lr=LR, share_over_ranks=False),
            shared: lambda m: Muon(m, lr=LR),
        }
        dist.barrier()
        rows += race(f"{case}, DDP x{ranks}", contestants, replicated, rounds, warm_up, repeated, [])
        contestants = {
            "torch.optim.Muon on DTensors": lambda m: torch.optim.Muon(m.parameters(), lr=LR),
            "FSDP2, two all_to_all": lambda m: Muon(m, lr=LR),
        }
        dist.barrier()
        base = "torch.optim.Muon on DTensors"
        rows += race(f"{case}, FSDP2 x{ranks}", contestants, sharded, rounds, warm_up, base, [])
    return [asdict(row) for row in rows]


def orthogonalization_flops(width: int, layers: int) -> float:
    """Five quintic steps on all matrices: 5 (4 m^2 n + 2 m^3) each, m <= n."""
    sides = [(width, 3 * width), (width, width), (width, 4 * width), (width, 4 * width)]
    return layers * sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)


def best_bf16_gflops(device: str) -> float:
    """What one large bf16 product reaches here: the roof that the steps are measured against."""
    a = torch.randn(2048, 2048, device=device).bfloat16()
    best = 0.0
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return best


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in read("/proc/cpuinfo") if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("pytorch_optimizer", "heavyball", "dion"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "importable, no version" if importable(name) else "not installed"
    return {
        "cpu": cpu or platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "versions": versions,
    }


def read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def markdown(report: dict[str, Any]) -> str:
    about = report["machine"]
    lines = [
        "# One optimizer step on the hidden matrices",
        "",
        f"{about['gpu'] or about['cpu']}, {about['threads']} thread(s), load {about['load_average'][0]:.1f}, "
        f"{about['date']}, commit {about['commit']}, {about['versions']}. Seed {report['seed']}, {report['rounds']} "
        f"interleaved rounds after {report['warm_up']} warm-up steps. Ratio: the baseline's time over its own, median "
        "[quartiles] over rounds.",
        "",
        "| case | optimizer | CPU ms | wall ms | CPU ratio | wall ratio | extra MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cpu, wall = row["cpu_ratio_iqr"], row["wall_ratio_iqr"]
        lines.append(
            f"| {row['case']} | {row['name']} | {row['cpu_ms']:.1f} | {row['wall_ms']:.1f} "
            f"| {row['cpu_ratio']:.2f} [{cpu[0]:.2f}, {cpu[1]:.2f}] "
            f"| {row['wall_ratio']:.2f} [{wall[0]:.2f}, {wall[1]:.2f}] | {row['extra_mib']:.1f} |"
        )
    lines += ["", *(f"- {failure}" for failure in report["failures"])]
    lines += ["", f"Roof: {report['roof_gflops']:.0f} GFLOP/s in one 2048^3 bf16 product.", ""]
    for case, share in report["roof_share"].items():
        lines.append(f"- {case}: the Polar Express step runs at {share:.0%} of the roof (its products alone counted).")
    return "\n".join(lines) + "\n"


def quiet() -> None:
    logging.getLogger("lightning_spectral").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, few rounds: does it run?")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15, help="interleaved repeats, at least 5")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before the first timed one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--ranks", type=int, default=0, help="also race DDP and FSDP2 on this many gloo processes (CPU)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    cases = QUICK if options.quick else {name: CASES[name] for name in options.cases}
    rounds, warm_up = (5, 2) if options.quick else (max(5, options.rounds), options.warm_up)
    quiet()
    torch.set_num_threads(options.threads)
    about = machine()
    rows: list[Row] = []
    failures: list[str] = []
    for case, (width, layers) in cases.items():
        contestants: dict[str, Contestant] = {
            BASE: lambda m: torch.optim.Muon(m.parameters(), lr=LR),
            **ours(),
            **peers(),
        }
        rows += race(
            case,
            contestants,
            lambda width=width, layers=layers: hidden_matrices(width, layers, options.device, options.seed),
            rounds,
            warm_up,
            BASE,
            failures,
        )
        adamw: dict[str, Contestant] = {
            "torch.optim.AdamW, foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=LR, foreach=True),
            "torch.optim.AdamW, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=LR, fused=True),
            "AdamW": lambda m: AdamW(m, lr=LR),
        }
        rows += race(
            f"{case}, AdamW",
            adamw,
            lambda width=width, layers=layers: hidden_matrices(width, layers, options.device, options.seed),
            rounds,
            warm_up,
            "torch.optim.AdamW, foreach",
            failures,
        )
    if options.ranks > 1:
        rows += distributed_rows(options.ranks, cases, rounds, warm_up, options.seed)
    roof = best_bf16_gflops(options.device)
    share = {
        row.case: orthogonalization_flops(*cases[row.case]) / row.wall_ms / 1e6 / roof
        for row in rows
        if row.name == "Muon, Polar Express"
    }
    report = {
        "machine": about,
        "seed": options.seed,
        "rounds": rounds,
        "warm_up": warm_up,
        "rows": [asdict(row) for row in rows],
        "failures": failures,
        "roof_gflops": roof,
        "roof_share": share,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"optimizer_step_{options.device}{'_quick' if options.quick else ''}"
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
