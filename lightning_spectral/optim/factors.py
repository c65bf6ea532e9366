"""The factors of a low-rank update: orthonormal columns on the left, unit rows on the right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# B matrices of one shape, M rows, N columns, R rank of the update
_ALIGN_BYTES = 64  # the widest vector register, and torch's own alignment on a CPU


def next_right_factor(right_BRN: Tensor, old_BRN: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(the right factor of this update, what is kept for the next step).

    Args:
        right_BRN: ``P^T B``.
        old_BRN: The factor of the last step; what is kept is written over it.
        group: Settings; ``orthogonal_right`` counts.
    """
    length = right_BRN.norm(dim=-1, keepdim=True)
    if group["orthogonal_right"]:
        new_BRN = orthonormal_columns(right_BRN.mT).mT
        # QR leaves the signs of its columns open; the update must point along B.
        new_BRN = new_BRN * torch.where((new_BRN * right_BRN).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    else:
        new_BRN = right_BRN / length.where(length > 0, 1.0)
    empty = length == 0
    # A direction that saw nothing keeps its old row: a zero row could never come back.
    kept_BRN = torch.where(empty, old_BRN, new_BRN, out=old_BRN)
    return new_BRN.masked_fill_(empty, 0.0), kept_BRN


def orthonormal_columns(tall_BMR: Tensor) -> Tensor:
    """Q of the QR decomposition of each matrix, the same to the last bit whatever else is in the batch.

    LAPACK's rounding depends on how a matrix is aligned in memory: where the matrices of a batch are not a multiple of
    a vector register long, the second one gets other last bits than it gets alone. One process and the ranks of FSDP
    batch different matrices, and with bf16 weights training amplifies a last bit to 1e-2 of the update in 20 steps.
    Rows of zeros, which change nothing in exact arithmetic, align every column; common widths need none.

    Args:
        tall_BMR: (B, M, R) with M >= R.

    Returns:
        (B, M, R), orthonormal columns.
    """
    rows = tall_BMR.shape[-2]
    padding = -rows % (_ALIGN_BYTES // tall_BMR.element_size())
    padded = torch.nn.functional.pad(tall_BMR, (0, 0, 0, padding)) if padding else tall_BMR
    return torch.linalg.qr(padded)[0][:, :rows]
