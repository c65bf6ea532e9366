"""How large a matrix is, and the power of two that makes it near one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unit_scale(matrix: Tensor) -> Tensor:
    """Power of two (..., 1, 1) that brings the largest magnitude of (..., M, N) near one; one for a zero matrix.

    Multiplying by it is exact. It is limited to normal numbers, so that what is subnormal may stay as small as 2^-23.
    """
    largest = largest_magnitude(matrix)
    wide = largest.to(torch.promote_types(largest.dtype, torch.float32))
    exponent = torch.frexp(wide).exponent
    limit = 1022 if wide.dtype == torch.float64 else 126
    factor = torch.ldexp(torch.ones_like(wide), -exponent.clamp(-limit, limit))
    return factor.to(matrix.dtype)


def largest_magnitude(matrix: Tensor) -> Tensor:
    """Largest absolute entry (..., 1, 1) of (..., M, N); NaN where there is one."""
    if matrix.device.type == "cpu":
        each = largest_magnitudes(matrix.reshape(-1, *matrix.shape[-2:]).unbind(0))
        return torch.stack(each).view(*matrix.shape[:-2], 1, 1)
    return torch.linalg.vector_norm(matrix, float("inf"), dim=(-2, -1), keepdim=True)


def largest_magnitudes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same of tensors of any shape, none empty, one scalar each."""
    if all(tensor.device.type == "cpu" for tensor in tensors):  # its maximum norm is twenty times as slow
        return [torch.maximum(high, -low) for low, high in map(torch.aminmax, tensors)]
    return list(torch._foreach_norm(list(tensors), float("inf")))


def answers_at_once(tensor: Tensor) -> bool:
    """Whether the host may ask for a value: on a GPU it would wait for all that was launched."""
    return tensor.device.type == "cpu"
