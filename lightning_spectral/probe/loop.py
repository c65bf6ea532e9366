"""An observer driven by what any loop does anyway: the model's forward calls and the optimizer's steps.

Every forward of the outermost module in training mode begins a micro-batch, which ends where the next one begins or the
optimizer steps, so that a loss that the script computes after the forward belongs to it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_spectral.models.hooks import leave_copy
from lightning_spectral.probe.alarms import Alarms
from lightning_spectral.probe.guard import warn
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.observer import Observer
from lightning_spectral.text.arguments import require_count

NO_STEP = (
    "nothing was recorded: the model ran {count} time(s) in training mode and no optimizer step was told. Call "
    "`probe.step()` after `optimizer.step()`, or give the optimizer: `observe(..., optimizer=optimizer)`."
)


class LoopObserver:
    """Measures one model in a loop that calls it and then steps.

    Args:
        measurement: What, when and where.
        name: Who speaks in warnings.
        num_steps: Optimizer steps of the run, if known: the last one is measured too.
        alarms: Judge every window.

    Attributes:
        step: Optimizer steps done.
        observer: The measurement's life.
        alarms: Know whether one of them would stop the loop.

    Raises:
        ValueError: If ``num_steps`` is not positive.
    """

    def __init__(
        self,
        measurement: Measurement,
        *,
        name: str,
        num_steps: int | None = None,
        alarms: Alarms | None = None,
    ) -> None:
        if num_steps is not None:
            require_count("num_steps", num_steps)
        self.alarms = Alarms((), measurement) if alarms is None else alarms
        self.observer = Observer(measurement, name=name)
        self.observer.schedule.last_step = None if num_steps is None else num_steps - 1
        self.step = 0
        self._handles: list[RemovableHandle] = []
        self._inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
        self._num_forwards = 0
        self._host: Host | None = None
        self._continues = False
        self._has_stepped = False

    @property
    def latest(self) -> Scalars:
        """Medians over layers of the windows published since this was last read."""
        return self.observer.take_scalars()

    def attach(self, model: nn.Module, host: Host, *, outer: nn.Module | None = None, counts: Any = None) -> None:
        """Hook the model, and open the first window if it is due.

        Args:
            model: Holds the blocks.
            host: The loop.
            outer: The module that the loop calls, if not ``model`` itself.
            counts: Token counts to use where the user gave none.

        Raises:
            ValueError: What is asked for cannot be measured in this model.
        """
        self._host = host
        host.resume = host.resume or self._continues
        host.published = lambda records, result: self.alarms.judge(records, host, self.observer.run_folder)
        self.observer.attach(model, host, fallback_counts=counts)
        called = model if outer is None else outer
        before, after = _Hook(self._before_forward), _Hook(self._after_forward)
        self._handles = [
            # before the recorder's, so that a micro-batch that begins here holds the call itself
            called.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            called.register_forward_hook(after, with_kwargs=True),
        ]
        before.place = called._forward_pre_hooks, self._handles[0].id
        after.place = called._forward_hooks, self._handles[1].id
        self._begin()

    def give_ids(self, ids: Tensor) -> None:
        """Token ids of a batch that is about to run, for a pipeline stage that sees none.

        Raises:
            ValueError: If they are no ids (B, T) and no step is done yet; later the records say so.
        """
        self.observer.give_ids(ids, may_raise=not self._has_stepped)

    def end_step(self) -> None:
        """After an optimizer step: close the open window, count the step, open the next window if it is due."""
        self._has_stepped = True
        if not self.observer.is_armed:
            self.step += 1
            return
        if self._num_forwards == 0:  # the model's own forward was gone past, or did not run
            self.observer.tokens.seen = None
        self._finish()
        self.observer.begin_step(self.step)  # where nothing has opened it, nothing was seen in it
        self.observer.end_step()
        self.step += 1
        self._num_forwards = 0
        self._begin()

    def detach(self, *, finished: bool | None = None) -> None:
        """Take every hook off and give the run folder back.

        Args:
            finished: Whether the run has reached its end.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs = None
        untold = finished and self._num_forwards and not self._has_stepped
        if untold and self._host is not None and self._host.is_first:
            warn(NO_STEP.format(count=self._num_forwards))
        self._num_forwards = 0
        self.observer.drain()
        self.observer.detach(finished=finished, last_step=self.step)

    def state_dict(self) -> dict[str, Any]:
        """To be saved with the loop's own state, so that a resumed run continues its records."""
        self.observer.drain(alone=True)  # the window that is being solved belongs to what is saved
        return {"step": self.step, **self.observer.state_dict(), **self.alarms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the records of an earlier run; before or after :meth:`attach`.

        Raises:
            ValueError: If it is no state of a loop.
        """
        if "step" not in state:
            raise ValueError(f"the state has no `step`, but {list(state)[:5]}: give what `state_dict()` returned.")
        self.step = state["step"]
        self.observer.load_state_dict(dict(state))
        self.alarms.load_state_dict(state)
        self._restart()

    def follow(self, step: int) -> None:
        """The loop was resumed at this step without our state: what came before it is not known."""
        self.step, self.observer.tokens.seen = step, None
        self._continues = True
        if self._host is not None:
            self._host.resume = True  # where the folder is not open yet
        self._restart()

    def _restart(self) -> None:
        if self.observer.is_armed:
            self._inputs = None
            self.observer.abandon_window()
            self._begin()

    def _begin(self) -> None:
        self.observer.begin_step(self.step)
        self.observer.begin_micro_batch(waits=True)

    def _finish(self) -> None:
        """The micro-batch under way has ended: its loss, if the script computes one, is known by now."""
        args, kwargs = self._inputs or ((), {})
        if self.observer.step is not None or self._inputs is not None:
            self.observer.end_micro_batch(kwargs or args, counts_tokens=self._inputs is not None)
        self._inputs = None

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.observer.is_armed:
            return
        if not self._counts(module):
            self.observer.pause()
            return
        if self._inputs is not None:
            self._finish()
            self.observer.begin_micro_batch()
        else:
            self.observer.resume(losses=True)
        self._inputs = (args, kwargs)
        self._num_forwards += 1

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._counts(module):
            self.observer.end_forward()
        else:
            self.observer.resume()

    def _counts(self, module: nn.Module) -> bool:
        """Whether a forward call now is one of a training step."""
        rehearsed = self._host is not None and self._host.is_stage and _is_rehearsal_of_pipelining()
        return module.training and torch.is_grad_enabled() and not rehearsed


def _is_rehearsal_of_pipelining() -> bool:
    """Whether ``torch.distributed.pipelining`` runs the model, before its first step, on no data to learn shapes."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_forward_metadata_inference":
            return str(frame.f_globals.get("__name__")).startswith("torch.distributed.pipelining")
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_observed(model: nn.Module) -> bool:
    """Whether a loop's observer hooks this module or one inside it."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return any(isinstance(hook, _Hook) for hook in hooks)


class _Hook:
    """A hook that belongs to one module alone: a copy of that module has none, a pickle one that does nothing."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call
        self.place: tuple[Any, int] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # where a loop compiles the module that it calls
    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return leave_copy(memo, self.place)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")
