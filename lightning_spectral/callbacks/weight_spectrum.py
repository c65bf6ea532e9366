"""Spectra of what the optimizer sees and does: weights, gradients, momentum and the applied update, per layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.callbacks import sinks
from lightning_spectral.callbacks.run_folder import open_run_folder
from lightning_spectral.functional.flattening import FLAT_BAND, spectrum_flattening
from lightning_spectral.functional.matrix_spectrum import spectrum_measures
from lightning_spectral.functional.orthogonalize import coefficient_set
from lightning_spectral.models.names import clean_names
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.schedule import Schedule
from lightning_spectral.records import WEIGHTS_FILE, WeightRecord, append_records, read_weights

WHAT = ("weight", "gradient", "momentum", "update")
_MOMENTUM_KEYS = ("momentum_buffer", "momentum", "exp_avg")  # torch's SGD and Muon, ours, Adam
_SCALARS = ("effective_rank", "stable_rank", "normalized_entropy", "top10_energy", "flattened_share")


class WeightSpectrumCallback(Callback):
    """Measure the spectra of a model's matrices while it trains; never changes the training.

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

    Raises:
        ValueError: An argument is out of range.

    Example:
        ``Trainer(callbacks=[WeightSpectrumCallback(every_n_steps=100)])``
    """

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
    ) -> None:
        if isinstance(what, str) or not what or set(what) - set(WHAT):
            raise ValueError(f"`what` must be a list from {list(WHAT)}, got {what!r}.")
        if coefficients is not None:
            coefficient_set(coefficients)
        if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or ns_steps < 1:
            raise ValueError(f"`ns_steps` must be an integer >= 1, got {ns_steps!r}.")
        self.what = tuple(what)
        self.parameters = None if parameters is None else tuple(parameters)
        self.coefficients, self.ns_steps = coefficients, ns_steps
        self.dirpath, self.run_id = dirpath, run_id
        self.run_folder: RunFolder | None = None
        self._schedule = Schedule(every_n_steps)
        self._matrices: list[tuple[str, Tensor]] = []
        self._known: set[tuple[Any, ...]] = set()
        self._window_step: int | None = None
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._matrices = list(self._choose(pl_module))
        if not self._matrices:
            raise MisconfigurationException(
                f"WeightSpectrumCallback found no matrix in `{type(pl_module).__name__}`"
                + (f" for {list(self.parameters)}" if self.parameters else "")
                + "; name parameters with shell patterns, `parameters=['*.mlp.*.weight']`."
            )
        self.run_folder = open_run_folder(trainer, pl_module, dirpath=self.dirpath, run_id=self.run_id)
        path = self.run_folder.path / WEIGHTS_FILE
        self._known = {record.key for record in read_weights(path).records} if path.exists() else set()
        rank_zero_info(
            f"WeightSpectrumCallback: {len(self._matrices)} matrices ({self._matrices[0][0]} ... "
            f"{self._matrices[-1][0]}), {', '.join(self.what)}, every {self._schedule.every_n_steps} steps."
        )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._schedule.last_step = int(total) - 1 if total != float("inf") else None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._window_step is None and self._schedule.is_due(trainer.global_step):
            self._window_step = trainer.global_step

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._window_step is None:
            return
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self._matrices:
            if id(parameter) not in owned:
                continue
            if "gradient" in self.what and parameter.grad is not None:
                self._gradients[name] = _singular_values(parameter.grad)
            if "update" in self.what:
                self._before[name] = _whole(parameter).clone()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._window_step is None or trainer.global_step == self._window_step:
            return  # gradients still accumulate
        step, self._window_step = self._window_step, None
        self._schedule.previous = step
        momentum = _momentum(trainer.optimizers) if "momentum" in self.what else {}
        spectra: list[tuple[str, Tensor, str, Tensor]] = []
        for name, parameter in self._matrices:
            if "weight" in self.what:
                spectra.append((name, parameter, "weight", _singular_values(parameter)))
            if name in self._gradients:
                spectra.append((name, parameter, "gradient", self._gradients[name]))
            buffer = momentum.get(id(parameter))
            if buffer is not None:
                spectra.append((name, parameter, "momentum", _singular_values(buffer)))
            if name in self._before:
                spectra.append((name, parameter, "update", _singular_values(_whole(parameter) - self._before[name])))
        self._before, self._gradients = {}, {}
        self._publish(trainer, pl_module, step, [self._record(step, *spectrum) for spectrum in spectra])

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._matrices, self._before, self._gradients = [], {}, {}
        self._window_step, self.run_folder = None, None

    @property
    def state_key(self) -> str:
        """Two callbacks are told apart by what they measure."""
        return self._generate_state_key(what=self.what, parameters=self.parameters)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"previous": self._schedule.previous}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._schedule.previous = state_dict["previous"]

    def _choose(self, pl_module: pl.LightningModule) -> Iterator[tuple[str, Tensor]]:
        embeddings = {id(module.weight) for module in pl_module.modules() if isinstance(module, torch.nn.Embedding)}
        names = clean_names(name for name, _ in pl_module.named_parameters())
        for raw, parameter in pl_module.named_parameters():
            name = names[raw]
            if self.parameters is None:
                chosen = parameter.ndim >= 2 and id(parameter) not in embeddings
            else:
                chosen = parameter.ndim >= 2 and any(fnmatch(name, pattern) for pattern in self.parameters)
            if chosen and parameter.requires_grad:
                yield name, parameter

    def _record(self, step: int, name: str, parameter: Tensor, what: str, sigma_R: Tensor) -> WeightRecord:
        assert self.run_folder is not None
        number = re.search(r"\.(\d+)\.", name)
        rows, columns = parameter.shape[0], parameter[0].numel()
        layer = int(number.group(1)) if number else None
        if not bool(torch.isfinite(sigma_R).all()):
            return WeightRecord(self.run_folder.run_id, step, name, layer, what, rows, columns, "nonfinite")
        measures = spectrum_measures(sigma_R, float(torch.finfo(parameter.dtype).eps))
        share: float | None = None
        needed: int | None = None
        if self.coefficients and what in ("gradient", "momentum") and measures.largest > 0:
            found = spectrum_flattening(sigma_R, self.coefficients, self.ns_steps, FLAT_BAND)
            share, needed = found.share, found.steps_needed
        return WeightRecord(
            run_id=self.run_folder.run_id,
            step=step,
            parameter=name,
            layer=layer,
            what=what,
            rows=rows,
            columns=columns,
            status="ok" if measures.largest > 0 else "degenerate",
            flattened_share=share,
            steps_to_flatten=needed,
            coefficients=f"{self.coefficients} x {self.ns_steps}" if share is not None else "",
            **measures.as_dict(),  # type: ignore[arg-type]
        )

    def _publish(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, records: list[WeightRecord]
    ) -> None:
        assert self.run_folder is not None
        new = [record for record in records if record.key not in self._known]
        self._known |= {record.key for record in new}
        if trainer.is_global_zero and new:
            append_records(self.run_folder.path / WEIGHTS_FILE, new)
        medians, details = scalars(records)
        sinks.log_scalars(trainer, {**medians, **details}, step)
        sinks.publish_medians(pl_module, medians)


def scalars(records: Sequence[WeightRecord]) -> tuple[dict[str, float], dict[str, float]]:
    """(medians over parameters, one scalar per parameter), as tags."""
    details: dict[str, float] = {}
    gathered: dict[str, list[float]] = {}
    for record in records:
        for measure in _SCALARS:
            value = getattr(record, measure)
            if value is not None:
                details[f"spectral_weights.{measure}.{record.what}/{_display(record)}"] = value
                gathered.setdefault(f"spectral_weights/{measure}.{record.what}", []).append(value)
    return {tag: float(torch.tensor(values).median()) for tag, values in gathered.items()}, details


def _display(record: WeightRecord) -> str:
    """``layer_03.mlp.proj``: zero-padded, so that lists sort by depth."""
    name = record.parameter.removesuffix(".weight")
    if record.layer is None:
        return name
    return f"layer_{record.layer:02d}." + name.split(f".{record.layer}.", 1)[-1]


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; shards of a DTensor are gathered (every rank takes this branch)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _singular_values(tensor: Tensor) -> Tensor:
    matrix_MN = _whole(tensor).flatten(1).double()
    if not bool(torch.isfinite(matrix_MN).all()):
        return torch.full((1,), torch.nan, dtype=torch.float64)
    return torch.linalg.svdvals(matrix_MN).cpu()


def _momentum(optimizers: Sequence[Optimizer]) -> dict[int, Tensor]:
    """First-moment buffer of every parameter that has one, by the parameter's id."""
    found: dict[int, Tensor] = {}
    for optimizer in optimizers:
        for parameter, state in getattr(optimizer, "_optimizer", optimizer).state.items():
            for key in _MOMENTUM_KEYS:
                buffer = state.get(key)
                if isinstance(buffer, Tensor) and buffer.shape == parameter.shape:
                    found[id(parameter)] = buffer
                    break
    return found
