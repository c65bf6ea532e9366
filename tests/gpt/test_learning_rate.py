"""litgpt's schedule per optimizer step, and the paper's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from litgpt.pretrain import get_lr

from lightning_spectral.gpt.learning_rate import LRPlan, LRSchedule


@given(
    num_steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 20),
    accumulation=st.integers(1, 4),
    lr=st.floats(1e-4, 1.0),
    floor=st.floats(0.0, 1.0),
)
def test_cosine_is_litgpts_at_the_last_micro_batch_of_each_step(
    num_steps: int, warmup_steps: int, accumulation: int, lr: float, floor: float
) -> None:
    total = num_steps * accumulation
    warmup = min(total, warmup_steps * accumulation)
    plan = LRPlan(num_steps, warmup, floor * lr, accumulation)
    for step in range(num_steps):
        iteration = (step + 1) * accumulation - 1  # litgpt sets the rate before every micro-batch
        if iteration < total:
            expected = get_lr(lr, iteration, warmup, total, floor * lr)
            assert lr * plan.factor(step, lr) == pytest.approx(expected, rel=1e-9, abs=1e-15)  # fp64 rounding


def test_after_the_last_step_the_rate_is_the_floor() -> None:
    assert LRPlan(10, 0, 0.1).factor(10, 1.0) == pytest.approx(0.1)


def test_the_papers_schedule_holds_then_falls_linearly() -> None:
    plan = LRPlan(100, 0, 0.0, 1, LRSchedule("constant_linear_decay", 0.2))
    factors = [plan.factor(step, 1.0) for step in range(101)]
    assert factors[:81] == [1.0] * 81
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert factors[100] == 0.0


def test_a_bad_decay_fraction_is_named() -> None:
    with pytest.raises(ValueError, match=r"`lr_schedule.decay_fraction` must be in \(0, 1\], got 0"):
        LRSchedule("constant_linear_decay", 0.0)
