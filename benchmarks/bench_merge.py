"""What does it cost to add the states of two processes, ours (re-basing included) and spectral-telemetry's?

One contestant is one layer with three buckets and their merge, in two gloo processes of this machine. `to one owner` is
what the callbacks do: each layer's sum travels to the one rank that solves it. CPU is this rank's own; a loopback has
no wire, so bytes tell more about a cluster than times do.

    python benchmarks/bench_merge.py --quick
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness, peers
from lightning_spectral.functional.buckets import sort_by_group
from lightning_spectral.functional.covariance import Moments, empty_moments, update_
from lightning_spectral.probe.sync import reduce_
from tests.distributed.harness import run_ranks

BASE = "ours, to one owner"
BUCKETS, RANKS = 3, 2


def rows_of(rank: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means differ between ranks, so that shifts do."""
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(256, width, generator=generator) + rank
    return rows, torch.randint(0, BUCKETS, (256,), generator=generator)


def contestants(rank: int, width: int) -> dict[str, Callable[[Moments], Any]]:
    """Each is given a copy of our state, since ours adds in place."""
    found: dict[str, Callable[[Moments], Any]] = {
        BASE: lambda moments: reduce_(moments, 0),
        "ours, to all ranks": reduce_,
    }
    if peers.HAS_TELEMETRY:
        from spectral_telemetry.telemetry import all_reduce_merge

        for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
            theirs = peers.Telemetry(width, BUCKETS, dtype, "cpu")
            theirs.update(*rows_of(rank, width))
            states = (theirs.pooled, *theirs.buckets)
            found[f"spectral-telemetry {name}, to all ranks"] = lambda _, states=states: [
                all_reduce_merge(state) for state in states
            ]
    return found


def counted_bytes(run: Callable[[], Any]) -> int:
    """Bytes that this rank hands to collectives."""
    total = 0

    def noting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return collective(tensor, *args, **kwargs)

        return call

    before = dist.all_reduce, dist.reduce
    dist.all_reduce, dist.reduce = map(noting, before)
    try:
        run()
    finally:
        dist.all_reduce, dist.reduce = before
    return total


def race(rank: int, world_size: int, width: int, rounds: int) -> tuple[list[harness.Timing], dict[str, int]]:
    """Both ranks run the same contestants in the same order; a barrier starts each."""
    racers, moments = contestants(rank, width), empty_moments(BUCKETS, width)
    rows, codes = rows_of(rank, width)
    update_(moments, rows, *sort_by_group(codes, BUCKETS))
    payload = {name: counted_bytes(partial(run, moments.clone())) for name, run in racers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in racers}
    for _ in range(rounds):
        for name, run in racers.items():
            ready = partial(run, moments.clone())
            dist.barrier()
            times[name].append(harness.timed(ready, "cpu"))
    return [harness.summary(name, times[name], times[BASE]) for name in racers], payload


def main(argv: list[str] | None = None) -> int:
    parser: argparse.ArgumentParser = harness.arguments(__doc__, rounds=9)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 3072])
    options = parser.parse_args(argv)
    if options.device != "cpu":
        parser.error("two processes on one GPU would measure the GPU's scheduler: only --device cpu")
    if options.quick:
        options.widths, options.rounds = [256], 3
    about = harness.prepare(options)
    report: dict[str, Any] = {"rows": {}, "mib": {}}
    text = ["# Merge: the states of one layer, two gloo processes", ""]
    for width in options.widths:
        timings, payload = run_ranks(race, RANKS, width, options.rounds, timeout_s=600)[0]
        mib = {name: size / 2**20 for name, size in payload.items()}
        report["rows"][width], report["mib"][width] = [asdict(t) for t in timings], mib
        text += [f"## D = {width}", "", *harness.table(timings, BASE), ""]
        text += [f"- {name}: {size:.1f} MiB, {size / mib[BASE]:.2f} of `{BASE}`" for name, size in mib.items()] + [""]
    harness.write(options, "merge_1t", about, report, "\n".join(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
