"""The padding mask that a model was called with, for the ids that it was called with.

Axes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

# ending of an argument of ids -> ending of the mask that goes with it; what stands before both must be equal
_PAIRS = (
    ("input_ids", "attention_mask"),
    ("ids", "attention_mask"),
    ("ids", "mask"),
    ("input", "mask"),
    ("tokens", "mask"),
    ("idx", "mask"),
    ("x", "mask"),
    ("input_tokens", "padding_mask"),
)
# True where a position is padding (torch)
_INVERTED = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "padding_mask")


def call_mask(ids: Tensor, arguments: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """False where an id is padding, of the ids' shape, or ``None`` if no enclosing call says so.

    Args:
        ids: The ids that the embedding was given.
        arguments: Tensors of the enclosing calls by name, innermost first.
    """
    for depth, named in enumerate(arguments):
        own = next((name for name, value in named.items() if _is_same(value, ids)), None)
        if own is not None:
            mask = _beside(own, named, ids)
            if mask is not None:
                return mask
        if depth == 0 or own is not None:
            for name in _INVERTED:
                mask = named.get(name)
                if mask is not None and _fits(mask, ids) is not None:
                    return ~_as_bool(_oriented(mask, ids))
    return None


def _beside(own: str, named: Mapping[str, Tensor], ids: Tensor) -> Tensor | None:
    for ids_ending, mask_ending in _PAIRS:
        if own.endswith(ids_ending):
            mask = named.get(own.removesuffix(ids_ending) + mask_ending)
            if mask is not None and _fits(mask, ids):
                return _as_bool(_oriented(mask, ids))
    return None


def _is_same(value: Tensor, ids: Tensor) -> bool:
    return (
        not value.is_floating_point()
        and value.numel() == ids.numel()
        and value.data_ptr() == ids.data_ptr()
        and value.dtype == ids.dtype
    )


def _fits(mask: Tensor, ids: Tensor) -> bool | None:
    same = mask.shape == ids.shape or (ids.ndim == 2 and tuple(mask.shape) == tuple(reversed(ids.shape)))
    return same or None


def _oriented(mask: Tensor, ids: Tensor) -> Tensor:
    return mask if mask.shape == ids.shape else mask.T


def _as_bool(mask: Tensor) -> Tensor:
    """A mask of 0 and 1, of bools, or of what is added to scores (0 and a large negative number)."""
    if mask.is_floating_point() and bool((mask < 0).any()):
        return mask >= 0
    return mask.bool()
