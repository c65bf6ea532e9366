"""A symmetric matrix as its upper strips, packed into one vector: 9/16 of the entries and of the work.

Axes: D features, P packed entries of a symmetric D x D matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Upper strips of a symmetric matrix: 8 strips do 9/16 of the full product's work; more of them only get thinner.
NUM_STRIPS = 8


def strip_bounds(width: int) -> list[tuple[int, int]]:
    """Row ranges of the upper strips; strip ``(a, b)`` holds columns ``a`` to ``width``."""
    height = max(-(-width // NUM_STRIPS), 1)
    return [(start, min(start + height, width)) for start in range(0, width, height)]


def packed_size(width: int) -> int:
    """Entries P of a packed symmetric ``width x width`` matrix."""
    return sum((stop - start) * (width - start) for start, stop in strip_bounds(width))


def strip_views(packed_P: Tensor, width: int) -> list[Tensor]:
    """The strips of one packed matrix as views, each ``(rows, width - first row)``."""
    views, offset = [], 0
    for start, stop in strip_bounds(width):
        shape = (stop - start, width - start)
        views.append(packed_P[offset : offset + shape[0] * shape[1]].view(shape))
        offset += shape[0] * shape[1]
    return views


def unpack(packed_P: Tensor, width: int, dtype: torch.dtype | None = None) -> Float[Tensor, "D D"]:
    """The full symmetric matrix of one packed vector, in its own or another type."""
    matrix_DD = packed_P.new_empty(width, width, dtype=dtype)
    for (start, stop), strip in zip(strip_bounds(width), strip_views(packed_P, width), strict=True):
        matrix_DD[start:stop, start:] = strip
        matrix_DD[start:, start:stop] = strip.mT
    return matrix_DD


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """Type of the O(D) sums: fp64 where the device has it (Apple's GPU does not)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def packed_trace(packed_P: Tensor, width: int) -> Tensor:
    """Trace of a packed symmetric matrix, in fp64 where there is fp64."""
    high = sum_dtype(packed_P.device)
    return torch.stack([strip.diagonal().sum(dtype=high) for strip in strip_views(packed_P, width)]).sum()


def packed_matvec(strips: Sequence[Tensor], vector_D: Tensor) -> Tensor:
    """The symmetric matrix times a vector, in the vector's type."""
    result_D = torch.zeros_like(vector_D)
    start = 0
    for strip in strips:
        stop = start + strip.shape[0]
        high = strip.to(vector_D.dtype)
        result_D[start:stop] += high @ vector_D[start:]
        result_D[stop:] += high[:, stop - start :].mT @ vector_D[start:stop]
        start = stop
    return result_D
