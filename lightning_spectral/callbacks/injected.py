"""Callbacks that an environment variable adds to a Trainer or Fabric; ``factory`` says when, ``probe_file`` which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_spectral.callbacks import VARIABLE
from lightning_spectral.callbacks.base import SpectralCallback
from lightning_spectral.callbacks.fabric import FabricSpectralProbe
from lightning_spectral.callbacks.probe_file import load_callbacks
from lightning_spectral.probe.alarms import AlarmRule, Alarms
from lightning_spectral.probe.guard import warn
from lightning_spectral.probe.measurement import Measurement


def injected(callback: Callback) -> Callback:
    """The same callback under a state key of its own, which is disabled beside the user's own one of its class."""
    return _rebuilt(type(callback), _state_of(callback))


class Injected(Callback):
    """What a subclass of a callback gains when the environment adds it."""

    base: type[Callback]

    def refuse(self, reason: str) -> None:
        """Warn once of what cannot be measured; the script, which did not ask for this callback, goes on."""
        warn(f"{VARIABLE}: {self.base.__name__}: {reason} Nothing is measured here.")
        self.__class__ = StoodDown  # type: ignore[assignment]  # from here on a callback without any hook

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before any other hook: look whether the user's script measures this itself."""
        if any(
            isinstance(other, self.base) and not isinstance(other, Injected)
            for other in trainer.callbacks  # type: ignore[attr-defined]
        ):
            rank_zero_info(f"{VARIABLE}: this Trainer has a {self.base.__name__} of its own; ours is disabled.")
            self.__class__ = StoodDown  # type: ignore[assignment]  # from here on a callback without any hook
            return
        super().setup(trainer, pl_module, stage)

    def __reduce__(self) -> tuple[Any, ...]:
        """Spawned processes get it by its class, which was made on the fly."""
        return _rebuilt, (self.base, _state_of(self))


class StoodDown(Callback):
    """A callback that left the work to another."""


class InjectedFabricProbe(FabricSpectralProbe):
    """A Fabric probe that the environment adds: it warns once of what cannot be measured."""

    def refuse(self, reason: str) -> None:
        """Tell it, and hook nothing."""
        warn(f"{VARIABLE}: {type(self.callback).__name__}: {reason} Nothing is measured here.")
        self._is_attached = True  # do not try the next module


def fabric_probes(callbacks: Sequence[Callback]) -> list[FabricSpectralProbe]:
    """Each callback as a Fabric probe, but those that need a Trainer, or whose numbers another one reports."""
    found = _of_activations(callbacks, "Fabric loop")
    return [InjectedFabricProbe(callback, alarms=alarms) for callback, alarms in found]


def measurements(path: str | Path) -> list[tuple[Measurement, list[AlarmRule]]]:
    """What a ``probe.yaml`` asks for, for a loop without callbacks of Lightning's: what is measured, and watched in it.

    Raises:
        MisconfigurationException: If the file is missing, no YAML, or names what does not exist; one sentence.
    """
    return [(callback.measurement, alarms) for callback, alarms in _of_activations(load_callbacks(path), "loop")]


def add_to_trainer(trainer: Any, path: str | Path) -> None:
    """Give a ``transformers.Trainer`` the probes of a file, unless the script has one of its own.

    Args:
        trainer: Just made.
        path: The ``probe.yaml``.
    """
    from lightning_spectral.callbacks.huggingface import HuggingFaceProbe

    class InjectedHuggingFaceProbe(HuggingFaceProbe):
        """Warn once of what cannot be measured."""

        def refuse(self, reason: str) -> None:
            warn(f"{VARIABLE}: {reason} Nothing is measured here.")

    if not any(isinstance(callback, HuggingFaceProbe) for callback in trainer.callback_handler.callbacks):
        for measurement, alarms in measurements(path):
            trainer.add_callback(InjectedHuggingFaceProbe.of(measurement, alarms))


def _of_activations(callbacks: Sequence[Callback], where: str) -> list[tuple[SpectralCallback, list[AlarmRule]]]:
    """What measures activations, each with the alarms that watch it."""
    together: Any = SimpleNamespace(callbacks=list(callbacks))
    found: list[tuple[SpectralCallback, list[AlarmRule]]] = [
        (one, []) for one in callbacks if isinstance(one, SpectralCallback) and not one.is_redundant(together)
    ]
    for callback in callbacks:
        if isinstance(callback, AlarmRule):
            _give(callback, found)
        elif not isinstance(callback, SpectralCallback):
            warn(f"{VARIABLE}: {type(callback).__name__} needs a Trainer; it is left out in this {where}.")
    return found


def _give(alarm: AlarmRule, found: Sequence[tuple[SpectralCallback, list[AlarmRule]]]) -> None:
    """To the first that measures what it watches."""
    reason = f"{type(alarm).__name__} watches the bucket `{alarm.bucket}`, and nothing is measured"
    for callback, alarms in found:
        try:
            Alarms([alarm], callback.measurement, remedy="add a TailTokenProbe.")
        except ValueError as error:
            reason = str(error)
            continue
        alarms.append(alarm)
        return
    warn(f"{VARIABLE}: {reason} It is left out.")


def _rebuilt(base: type[Callback], state: dict[str, Any]) -> Callback:
    made: type[Callback] = type(f"Injected{base.__name__}", (Injected, base), {"base": base, "__module__": __name__})
    callback = object.__new__(made)
    if hasattr(callback, "__setstate__"):
        callback.__setstate__(state)
    else:
        callback.__dict__.update(state)
    return callback


def _state_of(callback: Callback) -> dict[str, Any]:
    state: dict[str, Any] = callback.__getstate__() if hasattr(callback, "__setstate__") else callback.__dict__  # type: ignore[attr-defined]
    return state
