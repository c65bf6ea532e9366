"""What an algorithm for matrices has to say: how momentum moves, and how whole matrices become an update."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# B matrices of one shape, M rows, N columns

Group = dict[str, Any]

# (M, N) -> factor on the learning rate. `match_rms_adamw`: arXiv:2502.16982; `original`: Keller Jordan; `spectral`: one
# unit of learning rate moves outputs of unit-RMS inputs by one unit RMS, as the paper's runs do.
LR_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "spectral": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}

MOMENTUM_STYLES = ("ema", "heavy_ball")
PRECISIONS = ("auto", "bf16", "fp32", "fp64")


def compute_dtype(precision: str, param_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision of the products: ``auto`` takes bf16 where the hardware multiplies it natively, never fp16."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    if param_dtype == torch.float64:
        return torch.float64
    if device.type in ("cuda", "xpu") or (device.type == "cpu" and _cpu_multiplies_bf16()):
        return torch.bfloat16
    return torch.float32


@lru_cache(maxsize=1)
def _cpu_multiplies_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class MatrixRule:
    """Base of the algorithms; a new one overrides ``update_matrices`` and, if it keeps more state, ``companions``.

    A rule has no state of its own: everything that must survive a checkpoint is in the group (plain settings), in the
    momentum (laid out as the parameter) or in companions (a flat fp32 array per matrix).
    """

    rewrites_momentum = False  # `update_matrices` changes the momentum it is given (Dion's error feedback)
    shares_over_replicas = True  # worth sending the result to the other DDP ranks instead of repeating the work

    def companions(self, shape: tuple[int, int], group: Group) -> dict[str, int]:
        """Name -> number of fp32 values kept with a matrix; at most M * N."""
        return {}

    def initial_companion(self, name: str, shape: tuple[int, int], group: Group, index: int) -> Tensor | None:
        """First value of a companion, the same on every rank; zeros when None."""
        return None

    def dtype(self, group: Group, param_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Dtype in which the direction enters ``update_matrices`` and the update leaves it."""
        return compute_dtype(group["precision"], param_dtype, device)

    def shape_factor(self, shape: tuple[int, int], group: Group) -> float:
        """Factor on the learning rate for a matrix of this shape."""
        return LR_SCALES[group["lr_scale"]](*shape)

    def advance(self, momentum: Tensor, grad: Tensor, group: Group) -> None:
        """Move the momentum of one local piece, in place."""
        if group["momentum_style"] == "ema":
            momentum.lerp_(grad, 1 - group["momentum"])
        else:
            momentum.mul_(group["momentum"]).add_(grad)

    def direction(self, momentum: Tensor, grad: Tensor, group: Group) -> Tensor:
        """What is to be orthogonalised, for one local piece, after ``advance``."""
        if not group["nesterov"]:
            return momentum
        if group["momentum_style"] == "ema":
            return grad.lerp(momentum, group["momentum"])
        return grad.add(momentum, alpha=group["momentum"])

    def update_matrices(self, directions_BMN: Tensor, companions: dict[str, list[Tensor]], group: Group) -> Tensor:
        """Turn whole directions of one shape into updates of the same shape and dtype.

        Args:
            directions_BMN: Stacked directions, free to be overwritten.
            companions: Name -> one array per matrix, to be updated in place; with ``rewrites_momentum`` also
                ``momentum_buffer``, each (M, N).
            group: Settings of the parameter group.
        """
        raise NotImplementedError
