"""When our callbacks have their turn: at the last step, and before all others where an exception ends it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class LastStep:
    """Says before a batch whether it belongs to the last optimizer step, as far as that can be known.

    A script that steps by hand may step after any number of batches: the latest number is taken for the next one, and
    a step's first batch decides for all of them, so that no window begins in its middle.
    """

    def __init__(self) -> None:
        self._steps_per_batch = self._batches_per_step = 1  # of the latest batch that stepped, and until it did
        self._before = self._num_batches = 0
        self._answer = False

    def is_next(self, trainer: pl.Trainer, batch_idx: int, step: int) -> bool:
        """Whether the step about to be taken, ``step`` being done, is the last one of the run."""
        self._before = step
        by_hand = not getattr(trainer.lightning_module, "automatic_optimization", True)
        if not by_hand or self._num_batches == 0:
            self._answer = self._is_last(trainer, batch_idx, step, by_hand)
        self._num_batches += 1
        return self._answer

    def _is_last(self, trainer: pl.Trainer, batch_idx: int, step: int, by_hand: bool) -> bool:
        if trainer.max_steps is not None and 0 <= trainer.max_steps <= step + self._steps_per_batch:
            return True
        if trainer.max_epochs is None or trainer.max_epochs < 0 or trainer.current_epoch != trainer.max_epochs - 1:
            return False
        num_batches = trainer.num_training_batches
        if num_batches == float("inf"):
            return trainer.accumulate_grad_batches == 1 and trainer.is_last_batch
        if by_hand:
            return batch_idx + self._batches_per_step >= num_batches
        return batch_idx // trainer.accumulate_grad_batches == (int(num_batches) - 1) // trainer.accumulate_grad_batches

    def learn(self, step: int) -> None:
        """After a batch, ``step`` being done: how many steps it was."""
        if step > self._before:
            self._steps_per_batch, self._batches_per_step = step - self._before, self._num_batches
            self._num_batches = 0


class First(pl.Callback):
    """Told of an exception before anybody else's callback, which may raise in its own ``on_exception``.

    Lightning then calls none of those after it and no teardown: hooks and threads of ours would stay.
    """

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Pass it on."""
        self.callback.on_exception(trainer, pl_module, exception)
        leave(trainer, self.callback)


def come_first(trainer: pl.Trainer, callback: Any) -> None:
    """From now on ``callback`` hears of an exception first. The list is a new one: the old is being gone through."""
    leave(trainer, callback)
    trainer.callbacks = [First(callback), *trainer.callbacks]  # type: ignore[attr-defined]


def leave(trainer: pl.Trainer, callback: Any) -> None:
    """Undo :func:`come_first`."""
    others = [one for one in trainer.callbacks if not (isinstance(one, First) and one.callback is callback)]  # type: ignore[attr-defined]
    trainer.callbacks = others  # type: ignore[attr-defined]
