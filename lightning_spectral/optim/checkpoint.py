"""One layout of optimizer state for every strategy, so that a checkpoint of one resumes under another.

In a state dict every tensor (but the scalar ``step``) lies as its parameter does: whole, FSDP1 shard or DTensor.
FSDP1's own state dict needs exactly that, and DCP moves it between world sizes. Companions (a flat array shorter than
the parameter) travel as the first entries of such a tensor.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.optim.shards import Piece, is_dtensor, local


def held_length(piece: Piece, length: int) -> int:
    """How many entries of a companion of ``length`` fall into the range of this piece."""
    return min(piece.stop, length) - min(piece.start, length)


def like_param(local_values: Tensor, param: Tensor) -> Tensor:
    """Give local values (as many as the local parameter has) the parameter's own layout."""
    held = local(param)
    shaped = local_values.view(held.shape)
    if not is_dtensor(param):
        return shaped
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(  # type: ignore[no-any-return]
        shaped,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def companion_to_saved(value: Tensor, param: Tensor) -> Tensor:
    """Pad a companion's local part with zeros to the size of the local parameter."""
    padded = torch.zeros(local(param).numel(), dtype=value.dtype, device=value.device)
    padded[: value.numel()] = value
    return like_param(padded, param)


def saved_to_companion(saved: Tensor, piece: Piece, length: int) -> Tensor:
    """Take the local part of a companion out of its saved form, whole or already cut for this rank."""
    return _held(saved, piece).reshape(-1)[: held_length(piece, length)].to(torch.float32, copy=True)


def saved_to_param_layout(saved: Tensor, param: Tensor, piece: Piece) -> Tensor:
    """Cut a whole tensor (a full checkpoint of another strategy) for this rank; leave one that fits as it is."""
    if is_dtensor(saved) or not (is_dtensor(param) or saved.shape != param.shape):
        return saved
    return like_param(_held(saved, piece).reshape(-1).clone(), param)


def _held(saved: Tensor, piece: Piece) -> Tensor:
    if is_dtensor(saved):
        return local(saved)
    if piece.kind != "whole" and saved.numel() == piece.numel and piece.stop - piece.start != piece.numel:
        return saved.reshape(-1)[piece.start : piece.stop]
    return saved


def make_uniform(states: dict[Any, dict[str, Any]], params: dict[Any, Tensor]) -> None:
    """Give every state the keys of all others, zeros where a rule has none, and all its arrays the widest dtype.

    FSDP1's ``optim_state_dict`` asserts that all parameters of a flat buffer have the same keys, of one dtype (a bf16
    momentum beside an fp32 companion is refused). Widening is exact, and loading narrows again.
    """
    arrays = [(name, value) for state in states.values() for name, value in state.items() if _is_array(value)]
    dtype = reduce(torch.promote_types, (value.dtype for _, value in arrays), torch.float32)
    wanted = {name for name, _ in arrays}
    for key, state in states.items():
        for name in wanted - state.keys():
            state[name] = torch.zeros_like(params[key], dtype=dtype)
        state.update({name: value.to(dtype) for name, value in state.items() if _is_array(value)})


def _is_array(value: Any) -> bool:
    return torch.is_tensor(value) and value.ndim > 0
