"""A Trainer in the plain values that an observer knows: folder, ranks, loggers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info

from lightning_spectral.callbacks.uploads import is_tensorboard
from lightning_spectral.lightning_private import callback_metrics
from lightning_spectral.probe.host import Host
from lightning_spectral.probe.results import WindowResult
from lightning_spectral.probe.run_folder import RunFolder, new_run_id
from lightning_spectral.probe.scalars import finite
from lightning_spectral.records import SpectralRecord


def host_of(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    dirpath: str | None,
    run_id: str | None,
    continued_run: str | None = None,
    published: Callable[[Sequence[SpectralRecord], WindowResult], None] = lambda records, result: None,
) -> Host:
    """What our callbacks need of a Trainer.

    Args:
        trainer: At fit start, or at the start of an evaluation.
        pl_module: Its module.
        dirpath: The user's folder, if any.
        run_id: The user's id, if any.
        continued_run: Run id in the checkpoint that was loaded, if any.
        published: Called with each published window.
    """
    fits = trainer.state.fn == "fit"
    # after steps of its own a Trainer goes on: `fit` again, or `validate` after it, adds to the run
    resume: bool | str = (trainer.ckpt_path is not None and fits) or trainer.global_step > 0
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return Host(
        folder=str(Path(dirpath or folder_of(trainer)).absolute()),
        run_id=run_id or new_run_id(),
        describe={
            "optimizer": _optimizer_name(trainer),
            "seed": global_seed(),
            "hparams": dict(pl_module.hparams),
        },
        resume=continued_run or resume,
        makes_room=fits,
        opened=lambda: [folder for callback in callbacks if (folder := _opened(callback, trainer)) is not None],
        writes=trainer.is_global_zero and not trainer.fast_dev_run,  # type: ignore[attr-defined]
        is_first=trainer.is_global_zero,
        num_replicas=_num_replicas(trainer),
        process_group=data_parallel_group(pl_module),
        may_solve_beside=fits
        and not any(str(getattr(other, "monitor", None)).startswith("spectral") for other in callbacks),
        num_local_processes=trainer.num_devices,
        log=lambda scalars, step: log_scalars(trainer, scalars, step),
        published=published,
        inform=rank_zero_info,
    )


def folder_of(trainer: pl.Trainer) -> str:
    """``save_dir/name/version`` of the TensorBoard logger, else of the first; without a logger the root directory.

    So that the tab SPECTRAL finds records beside the event files, whatever other loggers there are.
    """
    if not trainer.loggers:
        return str(trainer.default_root_dir)
    logger = next(filter(is_tensorboard, trainer.loggers), trainer.loggers[0])
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(str(logger.save_dir or trainer.default_root_dir), str(logger.name), version)


def tell_listeners(trainer: pl.Trainer, records: Sequence[SpectralRecord]) -> None:
    """Callbacks with ``on_spectral_window(trainer, records)`` hear of every window."""
    for callback in [*trainer.callbacks]:  # type: ignore[attr-defined]
        listen = getattr(callback, "on_spectral_window", None)
        if listen is not None:
            listen(trainer, records)


def publish_medians(pl_module: pl.LightningModule, scalars: dict[str, float]) -> None:
    """To ``callback_metrics``, so that ``ModelCheckpoint(monitor="spectral/hard_rank.tail")`` works.

    Past ``self.log``, which takes a quarter of a millisecond a tag and a collective each at an epoch's end: they are
    equal on all ranks already.
    """
    values = torch.tensor(list(scalars.values()), dtype=torch.float32, device=pl_module.device).unbind()
    callback_metrics(pl_module.trainer).update(zip(scalars, values, strict=True))


def data_parallel_group(pl_module: pl.LightningModule) -> dist.ProcessGroup | None:
    """Ranks with different data: under tensor parallelism its peers see the same rows and must not be added."""
    mesh = getattr(pl_module, "device_mesh", None)
    return None if mesh is None else mesh["data_parallel"].get_group()


def global_seed() -> int | None:
    """What `seed_everything` was called with, if it was."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return int(seed) if seed.isdigit() else None


def _opened(callback: Any, trainer: pl.Trainer) -> RunFolder | None:
    folder = getattr(callback, "run_folder", None)
    return folder if isinstance(folder, RunFolder) and getattr(callback, "home", None) is trainer else None


def _optimizer_name(trainer: pl.Trainer) -> str:
    optimizers = trainer.optimizers
    return type(getattr(optimizers[0], "optimizer", optimizers[0])).__name__ if optimizers else "none"


def _num_replicas(trainer: pl.Trainer) -> int:
    kwargs = (
        trainer.strategy.distributed_sampler_kwargs if hasattr(trainer.strategy, "distributed_sampler_kwargs") else None
    )
    return int(kwargs["num_replicas"]) if kwargs else trainer.world_size


def log_scalars(trainer: pl.Trainer, scalars: dict[str, float], step: int | None) -> None:
    """To every logger, past ``self.log``: hundreds of tags there would cost more than the window."""
    scalars = finite(scalars)
    if scalars and trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step if step is None else step)


def num_loaders(trainer: pl.Trainer) -> int:
    """Dataloaders of the evaluation under way."""
    numbers = {
        "validation": trainer.num_val_batches,
        "test": trainer.num_test_batches,
        "predict": trainer.num_predict_batches,
    }
    stage = "validation" if trainer.validating else "test" if trainer.testing else "predict"
    found = numbers["validation" if trainer.state.fn == "fit" else stage]
    return len(found) if isinstance(found, list) else 1
