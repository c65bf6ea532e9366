"""Zero edit: ``LIGHTNING_SPECTRAL=probe.yaml python train.py`` measures a script that knows nothing of us.

Lightning asks every installed ``callbacks_factory`` entry point for callbacks whenever a Trainer or a Fabric is made.
Ours answer with the callbacks of ``probe.yaml``, and with nothing, at once, where the variable is not set. This module
therefore imports only the standard library.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from lightning_spectral.callbacks import VARIABLE

# Older ones refuse callbacks of `lightning.pytorch` with "Expected a parent".
_OLDEST_PYTORCH_LIGHTNING = (2, 6)


def trainer_callbacks() -> list[Any]:
    """Entry point ``lightning.pytorch.callbacks_factory``: the callbacks for a Trainer."""
    return _made(_for_trainer)


def pytorch_lightning_callbacks() -> list[Any]:
    """Entry point ``pytorch_lightning.callbacks_factory``: likewise, for scripts that import ``pytorch_lightning``."""
    return _made(_for_pytorch_lightning)


def fabric_callbacks() -> list[Any]:
    """Entry point ``lightning.fabric.callbacks_factory``: the same callbacks, driven by a Fabric loop."""
    return _made(_for_fabric)


def _made(make: Callable[[str], list[Any]]) -> list[Any]:
    """The callbacks, or none: in a script that did not ask for them, errors are warnings and training goes on."""
    path = os.environ.get(VARIABLE)
    if not path:
        return []
    try:
        return make(path)
    except Exception as error:
        from lightning_spectral.probe.guard import warn

        warn(f"{error} Nothing is measured." if str(error).startswith(VARIABLE) else f"{VARIABLE}={path}: {error}")
        return []


def _for_trainer(path: str) -> list[Any]:
    from lightning_spectral.callbacks.injected import injected
    from lightning_spectral.callbacks.probe_file import load_callbacks

    return [injected(callback) for callback in load_callbacks(path)]


def _for_pytorch_lightning(path: str) -> list[Any]:
    found = version("pytorch-lightning")
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_PYTORCH_LIGHTNING:
        raise RuntimeError(
            f"pytorch_lightning {found} cannot run callbacks of `lightning`: upgrade it to 2.6, or "
            "`import lightning.pytorch as pl` in the script."
        )
    return _for_trainer(path)


def _for_fabric(path: str) -> list[Any]:
    from lightning_spectral.callbacks.injected import fabric_probes
    from lightning_spectral.callbacks.probe_file import load_callbacks

    return fabric_probes(load_callbacks(path))
