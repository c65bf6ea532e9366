"""Spectra of what the optimizer sees and does: weights, gradients, momentum and the applied update, per matrix.

A parameter may hold several matrices (experts, heads of a fused projection) or keep them transposed: those that an
optimizer of this package orthogonalises are those measured; under any other, those that the model's structure tells.

The life of this measurement, whatever loop it watches::

    attach -> begin_step(step) -> before_optimizer_step(optimizer) -> end_step(optimizers) -> detach

As in ``observer``: configuration is an error in ``attach``, and nothing is raised later.

Axes: M rows, N columns, R singular values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral.functional.flattening import FLAT_BAND, spectrum_flattening
from lightning_spectral.functional.matrix_spectrum import spectrum_measures
from lightning_spectral.models.layouts import matrices_of
from lightning_spectral.models.names import clean_names
from lightning_spectral.models.placement import is_dtensor
from lightning_spectral.models.places import places_in
from lightning_spectral.models.views import Views
from lightning_spectral.probe.agreement import Agreement, MissingRankError
from lightning_spectral.probe.guard import DeliberateError, Guard
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.matrix_spectra import spectra
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.run_start import open_folder
from lightning_spectral.probe.scalars import finite
from lightning_spectral.probe.schedule import Schedule
from lightning_spectral.probe.weight_settings import WHAT, WeightSettings
from lightning_spectral.records import WeightRecord
from lightning_spectral.text import one_line

_MOMENTUM_KEYS = ("momentum_buffer", "momentum", "exp_avg")  # torch's SGD and Muon, ours, Adam
_SCALARS = ("effective_rank", "stable_rank", "normalized_entropy", "top10_energy", "flattened_share")


class WeightObserver:
    """Measures the matrices of one model.

    Args:
        settings: What and when.
        name: Who speaks in warnings.
        key: What the ranks must have in common.
    """

    def __init__(self, settings: WeightSettings, *, name: str, key: str) -> None:
        self.settings, self.name, self._key = settings, name, key
        self.schedule = Schedule(settings.every_n_steps)
        self.guard = Guard(name, strict=settings.strict)
        self.run_folder: RunFolder | None = None
        self._taken: dict[str, Any] = {}  # what a checkpoint held that could not be written before it
        self.is_armed = False
        self.step: int | None = None
        self._num_windows = 0
        self._host: Host | None = None
        self._agreement: Agreement | None = None
        self._matrices: list[tuple[str, Tensor]] = []
        self._views: dict[int, Views] = {}
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, list[Tensor]] = {}

    def attach(self, model: nn.Module, host: Host) -> None:
        """Choose the matrices and open the run folder; a collective: every rank must call it.

        Raises:
            ValueError: If there is no matrix to measure.
        """
        self._host, self.guard.tell = host, host.tell
        self._agreement = Agreement(self._key)
        self._matrices = list(_choose(model, self.settings.parameters))
        self._views = _views_in(model)
        if not self._matrices and any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
            raise ValueError(
                f"`{type(model).__name__}` is held in flat parts by DeepSpeed ZeRO-3, in which no rank has a whole "
                "matrix: weights are measured under ZeRO-2 or less, DDP, FSDP or FSDP2 (activations also under ZeRO-3)."
            )
        if not self._matrices:
            chosen = f" for {list(self.settings.parameters)}" if self.settings.parameters else ""
            raise ValueError(
                f"found no matrix in `{type(model).__name__}`{chosen}; name parameters with shell patterns, "
                "`parameters=['*.mlp.*.weight']`."
            )
        try:
            first = self._agreement.exchange("attach", {"folder": str(host.folder), "run_id": host.run_id})[0]
            host.folder, host.run_id = first["folder"], first["run_id"]
            self.run_folder = open_folder(host, self._agreement)
            with self.guard(f"writing to `{self.run_folder.path}`", "not_written"):
                taken, self._taken = self._taken, {}
                self.run_folder.take_back(taken)
        except MissingRankError as error:
            self._stand_down(f"{error}: the others measure nothing. Add it on every rank")
            return
        self.is_armed = True
        host.inform(
            f"{self.name}: {len(self._matrices)} matrices ({self._matrices[0][0]} ... {self._matrices[-1][0]}), "
            f"{', '.join(self.settings.what)}, every {self.settings.every_n_steps} steps."
        )

    def begin_step(self, step: int, *, is_last: bool = False) -> None:
        """Before the first micro-batch of an optimizer step; further calls within it change nothing."""
        due = self.schedule.is_due(step) or (is_last and step != self.schedule.previous)
        if self.is_armed and self.step is None and due:
            self.step = step
            self._num_windows += 1

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """When gradients are complete: keep their spectra and the weights before the update."""
        if self.step is None or not self.is_armed:
            return
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        mine = [(name, parameter) for name, parameter in self._matrices if id(parameter) in owned]
        if not self._all_are_here(f"window {self._num_windows} {len(self._before)} {len(mine)}"):
            return
        with self.guard("reading gradients"):
            self._views.update(_views_of(optimizer))
            if "gradient" in self.settings.what:
                having = [(name, parameter) for name, parameter in mine if parameter.grad is not None]
                found = self._spectra_in(having, [p.grad for _, p in having if p.grad is not None])
                self._gradients |= {name: of_one for (name, _), of_one in zip(having, found, strict=True)}
            if "update" in self.settings.what:
                self._before |= {name: parameter.detach().clone() for name, parameter in mine}

    def end_step(self, optimizers: Sequence[Optimizer]) -> Scalars:
        """After the optimizer step: measure, write and log. Returns medians over parameters, for a monitor."""
        step, self.step = self.step, None
        if step is None or not self.is_armed:
            return {}
        self.schedule.previous = step
        scalars: Scalars = {}
        if self._all_are_here(f"end of window {self._num_windows}"):
            with self.guard("measuring weights"):
                records = [
                    self._record(step, name, parameter, what, i, sigma)
                    for name, parameter, what, found in self._spectra(optimizers)
                    for i, sigma in enumerate(found)
                ]
                scalars = self._publish(step, records)
        self._before, self._gradients = {}, {}
        self.guard.take()
        return scalars

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        waiting = {} if self.run_folder is None else self.run_folder.waiting
        return {"previous": self.schedule.previous, **({"waiting": waiting} if waiting else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.schedule.previous, self._taken = state["previous"], state.get("waiting", {})

    def detach(self) -> None:
        """Forget the matrices and give the run folder back."""
        if self.run_folder is not None and self.is_armed:
            with self.guard("closing the run folder", "not_closed"):
                self.run_folder.close()
        self._matrices, self._views, self._before, self._gradients = [], {}, {}, {}
        self.step, self.is_armed = None, False

    def _all_are_here(self, topic: str) -> bool:
        """Where weights are sharded, gathering them needs every rank."""
        assert self._agreement is not None
        if self._agreement.world_size == 1 or not any(is_dtensor(matrix) for _, matrix in self._matrices):
            return True
        try:
            self._agreement.exchange(topic, {})
        except MissingRankError as error:
            self._stand_down(f"{error}; nothing more is measured")
            return False
        return True

    def _stand_down(self, reason: str) -> None:
        self.guard.say("stood down", f"{one_line(reason)}.", on_every_rank=True)
        self.is_armed, self.step = False, None
        if self.settings.strict:
            raise DeliberateError(f"{self.name}: {reason}")

    def _spectra(self, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor, str, list[Tensor]]]:
        """Name, parameter, what, and the singular values of each of its matrices."""
        momentum = _momentum(optimizers) if "momentum" in self.settings.what else {}
        asked: list[tuple[str, Tensor, str, Tensor]] = []
        for name, parameter in self._matrices:
            own = parameter.detach()
            asked += [(name, parameter, "weight", own)] if "weight" in self.settings.what else []
            buffer = momentum.get(id(parameter))
            asked += [] if buffer is None else [(name, parameter, "momentum", buffer)]
            asked += [(name, parameter, "update", own - self._before.pop(name))] if name in self._before else []
        of = [(name, parameter) for name, parameter, _, _ in asked]
        found = {
            (name, what): values
            for (name, _, what, _), values in zip(asked, self._spectra_in(of, [t for *_, t in asked]), strict=True)
        }
        found |= {(name, "gradient"): values for name, values in self._gradients.items()}
        for name, parameter in self._matrices:
            for what in WHAT:
                if (name, what) in found:
                    yield name, parameter, what, found[name, what]

    def _views_for(self, parameter: Tensor) -> Views:
        return self._views.get(id(parameter)) or Views(tuple(parameter.shape))

    def _spectra_in(self, of: Sequence[tuple[str, Tensor]], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Singular values of every matrix in tensors that lie as these parameters do."""
        return spectra([tensor.detach() for tensor in tensors], [self._views_for(parameter) for _, parameter in of])

    def _record(self, step: int, name: str, parameter: Tensor, what: str, i: int, sigma_R: Tensor) -> WeightRecord:
        assert self.run_folder is not None
        number = re.search(r"\.(\d+)\.", name)
        views = list(self._views_for(parameter))
        rows, columns = views[i].shape
        name = name if len(views) == 1 else f"{name}[{i}]"
        layer = int(number.group(1)) if number else None
        if not len(sigma_R) or not bool(torch.isfinite(sigma_R).all()):
            status = "nonfinite" if len(sigma_R) else "solve_failed"
            return WeightRecord(self.run_folder.run_id, step, name, layer, what, rows, columns, status)
        measures = spectrum_measures(sigma_R, float(torch.finfo(parameter.dtype).eps))
        share: float | None = None
        needed: int | None = None
        coefficients = self.settings.coefficients
        if coefficients and what in ("gradient", "momentum") and measures.largest > 0:
            found = spectrum_flattening(sigma_R, coefficients, self.settings.ns_steps, FLAT_BAND)
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
            coefficients=f"{coefficients} x {self.settings.ns_steps}" if share is not None else "",
            **measures.as_dict(),  # type: ignore[arg-type]
        )

    def _publish(self, step: int, records: list[WeightRecord]) -> Scalars:
        assert self.run_folder is not None
        assert self._host is not None
        with self.guard(f"writing to `{self.run_folder.path}`", "not_written"):
            self.run_folder.append_weights(records)
        medians, details = scalars(records)
        if self._host.is_first:
            self._host.log(finite({**medians, **details}), step)
        return medians


def scalars(records: Sequence[WeightRecord]) -> tuple[Scalars, Scalars]:
    """(medians over parameters, one scalar per parameter), as tags."""
    details: Scalars = {}
    gathered: dict[str, list[float]] = {}
    shown = _displays([record.parameter for record in records])
    for record in records:
        for measure in _SCALARS:
            value = getattr(record, measure)
            if value is not None:
                details[f"spectral_weights.{measure}.{record.what}/{shown[record.parameter]}"] = value
                gathered.setdefault(f"spectral_weights/{measure}.{record.what}", []).append(value)
    return {tag: float(torch.tensor(values).median()) for tag, values in gathered.items()}, details


def _choose(model: nn.Module, patterns: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = clean_names(name for name, _ in model.named_parameters())
    for raw, parameter in model.named_parameters():
        name = names[raw]
        if patterns is None:
            chosen = parameter.ndim >= 2 and id(parameter) not in embeddings
        else:
            chosen = parameter.ndim >= 2 and any(fnmatch(name, pattern) for pattern in patterns)
        if chosen and parameter.requires_grad and parameter.numel():
            yield name, parameter


def _views_in(model: nn.Module) -> dict[int, Views]:
    """The matrices that the model's structure tells, by the parameter's id."""
    found: dict[int, Views] = {}
    for parameter, place in places_in(model):
        views = matrices_of(place, tuple(parameter.shape))
        if views is not None:
            found[id(parameter)] = views
    return found


def _views_of(optimizer: Any) -> dict[int, Views]:
    """The matrices that an optimizer of this package makes of its parameters (``split``), by the parameter's id."""
    found: dict[int, Views] = getattr(getattr(optimizer, "_optimizer", optimizer), "matrix_views", {})
    return found


def _displays(names: Sequence[str]) -> dict[str, str]:
    """``layer_03.mlp.proj``: zero-padded, so that lists sort by depth; with its path where two stacks have the same."""
    found = {name: _display(name, with_path=False) for name in names}
    count = Counter(found.values())
    return {name: _display(name, with_path=True) if count[short] > 1 else short for name, short in found.items()}


def _display(name: str, with_path: bool) -> str:
    name = re.sub(r"\.weight(?=$|\[)", "", name)
    number = re.search(r"\.(\d+)\.", name)
    if number is None:
        return name
    path = name[: number.start()] + "." if with_path else ""
    return f"{path}layer_{int(number.group(1)):02d}." + name[number.end() :]


def _momentum(optimizers: Sequence[Any]) -> dict[int, Tensor]:
    """First-moment buffer of every parameter that has one, by the parameter's id."""
    found: dict[int, Tensor] = {}
    for optimizer in optimizers:
        for parameter, state in getattr(optimizer, "optimizer", optimizer).state.items():
            for key in _MOMENTUM_KEYS:
                buffer = state.get(key)
                if isinstance(buffer, Tensor) and buffer.shape == parameter.shape:
                    found[id(parameter)] = buffer
                    break
    return found
