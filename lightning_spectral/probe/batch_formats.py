"""What a batch says beyond the ids that the model was given: padding, targets, size.

Formats understood: one ``(B, T + 1)`` tensor of ids (litgpt pretraining), ``(inputs, targets)`` pairs, and dictionaries
with ``input_ids``, ``attention_mask`` and ``labels`` (Hugging Face, litgpt fine-tuning). Anything else: ``mask_fn``.

Axes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

IGNORE_INDEX = -100
_LABEL_KEYS = ("labels", "targets", "target")


def padding_mask(batch: Any, ids_shape: tuple[int, ...]) -> Tensor | None:
    """True where a position is real, or ``None`` if the batch does not say.

    An ``attention_mask`` is believed first. Without one, positions whose label is ``IGNORE_INDEX`` are not rows.
    """
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and _has_shape(mask, ids_shape):
            return mask.bool()
    labels = _labels(batch)
    if _has_shape(labels, ids_shape):
        return labels != IGNORE_INDEX
    return None


def targets(batch: Any, ids_shape: tuple[int, ...]) -> Tensor | None:
    """The token to predict at each position where the batch holds one more column than the model was given."""
    if len(ids_shape) == 2 and _has_shape(batch, (ids_shape[0], ids_shape[1] + 1)):
        assert isinstance(batch, Tensor)
        return batch[:, 1:]
    if isinstance(batch, (list, tuple)) and len(batch) == 2 and _has_shape(batch[1], ids_shape):
        return batch[1]
    return None


def ids(batch: Any) -> Tensor | None:
    """The batch's ``(B, columns)`` tensor of ids, or ``None``; it may have one column more than the model is given."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids")
    elif isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point():
        return batch
    return None


def _labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[1]
    return None


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == shape and not value.is_floating_point()
