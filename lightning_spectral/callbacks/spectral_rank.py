"""``SpectralRankCallback``: soft and hard rank of every layer's FFN activations, over all tokens."""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from lightning_spectral.callbacks.base import SpectralCallback
from lightning_spectral.callbacks.tail_token_probe import TailTokenProbe


class SpectralRankCallback(SpectralCallback):
    """Measures the spectrum of FFN activations while a model trains.

    Add it to any Trainer; the model's code stays as it is. Every ``every_n_steps`` optimizer steps, and at the first
    and the last one, all tokens of the step are measured, over all micro-batches and ranks. Results go to the run
    folder (``spectral.jsonl``), to every logger, and as medians over layers to ``trainer.callback_metrics``.

    Next to a :class:`TailTokenProbe` with the same schedule and sites it does nothing: the probe's pooled spectrum is
    the same measurement. Arguments: :class:`~lightning_spectral.probe.settings.ProbeSettings`.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: Before step 1, if no FFN site is found or the state would not fit.

    Example::

        trainer = Trainer(callbacks=[SpectralRankCallback(every_n_steps=200)])
    """

    @override
    def is_redundant(self, trainer: pl.Trainer) -> bool:
        return any(
            isinstance(other, TailTokenProbe) and other.measurement.covers(self.measurement)
            for other in trainer.callbacks  # type: ignore[attr-defined]
        )
