"""One optimizer step from W = 0, and what it stores."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_spectral.theory.embeddings import DEFAULT_CACHE_BYTES, Embeddings
from lightning_spectral.theory.gradient import negative_gradient_at_zero
from lightning_spectral.theory.problem import MemoryProblem
from lightning_spectral.theory.recovery import RecoveryStats, recovered_mask, recovery_stats
from lightning_spectral.theory.rules import Gradient, RuleSettings, direction


@dataclass(frozen=True)
class OneStepResult:
    """What one step of one rule stores.

    Attributes:
        problem: The problem.
        rule: Name of the rule.
        stats: Recovery counts and curve.
        distinct: Items with a non-zero weight in the gradient.
        censored: More than a third of all items are recovered: the count feels the end of the list.
        seconds: Wall time by phase: ``embeddings`` (0 when shared with an earlier rule), ``gradient``, ``direction``,
            ``recovery``.
        update_MD: The direction, shape (M, D), fp64.
        recovered: Mask, shape (N,).
    """

    problem: MemoryProblem
    rule: str
    stats: RecoveryStats
    distinct: int
    censored: bool
    seconds: dict[str, float]
    update_MD: Tensor
    recovered: NDArray[np.bool_]

    def as_dict(self) -> dict[str, Any]:
        """Scalars and curve, for ``results.jsonl``."""
        return {
            **self.stats.as_dict(),
            "distinct": self.distinct,
            "censored": self.censored,
            "seconds": {phase: round(value, 4) for phase, value in self.seconds.items()},
        }


class OneStep:
    """One problem at W = 0, for several rules: embeddings and gradient are made once.

    Args:
        problem: The problem.
        device: Where to compute.
        chunk_size: Items whose scores are held at once.
        cache_bytes: Embeddings larger than this are drawn again whenever they are needed.
        weights: Weights of the items in the gradient, shape (N,), instead of the problem's own.
    """

    def __init__(
        self,
        problem: MemoryProblem,
        device: str = "cpu",
        chunk_size: int = 4096,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        self.problem = problem
        self.chunk_size = chunk_size
        self.embeddings = Embeddings(problem, device, cache_bytes)
        start = time.perf_counter()
        if self.embeddings.cached:
            for side in ("u", "v"):
                self.embeddings.rows(side, 0, 1)  # type: ignore[arg-type]
        drawn = time.perf_counter()
        self.weights = problem.gradient_weights() if weights is None else weights
        self.gradient = Gradient(
            negative_gradient_at_zero(self.embeddings, self.weights), self.weights, self.embeddings
        )
        self._seconds = {"embeddings": drawn - start, "gradient": time.perf_counter() - drawn}

    def run(self, rule: str, settings: RuleSettings | None = None, screen: str = "auto") -> OneStepResult:
        """Take the step and test every item."""
        start = time.perf_counter()
        update_MD = direction(rule, self.gradient, settings)
        stepped = time.perf_counter()
        mask = recovered_mask(self.embeddings, update_MD, self.chunk_size, screen)
        seconds = {**self._seconds, "direction": stepped - start, "recovery": time.perf_counter() - stepped}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        stats = recovery_stats(mask, self.problem.frequencies())
        censored = 3 * stats.count > self.problem.n_items
        if censored:
            warnings.warn(censored_message(self.problem, rule, stats.count), stacklevel=2)
        return OneStepResult(
            problem=self.problem,
            rule=rule,
            stats=stats,
            distinct=int((self.weights > 0).sum()),
            censored=censored,
            seconds=seconds,
            update_MD=update_MD,
            recovered=mask,
        )


def censored_message(problem: MemoryProblem, rule: str, count: float) -> str:
    """Why a count close to N says little about capacity."""
    return (
        f"censored: {rule} recovers {count:.0f} of n_items={problem.n_items} items (d={problem.d}, alpha="
        f"{problem.alpha}); with fewer than 3 x count items the count is too low. Raise `n_items` to {3 * count:.0f}."
    )


def one_step(
    problem: MemoryProblem, rule: str = "muon", settings: RuleSettings | None = None, **options: Any
) -> OneStepResult:
    """One step of ``rule`` on ``problem`` from W = 0; ``options`` as in :class:`OneStep`.

    Example:
        >>> result = one_step(MemoryProblem(d=32, n_items=500, alpha=1.5), "muon")
        >>> 0 < result.stats.count < 100
        True
    """
    return OneStep(problem, **options).run(rule, settings)
