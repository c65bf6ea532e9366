"""All eigenvalues of a sample, in fp32 where that is as good: it takes 0.6 to 0.7 of fp64's time.

An eigenvalue from an fp32 solve is off by about ``eps * largest``, most of it cancels in a rank: soft and hard rank of
1,000 modes differ by 5e-7 from the fp64 solve. What suffers first are Renyi orders below 1, to which the smallest modes
count most; so the error of order 1/2 is estimated from the eigenvalues themselves, and a spectrum too steep is solved
again in fp64. (The fp32 products cost such a spectrum ten times as much: order 1/2 of null modes is off by 1e-3.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.functional.sample import Sample

MIN_WIDTH = 512  # below, fp64 takes milliseconds
# Of order 1/2. At this estimate it was off by 1e-5 at most and the soft rank by 2e-7 (untrained FFNs, D = 1,024).
TOLERANCE = 3e-5
_ERROR = torch.finfo(torch.float32).eps / 8  # of an eigenvalue, over the largest; typical, not the bound


class Eigensolver:
    """Solves the samples of one window: where one is too steep for fp32, no sample of as few rows is tried again.

    Attributes:
        fp64_up_to: Number of rows up to which fp64 is taken at once: the fewer rows, the steeper.
    """

    def __init__(self) -> None:
        self.fp64_up_to = 0

    def __call__(self, own: Sample) -> Tensor:
        """All D eigenvalues, descending, in fp64.

        The matrix is a sum of squares: whatever is negative in its spectrum is rounding. Its entries are known to be
        finite by its trace, which the caller has looked at.
        """
        eigs = self._in_fp32(own)
        if eigs is None:
            eigs = torch.linalg.eigvalsh(own.matrix_MM)
        eigs = eigs.flip(-1).clamp(min=0)
        return torch.cat([eigs, eigs.new_zeros(own.width - len(eigs))])

    def _in_fp32(self, own: Sample) -> Tensor | None:
        if own.product_dtype != torch.float32 or len(own.matrix_MM) < MIN_WIDTH or own.num_rows <= self.fp64_up_to:
            return None
        eigs = torch.linalg.eigvalsh(own.matrix_MM.float()).to(own.matrix_MM.dtype)
        if is_accurate(eigs, own):
            return eigs
        self.fp64_up_to = own.num_rows
        return None


def is_accurate(eigs: Tensor, own: Sample) -> bool:
    """Whether an fp32 solve's eigenvalues, ascending, are good for every rank to :data:`TOLERANCE`."""
    floor = _ERROR * eigs[-1]
    kept = eigs.clamp(min=floor)
    # of ln R_1/2 = 2 ln sum sqrt(l): independent errors of the eigenvalues, and modes of rounding alone, which all add
    independent, rounding = floor * kept.reciprocal().sum().sqrt(), (eigs < 8 * floor).sum() * floor.sqrt()
    order_half = (independent + rounding) / kept.sqrt().sum()
    trace, square = (eigs.sum() / own.trace - 1).abs(), (eigs.square().sum() / own.frobenius_sq - 1).abs()
    return bool(torch.stack([order_half, trace, square]).max() <= TOLERANCE)
