"""When to measure: the first step, every n steps, and the last one."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_spectral.text.arguments import require_count


@dataclass
class Schedule:
    """Windows over optimizer steps; a window is one optimizer step with all its micro-batches.

    Attributes:
        every_n_steps: Distance of windows in optimizer steps.
        last_step: Index of the last optimizer step, if known: it is measured too.
        previous: Step of the latest window, so that a counter that jumps (manual optimization with several
            optimizers counts each) still meets every multiple.
    """

    every_n_steps: int
    last_step: int | None = None
    previous: int | None = None

    def __post_init__(self) -> None:
        require_count("every_n_steps", self.every_n_steps)

    def is_due(self, step: int) -> bool:
        """Whether the step about to be taken (``step`` are done) is to be measured."""
        if self.previous is not None and step <= self.previous:
            return False
        if step == self.last_step or step % self.every_n_steps == 0:
            return True
        return self.previous is not None and step // self.every_n_steps > self.previous // self.every_n_steps
