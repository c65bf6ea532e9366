"""One layout of optimizer state for every strategy, so that a checkpoint of one resumes under another.

In a state dict every tensor (but the scalar ``step``) lies as its parameter does: whole, FSDP1 shard or DTensor.
FSDP1's own state dict needs exactly that, and DCP moves it between world sizes. Extra state (arrays shorter than a
matrix) travels as the first entries of its matrix inside such a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.models.placement import Shard, is_dtensor, local
from lightning_spectral.optim.matrices import Extra, Matrix, flat


def like_param(local_values: Tensor, param: Tensor) -> Tensor:
    """Give local values (as many as the local parameter has) the parameter's own layout."""
    shaped = local_values.view(local(param).shape)
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


def extra_to_saved(value: Tensor, name: str, matrices: Sequence[Matrix], param: Tensor) -> Tensor:
    """Put local extra state where its matrices' first entries lie, in a tensor like the parameter, zeros elsewhere."""
    padded = torch.zeros(local(param).numel(), dtype=value.dtype, device=value.device)
    padded[_positions(name, matrices).to(value.device)] = value
    return like_param(padded, param)


def saved_to_extra(saved: Tensor, name: str, matrices: Sequence[Matrix], shard: Shard) -> Tensor:
    """Take local extra state out of its saved form, whole or already cut for this rank."""
    here = flat(_held(saved, shard))
    return here[_positions(name, matrices).to(here.device)].to(torch.float32)


def saved_to_param_layout(saved: Tensor, param: Tensor, shard: Shard) -> Tensor:
    """Cut a whole tensor (a full checkpoint of another strategy) for this rank; leave one that fits as it is.

    Raises:
        ValueError: If the tensor is neither whole nor of the local size.
    """
    if is_dtensor(saved):
        return saved
    here = _held(saved, shard)
    if here.numel() != local(param).numel():
        raise ValueError(f"it has shape {tuple(saved.shape)} in the checkpoint, {tuple(shard.shape)} here")
    if not is_dtensor(param) and here is saved and saved.shape == param.shape:
        return saved
    return like_param(here.reshape(-1).clone(), param)


def _positions(name: str, matrices: Sequence[Matrix]) -> Tensor:
    """Places in the flat local parameter of the local entries of extra state, in the order in which they lie."""
    found = [torch.zeros(0, dtype=torch.long)]
    for matrix in matrices:
        found += [_positions_in(matrix, matrix.extra[name])]
    return torch.cat(found)


def _positions_in(matrix: Matrix, extra: Extra) -> Tensor:
    columns = matrix.shape[1]
    # where every entry of the first rows of the matrix lies here; -1 where it does not
    rows = -(-extra.length // columns)
    place = torch.full((rows, columns), -1, dtype=torch.long)
    for block in matrix.blocks:
        (r0, r1), (c0, c1) = block.target.rows, block.target.columns
        r1 = min(r1, rows)
        if r1 <= r0:
            continue
        down, right = (block.step, block.stride) if block.transposed else (block.stride, block.step)
        grid = torch.arange(r1 - r0).unsqueeze(1) * down + torch.arange(c1 - c0).unsqueeze(0) * right
        place[r0:r1, c0:c1] = grid + block.offset
    spans = [torch.arange(low, high) for low, high in extra.spans]
    return place.view(-1)[torch.cat(spans)] if spans else torch.zeros(0, dtype=torch.long)


def _held(saved: Tensor, shard: Shard) -> Tensor:
    if is_dtensor(saved):
        return local(saved)
    if not shard.is_whole and saved.numel() == shard.numel:
        return shard.cut(saved)
    return saved


def make_uniform(states: dict[Any, dict[str, Any]], params: dict[Any, Tensor]) -> None:
    """Give every state the keys of all others, zeros where a rule has none, and all its arrays the widest dtype.

    FSDP1's ``optim_state_dict`` asserts that all parameters of a flat buffer have the same keys, of one dtype (a bf16
    momentum beside fp32 extra state is refused). Widening is exact, and loading narrows again.
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
