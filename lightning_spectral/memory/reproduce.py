"""The plan behind ``memory reproduce``: every law, as far as the time goes.

Each part has a share of the budget and a ladder of sizes. First every part takes the two rungs that a slope needs; then
each climbs until its next rung, whose cost is extrapolated from the last one, would not fit: a longer budget therefore
reaches larger d by itself. Past the budget nothing new begins, whatever is still missing is named.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_spectral.memory import runs as memory_runs
from lightning_spectral.text import CommandError
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.rules import RuleSettings

Row = dict[str, Any]
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_RULES = ("sgd", "sign", "muon", "ns5", "newton")
_RESERVE = 0.1  # of the budget, for fits and figures
_RESERVE_AT_LEAST_S = 10.0
_RUNGS_OF_A_SLOPE = 2
_SEEDS = 3  # the fewest that a verdict is given on
_MUON_ITEMS = 0.22  # count over d^(4/3) at alpha = 1.5 and d >= 512


def parse_budget(text: str) -> float:
    """Seconds of ``90s``, ``3m`` or ``2h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not match or float(match.group(1)) <= 0:
        raise CommandError(f"`--budget` must be a time above 0 like 90s, 3m or 2h, got {text!r}.")
    return float(match.group(1)) * _UNITS[match.group(2)]


@dataclass(frozen=True)
class Part:
    """One part of the plan.

    Attributes:
        name: What it measures.
        share: Of the budget.
        growth: Cost of a rung over the cost of the one before.
        rungs: Calls that make the rows of each rung.
    """

    name: str
    share: float
    growth: float
    rungs: list[Callable[[], Iterator[Row]]]


def reproduce_rows(
    budget: float, n_items: int, first_seed: int, machine: Row, begun: float, say: Callable[[str], None] = print
) -> Iterator[Row]:
    """Rows of all parts, none begun past the budget; what a part does not use, the later ones may.

    Args:
        budget: Seconds, for everything.
        n_items: Items of the one-step runs.
        first_seed: Of every part.
        machine: Arguments for the solvers.
        begun: ``time.perf_counter()`` when the command began.
        say: Told once what the budget had no room for.
    """
    yield from within_budget(plan(n_items, first_seed, machine), budget, begun, say)


def within_budget(parts: list[Part], budget: float, begun: float, say: Callable[[str], None] = print) -> Iterator[Row]:
    """Rows of all parts: two rungs of each first, then each as far as its share of the time goes."""
    end = begun + budget - max(_RESERVE * budget, _RESERVE_AT_LEAST_S)
    costs = [[0.0] for _ in parts]
    cut: list[str] = []

    def climb(position: int, number: int) -> Iterator[Row]:
        start = time.perf_counter()
        for row in parts[position].rungs[number]():
            yield row
            if time.perf_counter() > end:
                cut.append(f"{parts[position].name} (size {number + 1})")
                break
        costs[position].append(time.perf_counter() - start)

    for number in range(_RUNGS_OF_A_SLOPE):
        for position, part in enumerate(parts):
            if time.perf_counter() > end:
                cut.append(f"{part.name} (size {number + 1})")
            else:
                yield from climb(position, number)
    for position, part in enumerate(parts):
        share = part.share / sum(other.share for other in parts[position:])
        until = time.perf_counter() + share * (end - time.perf_counter())
        for number in range(_RUNGS_OF_A_SLOPE, len(part.rungs)):
            if time.perf_counter() + costs[position][-1] * part.growth > until:
                break
            yield from climb(position, number)
    if cut:
        missing = ", ".join(dict.fromkeys(cut))
        say(f"\nThe budget of {budget:g} s ended within: {missing}. Give it more time for the rest.")


def plan(n_items: int, first_seed: int, machine: Row) -> list[Part]:
    """The ladder of each part; N is the same at every d, and every cell (d, alpha, batch size) has seeds of its own."""
    settings = RuleSettings()
    cells = itertools.count()

    def seeds_of_a_cell() -> range:
        first = first_seed + _SEEDS * next(cells)
        return range(first, first + _SEEDS)

    def problem(d: int, alpha: float, seed: int, items: int = n_items) -> MemoryProblem:
        return MemoryProblem(d=d, n_items=items, alpha=alpha, seed=seed)

    def one_step(d: int) -> Callable[[], Iterator[Row]]:
        cell = {alpha: seeds_of_a_cell() for alpha in (1.5, 1.2, 2.0)}

        def rows() -> Iterator[Row]:
            for position in range(_SEEDS):
                for alpha, seeds in cell.items():
                    whole = problem(d, alpha, seeds[position])
                    yield from memory_runs.one_step_rows(whole, _RULES, settings, machine)

        return rows

    def batch(d: int) -> Callable[[], Iterator[Row]]:
        sizes = (1, 2, 4, 8, *(4**k for k in range(2, 12)), None)
        cell = {size: seeds_of_a_cell() for size in sizes}

        def rows() -> Iterator[Row]:
            for position in range(_SEEDS):
                for size, seeds in cell.items():
                    sampled = problem(d, 1.5, seeds[position]).with_(batch_size=size)
                    yield from memory_runs.batch_rows(sampled, ("sgd", "muon"), settings, machine)

        return rows

    def several(
        seeds: range, of: Callable[[int], MemoryProblem], machine: Row, run: Row
    ) -> Callable[[], Iterator[Row]]:
        def rows() -> Iterator[Row]:
            for seed in seeds:
                yield from memory_runs.step_rows(of(seed), ("sgd", "muon"), settings, machine, run)

        return rows

    def deflation(d: int) -> Callable[[], Iterator[Row]]:
        run = {"steps": 5, "mode": "deflation", "step_scale": 1.0, "schedule": "constant"}
        return several(seeds_of_a_cell(), lambda seed: problem(d, 1.5, seed), machine, run)

    def exact(d: int, items: int) -> Callable[[], Iterator[Row]]:
        run = {"steps": 8, "mode": "exact", "step_scale": 2.0, "schedule": "linear"}
        small = {**machine, "chunk_size": 1024}
        return several(seeds_of_a_cell(), lambda seed: problem(d, 1.5, seed, items), small, run)

    def newton_schulz(d: int) -> Callable[[], Iterator[Row]]:
        seed = seeds_of_a_cell()[0]
        return lambda: memory_runs.newton_schulz_rows(
            problem(d, 1.5, seed),
            ("muon", "polar_express", "cubic"),
            (3, 5, 7, 9, 11, 14),
            ("float32", "bfloat16"),
            machine,
        )

    # past it Muon would recover more than a third of the items
    ladder = [d for d in (128, 256, 512, 1024, 2048, 4096) if 3 * _MUON_ITEMS * d ** (4 / 3) <= n_items or d <= 256]
    return [
        Part("one step", 0.45, 4.0, [one_step(d) for d in ladder]),
        Part("batch size", 0.15, 4.0, [batch(d) for d in (64, 128, 256, 512)]),
        Part("deflation steps", 0.15, 4.0, [deflation(d) for d in (64, 128, 256, 512)]),
        Part("exact steps", 0.15, 20.0, [exact(32, 2048), exact(64, 4096), exact(128, 16384), exact(256, 65536)]),
        Part("Newton-Schulz", 0.10, 4.0, [newton_schulz(d) for d in (128, 256, 512, 1024)]),
    ]
