"""``WeightSpectrumCallback``: spectra of weights, gradients, momentum and updates in a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.callbacks.fit_start import BeginsFit
from lightning_spectral.callbacks.trainer_host import host_of, publish_medians
from lightning_spectral.callbacks.turns import LastStep, come_first, leave
from lightning_spectral.lightning_private import state_key
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.weight_settings import WHAT, WeightSettings
from lightning_spectral.probe.weight_spectra import WeightObserver
from lightning_spectral.text.arguments import refuses_unknown, require_kinds, require_run_id


class WeightSpectrumCallback(BeginsFit):
    """Measure the spectra of a model's matrices while it trains; never changes the training.

    A parameter may hold several matrices: experts, and heads or q, k and v where the optimizer divides them (`split`);
    these are measured one by one, as ``name[0]``, ``name[1]``, outputs by inputs also where they are kept transposed.

    Writes ``weights.jsonl`` into the run folder, one scalar per measure and layer to every logger
    (``spectral_weights.effective_rank.update/layer_03.mlp.proj``) and medians over layers to ``callback_metrics``
    (``spectral_weights/effective_rank.update``).

    Args:
        every_n_steps: Measure the first step, every n-th and the last one.
        what: Any of ``weight``, ``gradient``, ``momentum``, ``update``. Without momentum there is no such record.
        parameters: Shell patterns of parameter names; the default takes every trainable matrix but embeddings.
        coefficients: Newton-Schulz set whose flattened share is reported for gradient and momentum; ``None`` for none.
        ns_steps: Its steps.
        dirpath: The run folder; default: that of the other callbacks, the logger's or the trainer's.
        run_id: Name of the run.
        strict: Raise where something goes wrong during training, instead of a warning. For tests.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: Before step 1, if there is no matrix to measure.

    Example:
        ``Trainer(callbacks=[WeightSpectrumCallback(every_n_steps=100)])``
    """

    @refuses_unknown
    def __init__(
        self,
        every_n_steps: int = 200,
        *,
        what: Sequence[str] = WHAT,
        parameters: Sequence[str] | None = None,
        coefficients: str | None = "muon",
        ns_steps: int = 5,
        dirpath: str | None = None,
        run_id: str | None = None,
        strict: bool = False,
    ) -> None:
        require_kinds(WeightSpectrumCallback.__init__, locals())
        kinds = what if isinstance(what, str) else tuple(what)
        named = None if parameters is None else tuple(parameters)
        self.settings = WeightSettings(every_n_steps, kinds, named, coefficients, ns_steps, strict)
        require_run_id(run_id)
        self.dirpath, self.run_id = dirpath, run_id
        self.observer = WeightObserver(self.settings, name=type(self).__name__, key=self.state_key)
        self.home: pl.Trainer | None = None
        self._last_step = LastStep()

    @property
    def run_folder(self) -> RunFolder | None:
        """Where records go, once attached."""
        return self.observer.run_folder

    def refuse(self, reason: str) -> None:
        """What is asked for cannot be measured: an error before step 1."""
        raise MisconfigurationException(f"{type(self).__name__} {reason}")

    @override
    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None and trainer.global_step == 0:
            self.observer.schedule.previous = None  # nothing of an earlier run is carried on
        host = host_of(trainer, pl_module, dirpath=self.dirpath, run_id=self.run_id)
        if self.home is not trainer:
            self.observer.run_folder = None  # it is of another run
        self.home = trainer
        come_first(trainer, self)
        try:
            self.observer.attach(pl_module, host)
        except ValueError as error:
            self.refuse(str(error))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.observer.begin_step(step, is_last=self._last_step.is_next(trainer, batch_idx, step))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self.observer.before_optimizer_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._last_step.learn(trainer.global_step)
        if self.observer.step is None or trainer.global_step == self.observer.step:
            return  # gradients still accumulate
        scalars = self.observer.end_step(trainer.optimizers)
        if scalars:
            with self.observer.guard("logging medians"):
                publish_medians(pl_module, scalars)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.observer.detach()
        leave(trainer, self)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.observer.detach()

    @cached_property  # Lightning asks for it at every hook
    def state_key(self) -> str:  # type: ignore[override]
        """Two callbacks are told apart by what they measure, when, and where it goes."""
        names = ("every_n_steps", "what", "parameters", "coefficients", "ns_steps")
        return state_key(self, **{name: getattr(self.settings, name) for name in names}, dirpath=self.dirpath)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.observer.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.observer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: matrices and open files stay with the original."""
        return {"settings": self.settings, "dirpath": self.dirpath, "run_id": self.run_id, **self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A callback that measures the same, attached to nothing."""
        self.settings, self.dirpath, self.run_id = state["settings"], state["dirpath"], state["run_id"]
        self.observer = WeightObserver(self.settings, name=type(self).__name__, key=self.state_key)
        self.home, self._last_step = None, LastStep()
        self.load_state_dict(state)
