"""Rows of layers whose features are spread over ranks by tensor parallelism.

Axes: N rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.models.sites import Site


def whole_rows(rows_ND: Tensor, site: Site) -> Tensor:
    """All features of each row: shards under tensor parallelism are gathered; a plain slice is an error.

    Raises:
        ValueError: If only some of the D features are present.
    """
    width = site.width or rows_ND.shape[-1]
    if not hasattr(rows_ND, "full_tensor") and rows_ND.shape[-1] != width:
        rows_ND = _as_shard(rows_ND, site, width)
    if hasattr(rows_ND, "full_tensor"):
        rows_ND = rows_ND.full_tensor()
    if rows_ND.shape[-1] != width:
        raise ValueError(
            f"`{site.name}` shows {rows_ND.shape[-1]} of its {width} features: a slice of a tensor-parallel layer is "
            "not the layer. Use DTensor-based tensor parallelism (`parallelize_module`): its slices are assembled."
        )
    return rows_ND


def _as_shard(rows_ND: Tensor, site: Site, width: int) -> Tensor:
    """A local output of `ColwiseParallel` as the DTensor that its weight's placement says it is a shard of."""
    weight = getattr(site.module, "weight", None)
    mesh = getattr(weight, "device_mesh", None)
    if weight is None or mesh is None:
        return rows_ND
    from torch.distributed.tensor import DTensor, Shard

    tensor_mesh = mesh[mesh.mesh_dim_names[-1]] if mesh.ndim > 1 else mesh  # FSDP2 puts its own dimension first
    features_dim = 0 if site.site == "pre" else 1
    if weight.placements[-1] != Shard(features_dim):
        return rows_ND
    shape = torch.Size((rows_ND.shape[0], width))
    return DTensor.from_local(rows_ND, tensor_mesh, [Shard(1)], run_check=False, shape=shape, stride=(width, 1))
