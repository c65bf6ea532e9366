"""``SpectralRankCallback``: soft and hard rank of every layer's FFN activations, over all tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_spectral.callbacks.base import SpectralCallback
from lightning_spectral.callbacks.tail_token_probe import TailTokenProbe
from lightning_spectral.functional.rank import DEFAULT_RENYI_ORDERS
from lightning_spectral.probe.grouping import Grouping, pooled_only
from lightning_spectral.probe.options import conventions_of, probe_options


class SpectralRankCallback(SpectralCallback):
    r"""Measures the spectrum of FFN activations while a model trains.

    Add it to any Trainer; the model's code stays as it is. Every ``every_n_steps`` optimizer steps (and at the first
    and the last one) all tokens of the step are taken in, over all micro-batches and ranks. Numbers go to the run
    folder (``spectral.jsonl``), to every logger, and as medians over layers to ``trainer.callback_metrics``.

    Beside a :class:`TailTokenProbe` with the same schedule and sites it adds nothing to the run: the probe's merge of
    its buckets is the pooled measurement.

    Args:
        every_n_steps: Optimizer steps between windows.
        sites: ``post`` (input of the down projection), ``pre`` (output of the up projection), or both, which adds
            the reinjection ratio and the divergence of the two spectra.
        modules: Globs of the down projections, for a model that is not of a known family.
        embedding: Glob of the token embedding, where it is not found by itself.
        on: Stages to measure: ``train``, ``validation``, ``test``, ``predict``. An evaluation stage is one window.
        token_fraction: Share of the positions of every sequence to take in, in (0, 1].
        num_jackknife_groups: Deal sequences to this many groups, for sequence-level 95 % intervals and the debiased
            soft rank. The interval is about what the plain rank would be with other sequences, not about its bias from
            few rows. K shards take K times the state and K + 1 solves a spectrum (4: rows 1.06 times slower, reports
            5 times), which is why 1, for neither, is the default.
        renyi_orders: Orders of the Renyi ranks in the records.
        soft: ``exact``; or ``approx`` for layers at least 1,024 wide: within 0.5 %, several times faster than the
            eigensolve, labelled ``soft_method`` in the records, without what needs the whole spectrum (Renyi ranks).
        eigenvalues: Also save every spectrum (``eigenvalues/*.safetensors``).
        dirpath: Run folder; default the trainer's log directory.
        run_id: Id of the run; default made from time and chance.
        labels: Free labels for analysis, e.g. ``{"optimizer": "muon"}``.
        mask_fn: ``batch -> (B, T)`` mask, False at padding, where the batch's format is not understood.
        on_nonfinite: NaN or Inf activations are recorded with a status and ``warn`` once, only ``record``, or
            ``raise``.
        memory_limit_mib: Refuse to start if the state of a window needs more; rows that wait for a product come on top
            (the line at fit start states both).
        convention: ``default``, or ``paper`` for comparisons with the paper's numbers: an absolute epsilon in the hard
            rank.
        background: Solve windows in a thread beside training; default where a core is free, nothing monitors a
            ``spectral`` metric and twice the state fits. Records are the same, medians come a few steps later.
        seed: Of the positions drawn where ``token_fraction < 1``.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: Before step 1, if no FFN site is found or the state would not fit.

    Example::

        trainer = Trainer(callbacks=[SpectralRankCallback(every_n_steps=200)])
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        *,
        sites: Sequence[str] = ("post",),
        modules: list[str] | None = None,
        embedding: str | None = None,
        on: Sequence[str] = ("train",),
        token_fraction: float = 1.0,
        num_jackknife_groups: int = 1,
        renyi_orders: Sequence[float] = DEFAULT_RENYI_ORDERS,
        soft: Literal["exact", "approx"] = "exact",
        eigenvalues: bool = False,
        dirpath: str | None = None,
        run_id: str | None = None,
        labels: dict[str, str] | None = None,
        mask_fn: Callable[[Any], Tensor | None] | None = None,
        on_nonfinite: str = "warn",
        memory_limit_mib: float | None = None,
        convention: str = "default",
        background: bool | None = None,
        seed: int = 0,
    ) -> None:
        options = probe_options(
            sites=sites,
            modules=modules,
            embedding=embedding,
            token_fraction=token_fraction,
            num_jackknife_groups=num_jackknife_groups,
            renyi_orders=renyi_orders,
            convention=convention,
            soft=soft,
        )
        super().__init__(
            every_n_steps=every_n_steps,
            on=on,
            options=options,
            dirpath=dirpath,
            run_id=run_id,
            labels=labels,
            mask_fn=mask_fn,
            eigenvalues=eigenvalues,
            on_nonfinite=on_nonfinite,
            memory_limit_mib=memory_limit_mib,
            conventions=conventions_of(options),
            background=background,
            seed=seed,
        )

    @override
    def grouping(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Grouping:
        return pooled_only()

    @override
    def is_redundant(self, trainer: pl.Trainer) -> bool:
        return any(
            isinstance(other, TailTokenProbe) and other.covers(self)
            for other in trainer.callbacks  # type: ignore[attr-defined]
        )
