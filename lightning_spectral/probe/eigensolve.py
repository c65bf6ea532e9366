"""All eigenvalues of a sample, in fp32 where that is as good: it takes 0.6 of fp64's time.

An eigenvalue from an fp32 solve is off by about ``eps * largest``. The soft rank feels that most where many modes are
rounding alone (a bucket of few distinct tokens), so its error is estimated from the eigenvalues themselves, and a
spectrum too steep is solved again in fp64. Renyi orders below 1 feel it more, but no more than they feel the fp32
products that the matrix was summed from: order 1/2 of 1,000 null modes is off by 5e-4 through the solve and by 1e-3
through the products, which no solve can mend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.functional.sample import Sample
from lightning_spectral.probe.lapack import eigenvalues

MIN_WIDTH = 512  # below, fp64 takes milliseconds
# Of the soft rank, by the estimate below. At this estimate it was off by 8e-6 (2,048 modes, 20 distinct rows): null
# modes err less than the largest, and half of their errors are negative and cut off.
TOLERANCE = 1e-4
_ERROR = torch.finfo(torch.float32).eps / 8  # of an eigenvalue, over the largest; typical, not the bound


class Eigensolver:
    """Solves the samples of one window: where one is too steep for fp32, no sample of as few rows is tried again.

    Args:
        exact: ``False`` takes every fp32 solve as it is: rounding moves a soft rank by up to 0.03 %, which is little
            beside what an approximate one may err (:mod:`~lightning_spectral.functional.approximate`).

    Attributes:
        fp64_up_to: Number of rows up to which fp64 is taken at once: the fewer rows, the steeper.
    """

    def __init__(self, *, exact: bool = True) -> None:
        self._exact = exact
        self.fp64_up_to = 0

    def __call__(self, own: Sample) -> Tensor:
        """All D eigenvalues, descending, in fp64.

        The matrix is a sum of squares: whatever is negative in its spectrum is rounding. Its entries are known to be
        finite by its trace, which the caller has looked at.
        """
        eigs = self._in_fp32(own)
        if eigs is None:
            eigs = eigenvalues(own.matrix_MM)
        eigs = eigs.flip(-1).clamp(min=0)
        return torch.cat([eigs, eigs.new_zeros(own.width - len(eigs))])

    def _in_fp32(self, own: Sample) -> Tensor | None:
        if own.product_dtype != torch.float32:
            return None
        if self._exact and (len(own.matrix_MM) < MIN_WIDTH or own.num_tokens <= self.fp64_up_to):
            return None
        low_MM = own.matrix_MM.to(torch.float32, copy=True)
        eigs = eigenvalues(low_MM, overwrite=True).to(own.matrix_MM.dtype)
        if not self._exact or is_accurate(eigs, own):
            return eigs
        self.fp64_up_to = own.num_tokens
        return None


def is_accurate(eigs: Tensor, own: Sample) -> bool:
    """Whether the soft rank of an fp32 solve's eigenvalues, ascending, is good to :data:`TOLERANCE`."""
    floor, total = _ERROR * eigs[-1], eigs.sum()
    trace, square = (total / own.trace - 1).abs(), (eigs.square().sum() / own.frobenius_sq - 1).abs()
    # of ln R_1 = -sum p ln p: errors of eigenvalues cancel, except in modes of rounding alone, which all add
    feels = (eigs.clamp(min=floor).div(total).log() + 1).abs() * (floor / total)
    rounding = eigs < 8 * floor
    soft = feels[~rounding].square().sum().sqrt() + feels[rounding].sum() / 2
    return bool(torch.stack([soft, trace, square]).max() <= TOLERANCE)
