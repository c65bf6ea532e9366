"""All eigenvalues of a sample, in fp32 where that is as good: it takes 0.6 to 0.7 of fp64's time.

An eigenvalue from an fp32 solve is off by about ``eps * largest``, most of it cancels in a rank: soft and hard rank of
1,000 modes differ by 5e-7 from the fp64 solve. What suffers first are Renyi orders below 1, to which the smallest modes
count most; so the error of order 1/2 is estimated from the eigenvalues themselves, and a spectrum too steep is solved
again in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.functional.sample import Sample

MIN_WIDTH = 512  # below, fp64 takes milliseconds
# The products were made in fp32 too, and err by as much. Measured errors are 3 to 10 times below the estimate.
TOLERANCE = 1e-5
_ERROR = torch.finfo(torch.float32).eps / 8  # of an eigenvalue, over the largest; typical, not the bound


class Eigensolver:
    """Solves the samples of one window: after the first that is too steep for fp32, all in fp64."""

    def __init__(self) -> None:
        self.fp32 = True

    def __call__(self, own: Sample) -> Tensor:
        """All D eigenvalues, descending, in fp64.

        The matrix is a sum of squares: whatever is negative in its spectrum is rounding. Its entries are known to be
        finite by its trace, which the caller has looked at.
        """
        eigs = None
        if self.fp32 and own.product_dtype == torch.float32 and len(own.matrix_MM) >= MIN_WIDTH:
            eigs = torch.linalg.eigvalsh(own.matrix_MM.float()).to(own.matrix_MM.dtype)
            self.fp32 = is_accurate(eigs, own)
        if eigs is None or not self.fp32:
            eigs = torch.linalg.eigvalsh(own.matrix_MM)
        eigs = eigs.flip(-1).clamp(min=0)
        return torch.cat([eigs, eigs.new_zeros(own.width - len(eigs))])


def is_accurate(eigs: Tensor, own: Sample) -> bool:
    """Whether an fp32 solve's eigenvalues, ascending, are good for every rank to :data:`TOLERANCE`."""
    floor = _ERROR * eigs[-1]
    kept = eigs.clamp(min=floor)
    # first-order error of ln R_1/2 = 2 ln sum sqrt(l), from independent errors of the eigenvalues
    order_half = floor * kept.reciprocal().sum().sqrt() / kept.sqrt().sum()
    trace, square = (eigs.sum() / own.trace - 1).abs(), (eigs.square().sum() / own.frobenius_sq - 1).abs()
    return bool(torch.stack([order_half, trace, square]).max() <= TOLERANCE)
