"""``observe``: the measurement in any training loop, with one line before it and one in it.

::

    with observe(model, every_n_steps=100, out="runs/a") as probe:
        for batch in data:
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_spectral.probe.alarms import AlarmRule, Alarms
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.loop import LoopObserver
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.run_folder import RunFolder, new_run_id
from lightning_spectral.probe.settings import (
    STREAM,
    BucketSettings,
    ProbeSettings,
    SharedArguments,
    Unpack,
    refuse_unknown,
)
from lightning_spectral.probe.steppers import Follower, steppers
from lightning_spectral.text import one_line


class Observation:
    """A model under observation; made by :func:`observe`."""

    def __init__(self, loop: LoopObserver) -> None:
        self._loop = loop
        self._follower = Follower(self.step)
        self.latest: Scalars = {}

    @property
    def run_folder(self) -> RunFolder | None:
        """Where records go."""
        return self._loop.observer.run_folder

    @property
    def num_steps(self) -> int:
        """Optimizer steps seen."""
        return self._loop.step

    @property
    def should_stop(self) -> bool:
        """Whether an alarm with ``stop=True`` has been raised: alike on all ranks."""
        return self._loop.alarms.should_stop

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # where a loop compiles its step, or the optimizer's
    def step(self) -> Scalars:
        """After ``optimizer.step()``, unless ``observe`` was given the optimizer; the latest medians over layers."""
        self._loop.end_step()
        self.latest = self._loop.latest or self.latest
        return self.latest

    def tokens(self, ids: Tensor) -> None:
        """Before the forward passes of a batch, in a pipeline stage that sees no ids: those that the first stage gets.

        Forward calls take their rows in order. Where several batches make an optimizer step, give each before it runs;
        what is left after the step is forgotten.

        Args:
            ids: (B, T) of the whole batch; negative where it is padding.

        Raises:
            ValueError: If they are no such tensor and no step is done yet; later the records say so.
        """
        self._loop.give_ids(ids)

    def follow(self, optimizer: Optimizer) -> None:
        """Take each step of an optimizer, or of the one that it wraps, as a step of the loop."""
        self._follower.follow(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """To be saved with the model."""
        return self._loop.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an earlier run."""
        self._loop.load_state_dict(state)

    def close(self, *, finished: bool | None = None) -> None:
        """Take every hook off; a second call does nothing.

        Args:
            finished: Whether the run has reached its end.
        """
        self._follower.remove()
        self._loop.detach(finished=finished)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._loop.observer.after_error()
        self.close(finished=kind is None)


def observe(
    model: nn.Module,
    every_n_steps: int = 200,
    *,
    out: str | Path = "spectral",
    beside: Observation | None = None,
    optimizer: Optimizer | None = None,
    num_steps: int | None = None,
    resume: bool = False,
    counts: Any = None,
    process_group: dist.ProcessGroup | None = None,
    alarms: Sequence[AlarmRule] = (),
    **shared: Unpack[SharedArguments],
) -> Observation:
    """Measure a model in a training loop of any kind.

    Args:
        model: The model that the loop calls; wrapped or not.
        every_n_steps: Optimizer steps between windows.
        out: Run folder.
        beside: With several pipeline stages on a rank, the observation of another of them, made before on every rank:
            records go into its run folder instead of ``out``.
        optimizer: Its steps are followed, so that the loop need not call ``step()``.
        num_steps: Optimizer steps of the run, if known: the last one is measured too.
        resume: Go on with the records in ``out``; then call ``load_state_dict`` with the state that was saved.
        counts: Occurrences of each token id, or ``"stream"``: measures frequent and rare tokens apart, with their
            losses, as :class:`~lightning_spectral.TailTokenProbe` does.
        process_group: With pipeline stages, the ranks that hold this stage's layers and see other data; every rank
            gives its own. Records of all stages are in one folder, under the layers' names in the whole model; a stage
            that sees no token ids is given them by :meth:`Observation.tokens`.
        alarms: :class:`~lightning_spectral.SpectralAlarm` rules; one with ``stop=True`` sets
            :attr:`Observation.should_stop`.
        **shared: :class:`~lightning_spectral.probe.settings.ProbeSettings` documents them.

    Raises:
        ValueError: If an argument is out of range, the model has no feed-forward network that is found, stages
            cannot be told apart, or an alarm watches what is not measured.
    """
    refuse_unknown(observe, shared)
    _refuse_stage(model, beside, process_group, counts, shared)
    _refuse_other_kinds(shared, optimizer, resume, process_group)
    if not isinstance(model, nn.Module):
        seen = one_line(repr(model))[:80]
        what = f"the class `{model.__name__}`: make one first" if isinstance(model, type) else f"`{seen}`"
        if isinstance(model, (list, tuple)):
            what += ": call it for each model, with an `out` of its own"
        raise TypeError(f"observe measures a model (torch.nn.Module), got {what}.")
    settings = replace(ProbeSettings(every_n_steps=every_n_steps, **shared), dirpath=str(out))
    buckets = None if counts is None else BucketSettings(counts=counts)
    measurement = Measurement(settings, buckets)
    loop = LoopObserver(measurement, name="observe", num_steps=num_steps, alarms=Alarms(alarms, measurement))
    host = plain_host(settings, resume=resume, optimizer=optimizer, process_group=process_group)
    if beside is not None:
        _share_folder(host, beside)
    loop.attach(model, host)
    observation = Observation(loop)
    if optimizer is not None:
        observation.follow(optimizer)
    return observation


def _refuse_stage(model: Any, beside: Any, process_group: Any, counts: Any, shared: Mapping[str, Any]) -> None:
    """What pipeline stages cannot do, and what cannot be told apart in a folder that two of them share.

    Raises:
        ValueError: With the remedy.
    """
    if process_group is not None and isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"`model` is an `nn.{type(model).__name__}`, which no schedule calls: with several stages on a rank call "
            "`observe` for each of them, the further ones with `beside=` the first."
        )
    if process_group is not None and isinstance(counts, str) and counts == STREAM:
        raise ValueError("`counts='stream'` with a `process_group`: later stages see no ids; give an array or a file.")
    if beside is None:
        return
    if not isinstance(beside, Observation) or beside.run_folder is None:
        raise ValueError(f"`beside` must be what `observe` returned for another stage, got {beside!r:.80}.")
    if process_group is None:
        raise ValueError("`beside` is for pipeline stages: give the `process_group` of this one.")
    if shared.get("eigenvalues"):
        raise ValueError(
            "`eigenvalues=True` writes one file a window: with `beside`, give this stage an `out` instead."
        )


def _share_folder(host: Host, beside: Observation) -> None:
    """Make the run folder of another observation that of this host."""
    folder = beside.run_folder
    assert folder is not None
    host.folder, host.run_id, host.opened = folder.wanted, folder.run_id, lambda: [folder]


def _refuse_other_kinds(shared: Mapping[str, Any], optimizer: Any, resume: Any, process_group: Any) -> None:
    """What would be found out in the midst of the loop.

    Raises:
        ValueError: With the argument, the value seen and the remedy.
    """
    if "dirpath" in shared:
        raise ValueError(f"`dirpath` is for callbacks: observe takes the run folder as `out={shared['dirpath']!r}`.")
    _refuse_optimizer(optimizer)
    if not isinstance(resume, bool):
        raise ValueError(f"`resume` must be True or False, got {resume!r:.80}: True goes on with the records in `out`.")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            f"`process_group` must be a process group, got {process_group!r:.80}: e.g. `mesh['dp'].get_group()`."
        )


def _refuse_optimizer(optimizer: Any) -> None:
    """What is no optimizer, or one whose steps cannot be followed.

    Raises:
        ValueError: With the value seen and the remedy.
    """
    if optimizer is not None and not isinstance(optimizer, Optimizer) and not hasattr(optimizer, "optimizer"):
        seen = (
            f"the class `{optimizer.__name__}`: make one first" if isinstance(optimizer, type) else f"{optimizer!r:.80}"
        )
        raise ValueError(f"`optimizer` must be an optimizer (torch.optim.Optimizer), got {seen}.")
    if optimizer is not None and not steppers(optimizer):
        raise ValueError(
            f"`optimizer` is a `{type(optimizer).__name__}`, of whose steps torch tells nothing: leave it out, and "
            "call `probe.step()` after each of them."
        )


def plain_host(
    settings: ProbeSettings,
    *,
    resume: bool = False,
    optimizer: Optimizer | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Host:
    """A loop of which nothing is known but its process group.

    Args:
        settings: Names the folder and the run.
        resume: Go on with what is in the folder.
        optimizer: For ``run.json``.
        process_group: Of a pipeline stage.
    """
    ready = dist.is_available() and dist.is_initialized()
    return Host(
        folder=Path(settings.dirpath or "spectral").absolute(),
        run_id=settings.run_id or new_run_id(),
        describe={} if optimizer is None else {"optimizer": type(optimizer).__name__},
        resume=resume,
        is_first=not ready or dist.get_rank() == 0,
        writes=not ready or dist.get_rank() == 0,
        num_replicas=dist.get_world_size(process_group) if ready else 1,
        process_group=process_group,
        is_stage=process_group is not None,
    )
