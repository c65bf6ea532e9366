"""How the learning rate moves: litgpt's warm-up and cosine, or the paper's constant rate with a linear end.

litgpt counts in micro-batches ("iterations") and sets the rate before each; an optimizer step therefore uses the rate
of its last micro-batch. The functions here give the same numbers per optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LRSchedule:
    """Shape of the learning rate after warm-up."""

    kind: Literal["cosine", "constant_linear_decay"] = "cosine"
    """``cosine`` decays to ``train.min_lr`` from the end of warm-up on (litgpt's schedule);
    ``constant_linear_decay`` holds the rate, then falls linearly to ``train.min_lr``"""
    decay_fraction: float = 0.2
    """Share of the run that the linear decay takes; not used by ``cosine``"""

    def __post_init__(self) -> None:
        if not 0.0 < self.decay_fraction <= 1.0:
            raise ValueError(f"`lr_schedule.decay_fraction` must be in (0, 1], got {self.decay_fraction}.")


@dataclass(frozen=True)
class LRPlan:
    """A schedule with the run's lengths filled in.

    Attributes:
        num_steps: Optimizer steps of the run.
        warmup_iters: Micro-batches of linear warm-up.
        min_lr: Where the decay ends.
        accumulation: Micro-batches per optimizer step and rank.
        schedule: Shape after warm-up.
    """

    num_steps: int
    warmup_iters: int = 0
    min_lr: float = 0.0
    accumulation: int = 1
    schedule: LRSchedule = LRSchedule()

    def factor(self, step: int, base_lr: float) -> float:
        """Share of ``base_lr`` that optimizer step ``step`` (from 0) uses."""
        total = self.num_steps * self.accumulation
        iteration = (step + 1) * self.accumulation - 1
        if iteration < self.warmup_iters:
            return iteration / self.warmup_iters
        floor = self.min_lr / base_lr if base_lr else 0.0
        start, shape = _SHAPES[self.schedule.kind](self, total)
        if iteration >= total:
            return floor
        progress = max(0.0, (iteration - start) / max(1.0, total - start))
        return floor + shape(progress) * (1.0 - floor)


def _cosine(plan: LRPlan, total: int) -> tuple[float, Callable[[float], float]]:
    return float(plan.warmup_iters), lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant_linear_decay(plan: LRPlan, total: int) -> tuple[float, Callable[[float], float]]:
    start = max(float(plan.warmup_iters), total * (1.0 - plan.schedule.decay_fraction))
    return start, lambda progress: 1.0 - progress


_SHAPES = {"cosine": _cosine, "constant_linear_decay": _constant_linear_decay}
