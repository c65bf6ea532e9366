"""Which matrices are worth one batched product: those of one shape, dtype and device, as many as fit a cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# Of the stack; a larger batch is cut. On a CPU a step at d = 128 and 256 takes the same time with 2, 4 and 8 MiB, and a
# tenth more with 1; above a short side of 256 one product fills the core. A GPU wants few launches: on an H200 one
# matrix of 768 x 3,072 takes as long to launch as a dozen of them to multiply.
_CPU_BATCH_BYTES, _CPU_SHORT_SIDE = 1 << 21, 256
_BATCH_BYTES = 64 << 20


def same_shape_runs(
    matrices: Sequence[Tensor], batch: bool = True, device: torch.device | None = None
) -> list[list[int]]:
    """Indices of matrices that share shape, dtype and device, in runs worth one batched product.

    Args:
        matrices: Each (M, N).
        batch: False makes every matrix a run of its own.
        device: Where the products will run, if ``matrices`` are only shells; that of each matrix when None.

    Raises:
        ValueError: If an entry does not have two dimensions.
    """
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        if matrix.ndim != 2:
            raise ValueError(f"`matrices[{i}]` must have two dimensions, got shape {tuple(matrix.shape)}.")
        alike[(matrix.shape, matrix.dtype, matrix.device)].append(i)
    runs: list[list[int]] = []
    for members in alike.values():
        first = matrices[members[0]]
        on_cpu = (device or first.device).type == "cpu"
        most = (_CPU_BATCH_BYTES if min(first.shape) <= _CPU_SHORT_SIDE else 0) if on_cpu else _BATCH_BYTES
        size = max(1, most // max(1, first.nbytes)) if batch else 1
        count = -(-len(members) // size)
        ends = [len(members) * i // count for i in range(count + 1)]  # as even as can be: 6 and 6, not 8 and 4
        runs.extend(members[low:high] for low, high in pairwise(ends))
    return runs
