"""The models of a training script, as they are when it first goes backward; there the script is ended.

It runs as ``python script.py`` would, up to there: no optimizer has stepped. Every model that was called until then is
hooked at its first call, so that the layout is that of the script's own batches. What would keep its results is a dry
run: our run folders, the loggers of a Lightning Trainer, W&B.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.rehearsal import Rehearsed
from lightning_spectral.models.sites import Found
from lightning_spectral.models.stacks import find_stacks
from lightning_spectral.models.walk import modules_of
from lightning_spectral.probe.run_folder import rehearsal
from lightning_spectral.text import CommandError, one_line

_ENOUGH_EVENTS = 4_096  # a script may evaluate for an hour before it trains


@dataclass(frozen=True)
class Called:
    """One model of a script.

    Attributes:
        model: The outermost module that was called, or the LightningModule around it.
        found: What is measured in it.
        layouts: The layout of each stack that ran, by its name.
    """

    model: nn.Module
    found: Found
    layouts: dict[str, Rehearsed]


class _Backward(BaseException):
    """The script goes backward; not an ``Exception``, so that the script's own handlers let it pass."""


class _Watch:
    """Which models are called, and how rows and tokens lie in them."""

    def __init__(self, **search: Any) -> None:
        self._search = search
        self._called: list[tuple[Called, Recorder]] = []
        self._inside: set[int] = set()
        self.reasons: dict[str, str] = {}

    def see(self, module: nn.Module, *_: Any) -> None:
        """Hook a model that is called for the first time from outside of those known."""
        if id(module) in self._inside:
            return
        self._inside.update(id(inner) for inner in modules_of(module))
        try:
            found = find_stacks(module, **self._search)
        except ValueError as error:
            self.reasons[type(module).__name__] = one_line(error)
            return
        blocks_only = replace(found, stacks=tuple(replace(stack, sites=()) for stack in found.stacks))
        recorder = Recorder(module, blocks_only)
        recorder.start(training=False)
        self._called.append((Called(module, found, {}), recorder))

    def look(self, *_: Any) -> None:
        """Before a model is called: read what the calls until then showed, and keep no more of them."""
        for called, recorder in self._called:
            if recorder.num_events > _ENOUGH_EVENTS:
                _read(called, recorder)
                recorder.start(training=False)

    def result(self) -> list[Called]:
        """What was seen; every hook is taken off."""
        for called, recorder in self._called:
            _read(called, recorder)
            recorder.remove()
        return [called for called, _ in self._called]


def _read(called: Called, recorder: Recorder) -> None:
    for call in recorder.peek():
        if not called.layouts.get(call.stack, Rehearsed()).layout:
            called.layouts[call.stack] = Rehearsed(call.layout, call.agreement, call.reason)


def models_of(script: Path, words: Sequence[str], **search: Any) -> list[Called]:
    """Run a script until it first goes backward.

    Args:
        script: The file.
        words: Its command line.
        **search: Passed to :func:`~lightning_spectral.models.stacks.find_stacks`.

    Raises:
        CommandError: If it ends before, by an error of its own or without a model that is understood.
    """
    watch = _Watch(**search)
    failure = ""
    with rehearsal(), _ended_at_backward(watch, script.read_text(encoding="utf-8")), _as_main(script, words):
        try:
            with redirect_stdout(sys.stderr):
                runpy.run_path(str(script), run_name="__main__")
        except _Backward:
            pass
        except SystemExit as error:
            failure = f"it ended with exit code {error.code}" if error.code else ""
        except Exception as error:
            failure = f"it ended in {type(error).__name__}: {one_line(error)}"
    found = watch.result()
    if not found:
        seen = "; ".join(f"`{name}`: {reason}" for name, reason in watch.reasons.items()) or "no module was called"
        raise CommandError(f"`{script}` called no model that is understood: {failure or seen}")
    return found


@contextmanager
def _ended_at_backward(watch: _Watch, text: str) -> Iterator[None]:
    def ended(*_: Any, **__: Any) -> None:
        raise _Backward

    def called(module: nn.Module, *_: Any) -> None:
        watch.look()
        watch.see(module)

    kept: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        kept.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    handle = register_module_forward_pre_hook(called)
    for owner, name in ((Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad")):
        put(owner, name, ended)
    with tempfile.TemporaryDirectory() as folder:
        for package in _lightning_packages(text):
            logger = _dry_logger(import_module(f"{package}.loggers.logger").DummyLogger, folder)
            trainer = import_module(package).Trainer
            for name in ("fit", "validate", "test", "predict"):
                put(trainer, name, _seeing(watch, getattr(trainer, name), logger))
        try:
            yield
        finally:
            for owner, name, value in reversed(kept):
                setattr(owner, name, value)
            handle.remove()


def _lightning_packages(text: str) -> list[str]:
    """Whose Trainers a script may use: what they are given is a model, also where only its parts are called."""
    names = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}
    return [package for package, word in names.items() if word in text and find_spec(word)]


def _dry_logger(dummy: type, folder: str) -> Any:
    """A logger that keeps nothing, with a folder for what the script itself writes beside it."""
    return type("DryLogger", (dummy,), {"save_dir": folder, "log_dir": folder})()


def _seeing(watch: _Watch, method: Callable[..., Any], logger: Any) -> Callable[..., Any]:
    @wraps(method)
    def seen(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, nn.Module):
            watch.see(model)
        trainer.loggers = [logger for _ in trainer.loggers]
        return method(trainer, *args, **kwargs)

    return seen


@contextmanager
def _as_main(script: Path, words: Sequence[str]) -> Iterator[None]:
    kept = sys.argv, list(sys.path), os.environ.get("WANDB_MODE")
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.parent.absolute()))
    os.environ["WANDB_MODE"] = "disabled"
    try:
        yield
    finally:
        sys.argv, sys.path[:] = kept[0], kept[1]
        if kept[2] is None:
            del os.environ["WANDB_MODE"]
        else:
            os.environ["WANDB_MODE"] = kept[2]
