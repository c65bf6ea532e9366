"""Layers that tensor parallelism spreads over ranks: their features, and the positions of what enters them.

Axes: N rows, D features.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.models.placement import is_dtensor, whole
from lightning_spectral.models.sites import Site


def tensor_mesh(model: nn.Module) -> Any:
    """The ranks that tensor parallelism spreads features over, as a 1-D ``DeviceMesh``; ``None`` without it.

    They are those of a weight that is cut by columns (``RowwiseParallel``), unless FSDP2 has cut it; a model of
    transformers (``tp_plan``), which keeps plain slices, has its mesh.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    for module in model.modules():
        own = vars(module)
        if own.get("_tp_size") and own.get("_device_mesh") is not None:  # of transformers
            mesh = _last_dim(own["_device_mesh"])
            return mesh if mesh.size() > 1 else None
    by_fsdp = _held_by_fsdp(model)
    for param in model.parameters():
        if is_dtensor(param) and param.placements[-1].is_shard(1):  # type: ignore[attr-defined]
            mesh = _last_dim(param.device_mesh)  # type: ignore[attr-defined]
            if mesh.size() > 1 and (param.device_mesh.ndim > 1 or id(param) not in by_fsdp):  # type: ignore[attr-defined]
                return mesh
    return None


def whole_positions(local: Tensor, leads: Iterable[tuple[int, ...]], mesh: Any) -> Tensor:
    """All positions of what enters or leaves a module: sequence parallelism leaves each rank some of them.

    Args:
        local: ``(..., D)`` as it was seen on this rank.
        leads: Leading shapes that it may have as a whole.
        mesh: Of the ranks that may have the rest; ``None``: there are none.

    Returns:
        All of it, a collective over the mesh, where this rank's share of a leading shape along one axis was seen; else
        as it was.
    """
    if mesh is None or is_dtensor(local):
        return whole(local)
    for lead in leads:
        apart = [axis for axis, (all_, own) in enumerate(zip(lead, local.shape, strict=False)) if all_ != own]
        if len(lead) == local.ndim - 1 and len(apart) == 1 and _share(lead[apart[0]], mesh) == local.shape[apart[0]]:
            return _gathered(local, apart[0], torch.Size((*lead, local.shape[-1])), mesh)
    return local


def _share(length: int, mesh: Any) -> int:
    """This rank's of so many, as ``torch.chunk`` deals them."""
    chunk = -(-length // mesh.size())
    return min(chunk, max(length - chunk * mesh.get_local_rank(), 0))


def _gathered(local: Tensor, axis: int, shape: torch.Size, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local.contiguous(), mesh, [Shard(axis)], run_check=False, shape=shape, stride=stride
    ).full_tensor()


def _last_dim(mesh: Any) -> Any:
    """FSDP2 puts its own dimension first."""
    return mesh[mesh.mesh_dim_names[-1]] if mesh.ndim > 1 else mesh


def _held_by_fsdp(model: nn.Module) -> set[int]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapped = [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]
    return {id(param) for module in wrapped for param in module.parameters()}


def whole_rows(rows_ND: Tensor, site: Site, mesh: Any = None) -> Tensor:
    """All features of each row: shards under tensor parallelism are gathered; a slice of unknown ranks is an error.

    Args:
        rows_ND: As they were seen on this rank.
        site: Where.
        mesh: Of the ranks that hold the rest, where the weight does not say.

    Raises:
        ValueError: If only some of the D features are present.
    """
    width = site.width or rows_ND.shape[-1]
    rows_ND = whole(rows_ND)
    if rows_ND.shape[-1] != width:
        rows_ND = _gathered_features(rows_ND, site, width, mesh)
    if rows_ND.shape[-1] != width:
        raise ValueError(
            f"`{site.name}` shows {rows_ND.shape[-1]} of its {width} features: a slice of a tensor-parallel layer is "
            "not the layer. Use DTensor-based tensor parallelism (`parallelize_module`): its slices are assembled."
        )
    return rows_ND


def _gathered_features(rows_ND: Tensor, site: Site, width: int, mesh: Any) -> Tensor:
    """A slice of the features, gathered as its weight's placement says, or else over the mesh that cut the model."""
    weight = getattr(site.module, "weight", None)
    placed = getattr(weight, "device_mesh", None)
    if weight is not None and placed is not None:
        mesh = _last_dim(placed) if weight.placements[-1].is_shard(0 if site.site == "pre" else 1) else None
    if mesh is None or rows_ND.shape[-1] != _share(width, mesh):
        return rows_ND
    return _gathered(rows_ND, 1, torch.Size((rows_ND.shape[0], width)), mesh)
