"""Pictures and records to the loggers that can hold them: TensorBoard, W&B, MLflow. Others get the scalars only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_spectral.records import RUN_FILES, RunInfo


def is_tensorboard(logger: Any) -> bool:
    """Whether a logger writes TensorBoard's files: ``lightning``'s, ``pytorch_lightning``'s, Fabric's, a subclass."""
    return any(kind.__name__ == "TensorBoardLogger" for kind in type(logger).__mro__)


def holds_pictures(logger: Any) -> bool:
    """Whether :func:`add_figure` has somewhere to put a picture."""
    return is_tensorboard(logger) or hasattr(logger, "log_image") or _is_mlflow(logger)


def add_figure(loggers: Sequence[Any], tag: str, figure: Any, step: int) -> None:
    """Add a matplotlib figure at an optimizer step.

    Args:
        loggers: Lightning loggers, Fabric's or the Trainer's; those without pictures are passed over.
        tag: Name such as ``spectral_pictures/rank_by_bucket``.
        figure: A figure with an Agg canvas.
        step: Optimizer steps done.
    """
    for logger in loggers:
        if is_tensorboard(logger):
            logger.experiment.add_figure(tag, figure, step)
        elif hasattr(logger, "log_image"):
            logger.log_image(tag, [pixels(figure)], step=step)
        elif _is_mlflow(logger):
            logger.experiment.log_figure(logger.run_id, figure, f"{tag}_{step:08d}.png")


def pixels(figure: Any) -> np.ndarray:
    """A figure as (height, width, 3) bytes."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def upload_records(loggers: Sequence[Any], folder: Path, info: RunInfo) -> None:
    """Put the run folder's records beside the run where its logger keeps files: an artifact in W&B and MLflow.

    Args:
        loggers: As for :func:`add_figure`.
        folder: The run folder.
        info: Its ``run.json``.
    """
    files = [folder / name for name in RUN_FILES if (folder / name).is_file()]
    for logger in loggers if files else ():
        if type(logger).__name__ == "WandbLogger":
            import wandb

            artifact = wandb.Artifact(f"spectral-records-{info.run_id}", type="spectral-records")
            for file in files:
                artifact.add_file(str(file))
            logger.experiment.log_artifact(artifact)
        elif _is_mlflow(logger):
            for file in files:
                logger.experiment.log_artifact(logger.run_id, str(file), "spectral_records")


def _is_mlflow(logger: Any) -> bool:
    return type(logger).__name__ == "MLFlowLogger"
