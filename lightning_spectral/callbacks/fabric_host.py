"""A Fabric in the plain values that an observer knows: folder, ranks, loggers."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_spectral.callbacks.trainer_host import global_seed
from lightning_spectral.callbacks.uploads import is_tensorboard
from lightning_spectral.lightning_private import callbacks_of_fabric, device_mesh
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.run_folder import RunFolder, new_run_id
from lightning_spectral.probe.settings import ProbeSettings


def host_of_fabric(fabric: Fabric, module: nn.Module, settings: ProbeSettings, *, resume: bool) -> Host:
    """What a probe needs of a Fabric.

    Args:
        fabric: The loop's.
        module: The model, as ``fabric.setup`` returns it.
        settings: Names folder and run.
        resume: Whether the loop has loaded our state.
    """
    mesh = _data_parallel_mesh(fabric)
    return Host(
        folder=str(Path(settings.dirpath or _log_dir(fabric) or "spectral").absolute()),
        run_id=settings.run_id or new_run_id(),
        describe={"seed": global_seed(), "hparams": _model_config(module)},
        resume=resume,
        opened=lambda: [
            folder
            for other in callbacks_of_fabric(fabric)
            if isinstance(folder := getattr(other, "run_folder", None), RunFolder)
        ],
        opens_late=True,  # a loop that resumes may load its state after `setup`
        writes=fabric.is_global_zero,
        is_first=fabric.is_global_zero,
        num_replicas=int(fabric.world_size if mesh is None else mesh.size()),
        process_group=_process_group(mesh),
        may_solve_beside=False,  # a loop has no end that it tells us of
        log=lambda scalars, step: _log(fabric, scalars, step),
        inform=rank_zero_info,
    )


def _log_dir(fabric: Fabric) -> str | None:
    if not fabric.loggers:
        return None
    logger = next(filter(is_tensorboard, fabric.loggers), fabric.loggers[0])
    getattr(logger, "experiment", None)  # a CSVLogger wants to be the first in its folder
    return getattr(logger, "log_dir", None)


def _log(fabric: Fabric, scalars: Scalars, step: int | None) -> None:
    for logger in fabric.loggers if scalars else ():
        logger.log_metrics(scalars, step=step)


def _data_parallel_mesh(fabric: Fabric) -> Any:
    """Under tensor parallelism, the ranks whose data differ."""
    mesh = device_mesh(fabric.strategy)
    return None if mesh is None else mesh["data_parallel"]


def _process_group(mesh: Any) -> dist.ProcessGroup | None:
    return None if mesh is None else mesh.get_group()


def _model_config(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if is_dataclass(config) and not isinstance(config, type):
        return {"model_config": asdict(config)}
    to_dict = getattr(config, "to_dict", None)
    return {"model_config": to_dict()} if callable(to_dict) else {}
