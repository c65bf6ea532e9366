"""One micro-batch, from the probe's start to its forward calls, with what the batch says of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.probe.adapters import BatchAdapter
from lightning_spectral.probe.batch_calls import of_batch
from lightning_spectral.probe.evaluation import WindowState
from lightning_spectral.probe.given_ids import GivenIds
from lightning_spectral.probe.guard import Guard
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.probe.settings import ProbeSettings
from lightning_spectral.probe.token_counts import TokenCounter


class MicroBatches:
    """Starts and collects them.

    Args:
        settings: Seed and mask.
        guard: Keeps errors, and tells once what was not understood.

    Attributes:
        given: Ids of the step's forward calls, for a model that sees none.
    """

    def __init__(self, settings: ProbeSettings, guard: Guard) -> None:
        self._settings, self._guard = settings, guard
        self._adapter = BatchAdapter(settings.mask_fn)
        self.given = GivenIds()

    def start(self, probe: SpectralProbe, window: WindowState, *, training: bool, waits: bool = False) -> None:
        """Before its forward pass, with ``waits`` long before. Equal steps draw equal rows."""
        step = window.step if training and window.step is not None else 0
        seed = (self._settings.seed * 1_000_003 + step) * 1_009 + window.num_micro_batches
        window.num_micro_batches += 1
        probe.start(seed=seed, training=training, waits=waits)

    def collect(
        self, probe: SpectralProbe, batch: Any, window: WindowState | None, tokens: TokenCounter, *, evaluates: bool
    ) -> None:
        """After it: its forward calls, accumulated; the window keeps what went wrong.

        Args:
            probe: What was started.
            batch: What the script was given.
            window: The open window, if any.
            tokens: Learns how much of a training batch the model is given.
            evaluates: Count only what belongs to the batch.
        """
        with self._guard("accumulating activations", "not_matched"):
            to_the_end = probe.recorder.listens
            choose = partial(of_batch, batch=batch) if evaluates else self.given
            calls = probe.collect(partial(self._mask, batch), partial(self._targets, batch), choose)
            if not evaluates:
                tokens.learn(batch, calls, to_the_end=to_the_end)
            for kind, note in probe.recorder.notes.items():
                self._guard.say(kind, note)
                if window is not None:
                    window.note = window.note or note
        if window is not None:
            window.trouble = window.trouble or self._guard.take()

    def _mask(self, batch: Any, call: ForwardCall) -> Tensor | None:
        if call.mask is not None and self._settings.mask_fn is None:
            return call.mask
        return self._adapter.mask(batch, call.ids, call.shape)

    def _targets(self, batch: Any, call: ForwardCall) -> Tensor | None:
        return self._adapter.targets(batch, call.ids, call.shape)
