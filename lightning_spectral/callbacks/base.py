"""The life of a measuring callback inside a Trainer; what is measured comes from the subclass.

fit start: find the sites, attach. Batch start: the schedule opens a window. Batch end: rows are taken in; once the
optimizer has stepped, the window is closed, solved and published. Teardown: hooks off. Nothing of this touches the
model, the loss or a global random state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_spectral.callbacks import sinks
from lightning_spectral.callbacks.evaluation import EvaluationHooks
from lightning_spectral.callbacks.run_folder import open_run_folder
from lightning_spectral.callbacks.tensorboard import Pictures
from lightning_spectral.functional.products import is_full_precision
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.probe import batch_formats as batches
from lightning_spectral.probe.background import BackgroundSolver, has_free_core
from lightning_spectral.probe.grouping import Grouping
from lightning_spectral.probe.options import ProbeOptions
from lightning_spectral.probe.probe import OpenWindow, SpectralProbe
from lightning_spectral.probe.records_of import WindowId
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.schedule import Schedule
from lightning_spectral.probe.window import ClosedWindow, SiteResult

STAGES = ("train", "validation", "test", "predict")
NONFINITE_POLICIES = ("warn", "record", "raise")


class SpectralCallback(EvaluationHooks):
    """Base of :class:`SpectralRankCallback` and :class:`TailTokenProbe`; see these for the arguments."""

    def __init__(
        self,
        *,
        every_n_steps: int,
        on: Sequence[str],
        options: ProbeOptions,
        dirpath: str | None,
        run_id: str | None,
        labels: dict[str, str] | None,
        mask_fn: Callable[[Any], Tensor | None] | None,
        eigenvalues: bool,
        on_nonfinite: str,
        memory_limit_mib: float | None,
        conventions: dict[str, str],
        seed: int,
        background: bool | None = None,
    ) -> None:
        unknown = set(on) - set(STAGES)
        if isinstance(on, str) or unknown or not on:
            raise ValueError(f"`on` must be a list of stages from {list(STAGES)}, got {on!r}.")
        if on_nonfinite not in NONFINITE_POLICIES:
            raise ValueError(f"`on_nonfinite` must be one of {list(NONFINITE_POLICIES)}, got {on_nonfinite!r}.")
        if memory_limit_mib is not None and memory_limit_mib <= 0:
            raise ValueError(f"`memory_limit_mib` must be > 0, got {memory_limit_mib}.")
        if eigenvalues and options.soft != "exact":
            raise ValueError("`eigenvalues=True` needs `soft='exact'`: the approximation knows no eigenvalues.")
        self.dirpath, self.run_id, self.labels = dirpath, run_id, labels
        self.options = options
        self.run_folder: RunFolder | None = None
        self._schedule = Schedule(every_n_steps)
        self._on = tuple(on)
        self._mask_fn = mask_fn
        self._eigenvalues = eigenvalues
        self._on_nonfinite = on_nonfinite
        self._memory_limit_mib = memory_limit_mib
        self._conventions = conventions
        self._seed = seed
        self._probe: SpectralProbe | None = None
        self._pictures = Pictures()
        self._train_window: OpenWindow | None = None
        self._window_step: int | None = None
        self._num_micro_batches = 0
        self._tokens_seen: int | None = 0
        self._window_tokens: int | None = 0
        self._extra_columns = 0
        self._warned: set[str] = set()
        self._background = background
        self._solver: BackgroundSolver | None = None
        self._unlogged: dict[str, float] = {}

    # what a subclass says

    def grouping(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Grouping:
        """Which bucket a row belongs to; called once, when the model exists."""
        raise NotImplementedError

    def is_redundant(self, trainer: pl.Trainer) -> bool:
        """Whether another callback of this trainer measures the same."""
        return False

    # fit

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.is_redundant(trainer):
            self._attach(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._schedule.last_step = int(total) - 1 if total != float("inf") else None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._probe is None:
            return
        step = trainer.global_step
        if self._window_step is None and "train" in self._on and self._schedule.is_due(step):
            self._probe.begin()
            self._window_step, self._num_micro_batches = step, 0
            self._window_tokens = self._tokens_seen
        if self._window_step is not None:
            self._start_micro_batch(self._window_step)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._probe is not None:
            self._probe.pause()  # checkpointed blocks run again during the backward pass

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._probe is not None:
            self._probe.resume()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._probe is None:
            return
        if self._window_step is not None:
            self._collect(batch)
        stepped = self._window_step is not None and trainer.global_step != self._window_step
        if stepped:
            assert self._window_step is not None
            step, self._window_step = self._window_step, None
            self._schedule.previous = step
            self._unlogged |= self._publish(trainer, pl_module, "train", step, self._window_tokens)
        elif self._solver is not None:
            self._unlogged |= self._solver.poll()
        self._log_medians(pl_module)
        self._count_tokens(trainer, batch)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._drain()
        self._log_medians(pl_module, at_epoch_end=True)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._drain()  # a run resumed from here must not miss the window that is being solved

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._drain()
        if self.run_folder is not None:
            self._pictures.finish(trainer, trainer.global_step, self.run_folder.path, self.run_folder.info)

    # end, state

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._drain()
        self._detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            if self._solver is not None and not self._solver.drain_after_error():
                rank_zero_warn(f"{type(self).__name__}: the window that was being solved is lost: it needs all ranks.")
        except Exception as error:  # the error that stopped the run is the one to be seen
            rank_zero_warn(f"{type(self).__name__}: the last window could not be solved: {error}")
        self._detach()

    @property
    def state_key(self) -> str:
        """Two callbacks of one class are told apart by what they measure."""
        grouping = {name: self._conventions.get(name) for name in ("group_by", "attribute_to")}
        return self._generate_state_key(sites=self.options.sites, modules=self.options.modules, on=self._on, **grouping)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "previous": self._schedule.previous,
            "tokens_seen": self._tokens_seen,
            "extra_columns": self._extra_columns,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._schedule.previous = state_dict["previous"]
        self._tokens_seen = state_dict["tokens_seen"]
        self._extra_columns = state_dict["extra_columns"]

    # inside

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.ckpt_path is None and trainer.global_step == 0:
            self._schedule.previous, self._tokens_seen = None, 0
        try:
            probe = SpectralProbe(pl_module, self.grouping(trainer, pl_module), self.options)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        self._probe = probe
        beside = self._solves_beside(trainer, probe)
        if trainer.world_size > 1:  # all ranks must take the same way
            beside = trainer.strategy.reduce_boolean_decision(beside, all=True)
        self._solver = BackgroundSolver(alone=trainer.world_size == 1) if beside else None
        self._check_memory(probe)
        self.run_folder = open_run_folder(
            trainer,
            pl_module,
            dirpath=self.dirpath,
            run_id=self.run_id,
            labels=self.labels,
            conventions=self._conventions,
        )
        sites = probe.tapped.sites
        rank_zero_info(
            f"{type(self).__name__}: {len(sites)} sites ({sites[0].name} ... {sites[-1].name}), {_memory(probe)}, "
            f"every {self._schedule.every_n_steps} steps on {', '.join(self._on)}; {_products(probe)}"
            f"{'solved in the background; ' if self._solver else ''}records in `{self.run_folder.path}`."
        )

    def _solves_beside(self, trainer: pl.Trainer, probe: SpectralProbe) -> bool:
        """Whether training windows are solved in another thread."""
        if self._background is False or self._on_nonfinite == "raise" or trainer.state.fn != "fit":
            return False
        if self._background:
            return True
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        monitored = any(str(getattr(other, "monitor", None)).startswith("spectral") for other in callbacks)
        limit, state = self._memory_limit_mib, probe.state_mib
        fits = limit is None or (state is not None and 2 * state <= limit)
        return has_free_core(probe.device, trainer.num_devices) and fits and not monitored

    def _check_memory(self, probe: SpectralProbe) -> None:
        limit, needed = self._memory_limit_mib, probe.state_mib
        if needed is not None and self._solver is not None:
            needed *= 2  # one window is solved while the next one fills
        if limit is not None and needed is not None and needed > limit:
            raise MisconfigurationException(
                f"{type(self).__name__} needs {needed:.1f} MiB in a window ({len(probe.tapped.sites)} sites x "
                f"{probe.buckets.num_groups} groups x 9/16 D^2 x 4 bytes), `memory_limit_mib` allows {limit:.1f}: "
                "measure fewer layers (`modules=[...]`), one site, or fewer shards."
            )

    def _drain(self) -> None:
        if self._solver is not None:
            self._unlogged |= self._solver.drain()

    def _log_medians(self, pl_module: pl.LightningModule, *, at_epoch_end: bool = False) -> None:
        sinks.publish_medians(pl_module, self._unlogged, at_epoch_end=at_epoch_end)
        self._unlogged = {}

    def _detach(self) -> None:
        if self._solver is not None:
            self._solver.close()
            self._solver = None
        if self._probe is not None:
            self._probe.remove()
        self._probe = None
        self._window_step = None
        self.run_folder = None

    def _start_micro_batch(self, step: int) -> None:
        assert self._probe is not None
        self._probe.start(seed=(self._seed * 1_000_003 + step) * 1_009 + self._num_micro_batches)
        self._num_micro_batches += 1

    def _collect(self, batch: Any) -> None:
        assert self._probe is not None

        def mask_of(call: ForwardCall) -> Tensor | None:
            return self._mask_fn(batch) if self._mask_fn else batches.padding_mask(batch, call.shape)

        calls = self._probe.collect(mask_of, lambda call: batches.targets(batch, call.shape))
        ids_BT = batches.ids(batch)
        if calls and ids_BT is not None:
            self._extra_columns = max(ids_BT.shape[1] - calls[-1].shape[-1], 0)

    @override
    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.sanity_checking or stage not in self._on:
            return
        if self._probe is None and trainer.state.fn != "fit" and not self.is_redundant(trainer):
            self._attach(trainer, pl_module)
        if self._probe is not None:
            self._train_window = self._probe.begin()  # validation may come between two micro-batches of a step
            self._num_micro_batches = 0

    @override
    def start_evaluation_batch(self, trainer: pl.Trainer, stage: str) -> None:
        if self._probe is not None and stage in self._on and not trainer.sanity_checking:
            self._start_micro_batch(0)

    @override
    def end_evaluation_batch(self, trainer: pl.Trainer, stage: str, batch: Any) -> None:
        if self._probe is not None and stage in self._on and not trainer.sanity_checking:
            self._collect(batch)

    @override
    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> dict[str, float]:
        if self._probe is None or stage not in self._on or trainer.sanity_checking:
            return {}
        medians = self._publish(trainer, pl_module, stage, trainer.global_step, self._tokens_seen)
        if self._train_window is not None:
            self._probe.window, self._train_window = self._train_window, None
        return medians

    def _publish(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, step: int, tokens_seen: int | None
    ) -> dict[str, float]:
        """Close the window, solve it now or beside training, publish; returns the medians that are known by now."""
        assert self._probe is not None
        assert self.run_folder is not None
        window = WindowId(self.run_folder.run_id, stage, step, tokens_seen)
        self._probe.settle(alone=trainer.world_size == 1 or not self.options.reduce)
        closed = self._probe.close(data_parallel_group(pl_module))
        publish = partial(self._publish_result, trainer, window, closed)
        if self._solver is None:
            return publish(closed.solve())
        if stage == "train" and is_full_precision(self._probe.device):
            return self._solver.submit(closed.solve, publish)
        self._drain()  # records stay in the order of the windows
        return publish(closed.solve())

    def _publish_result(
        self, trainer: pl.Trainer, window: WindowId, closed: ClosedWindow, owned: list[SiteResult]
    ) -> dict[str, float]:
        assert self.run_folder is not None
        result = closed.share(owned)
        records, scalars = sinks.publish(
            trainer, self.run_folder, result, window, self._conventions, with_eigenvalues=self._eigenvalues
        )
        if window.stage == "train":
            self._pictures.add(trainer, records, result)
        for callback in [*trainer.callbacks]:  # type: ignore[attr-defined]
            listen = getattr(callback, "on_spectral_window", None)
            if listen is not None:
                listen(trainer, records)
        self._react_to_nonfinite(records)
        return scalars

    def _react_to_nonfinite(self, records: Sequence[Any]) -> None:
        bad = [record for record in records if record.status == "nonfinite"]
        if not bad:
            return
        message = (
            f"{type(self).__name__}: NaN or Inf activations at step {bad[0].step} in `{bad[0].module}` "
            f"({len(bad)} of {len(records)} spectra); recorded with status `nonfinite`."
        )
        if self._on_nonfinite == "raise":
            raise RuntimeError(message)
        if self._on_nonfinite == "warn" and "nonfinite" not in self._warned:
            self._warned.add("nonfinite")
            rank_zero_warn(message)

    def _count_tokens(self, trainer: pl.Trainer, batch: Any) -> None:
        """Training tokens so far over all ranks; a batch may have one column more than the model is given."""
        ids_BT = batches.ids(batch)
        if ids_BT is None or self._tokens_seen is None:
            self._tokens_seen = None
            return
        self._tokens_seen += ids_BT.shape[0] * (ids_BT.shape[1] - self._extra_columns) * _data_parallel_size(trainer)


def _memory(probe: SpectralProbe) -> str:
    state = "unknown before the first forward" if probe.state_mib is None else f"{probe.state_mib:.1f} MiB"
    return f"state in a window {state} and up to {probe.waiting_mib:.1f} MiB of rows"


def _products(probe: SpectralProbe) -> str:
    return "".join(f"products of width {width} by {choice}; " for width, choice in probe.products.items())


def data_parallel_group(pl_module: pl.LightningModule) -> dist.ProcessGroup | None:
    """Ranks with different data: under tensor parallelism its peers see the same rows and must not be added."""
    mesh = getattr(pl_module, "device_mesh", None)
    return None if mesh is None else mesh["data_parallel"].get_group()


def _data_parallel_size(trainer: pl.Trainer) -> int:
    kwargs = (
        trainer.strategy.distributed_sampler_kwargs if hasattr(trainer.strategy, "distributed_sampler_kwargs") else None
    )
    return int(kwargs["num_replicas"]) if kwargs else trainer.world_size
