"""Probes in ``transformers.Trainer`` and ``accelerate.Accelerator`` without an edit of the script.

``import torch`` calls every installed entry point ``torch.backends`` (``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns that
off). Ours does nothing unless ``LIGHTNING_SPECTRAL`` is set; then, when one of the two modules is imported, its class
gets our shell. Nothing is imported that the script does not import itself, until it makes a Trainer or an Accelerator;
and this module imports only the standard library.

A loop of the script's own cannot be seen from outside: it needs the two lines of :func:`lightning_spectral.observe`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from lightning_spectral.callbacks import VARIABLE

Patch = Callable[[ModuleType], None]


def start() -> None:
    """Entry point ``torch.backends``: wait for the libraries, if the variable is set. Never raises."""
    try:
        if os.environ.get(VARIABLE) and not any(isinstance(finder, _Waits) for finder in sys.meta_path):
            waits = _Waits({"transformers.trainer": patch_trainer, "accelerate.accelerator": patch_accelerator})
            sys.meta_path.insert(0, waits)
    except Exception as error:  # an error here would end `import torch`
        sys.stderr.write(f"{VARIABLE}: {error}\n")


def patch_trainer(module: ModuleType) -> None:
    """Every ``transformers.Trainer`` gets the probes of the file; its own Accelerator gets none."""

    def made(trainer: Any) -> None:
        from lightning_spectral.callbacks.injected import add_to_trainer

        add_to_trainer(trainer, os.environ[VARIABLE])

    def made_accelerator(trainer: Any) -> None:
        trainer.accelerator.measured_by_its_trainer = True

    trainer = module.Trainer
    _then(trainer, "__init__", lambda own, result: made(own))
    if hasattr(trainer, "create_accelerator_and_postprocess"):
        _then(trainer, "create_accelerator_and_postprocess", lambda own, result: made_accelerator(own))


def patch_accelerator(module: ModuleType) -> None:
    """Every ``Accelerator`` observes the first model and optimizer that it prepares."""

    def prepared(accelerator: Any, result: Any) -> None:
        from lightning_spectral.callbacks.accelerate import observe_prepared

        if not getattr(accelerator, "measured_by_its_trainer", False):
            observe_prepared(accelerator, result, os.environ[VARIABLE])

    def ended(accelerator: Any, result: Any) -> None:
        for observation in getattr(accelerator, "spectral_observations", ()):
            observation.close(finished=True)

    _then(module.Accelerator, "prepare", prepared)
    _then(module.Accelerator, "end_training", ended)


def _then(owner: type, name: str, do: Callable[[Any, Any], None]) -> None:
    """After a method of a class has returned, do something more that cannot end the script."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if os.environ.get(VARIABLE):
            try:
                do(self, result)
            except Exception as error:
                from lightning_spectral.probe.guard import warn

                text = str(error)
                warn(f"{text if text.startswith(VARIABLE) else f'{VARIABLE}: {text}'} Nothing is measured here.")
        return result

    setattr(owner, name, wrapped)


class _Waits(MetaPathFinder):
    """Finds nothing itself: hands out the loader of a module that is waited for, to patch it once it is there."""

    def __init__(self, patches: dict[str, Patch]) -> None:
        self._patches = patches
        for name in [name for name in patches if name in sys.modules]:
            patches.pop(name)(sys.modules[name])

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self._patches:
            return None
        patch = self._patches.pop(fullname)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Patches(spec.loader, patch)
        return spec


class _Patches(Loader):
    """A module's own loader, and a patch afterwards."""

    def __init__(self, loader: Loader, patch: Patch) -> None:
        self._loader, self._patch = loader, patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module as if we were not there, then patch it."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            self._patch(module)
        except Exception as error:  # a version that we do not know
            sys.stderr.write(f"{VARIABLE}: {module.__name__}: {error}\n")
