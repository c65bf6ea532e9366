"""The spectral entropy of endlessly many sequences, from few of them whose rows are alike.

Rows ``sqrt(1 - s) own + sqrt(s) common``, L to a sequence with one common part, span n - 1 directions about the mean of
weight ``1 - s + s L`` and N - n of weight ``1 - s``: a sample of weighted rows, which
:mod:`~lightning_spectral.functional.few_rows` takes back to what is behind it, if the common part is spread over the
features as the rows are. The entropy that this model expects of all rows and of parts of them gives a curve, and the
difference that is seen between them a factor on it.

Axes: M eigenvalues, W weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from lightning_spectral.functional.few_rows import RowWeights, entropy_of_rows, population

_ROW_WEIGHTS = 8
_MOST = 0.95  # of the variance may be common


@dataclass(frozen=True)
class Likeness:
    """Second moments of the row weights, from three hard ranks of one sample.

    Attributes:
        of_rows: Of rows by themselves; 1 where none is longer than others.
        of_sequences: What sequences add.
    """

    of_rows: float
    of_sequences: float

    @classmethod
    def of(cls, num_rows: int, hard_rank: float, as_if_independent: float, across: float) -> Likeness:
        """From ``1 / R_N - 1 / R = moment / N``.

        Args:
            num_rows: N.
            hard_rank: Of the sample, R_N.
            as_if_independent: R from :func:`~lightning_spectral.functional.rank.debiased_hard_rank`.
            across: R from products of rows of different sequences.
        """
        own = num_rows * (1 / hard_rank - 1 / as_if_independent)
        return cls(max(own, 1.0), max(num_rows * (1 / as_if_independent - 1 / across), 0.0))

    @property
    def share_of_sequences(self) -> float:
        """Of what makes rows other than independent and alike long."""
        both = self.of_sequences + self.of_rows - 1
        return self.of_sequences / both if both > 0 else 0.0

    def weights(self, num_rows: int, num_sequences: float) -> RowWeights:
        """Of the directions that so many rows of so many sequences span; lognormal among the rows of a sequence."""
        length = max(num_rows / num_sequences, 1.0)
        common = min(math.sqrt(self.of_sequences / max(length - 1, 1e-9)), _MOST)
        nodes_W, shares_W = _normal()
        variance = math.log(self.of_rows)
        own_W = (nodes_W * math.sqrt(variance) - variance / 2).exp() * (1 - common)
        between = min(max(num_sequences - 1, 1), num_rows - 1)
        return RowWeights.of(
            torch.cat([own_W.new_tensor([1 - common + common * length]), own_W]),
            torch.cat([own_W.new_tensor([between]), shares_W * (num_rows - between)]),
        )


@lru_cache(maxsize=1)
def _normal() -> tuple[Tensor, Tensor]:
    """Nodes and shares that have the first moments of a normal distribution."""
    nodes_W, shares_W = (torch.from_numpy(part) for part in hermegauss(_ROW_WEIGHTS))
    return nodes_W, shares_W / shares_W.sum()


def entropy_of_endless(
    eigs_M: Float[Tensor, " M"],
    entropy: float,
    width: int,
    num_rows: int,
    num_sequences: int,
    parts: Sequence[tuple[float, int]],
    likeness: Likeness,
) -> float:
    """Spectral entropy, nats, that endlessly many sequences would show.

    Args:
        eigs_M: Eigenvalues of the sample covariance, >= 0, not all zero.
        entropy: Their spectral entropy, nats.
        width: D.
        num_rows: N.
        num_sequences: That the rows come from.
        parts: Entropy and number of rows of parts of the sample that are whole sequences; at least one.
        likeness: How alike the rows of a sequence are.

    Returns:
        The entropy; NaN where parts and all should show the same, or no spectrum is found behind the sample.
    """
    try:
        behind = population(eigs_M, num_rows, width, likeness.weights(num_rows, num_sequences))
    except RuntimeError:  # the fit on the grid does not settle
        return math.nan
    shown = entropy_of_rows(behind, num_rows)
    rows = max(1, round(len(parts) / sum(1 / size for _, size in parts)))  # what is hidden goes as 1 / N
    fall = shown - entropy_of_rows(behind, rows, likeness.weights(rows, num_sequences * rows / num_rows))
    seen_fall = entropy - sum(of_part for of_part, _ in parts) / len(parts)
    return entropy + seen_fall / fall * (behind.entropy - shown) if fall > 1e-9 else math.nan
