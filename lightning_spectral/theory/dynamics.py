"""Many steps: the exact softmax dynamics, and the deflation of the theorem.

``exact``: W <- W + c_t sqrt(d) D / |D|_F * sqrt(d), D the rule's direction for the full softmax gradient at W.
``deflation``: step t sees the gradient at 0 of the items after d_t only; d_t grows by the items it stores. This is the
thresholded gradient for which d_t is proved; for the exact iterates it is a conjecture.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_spectral.theory.embeddings import DEFAULT_CACHE_BYTES, Embeddings
from lightning_spectral.theory.exponents import deflated
from lightning_spectral.theory.gradient import log_probabilities, negative_gradient, negative_gradient_at_zero
from lightning_spectral.theory.imbalance import imbalance
from lightning_spectral.theory.problem import MemoryProblem, require_integer, require_real
from lightning_spectral.theory.recovery import recovered_mask, recovery_stats
from lightning_spectral.theory.rules import Gradient, RuleSettings, direction

MODES = ("exact", "deflation")
SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class StepResult:
    """One step of a run.

    Attributes:
        step: 1 after the first update.
        count: Items recovered; in mode ``deflation`` d_t, the items stored so far.
        outputs: Everything else, for ``results.jsonl``.
    """

    step: int
    count: int
    outputs: dict[str, Any]


def run(
    problem: MemoryProblem,
    rule: str = "muon",
    steps: int = 5,
    mode: str = "exact",
    settings: RuleSettings | None = None,
    step_scale: float = 2.0,
    schedule: str = "linear",
    device: str = "cpu",
    chunk_size: int = 1024,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> list[StepResult]:
    """Train W from 0 and count after each step.

    Args:
        problem: The problem; with a ``batch_size`` every step draws a batch of its own.
        rule: As in :func:`lightning_spectral.theory.rules.direction`; ``newton`` in mode ``deflation`` only.
        steps: >= 0.
        mode: ``exact`` or ``deflation``.
        settings: Options of the rules.
        step_scale: c in ``|W_{t+1} - W_t|_F = c sqrt(d d_out)``; c sqrt(d) has to exceed ln N for the heads to leave
            the gradient. Mode ``exact`` only.
        schedule: ``constant``, or ``linear``: c falls to c / steps at the last step.
        device: Where to compute.
        chunk_size: Items whose scores are held at once.
        cache_bytes: Embeddings larger than this are drawn again whenever they are needed.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """
    check_run(rule, steps, mode, step_scale, schedule)
    embeddings = Embeddings(problem, device, cache_bytes)
    settings = settings or RuleSettings()
    if mode == "deflation":
        return _deflate(embeddings, rule, steps, settings, chunk_size)
    return _descend(embeddings, rule, steps, settings, step_scale, schedule, chunk_size)


def check_run(rule: str, steps: int, mode: str, step_scale: float, schedule: str) -> None:
    """Raise a ``ValueError`` naming the first argument of :func:`run` that is out of range."""
    require_integer("steps", steps, 0, "a run has zero or more steps")
    require_real("step_scale", step_scale)
    if step_scale <= 0:
        raise ValueError(f"`step_scale` must be > 0, got {step_scale}.")
    for field, value, known in (("mode", mode, MODES), ("schedule", schedule, SCHEDULES)):
        if value not in known:
            raise ValueError(f"`{field}` must be one of {', '.join(known)}, got {value!r}.")
    if mode == "exact" and rule == "newton":
        raise ValueError("`rule` newton has a closed form at W = 0 only: use mode `deflation`, or one-step runs.")


def _deflate(
    embeddings: Embeddings, rule: str, steps: int, settings: RuleSettings, chunk_size: int
) -> list[StepResult]:
    results: list[StepResult] = []
    reached = 0
    for step in range(1, steps + 1):
        start = time.perf_counter()
        masked = deflated(embeddings.problem.gradient_weights(step - 1), reached)
        new = 0
        if masked is not None:
            gradient = Gradient(negative_gradient_at_zero(embeddings, masked), masked, embeddings)
            mask = recovered_mask(embeddings, direction(rule, gradient, settings), max(chunk_size, 4096))
            new = int(mask[reached:].sum())
        reached += new
        outputs = {"new": new, "seconds": round(time.perf_counter() - start, 4)}
        results.append(StepResult(step, reached, outputs))
    return results


def _descend(
    embeddings: Embeddings,
    rule: str,
    steps: int,
    settings: RuleSettings,
    step_scale: float,
    schedule: str,
    chunk_size: int,
) -> list[StepResult]:
    problem = embeddings.problem
    frequencies = problem.frequencies()
    weight_MD = torch.zeros(*problem.shape, dtype=torch.float64, device=embeddings.device)
    results: list[StepResult] = []
    for step in range(1, steps + 1):
        start = time.perf_counter()
        weights = problem.gradient_weights(step - 1)
        gradient = _gradient(embeddings, weight_MD, weights, step, chunk_size)
        update_MD = direction(rule, gradient, settings)
        scale = step_scale * (1 - (step - 1) / steps if schedule == "linear" else 1.0)
        weight_MD = weight_MD + update_MD * (
            scale * math.sqrt(math.prod(problem.shape)) / torch.linalg.matrix_norm(update_MD)
        )
        mask = recovered_mask(embeddings, weight_MD, max(chunk_size, 4096))
        stats = recovery_stats(mask, frequencies)
        log_probability_N = log_probabilities(embeddings, weight_MD, chunk_size)
        loss = -float(torch.from_numpy(frequencies).to(log_probability_N) @ log_probability_N)
        known = imbalance(log_probability_N)
        outputs = {
            **{key: value for key, value in stats.as_dict().items() if key != "count"},
            "loss": loss,
            "imbalance": known.delta,
            "best_probability": known.best,
            "worst_probability": known.worst,
            "loss_over_tail_mass": loss_over_tail_mass(loss, frequencies, mask),
            "seconds": round(time.perf_counter() - start, 4),
        }
        results.append(StepResult(step, stats.count, outputs))
    return results


def _gradient(
    embeddings: Embeddings, weight_MD: torch.Tensor, weights: NDArray[np.float64], step: int, chunk_size: int
) -> Gradient:
    if step == 1:
        return Gradient(negative_gradient_at_zero(embeddings, weights), weights, embeddings)
    matrix_MD, _ = negative_gradient(embeddings, weight_MD, weights, chunk_size)
    return Gradient(matrix_MD, weights, embeddings, at_zero=False)


def loss_over_tail_mass(loss: float, frequencies: NDArray[np.float64], recovered: NDArray[np.bool_]) -> float | None:
    """Loss in units of ``ln N`` times the mass beyond the first ``count`` items: about 1.3 where the law holds."""
    mass = float(frequencies[int(recovered.sum()) :].sum())
    return loss / (math.log(len(frequencies)) * mass) if mass > 0 else None
