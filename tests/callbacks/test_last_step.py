"""Which batch belongs to the last optimizer step, told before it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_spectral.callbacks.turns import LastStep


def asked(steps_after: list[int], *, by_hand: bool, accumulate: int = 1) -> list[bool]:
    """One epoch of as many batches; ``steps_after`` is ``global_step`` behind each of them."""
    trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(automatic_optimization=not by_hand), max_steps=-1, max_epochs=1,
        current_epoch=0, num_training_batches=len(steps_after), accumulate_grad_batches=accumulate,
    )  # fmt: skip
    last, step, answers = LastStep(), 0, []
    for batch_idx, after in enumerate(steps_after):
        answers.append(last.is_next(trainer, batch_idx, step))
        step = after
        last.learn(step)
    return answers


@pytest.mark.parametrize(
    ("steps_after", "expected"),
    [
        ([1, 2, 3, 4], [False, False, False, True]),
        ([0, 0, 1, 1, 1, 2, 2, 3], [False] * 6 + [True] * 2),  # three batches a step, two left at the end
        ([0, 1, 1, 2, 2, 3], [False] * 4 + [True] * 2),
        ([2, 4, 6], [False, False, True]),  # two optimizers
    ],
)
def test_steps_by_hand(steps_after, expected):
    assert asked(steps_after, by_hand=True) == expected


def test_steps_of_the_trainer():
    assert asked([0, 1, 1, 2, 3], by_hand=False, accumulate=2) == [False] * 4 + [True]
    assert asked([1, 1, 2], by_hand=False) == [False, False, True]  # the second returned no loss
