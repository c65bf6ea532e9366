"""Singular values of a model's matrices, of sharded ones too: one matrix at a time, each at its owner.

No rank ever holds more than one whole matrix. Every rank puts its entries into zeros of the matrix's shape, one
reduction adds them at the owner, which solves; owners take turns, and one sum hands all singular values to all ranks.

Axes: M rows, N columns, R singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.models.placement import Shard, blocks_of, dtensor_shard, is_dtensor, local, whole
from lightning_spectral.models.views import MatrixView, Views

_GAVE_UP = -1.0  # in place of singular values, where the solver found none


def spectra(tensors: Sequence[Tensor], views: Sequence[Views]) -> list[list[Tensor]]:
    """Singular values of every matrix in every tensor, descending, in fp64 on the CPU.

    Args:
        tensors: Each lies as its parameter does; DTensors are solved at owners, all others here. Every rank of their
            meshes must call it, with the same tensors in the same order.
        views: Which matrices each holds.

    Returns:
        By tensor and matrix ``(R,)``; one NaN where an entry is not finite, none where the solver gave up.
    """
    found: list[list[Tensor]] = []
    owned: dict[int, tuple[Any, list[Tensor]]] = {}
    turn = 0
    for tensor, of_tensor in zip(tensors, views, strict=True):
        if not is_dtensor(tensor) or tensor.device_mesh.size() == 1 or not _is_box(tensor, of_tensor):  # type: ignore[attr-defined]
            matrix = whole(tensor)
            found.append([_singular_values(view.of(matrix)) for view in of_tensor])
            continue
        shard = dtensor_shard(tensor)
        _, lines = owned.setdefault(id(shard.group), (shard.group, []))
        members = dist.get_process_group_ranks(shard.group)
        found.append([])
        for view in of_tensor:
            owner = members[turn % len(members)]
            turn += 1
            matrix_MN = _put_together(tensor, view, shard, owner)
            line_R = torch.zeros(min(view.shape), dtype=torch.float64)
            if dist.get_rank() == owner:
                line_R = _fill(line_R, _singular_values(matrix_MN))
            lines.append(line_R)
            found[-1].append(line_R)
    for group, lines in owned.values():
        _share(lines, group, local(tensors[0]).device)
    return [[_read(line_R) for line_R in of_tensor] for of_tensor in found]


def _is_box(tensor: Any, views: Views) -> bool:
    """Whether each rank's entries are rectangles of the stored matrix; told from what all ranks see alike."""
    return all(p.is_replicate() or (p.is_shard() and p.dim <= views.row_dims) for p in tensor.placements)


def _put_together(tensor: Any, view: MatrixView, shard: Shard, owner: int) -> Tensor:
    """The matrix, at its owner; elsewhere entries of no meaning."""
    mine = local(tensor)
    dtype = torch.promote_types(mine.dtype, torch.float32)  # not every backend adds half precision
    matrix_MN = torch.zeros(view.shape, dtype=dtype, device=mine.device)
    coordinates = tensor.device_mesh.get_coordinate()
    first_copy = all(c == 0 for c, p in zip(coordinates, tensor.placements, strict=True) if p.is_replicate())
    flat = mine.contiguous().reshape(-1)
    for block in blocks_of(view, shard) if first_copy else ():
        (top, bottom), (left, right) = block.target.rows, block.target.columns
        matrix_MN[top:bottom, left:right] = block.of(flat)
    dist.reduce(matrix_MN, dst=owner, group=shard.group)
    return matrix_MN


def _share(lines: Sequence[Tensor], group: Any, device: torch.device) -> None:
    """Give every rank what the owners found."""
    together = torch.cat(list(lines)).to(device)
    dist.all_reduce(together, group=group)
    for line_R, summed in zip(lines, together.cpu().split([len(line_R) for line_R in lines]), strict=True):
        line_R.copy_(summed)


def _fill(line_R: Tensor, sigma_R: Tensor) -> Tensor:
    return sigma_R if len(sigma_R) == len(line_R) else line_R.fill_(float(sigma_R[0]) if len(sigma_R) else _GAVE_UP)


def _read(line_R: Tensor) -> Tensor:
    if len(line_R) and bool(line_R.isnan().any()):
        return line_R[:1].fill_(torch.nan)
    return line_R[:0] if len(line_R) and float(line_R[0]) == _GAVE_UP else line_R


def _singular_values(tensor: Tensor) -> Tensor:
    try:
        matrix_MN = tensor.double()
        if not bool(torch.isfinite(matrix_MN).all()):
            return torch.full((1,), torch.nan, dtype=torch.float64)
        return torch.linalg.svdvals(matrix_MN).cpu()
    except (RuntimeError, MemoryError):  # of the solver, or no room for the copy: other ranks wait for an answer
        return torch.zeros(0, dtype=torch.float64)
