"""The private names of Lightning that we use, in one place: an upgrade that breaks one breaks a test named after it.

Everything else of the package uses Lightning's public interface. A name leaves as soon as there is a public way to the
same thing. Arguments are `Any` and nothing is imported: `lightning` and `pytorch_lightning` both work.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "accumulates",
    "callback_metrics",
    "callbacks_of_fabric",
    "device_mesh",
    "run_validation",
    "state_key",
    "unwrapped",
]


def accumulates(trainer: Any) -> bool:
    """Whether this batch only adds to the gradients, so that the optimizer does not step after it."""
    return bool(trainer.fit_loop._should_accumulate())


def callback_metrics(trainer: Any) -> dict[str, Any]:
    """The metrics that ``trainer.callback_metrics`` adds to: what is put here is found there until the next fit.

    The property itself would compute, and over ranks reduce, all that was logged so far.
    """
    metrics: dict[str, Any] = trainer._logger_connector._callback_metrics
    return metrics


def run_validation(trainer: Any) -> None:
    """One pass over the validation loaders amid training, as Lightning makes it at ``val_check_interval``.

    ``Trainer.validate`` would end the training. The logger connector's mark of the first iteration after a restart is
    kept, since the validation loop resets it and the training loop needs it.
    """
    connector = trainer._logger_connector
    first_loop_iter = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter


def callbacks_of_fabric(fabric: Any) -> list[Any]:
    """The callbacks that a Fabric was made with, in order."""
    return list(fabric._callbacks)


def device_mesh(strategy: Any) -> Any:
    """The device mesh of ``ModelParallelStrategy`` once it is set up; None for strategies without one."""
    return getattr(strategy, "_device_mesh", None)


def unwrapped(module: Any) -> Any:
    """What ``Fabric.setup`` wrapped for the strategy (a DDP or FSDP module, or the plain one); others as they are."""
    return getattr(module, "_forward_module", module)


def state_key(callback: Any, **identity: Any) -> str:
    """Key of a callback's state in a checkpoint: its class and what tells it from others of its class."""
    return str(callback._generate_state_key(**identity))
