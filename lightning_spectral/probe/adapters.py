"""What a batch says beyond what the model was called with: padding, targets, and how many tokens it holds.

The call's own arguments are believed first (``ForwardCall.mask``). What they do not say is looked for in the batch, in
any nesting of mappings, sequences, named tuples and dataclasses: the ids of the call are found by content, and the mask
or the labels are those that stand beside them.

Axes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
_IDS = ("input_ids", "token_ids", "ids", "tokens", "inputs", "input", "x")
_LABELS = ("labels", "label", "targets", "target", "y")
_MASKS = ("attention_mask", "padding_mask", "mask")
_NEVER_IDS = ("mask", "position_ids", "token_type_ids", "segment", "seqlens", "lengths", "index", "idx")
_MAX_DEPTH = 6


@dataclass(frozen=True)
class Entry:
    """One tensor of a batch.

    Attributes:
        parent: Path of the container that holds it; entries of one container have equal ones.
        name: Key, field or position in it.
        tensor: The tensor.
    """

    parent: tuple[str, ...]
    name: str
    tensor: Tensor


class BatchAdapter:
    """Reads any batch; a ``mask_fn`` of the user comes before what is found.

    Args:
        mask_fn: ``batch -> (B, T)`` mask, False at padding, or ``None`` where it does not say.
    """

    def __init__(self, mask_fn: Callable[[Any], Tensor | None] | None = None) -> None:
        self._mask_fn = mask_fn

    def mask(self, batch: Any, ids: Tensor | None, shape: Sequence[int]) -> Tensor | None:
        """False where a position is padding, of ``shape``; ``None`` if neither the user nor the batch says.

        Args:
            batch: What the script was given.
            ids: Token ids of the call, where known.
            shape: Shape of its places; what ``mask_fn`` returns may have a column more, as the ids of a batch have.

        Raises:
            ValueError: If ``mask_fn`` returns another shape.
        """
        if self._mask_fn is not None:
            given = self._mask_fn(batch)
            if given is not None and not _fits(given, shape):
                raise ValueError(
                    f"The padding mask has shape {tuple(given.shape)} but the model was given ids of shape "
                    f"{tuple(shape)}: pass a `mask_fn(batch)` that returns one value per id."
                )
            return None if given is None else _cut(given, shape).bool()
        beside = _beside(batch, ids, shape)
        masks = [entry for entry in beside if _is_mask(entry, ids)]
        if masks:
            found = _cut(masks[0].tensor, shape)
            return ~found.bool() if "padding" in masks[0].name and found.dtype == torch.bool else found.bool()
        labels = [_cut(entry.tensor, shape) for entry in beside if _stem(entry.name, _LABELS) is not None]
        unnamed = [
            _cut(entry.tensor, shape) for entry in beside if entry.name.isdigit() and not is_of(entry.tensor, ids)
        ]
        for found in (*labels, *unnamed):
            if not found.is_floating_point() and bool((found == IGNORE_INDEX).any()):
                return found != IGNORE_INDEX
        return None

    def targets(self, batch: Any, ids: Tensor | None, shape: Sequence[int]) -> Tensor | None:
        """The token to predict at each position; ``None`` where the next id of the sequence is meant.

        The batch says so with one more column than the model was given, or with an (inputs, targets) pair.
        """
        if len(shape) != 2:
            return None
        for entry in entries(batch):
            tensor = entry.tensor
            if _is_integer(tensor) and tuple(tensor.shape) == (shape[0], shape[1] + 1) and _begins(tensor, ids):
                return tensor[:, 1:]
        if isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], Tensor):
            pair = Entry((), "1", batch[1])
            if _is_integer(batch[1]) and tuple(batch[1].shape) == tuple(shape) and not _is_mask(pair, ids):
                return batch[1]
        return None


def holds_ids(batch: Any, ids: Tensor | None) -> bool:
    """Whether a tensor of the batch is these ids, or these ids and one column more."""
    return any(is_of(entry.tensor, ids) for entry in entries(batch))


def ids_in(batch: Any) -> list[Tensor]:
    """The token ids of a batch, ``(B, columns)`` or packed ``(N,)`` each; empty where none are recognised.

    They may have one column more than the model is given.
    """
    if isinstance(batch, Tensor):  # the common case, in every step
        return [batch] if batch.ndim == 2 and _is_integer(batch) else []
    found = [entry for entry in entries(batch) if _is_integer(entry.tensor) and entry.tensor.ndim in (1, 2, 3)]
    named = [entry for entry in found if _stem(entry.name, _IDS) is not None]
    if named:
        return [entry.tensor for entry in named]
    found = [entry for entry in found if entry.tensor.ndim == 2 and _may_be_ids(entry)]
    if all(entry.name.isdigit() for entry in found):
        return [entry.tensor for entry in found[:1]]
    return [entry.tensor for entry in found]


def entries(batch: Any) -> Iterator[Entry]:
    """Every tensor of a batch, with the container that holds it."""
    yield from _walk(batch, (), "0")


def _walk(value: Any, parent: tuple[str, ...], name: str) -> Iterator[Entry]:
    if isinstance(value, Tensor):
        yield Entry(parent, name, value)
        return
    if len(parent) >= _MAX_DEPTH:
        return
    children: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        children = [(str(key), child) for key, child in value.items()]
    elif is_dataclass(value) and not isinstance(value, type):
        children = [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        children = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (list, tuple)):
        children = [(str(place), child) for place, child in enumerate(value)]
    elif hasattr(value, "data") and isinstance(value.data, Mapping):  # transformers' BatchEncoding
        children = [(str(key), child) for key, child in value.data.items()]
    for key, child in children:
        yield from _walk(child, (*parent, name), key)


def _beside(batch: Any, ids: Tensor | None, shape: Sequence[int]) -> list[Entry]:
    """Entries that can speak of the call's positions, those named like its ids first.

    They are of its shape (or have a column more), and stand beside its ids where those are found.
    """
    everything = list(entries(batch))
    fitting = [entry for entry in everything if _fits(entry.tensor, shape)]
    home = next((entry for entry in everything if is_of(entry.tensor, ids)), None)
    if home is None:
        return fitting
    rest = _without(home.name, _IDS)
    near = [entry for entry in fitting if entry.parent == home.parent and entry is not home]
    return sorted(near, key=lambda entry: _without(entry.name, (*_MASKS, *_LABELS)) != rest)


def _without(name: str, stems: Sequence[str]) -> str:
    """What tells one of several apart: ``chosen_`` of ``chosen_input_ids`` and of ``chosen_attention_mask``."""
    lowered = name.lower()
    stem = next((stem for stem in stems if stem in lowered), "")
    return lowered.replace(stem, "", 1)


def _is_mask(entry: Entry, ids: Tensor | None) -> bool:
    if "loss" in entry.name:
        return False
    if "mask" in entry.name or entry.tensor.dtype == torch.bool:
        return True
    return entry.name.isdigit() and not is_of(entry.tensor, ids) and _looks_like_padding(entry.tensor)


def _looks_like_padding(tensor: Tensor) -> bool:
    """Ones, then zeros (or the other way round) in every row: no sequence of ids looks like that."""
    if tensor.is_floating_point() or tensor.ndim < 2 or not bool(((tensor == 0) | (tensor == 1)).all()):
        return False
    changes = (tensor[..., 1:] != tensor[..., :-1]).sum(-1)
    return bool((changes <= 1).all()) and bool((tensor == 1).any())


def is_of(tensor: Tensor, ids: Tensor | None) -> bool:
    """Whether a tensor of a batch is these ids, or these ids and one column more."""
    if ids is None or not _is_integer(tensor):
        return False
    if tuple(tensor.shape) == tuple(ids.shape):
        return tensor.data_ptr() == ids.data_ptr() or bool(torch.equal(tensor.to(ids.device), ids))
    return _begins(tensor, ids)


def _begins(tensor: Tensor, ids: Tensor | None) -> bool:
    """Whether the ids are all columns of the tensor but the last."""
    if ids is None:
        return True
    fits = tensor.ndim == ids.ndim and tensor.ndim > 0 and tensor.shape[:-1] == ids.shape[:-1]
    if not fits or tensor.shape[-1] != ids.shape[-1] + 1:
        return False
    return bool(torch.equal(tensor[..., :-1].to(ids.device), ids))


def _fits(tensor: Tensor, shape: Sequence[int]) -> bool:
    own = tuple(tensor.shape)
    return bool(own) and own[:-1] == tuple(shape[:-1]) and own[-1] in (shape[-1], shape[-1] + 1)


def _cut(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return tensor[..., : shape[-1]]


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _may_be_ids(entry: Entry) -> bool:
    name = entry.name.lower()
    return _stem(name, _LABELS) is None and not any(word in name for word in _NEVER_IDS)


def _stem(name: str, stems: Sequence[str]) -> str | None:
    """The stem that a name is made of: ``input_ids_b`` of ``input_ids``; short stems only as whole words."""
    lowered = name.lower()
    if any(word in lowered for word in _NEVER_IDS):
        return None
    parts = lowered.split("_")
    return next((stem for stem in stems if stem in lowered and ("_" in stem or stem in parts)), None)
