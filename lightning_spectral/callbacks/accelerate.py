"""The measurement in a loop of Hugging Face's Accelerate, where the environment variable asks for it.

A script that may be edited calls :func:`lightning_spectral.observe` with its model and optimizer instead.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_spectral.callbacks import VARIABLE
from lightning_spectral.probe.alarms import Alarms
from lightning_spectral.probe.host import Host
from lightning_spectral.probe.loop import LoopObserver, is_observed
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.observe import Observation
from lightning_spectral.probe.run_folder import new_run_id


def observe_prepared(accelerator: Any, prepared: Any, path: str) -> None:
    """Observe the first model with the first optimizer that an Accelerator has prepared, in one call or in two.

    Args:
        accelerator: Keeps the observations as ``spectral_observations``.
        prepared: What ``prepare`` returned.
        path: The ``probe.yaml``.
    """
    if getattr(accelerator, "spectral_observations", None) is not None:
        return
    objects = prepared if isinstance(prepared, (tuple, list)) else (prepared,)
    _keep(accelerator, "spectral_model", objects, nn.Module)
    _keep(accelerator, "spectral_optimizer", objects, Optimizer)
    model = getattr(accelerator, "spectral_model", None)
    optimizer = getattr(accelerator, "spectral_optimizer", None)
    if model is None or optimizer is None:
        return
    from lightning_spectral.callbacks.injected import measurements

    accelerator.spectral_observations = []
    if is_observed(model):
        return  # the script does it itself
    for measurement, alarms in measurements(path):
        inner = getattr(optimizer, "optimizer", optimizer)
        observation = _observe(accelerator, model, inner, measurement, Alarms(alarms, measurement))
        if observation is not None:
            accelerator.spectral_observations.append(observation)


def _keep(accelerator: Any, name: str, objects: Sequence[Any], kind: type) -> None:
    found = next((one for one in objects if isinstance(one, kind)), None)
    if found is not None and getattr(accelerator, name, None) is None:
        setattr(accelerator, name, found)


def _observe(
    accelerator: Any, model: nn.Module, optimizer: Optimizer, measurement: Measurement, alarms: Alarms
) -> Observation | None:
    settings, is_first = measurement.settings, bool(accelerator.is_main_process)
    folder = settings.dirpath or Path(getattr(accelerator, "project_dir", None) or ".") / "spectral"
    loop = LoopObserver(replace(measurement), name=f"{VARIABLE}: Accelerate", alarms=alarms)
    host = Host(
        folder=Path(folder).absolute(),
        run_id=settings.run_id or new_run_id(),
        describe={"optimizer": type(optimizer).__name__},
        is_first=is_first,
        writes=is_first,
        num_replicas=int(accelerator.num_processes),
        num_local_processes=max(torch.cuda.device_count(), 1) if accelerator.num_processes > 1 else 1,
        may_solve_beside=False,  # a loop has no end that it tells us of
    )
    try:
        loop.attach(accelerator.unwrap_model(model), host, outer=model)
    except ValueError as error:
        host.tell(f"{VARIABLE}: {error} Nothing is measured here.")
        return None
    observation = Observation(loop)
    observation.follow(optimizer)
    atexit.register(observation.close)
    return observation
