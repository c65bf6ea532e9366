"""``FabricSpectralProbe``: a measuring callback in a Fabric loop, driven by the two hooks that Fabric calls by itself.

``fabric.setup`` attaches it, every training forward feeds the open window, ``optimizer.step`` closes it and opens the
next when it is due. A loop needs no other call, so one that knows nothing of callbacks (``litgpt pretrain``) can be
measured too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_spectral.callbacks import sinks
from lightning_spectral.callbacks.base import SpectralCallback
from lightning_spectral.callbacks.run_folder import global_seed
from lightning_spectral.callbacks.tail_token_probe import TailTokenProbe, is_stream
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.probe import batch_formats as batches
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.probe.records_of import WindowId
from lightning_spectral.probe.run_folder import RunFolder, new_run_id, package_versions
from lightning_spectral.records import RunInfo


class FabricSpectralProbe:
    """Measures what ``callback`` would measure, in a Fabric loop.

    A window is one optimizer step with all its micro-batches and ranks, as in a Trainer. Forwards in eval mode are not
    looked at. ``attention_mask`` and ``labels`` given to the model by keyword mark padding.

    Fabric calls ``on_after_setup`` in ``fabric.setup`` but not in ``fabric.setup_module``: call it yourself then.

    Args:
        callback: A :class:`SpectralRankCallback` or :class:`TailTokenProbe`; its arguments say what, when and where.
            Its stages (``on``) are a Trainer's: here only training is measured. Without ``dirpath`` records go beside
            the first logger's files, or to ``spectral/``. ``mask_fn`` gets the model's keyword arguments, or its
            positional ones if there are none.
        num_steps: Optimizer steps of the run, if known: the last one is measured too.

    Raises:
        ValueError: If the callback does not measure activations, or counts a datamodule that Fabric does not have.

    Example::

        fabric = Fabric(callbacks=[FabricSpectralProbe(TailTokenProbe(200, counts="counts.npy"))])
        model, optimizer = fabric.setup(model, optimizer)
    """

    def __init__(self, callback: SpectralCallback, *, num_steps: int | None = None) -> None:
        if not isinstance(callback, SpectralCallback):
            raise ValueError(
                f"FabricSpectralProbe drives SpectralRankCallback and TailTokenProbe, not {type(callback).__name__}: "
                "that one needs a Trainer."
            )
        if isinstance(callback, TailTokenProbe) and is_stream(callback._counts):
            raise ValueError(
                "`counts='stream'` reads a Trainer's dataloader, which a Fabric loop does not have: give a file, made "
                "with `lightning-spectral count-tokens --data TEXT --out counts.npy`."
            )
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"`num_steps` must be >= 1, got {num_steps}.")
        self.callback = callback
        self.step = 0
        self.tokens_seen: int | None = 0
        self.latest: dict[str, float] = {}
        self.run_folder: RunFolder | None = None
        self._resume = False
        self._schedule = callback._schedule
        self._schedule.last_step = None if num_steps is None else num_steps - 1
        self._fabric: Fabric | None = None
        self._module: nn.Module | None = None
        self._probe: SpectralProbe | None = None
        self._handles: list[RemovableHandle] = []
        self._optimizer: int | None = None
        self._measuring = False
        self._num_micro_batches = 0
        self._num_forwards = 0
        self._window_tokens: int | None = 0
        self._inputs: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
        self._warned: set[str] = set()

    # the two hooks that Fabric calls

    def on_after_setup(self, fabric: Fabric, module: nn.Module) -> None:
        """Attach to the first module that the loop sets up.

        Raises:
            MisconfigurationException: If it has no site to measure, or the state would not fit.
        """
        if self._probe is not None:
            return
        self._fabric, self._module = fabric, module
        inner = getattr(module, "_forward_module", module)
        self._handles = [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            module.register_forward_hook(self._after_forward),
        ]
        try:
            # a Fabric loop has no trainer, and a grouping that needs one has been refused above
            grouping = self.callback.grouping(None, None)  # type: ignore[arg-type]
            self._probe = SpectralProbe(inner, grouping, self.callback.options)
        except ValueError as error:
            self.remove()
            raise MisconfigurationException(f"{self._name}: {error}") from error
        self.callback._check_memory(self._probe)
        # ahead of the taps' own hook, which arms only what is open
        gate = self._probe.tapped.root.register_forward_pre_hook(self._gate, prepend=True)
        self._handles.append(gate)
        sites = self._probe.tapped.sites
        rank_zero_info(
            f"{self._name}: {len(sites)} sites ({sites[0].name} ... {sites[-1].name}), every "
            f"{self._schedule.every_n_steps} optimizer steps."
        )
        self._open_if_due()

    def on_after_optimizer_step(self, strategy: Any, optimizer: Optimizer) -> None:
        """Close the window of this step, count the step, open the next window."""
        if self._probe is None:
            self._warn(
                "setup",
                "it is not attached: this loop uses `fabric.setup_module`, which calls no callback. Call "
                "`probe.on_after_setup(fabric, module)` after it. Nothing is measured.",
            )
            return
        if self._optimizer is None:
            self._optimizer = id(optimizer)
            self._follow_resumed(optimizer)
        if id(optimizer) != self._optimizer:
            return  # steps are those of the first optimizer
        if self._num_forwards == 0:
            self.tokens_seen = None
        if self._measuring:
            self._close(strategy, optimizer)
        self.step += 1
        self._num_forwards = 0
        self._open_if_due()

    # state, end

    def state_dict(self) -> dict[str, Any]:
        """To be saved with the loop's own state, so that a resumed run continues its records."""
        return {"step": self.step, "tokens_seen": self.tokens_seen, "previous": self._schedule.previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the records of an earlier run; before or after ``fabric.setup``."""
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self._schedule.previous = state["previous"]
        self._resume = True
        self._measuring = False
        if self._probe is not None:
            self._probe.begin()
            self._open_if_due()

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._measuring = False
        if self._probe is not None:
            self._probe.remove()
        self._probe = self._module = None

    # inside

    @property
    def _name(self) -> str:
        return f"{type(self).__name__}({type(self.callback).__name__})"

    def _open_if_due(self) -> None:
        if self._schedule.is_due(self.step):
            assert self._probe is not None
            self._probe.begin()
            self._measuring, self._num_micro_batches = True, 0
            self._window_tokens = self.tokens_seen
            self._start_micro_batch()

    def _follow_resumed(self, optimizer: Optimizer) -> None:
        """A loop that resumes without our state (litgpt's) still has the optimizer's own count of steps."""
        done = _steps_of(optimizer)
        if done is not None and done > self.step + 1:
            self.step, self.tokens_seen, self._window_tokens, self._resume = done - 1, None, None, True

    def _start_micro_batch(self) -> None:
        assert self._probe is not None
        seed = (self.callback._seed * 1_000_003 + self.step) * 1_009 + self._num_micro_batches
        self._probe.start(seed=seed)
        self._num_micro_batches += 1

    def _gate(self, module: nn.Module, args: Any) -> None:
        assert self._probe is not None
        self._probe.recorder.open = self._measuring and module.training

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # where a loop compiles the module that Fabric gave it
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        self._num_forwards += 1
        self._inputs = (args, kwargs)
        ids_BT = batches.ids(args) if args else batches.ids(kwargs)
        if ids_BT is None or self.tokens_seen is None:
            self.tokens_seen = None
        else:
            self.tokens_seen += ids_BT.numel() * self._num_replicas

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._measuring and module.training:
            self._collect()
            self._start_micro_batch()

    def _collect(self) -> None:
        assert self._probe is not None
        args, kwargs = self._inputs
        self._inputs = ((), {})
        mask_fn = self.callback._mask_fn

        def mask_of(call: ForwardCall) -> Tensor | None:
            return mask_fn(kwargs or args) if mask_fn else batches.padding_mask(kwargs, call.shape)

        self._probe.collect(mask_of)

    def _close(self, strategy: Any, optimizer: Optimizer) -> None:
        probe, fabric = self._probe, self._fabric
        assert probe is not None
        assert fabric is not None
        if self._num_forwards == 0:
            # `model.training_step(batch)` goes past the module's own forward: its passes are still in the taps
            self._warn("redirected", "the loop calls a method of the model, so padding in its batches is not seen.")
            self._collect()
        result = probe.end(self._process_group)
        self._measuring = False
        self._schedule.previous = self.step
        if self.run_folder is None:
            self.run_folder = self._open_folder(fabric, optimizer)
        window = WindowId(self.run_folder.run_id, "train", self.step, self._window_tokens)
        records, self.latest = sinks.publish(
            fabric,
            self.run_folder,
            result,
            window,
            self.callback._conventions,
            with_eigenvalues=self.callback._eigenvalues,
        )
        self.callback._react_to_nonfinite(records)

    @property
    def _data_parallel_mesh(self) -> Any:
        """Under tensor parallelism, the ranks whose data differ."""
        mesh = getattr(getattr(self._fabric, "strategy", None), "_device_mesh", None)
        return None if mesh is None else mesh["data_parallel"]

    @property
    def _process_group(self) -> dist.ProcessGroup | None:
        mesh = self._data_parallel_mesh
        return None if mesh is None else mesh.get_group()

    @property
    def _num_replicas(self) -> int:
        assert self._fabric is not None
        mesh = self._data_parallel_mesh
        return int(self._fabric.world_size if mesh is None else mesh.size())

    def _open_folder(self, fabric: Fabric, optimizer: Optimizer) -> RunFolder:
        """The folder of this run, or the one that another probe of this Fabric has opened at the same place."""
        log_dir = None
        if fabric.loggers:
            getattr(fabric.loggers[0], "experiment", None)  # a CSVLogger wants to be the first in its folder
            log_dir = getattr(fabric.loggers[0], "log_dir", None)
        path = str(Path(self.callback.dirpath or log_dir or "spectral").absolute())
        path, run_id = fabric.broadcast((path, self.callback.run_id or new_run_id()))
        for other in fabric._callbacks:
            opened = getattr(other, "run_folder", None)
            if isinstance(opened, RunFolder) and str(opened.path) == path:
                return opened
        info = RunInfo(
            run_id=run_id,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            optimizer=type(optimizer).__name__,
            seed=global_seed(),
            hparams=_model_config(self._module),
            versions=package_versions(),
            labels=dict(self.callback.labels or {}),
            conventions=dict(self.callback._conventions),
        )
        folder = RunFolder(path, info, resume=self._resume, writes=fabric.is_global_zero)
        folder.info = fabric.broadcast(folder.info)
        rank_zero_info(f"{self._name}: records in `{path}`.")
        return folder

    def _warn(self, cause: str, message: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            rank_zero_warn(f"{self._name}: {message}")


def _steps_of(optimizer: Optimizer) -> int | None:
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counts, default=None)


def _model_config(module: nn.Module | None) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if is_dataclass(config) and not isinstance(config, type):
        return {"model_config": asdict(config)}
    to_dict = getattr(config, "to_dict", None)
    return {"model_config": to_dict()} if callable(to_dict) else {}
