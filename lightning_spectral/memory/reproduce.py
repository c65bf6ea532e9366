"""The plan behind ``memory reproduce``: every law, as far as the time goes.

Each part has a share of the budget and a list of sizes. First every part runs the two sizes that a slope needs; then
each goes on until its next size, whose cost is extrapolated from the last one, would not fit: a longer budget therefore
reaches larger d. No run starts after the budget; what is missing is listed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_spectral.memory import runs as memory_runs
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.rules import RuleSettings

Row = dict[str, Any]
_RULES = ("sgd", "sign", "muon", "ns5", "newton")
_RESERVE = 0.1  # of the budget, for fits and figures
_RESERVE_AT_LEAST_S = 10.0
_SIZES_OF_A_SLOPE = 2
_SEEDS = 3  # the fewest that a verdict is given on
_MUON_ITEMS = 0.22  # count over d^(4/3) at alpha = 1.5 and d >= 512


@dataclass(frozen=True)
class Part:
    """One part of the plan.

    Attributes:
        name: What it measures.
        share: Of the budget.
        growth: Cost of a size over the cost of the one before.
        sizes: Functions that make the rows, by size, smallest first.
    """

    name: str
    share: float
    growth: float
    sizes: list[Callable[[], Iterator[Row]]]


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
    """Rows of all parts: two sizes of each first, then each as far as its share of the time goes."""
    runs = _BudgetedRuns(parts, begun + budget - max(_RESERVE * budget, _RESERVE_AT_LEAST_S))
    for number in range(_SIZES_OF_A_SLOPE):
        for part in parts:
            yield from runs.size(part, number)
    for position, part in enumerate(parts):
        yield from runs.further(part, part.share / sum(other.share for other in parts[position:]))
    if runs.cut:
        missing = ", ".join(dict.fromkeys(runs.cut))
        say(f"\nThe budget of {budget:g} s ended within: {missing}. Give it more time for the rest.")


class _BudgetedRuns:
    """Runs sizes until a time; knows what the last size of each part took, and what was left out."""

    def __init__(self, parts: list[Part], end: float) -> None:
        self.end = end
        self.cut: list[str] = []
        self._last_cost = {part.name: 0.0 for part in parts}

    def size(self, part: Part, number: int) -> Iterator[Row]:
        """One size of a part, or as many of its rows as there is time for."""
        start = time.perf_counter()
        for row in part.sizes[number]() if start <= self.end else ():
            yield row
            if time.perf_counter() > self.end:
                break
        else:
            if start <= self.end:
                self._last_cost[part.name] = time.perf_counter() - start
                return
        self.cut.append(f"{part.name} (size {number + 1})")

    def further(self, part: Part, share: float) -> Iterator[Row]:
        """Larger sizes, while the next one is expected to end within the share of what time is left."""
        until = time.perf_counter() + share * (self.end - time.perf_counter())
        for number in range(_SIZES_OF_A_SLOPE, len(part.sizes)):
            if time.perf_counter() + self._last_cost[part.name] * part.growth > until:
                return
            yield from self.size(part, number)


def plan(n_items: int, first_seed: int, machine: Row) -> list[Part]:
    """The sizes of each part; N is the same at every d, and every cell (d, alpha, batch size) has seeds of its own."""
    cells = _Cells(n_items, first_seed, machine)
    # past it Muon would recover more than a third of the items
    dimensions = [d for d in (128, 256, 512, 1024, 2048, 4096) if 3 * _MUON_ITEMS * d ** (4 / 3) <= n_items or d <= 256]
    exact = [(32, 2048), (64, 4096), (128, 16384), (256, 65536)]
    return [
        Part("one step", 0.45, 4.0, [cells.one_step(d) for d in dimensions]),
        Part("batch size", 0.15, 4.0, [cells.batch(d) for d in (64, 128, 256, 512)]),
        Part("deflation steps", 0.15, 4.0, [cells.deflation(d) for d in (64, 128, 256, 512)]),
        Part("exact steps", 0.15, 20.0, [cells.exact(d, items) for d, items in exact]),
        Part("Newton-Schulz", 0.10, 4.0, [cells.newton_schulz(d) for d in (128, 256, 512, 1024)]),
    ]


class _Cells:
    """The runs of each size; each takes the next seeds when it is made."""

    def __init__(self, n_items: int, first_seed: int, machine: Row) -> None:
        self.n_items, self.first_seed, self.machine = n_items, first_seed, machine
        self.settings = RuleSettings()
        self.taken = itertools.count()

    def seeds(self) -> range:
        """Of one more cell."""
        first = self.first_seed + _SEEDS * next(self.taken)
        return range(first, first + _SEEDS)

    def problem(self, d: int, alpha: float, seed: int, items: int | None = None) -> MemoryProblem:
        """A memory of this size."""
        return MemoryProblem(d=d, n_items=self.n_items if items is None else items, alpha=alpha, seed=seed)

    def one_step(self, d: int) -> Callable[[], Iterator[Row]]:
        """One step of every rule at three exponents."""
        cell = {alpha: self.seeds() for alpha in (1.5, 1.2, 2.0)}

        def rows() -> Iterator[Row]:
            for position in range(_SEEDS):
                for alpha, seeds in cell.items():
                    whole = self.problem(d, alpha, seeds[position])
                    yield from memory_runs.one_step_rows(whole, _RULES, self.settings, self.machine)

        return rows

    def batch(self, d: int) -> Callable[[], Iterator[Row]]:
        """One step from batches of many sizes."""
        sizes = (1, 2, 4, 8, *(4**k for k in range(2, 12)), None)
        cell = {size: self.seeds() for size in sizes}

        def rows() -> Iterator[Row]:
            for position in range(_SEEDS):
                for size, seeds in cell.items():
                    sampled = self.problem(d, 1.5, seeds[position]).with_(batch_size=size)
                    yield from memory_runs.batch_rows(sampled, ("sgd", "muon"), self.settings, self.machine)

        return rows

    def deflation(self, d: int) -> Callable[[], Iterator[Row]]:
        """Several steps by the theory's deflation."""
        run = {"steps": 5, "mode": "deflation", "step_scale": 1.0, "schedule": "constant"}
        return self._several(d, None, self.machine, run)

    def exact(self, d: int, items: int) -> Callable[[], Iterator[Row]]:
        """Several steps as they are."""
        run = {"steps": 8, "mode": "exact", "step_scale": 2.0, "schedule": "linear"}
        return self._several(d, items, {**self.machine, "chunk_size": 1024}, run)

    def newton_schulz(self, d: int) -> Callable[[], Iterator[Row]]:
        """What few steps of each iteration leave of a step of Muon."""
        problem = self.problem(d, 1.5, self.seeds()[0])
        sets, steps, dtypes = ("muon", "polar_express", "cubic"), (3, 5, 7, 9, 11, 14), ("float32", "bfloat16")
        return lambda: memory_runs.newton_schulz_rows(problem, sets, steps, dtypes, self.machine)

    def _several(self, d: int, items: int | None, machine: Row, run: Row) -> Callable[[], Iterator[Row]]:
        seeds = self.seeds()

        def rows() -> Iterator[Row]:
            for seed in seeds:
                whole = self.problem(d, 1.5, seed, items)
                yield from memory_runs.step_rows(whole, ("sgd", "muon"), self.settings, machine, run)

        return rows
