"""``TailTokenProbe``: the spectra of frequent and of rare tokens apart, with their losses."""

from __future__ import annotations

from typing import Any, Literal

from lightning_spectral.callbacks.base import SpectralCallback
from lightning_spectral.probe.settings import BucketSettings, ProbeSettings, SharedArguments, Unpack, refuse_unknown


class TailTokenProbe(SpectralCallback):
    r"""Measures HEAD, MID and TAIL tokens separately, and their merge.

    Optimizers that agree on the loss can differ on rare tokens: this is where the paper's exponents part. A row belongs
    to the bucket of its input token (``attribute_to``); losses and accuracies to that of the token to be predicted.

    Losses are the script's own: its calls of ``cross_entropy`` (or ``nll_loss``) on logits over the vocabulary.

    Args:
        every_n_steps: Optimizer steps between windows.
        counts: Occurrences of each token id in the training corpus: a file (``.npy``, ``.pt``, one number per line), an
            array, or ``"stream"`` to count the tokens of the training batches as they come; then buckets have the
            status ``not_matched`` until ten tokens per id were seen (data that lies in memory is counted at fit start).
            Default: the datamodule's ``token_counts``.
        count_batches: With ``"stream"``, after how many batches the counts are settled; default after enough tokens.
        head_share: Share of all occurrences that HEAD covers.
        mid_share: Share that HEAD and MID cover.
        attribute_to: ``input`` or ``target``.
        group_by: ``frequency``, or ``position`` for ``num_position_groups`` equal parts of the sequence.
        num_position_groups: See ``group_by``.
        losses: Also record loss and top-1 accuracy per bucket.
        **shared: :class:`~lightning_spectral.probe.settings.ProbeSettings` documents them.

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
        group_by: str = "frequency",
        num_position_groups: int = 4,
        losses: bool = True,
        **shared: Unpack[SharedArguments],
    ) -> None:
        buckets = BucketSettings(
            counts=counts,
            count_batches=count_batches,
            head_share=head_share,
            mid_share=mid_share,
            attribute_to=attribute_to,
            group_by=group_by,
            num_position_groups=num_position_groups,
            losses=losses,
        )
        refuse_unknown(type(self), shared)
        self.begin(ProbeSettings(every_n_steps=every_n_steps, **shared), buckets)
