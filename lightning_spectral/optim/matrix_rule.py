"""What an algorithm for matrices has to say: how momentum moves, and how whole matrices become an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.magnitude import answers_at_once, largest_magnitude

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
EPS_STYLES = ("relative", "absolute")
PEAK_DECAY = 0.999  # of the largest entry that `norm_eps` is relative to
PRECISIONS = ("auto", "bf16", "fp32", "fp64")
SEEN = ("gradient", "weight")  # whole matrices that a rule may ask for; each travels like the direction


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
    """Base of the algorithms; a new one overrides ``update_matrices`` and, if it keeps more state, ``extra_state``.

    A rule has no state of its own: everything that must survive a checkpoint is in the group (plain settings), in the
    momentum (laid out as the parameter) or in extra state (a flat fp32 array per matrix).
    """

    shares_over_replicas = True  # worth sending the result to ranks with a copy instead of repeating the work
    rewrites_momentum = False  # `update_matrices` changes the momentum it is given (Dion's error feedback)
    has_factors = False  # its update is a product of factors with Dion's settings and state, see ``low_rank``
    decays_weights = True  # decoupled weight decay acts beside the update
    also_sees: tuple[str, ...] = ()  # names in ``SEEN`` that `update_matrices` gets beside the direction, in `extra`

    def is_transposable(self, group: Group) -> bool:
        """Whether the transpose of a matrix becomes the transpose of its update, whatever its extra state."""
        return False

    def extra_state(self, shape: tuple[int, int], group: Group) -> dict[str, int]:
        """Name -> number of fp32 values kept with a matrix; at most M * N. Overriding methods add to it.

        One called ``count`` is the number of steps taken, which the rule moves; it then finds ``steps`` in ``extra``,
        on the host.
        """
        return {"peak": 1} if group["norm_eps_style"] == "relative" and group["norm_eps"] > 0 else {}

    def initial_state(self, name: str, shape: tuple[int, int], group: Group, index: int) -> Tensor | None:
        """First value of extra state, the same on every rank; zeros when None."""
        return None

    def dtype(self, group: Group, param_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Dtype in which the direction enters ``update_matrices`` and the update leaves it."""
        return compute_dtype(group["precision"], param_dtype, device)

    def shape_factor(self, shape: tuple[int, int], group: Group) -> float:
        """Factor on the learning rate for a matrix of this shape."""
        return LR_SCALES[group["lr_scale"]](*shape)

    def update_momentum(self, momenta: Sequence[Tensor], grads: Sequence[Tensor], group: Group) -> None:
        """Move the momentum of local parameters, in place."""
        if group["momentum_style"] == "ema":
            torch._foreach_lerp_(list(momenta), list(grads), 1 - group["momentum"])
        else:
            torch._foreach_mul_(list(momenta), group["momentum"])
            torch._foreach_add_(list(momenta), list(grads))

    def orthogonalizer_inputs(
        self, momenta: Sequence[Tensor], grads: Sequence[Tensor], group: Group
    ) -> Sequence[Tensor]:
        """What is to be orthogonalised, entry by entry, after ``update_momentum``."""
        if not group["nesterov"]:
            return momenta
        if group["momentum_style"] == "ema":
            return torch._foreach_lerp(list(grads), list(momenta), group["momentum"])
        return torch._foreach_add(list(grads), list(momenta), alpha=group["momentum"])

    def update_matrices(self, inputs_BMN: Tensor, extra: dict[str, list[Tensor]], group: Group) -> Tensor:
        """Turn whole directions of one shape into updates of the same shape and dtype.

        Args:
            inputs_BMN: Stacked directions, free to be overwritten.
            extra: Name -> one array per matrix, to be updated in place; with ``rewrites_momentum`` also
                ``momentum_buffer``, and what it ``also_sees``, which is free to be overwritten, each (M, N).
            group: Settings of the parameter group.
        """
        raise NotImplementedError


def fading(inputs_BMN: Tensor, extra: dict[str, list[Tensor]], group: Group) -> Tensor | None:
    """Factors (B, 1, 1) on the updates of matrices whose direction has all but vanished; None where that cannot be.

    A matrix without gradient (an expert that no token was routed to) would otherwise move at full size in the direction
    of its remaining momentum. Relative to the largest entry of the last ``1 / (1 - PEAK_DECAY)`` steps, which is
    updated here.
    """
    if "peak" not in extra:
        return None
    return fading_of(largest_magnitude(inputs_BMN).flatten(), extra, group)


def fading_of(largest: Tensor, extra: dict[str, list[Tensor]], group: Group) -> Tensor:
    """``fading`` from the largest magnitudes (B,) alone."""
    largest = largest.float()
    peaks = torch.maximum(torch.stack(extra["peak"]).view(-1).mul(PEAK_DECAY), largest)
    torch._foreach_copy_(extra["peak"], list(peaks.view(-1, 1).unbind(0)))
    return (largest / (peaks * group["norm_eps"])).nan_to_num(0.0).clamp(max=1.0).view(-1, 1, 1)


def faded(update_BMN: Tensor, factors: Tensor | None) -> Tensor:
    """Multiply updates by what ``fading`` gave, in place."""
    if factors is None or (answers_at_once(factors) and bool((factors == 1).all())):
        return update_BMN
    return update_BMN.mul_(factors.to(update_BMN.dtype))


def absolute_eps(group: Group) -> float:
    """``norm_eps`` where it is a Frobenius norm, else zero."""
    return float(group["norm_eps"]) if group["norm_eps_style"] == "absolute" else 0.0
