"""The plan behind ``memory reproduce``: every law, as far as the time goes.

Each part has a share of the budget and a ladder of sizes. A part climbs until its next rung, whose cost is
extrapolated from the last one, would not fit: a longer budget therefore reaches larger d by itself.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_spectral.cli import CommandError, memory_runs
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.rules import RuleSettings

Row = dict[str, Any]
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_RULES = ("sgd", "sign", "muon", "ns5", "newton")
_RESERVE = 0.9  # of the budget; the rest is for fits and figures


def parse_budget(text: str) -> float:
    """Seconds of ``90s``, ``3m`` or ``2h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not match or float(match.group(1)) <= 0:
        raise CommandError(f"`--budget` must be a time like 90s, 3m or 2h, got {text!r}.")
    return float(match.group(1)) * _UNITS[match.group(2)]


@dataclass(frozen=True)
class Part:
    """One part of the plan.

    Attributes:
        share: Of the budget.
        growth: Cost of a rung over the cost of the one before.
        rungs: Calls that make the rows of each rung; the first two are always made.
    """

    share: float
    growth: float
    rungs: list[Callable[[], Iterator[Row]]]


def reproduce_rows(budget: float, n_items: int, first_seed: int, machine: Row) -> Iterator[Row]:
    """Rows of all parts; what a part does not use, the later ones may."""
    usable, begun = _RESERVE * budget, time.perf_counter()
    parts = plan(n_items, first_seed, machine)
    for position, part in enumerate(parts):
        left = usable - (time.perf_counter() - begun)
        mine = left * part.share / sum(other.share for other in parts[position:])
        start = time.perf_counter()
        last = 0.0
        for number, rung in enumerate(part.rungs):
            spent = time.perf_counter() - start
            if number >= 2 and spent + last * part.growth > mine:
                break
            yield from rung()
            last = time.perf_counter() - start - spent


def plan(n_items: int, first_seed: int, machine: Row) -> list[Part]:
    """The ladder of each part."""
    settings = RuleSettings()

    def problem(d: int, alpha: float, seed: int, items: int = n_items) -> MemoryProblem:
        return MemoryProblem(d=d, n_items=items, alpha=alpha, seed=first_seed + seed)

    def one_step(d: int, seeds: int) -> Callable[[], Iterator[Row]]:
        def rows() -> Iterator[Row]:
            for alpha in (1.5, 1.2, 2.0):
                for seed in range(seeds):
                    yield from memory_runs.one_step_rows(
                        problem(d, alpha, seed, max(n_items, d * 15)), _RULES, settings, machine
                    )

        return rows

    def batch(d: int) -> Callable[[], Iterator[Row]]:
        def rows() -> Iterator[Row]:
            for seed in range(2):
                for size in (*(4**k for k in range(2, 12)), None):
                    sampled = problem(d, 1.5, seed).with_(batch_size=size)
                    yield from memory_runs.batch_rows(sampled, ("sgd", "muon"), settings, machine)

        return rows

    def deflation(d: int) -> Callable[[], Iterator[Row]]:
        def rows() -> Iterator[Row]:
            run = {"steps": 5, "mode": "deflation", "step_scale": 1.0, "schedule": "constant"}
            for seed in range(2):
                yield from memory_runs.step_rows(problem(d, 1.5, seed), ("sgd", "muon"), settings, machine, run)

        return rows

    def exact(d: int, items: int) -> Callable[[], Iterator[Row]]:
        def rows() -> Iterator[Row]:
            run = {"steps": 8, "mode": "exact", "step_scale": 2.0, "schedule": "linear"}
            small = {**machine, "chunk_size": 1024}
            for seed in range(2):
                yield from memory_runs.step_rows(problem(d, 1.5, seed, items), ("sgd", "muon"), settings, small, run)

        return rows

    def newton_schulz(d: int) -> Callable[[], Iterator[Row]]:
        return lambda: memory_runs.newton_schulz_rows(
            problem(d, 1.5, 0),
            ("muon", "polar_express", "cubic"),
            (3, 5, 7, 9, 11, 14),
            ("float32", "bfloat16"),
            machine,
        )

    return [
        Part(0.45, 3.5, [one_step(d, 3) for d in (128, 256, 512, 1024, 2048, 4096)]),
        Part(0.15, 4.0, [batch(d) for d in (64, 128, 256, 512)]),
        Part(0.15, 4.0, [deflation(d) for d in (64, 128, 256, 512)]),
        Part(0.15, 20.0, [exact(32, 2048), exact(64, 4096), exact(128, 16384), exact(256, 65536)]),
        Part(0.10, 3.5, [newton_schulz(d) for d in (128, 256, 512, 1024)]),
    ]
