"""Which bucket a token's row belongs to: one small table of rules.

Axes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_spectral.functional.buckets import EXCLUDED, frequency_buckets, look_up, position_groups, require_counts
from lightning_spectral.models.checkpoint_file import read_checkpoint
from lightning_spectral.records import BUCKETS

_PADDING = 512  # litgpt rounds a vocabulary up to a multiple of this, others to 64 or 128


@dataclass(frozen=True)
class Grouping:
    """Names of the buckets and the rule that deals rows to them.

    Attributes:
        names: Bucket names, in the order of their codes.
        code_fn: Token ids ``(B, T)`` -> codes ``(B, T)``; negative leaves a row out.
        attribute_to: Whether a row belongs to the bucket of its ``input`` token or of the ``target`` it predicts.
        vocab_size: Ids that the rule knows, or ``None`` if it does not look at them.
        by_place: Whether the rule looks at positions, so that it needs whole sequences.
        counted: Bucket and occurrences of each id ``(V,)``, where the rule is by them.
    """

    names: tuple[str, ...]
    code_fn: Callable[[Tensor], Tensor]
    attribute_to: Literal["input", "target"] = "input"
    vocab_size: int | None = None
    by_place: bool = False
    counted: tuple[Tensor, Tensor] | None = None

    def codes(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Code of each row."""
        return self._codes_of(ids_BT if self.attribute_to == "input" else targets_BT)

    def loss_codes(self, targets_BT: Tensor) -> Tensor:
        """Code of each prediction: always that of the token to be predicted."""
        return self._codes_of(targets_BT)

    def _codes_of(self, tokens_BT: Tensor) -> Tensor:
        known_BT = tokens_BT >= 0
        return torch.where(known_BT, self.code_fn(torch.where(known_BT, tokens_BT, 0)), EXCLUDED)


def pooled_only() -> Grouping:
    """One bucket for every row."""
    return Grouping(("pooled",), torch.zeros_like)


def by_frequency(
    counts_V: Tensor | Sequence[int], *, head_share: float, mid_share: float, attribute_to: Literal["input", "target"]
) -> Grouping:
    """HEAD, MID and TAIL by the counts of the training corpus."""
    table_V = frequency_buckets(counts_V, head_share, mid_share)
    counted = table_V, counts_V if isinstance(counts_V, Tensor) else torch.as_tensor(counts_V, device="cpu")
    return Grouping(BUCKETS, lambda ids: look_up(ids, table_V), attribute_to, table_V.numel(), counted=counted)


def by_position(num_groups: int) -> Grouping:
    """Equal parts of the sequence, e.g. to compare RoPE with NoPE."""

    def code_fn(ids_BT: Tensor) -> Tensor:
        return position_groups(ids_BT.shape[1], num_groups).to(ids_BT.device).expand_as(ids_BT)

    return Grouping(tuple(f"position_{group:02d}" for group in range(num_groups)), code_fn, by_place=True)


def check_vocabulary(num_counts: int, num_embedded: int, num_known: int | None = None) -> None:
    """Refuse token counts of another tokenizer. A model may embed more ids than there are: padding that never occurs.

    Padding is what ``num_known`` leaves over, or what fills the vocabulary up to a multiple of 64. An id without a
    count is refused when it occurs, so what passes here by chance is still no wrong number.

    Args:
        num_counts: Ids that have a count.
        num_embedded: Ids that the model embeds.
        num_known: Ids that its tokenizer has, if known (litgpt: ``vocab_size`` beside ``padded_vocab_size``).

    Raises:
        ValueError: With the remedy.
    """
    missing = num_embedded - num_counts
    padded = num_embedded % 64 == 0 and missing <= min(_PADDING, num_counts // 8)
    if missing <= 0 or padded or (num_known is not None and num_known <= num_counts):
        return
    known = "" if num_known in (None, num_embedded) else f" (its tokenizer has {num_known})"
    raise ValueError(
        f"The model embeds {num_embedded} token ids{known} but the token counts have {num_counts}: count with "
        f"`np.bincount(ids, minlength={num_known or num_embedded})`, or use the counts of this model's own tokenizer "
        "(`lightning-spectral count-tokens --tokenizer_dir DIR`)."
    )


def load_counts(source: Any) -> Tensor:
    """Token counts from a ``.npy`` / ``.pt`` / text file, an array, or a sequence.

    Raises:
        ValueError: If the file is missing, or what it holds are no counts; the message names it.
    """
    is_file = isinstance(source, (str, Path))
    counts = _counts_file(Path(source)) if is_file else _counts_array(source)
    try:
        require_counts(counts)
    except ValueError as error:
        raise ValueError(f"`counts`{f' (`{source}`)' if is_file else ''}: {error}") from error
    return counts


def _counts_array(source: Any) -> Tensor:
    try:
        return source if isinstance(source, Tensor) else torch.as_tensor(np.asarray(source), device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`counts` must be a file, an array with one count per token id, or 'stream', got {source!r}."
        ) from error


def _counts_file(path: Path) -> Tensor:
    if not path.is_file():
        made = path.with_suffix(".npy") if path.name else Path("counts.npy")
        raise ValueError(
            f"`counts`: no file `{path}`. Make one: `lightning-spectral count-tokens --data TEXT --out "
            f"{made}`, or count the training's own tokens: `counts='stream'`."
        )
    try:
        if path.suffix == ".pt":
            counts = read_checkpoint(path)
        elif path.suffix == ".npy":
            counts = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            counts = torch.from_numpy(np.loadtxt(path, dtype=np.int64, ndmin=1))
    except Exception as error:
        raise ValueError(
            f"`counts`: `{path}` holds no token counts ({type(error).__name__}). Expected one integer per id, "
            "as written by `lightning-spectral count-tokens` or `numpy.save`."
        ) from error
    if not isinstance(counts, Tensor) or counts.ndim != 1:
        seen = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"`counts`: `{path}` must hold a vector with one count per id, got {seen}.")
    return counts
