"""``FabricSpectralProbe``: a measuring callback in a Fabric loop, driven by the two hooks that Fabric calls by itself.

``fabric.setup`` attaches it, every training forward feeds the open window, ``optimizer.step`` closes it and opens the
next when it is due. A loop needs no other call, so one that knows nothing of callbacks (``litgpt pretrain``) can be
measured too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from lightning_spectral.callbacks.base import SpectralCallback
from lightning_spectral.callbacks.fabric_host import host_of_fabric
from lightning_spectral.lightning_private import unwrapped
from lightning_spectral.probe.alarms import AlarmRule, Alarms
from lightning_spectral.probe.host import Host, Scalars
from lightning_spectral.probe.loop import LoopObserver
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.text.arguments import refuses_unknown, require_count


class FabricSpectralProbe:
    """Measures what ``callback`` would measure, in a Fabric loop.

    A window is one optimizer step with all its micro-batches and ranks, as in a Trainer. Forwards in eval mode are not
    looked at.

    Fabric calls ``on_after_setup`` in ``fabric.setup`` but not in ``fabric.setup_module``: call it yourself then.

    Args:
        callback: A :class:`SpectralRankCallback` or :class:`TailTokenProbe`; its arguments say what, when and where.
            Its stages (``on``) are a Trainer's: here only training is measured. Without ``dirpath`` records go beside
            TensorBoard's files, else the first logger's, else to ``spectral/``. ``mask_fn`` gets the model's keyword
            arguments, or its positional ones if there are none.
        num_steps: Optimizer steps of the run, if known: the last one is measured too.
        alarms: :class:`~lightning_spectral.SpectralAlarm` rules; one with ``stop=True`` sets :attr:`should_stop`.

    Raises:
        ValueError: If the callback does not measure activations, or not what an alarm watches.

    Example::

        fabric = Fabric(callbacks=[FabricSpectralProbe(TailTokenProbe(200, counts="counts.npy"))])
        model, optimizer = fabric.setup(model, optimizer)
    """

    @refuses_unknown
    def __init__(
        self, callback: SpectralCallback, *, num_steps: int | None = None, alarms: Sequence[AlarmRule] = ()
    ) -> None:
        if not isinstance(callback, SpectralCallback):
            why = "that one needs a Trainer" if isinstance(callback, Callback) else "give it one of them, made"
            seen = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise ValueError(f"FabricSpectralProbe drives SpectralRankCallback and TailTokenProbe, not {seen}: {why}.")
        if num_steps is not None:
            require_count("num_steps", num_steps)
        self.callback = callback
        name = f"{type(self).__name__}({type(callback).__name__})"
        rules = Alarms(alarms, callback.measurement, remedy="give it a TailTokenProbe.")
        self.loop = LoopObserver(callback.measurement, name=name, num_steps=num_steps, alarms=rules)
        self.latest: Scalars = {}
        self.home: Fabric | None = None
        self._resume = self._is_attached = False
        self._optimizer: int | None = None
        self._host: Host | None = None

    @property
    def state_key(self) -> str:
        """What a Trainer asks its callbacks for.

        Raises:
            MisconfigurationException: Always.
        """
        name = type(self.callback).__name__
        raise MisconfigurationException(
            f"FabricSpectralProbe is a callback of Fabric: a Trainer takes `callbacks=[{name}(...)]` itself."
        )

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.loop.step

    @property
    def should_stop(self) -> bool:
        """Whether an alarm with ``stop=True`` has been raised: alike on all ranks."""
        return self.loop.alarms.should_stop

    @property
    def tokens_seen(self) -> int | None:
        """Training tokens so far over all ranks; ``None`` if unknown."""
        return self.loop.observer.tokens.seen

    @property
    def run_folder(self) -> RunFolder | None:
        """Where records go, once attached."""
        return self.loop.observer.run_folder

    # the two hooks that Fabric calls

    def on_after_setup(self, fabric: Fabric, module: nn.Module) -> None:
        """Attach to the first module that the loop sets up.

        Raises:
            MisconfigurationException: If it has no site to measure, or the state would not fit.
        """
        if self._is_attached:
            return
        self.home, self._is_attached = fabric, True
        try:
            settings = self.callback.measurement.settings
            self._host = host_of_fabric(fabric, module, settings, resume=self._resume)
            self.loop.attach(unwrapped(module), self._host, outer=module)
        except ValueError as error:
            self._is_attached = False
            self.refuse(str(error))

    def on_after_optimizer_step(self, strategy: Any, optimizer: Optimizer) -> None:
        """Close the window of this step, count the step, open the next window."""
        if not self._is_attached:
            self.loop.observer.guard.say(
                "setup",
                "it is not attached: this loop uses `fabric.setup_module`, which calls no callback. Call "
                "`probe.on_after_setup(fabric, module)` after it. Nothing is measured.",
            )
            return
        if self._optimizer is None:
            self._optimizer = id(optimizer)
            self._follow_resumed(optimizer)
        if id(optimizer) == self._optimizer:  # steps are those of the first optimizer
            self.loop.end_step()
            self.latest = self.loop.latest or self.latest

    def refuse(self, reason: str) -> None:
        """What is asked for cannot be measured: an error before step 1."""
        raise MisconfigurationException(f"{self.loop.observer.name}: {reason}")

    # state, end

    def state_dict(self) -> dict[str, Any]:
        """To be saved with the loop's own state, so that a resumed run continues its records."""
        return self.loop.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the records of an earlier run, which are in the same folder; before ``fabric.setup``."""
        self._resume = True
        self.loop.load_state_dict(state)

    def remove(self) -> None:
        """Take every hook off the model."""
        self.loop.detach()
        self._is_attached = False

    # inside

    def _follow_resumed(self, optimizer: Optimizer) -> None:
        """A loop that resumes without our state (litgpt's) still has the optimizer's own count of steps."""
        done = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
        if self._host is not None:
            self._host.describe["optimizer"] = type(optimizer).__name__
        if done > self.loop.step + 1:
            self.loop.follow(done - 1)
