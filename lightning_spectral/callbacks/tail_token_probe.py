"""``TailTokenProbe``: the spectra of frequent and of rare tokens apart, with their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_spectral.callbacks.base import SpectralCallback
from lightning_spectral.callbacks.counting import count_stream
from lightning_spectral.functional.rank import DEFAULT_RENYI_ORDERS
from lightning_spectral.probe.grouping import Grouping, by_frequency, by_position, load_counts
from lightning_spectral.probe.options import conventions_of, probe_options

GROUP_BY = ("frequency", "position")


class TailTokenProbe(SpectralCallback):
    r"""Measures HEAD, MID and TAIL tokens separately, and their merge.

    Optimizers that agree on the loss can differ on rare tokens: this is where the paper's exponents part. A row belongs
    to the bucket of its input token (``attribute_to``); losses and accuracies to that of the token to be predicted.

    Args:
        every_n_steps: Optimizer steps between windows.
        counts: Occurrences of each token id in the training corpus: a file (``.npy``, ``.pt``, one number a line), an
            array, or ``"stream"`` to count the training data once at fit start. Default: the datamodule's
            ``token_counts``.
        count_batches: With ``"stream"``, how many batches to count; default all.
        head_share: Share of all occurrences that HEAD covers.
        mid_share: Share that HEAD and MID cover.
        attribute_to: ``input`` or ``target``.
        group_by: ``frequency``, or ``position`` for ``num_position_groups`` equal parts of the sequence.
        num_position_groups: See ``group_by``.
        losses: Also record loss and top-1 accuracy per bucket.
        sites: As in :class:`SpectralRankCallback`, and so are the arguments that follow.
        modules: See there.
        embedding: See there.
        on: See there.
        token_fraction: See there.
        num_jackknife_groups: See there.
        renyi_orders: See there.
        soft: See there.
        eigenvalues: See there.
        dirpath: See there.
        run_id: See there.
        labels: See there.
        mask_fn: See there.
        on_nonfinite: See there.
        memory_limit_mib: See there.
        convention: ``paper`` also takes the rows of rank 0 only, as the paper does for its buckets.
        background: See there.
        seed: See there.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: Before step 1, without counts, with counts of another vocabulary, without a site.

    Example::

        trainer = Trainer(callbacks=[TailTokenProbe(every_n_steps=200, counts="counts.npy")])
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        *,
        counts: Any = None,
        count_batches: int | None = None,
        head_share: float = 0.33,
        mid_share: float = 0.67,
        attribute_to: Literal["input", "target"] = "input",
        group_by: Literal["frequency", "position"] = "frequency",
        num_position_groups: int = 4,
        losses: bool = True,
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
        if not 0 < head_share < mid_share < 1:
            raise ValueError(f"Need 0 < `head_share` < `mid_share` < 1, got {head_share} and {mid_share}.")
        if attribute_to not in ("input", "target"):
            raise ValueError(f"`attribute_to` must be `input` or `target`, got {attribute_to!r}.")
        if group_by not in GROUP_BY:
            raise ValueError(f"`group_by` must be one of {list(GROUP_BY)}, got {group_by!r}.")
        if num_position_groups < 1:
            raise ValueError(f"`num_position_groups` must be >= 1, got {num_position_groups}.")
        options = probe_options(
            sites=sites,
            modules=modules,
            embedding=embedding,
            token_fraction=token_fraction,
            num_jackknife_groups=num_jackknife_groups,
            renyi_orders=renyi_orders,
            convention=convention,
            soft=soft,
            buckets_from_rank_0=convention == "paper",
            with_losses=losses,
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
            conventions=conventions_of(
                options, group_by=group_by, attribute_to=attribute_to, shares=f"{head_share:g}/{mid_share:g}"
            ),
            background=background,
            seed=seed,
        )
        # A file is read now, so that a wrong path fails before any training.
        self._counts = counts if counts is None or is_stream(counts) else load_counts(counts)
        self._count_batches = count_batches
        self._shares = (head_share, mid_share)
        self._attribute_to = attribute_to
        self._group_by = group_by
        self._num_position_groups = num_position_groups

    @override
    def grouping(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Grouping:
        if self._group_by == "position":
            return by_position(self._num_position_groups)
        head_share, mid_share = self._shares
        counts = load_counts(self._token_counts(trainer, pl_module))
        return by_frequency(counts, head_share=head_share, mid_share=mid_share, attribute_to=self._attribute_to)

    def covers(self, other: SpectralCallback) -> bool:
        """Whether this probe's merge of buckets is what ``other`` would measure."""
        return (
            self.options == replace(other.options, with_losses=self.options.with_losses)
            and self._schedule.every_n_steps == other._schedule.every_n_steps
            and set(other._on) <= set(self._on)
            and self.dirpath == other.dirpath
            and self._attribute_to == "input"
        )

    def _token_counts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        if is_stream(self._counts):
            return count_stream(trainer, pl_module, self.options, self._count_batches)
        if self._counts is not None:
            return self._counts
        counts = getattr(getattr(trainer, "datamodule", None), "token_counts", None)
        if counts is None:
            raise ValueError(
                "no token counts: pass `counts='counts.npy'` (make it with `lightning-spectral count-tokens --data "
                "TEXT --out counts.npy`), an array with one count per id, `counts='stream'` to count the training "
                "data first, or give your datamodule a `token_counts` attribute."
            )
        return counts


def is_stream(counts: Any) -> bool:
    """Whether the counts are to be taken from the training data."""
    return isinstance(counts, str) and counts == "stream"
