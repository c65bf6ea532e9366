"""The spectrum behind a sample of few rows, and what more rows of the same kind would have shown.

Rows ``x_i = sqrt(tau_i) C^(1/2) z_i``, N of them with D features, both large, show the eigenvalues of C through a noise
that is known (Marchenko and Pastur 1967; with row weights tau, Paul and Silverstein 2009). With
``A(s) = mean of 1 / (l + s)`` over the D eigenvalues l of the sample covariance and t the eigenvalues of C,

    s A(s) = mean_t 1 / (1 + t g / s),   g = mean_i tau_i / (1 + tau_i e),   e g = (D / N) (1 - s A(s)),   all s > 0.

The last two give e and g from the sample; the first is linear in the distribution of t, which a non-negative
least-squares fit on a grid gives back from fewer rows than features (after El Karoui 2008). The other way round they
say what any number of rows shows, and the entropy follows from A alone, by
``l ln l = integral over s of l / (1 + s) - 1 + s / (l + s)``.

Activations need the weights: a nonlinearity such as relu^2 makes some rows ten times as long as others.

Axes: N rows, W of their weights, D features, M eigenvalues, J values of the grid, S places where A is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_GRID, _PLACES, _NODES = 100, 60, 80
_MAX_WEIGHTS = 64  # of rows: more are replaced by quantiles
_FARTHEST, _NEAR, _MOST_STEPS = 60.0, 1e-10, 80  # of a logarithm that is sought
_SMALLEST = 1e-3  # eigenvalue told apart from 0, over the mean one


@dataclass(frozen=True)
class RowWeights:
    """How much rows, or other independent directions of a sample, weigh.

    Attributes:
        weights_W: Weights tau, mean 1.
        shares_W: Share of the rows that has each; they sum to 1.
    """

    weights_W: Tensor
    shares_W: Tensor

    @classmethod
    def from_norms(cls, norms_N: Float[Tensor, " N"], hard_rank: float) -> RowWeights:
        """From squared norms about the mean, which differ by 2 / hard rank (relative variance) without any weights.

        Args:
            norms_N: At least 4, not all zero.
            hard_rank: Unbiased participation ratio.
        """
        norms_N = norms_N.detach().double().cpu()
        logs_N = (norms_N / norms_N.mean()).clamp(min=1e-6).log()
        variance = float((norms_N / norms_N.mean()).var())
        own = max(0.0, 1 - 2 / max(hard_rank, 1.0) / max(variance, 1e-12))
        weights_W = (logs_N * math.sqrt(own)).exp()
        if len(weights_W) > _MAX_WEIGHTS:
            weights_W = torch.quantile(weights_W, _quantiles(_MAX_WEIGHTS))
        return cls.of(weights_W, torch.ones_like(weights_W))

    @classmethod
    def of(cls, weights_W: Tensor, counts_W: Tensor) -> RowWeights:
        """Weights and numbers of rows, both up to a factor."""
        shares_W = counts_W / counts_W.sum()
        return cls(weights_W / (weights_W @ shares_W), shares_W)


@dataclass(frozen=True)
class Population:
    """What rows are drawn from.

    Attributes:
        values_J: Eigenvalues of the covariance, over the mean eigenvalue.
        masses_J: Share of the D eigenvalues that is each; they sum to 1.
        rows: What the rows were.
        width: D.
    """

    values_J: Tensor
    masses_J: Tensor
    rows: RowWeights
    width: int

    @property
    def entropy(self) -> float:
        """Spectral entropy, nats; ``exp`` of it is the soft rank of endlessly many rows."""
        return math.log(self.width) - float((self.masses_J * self.values_J * self.values_J.log()).sum())


def population(eigs_M: Float[Tensor, " M"], num_rows: int, width: int, rows: RowWeights) -> Population:
    """What a sample was drawn from.

    Args:
        eigs_M: Eigenvalues of the sample covariance (or Gram) matrix, >= 0, in any order and up to one factor.
        num_rows: N.
        width: D.
        rows: Their weights.

    Raises:
        ValueError: If there are fewer than 4 rows, or no eigenvalue is above 0.
    """
    if num_rows < 4 or not float(eigs_M.sum()) > 0:
        raise ValueError(f"a spectrum needs at least 4 rows that differ, got {num_rows}.")
    freedom = num_rows - 1
    eigs_M = eigs_M.detach().double().cpu().sort(descending=True).values[: min(freedom, width)]
    eigs_M = eigs_M * (width / eigs_M.sum())  # the mean over D is 1
    largest = float(eigs_M[0])
    places_S = _between(1e-2 * min(1.0, width / freedom), 3 * largest, _PLACES)
    # s A(s), without the digits lost in 1 - (1 - x)
    rest_S = (eigs_M / (eigs_M + places_S.unsqueeze(1))).sum(1) / width
    product_S = (rest_S * width / freedom).clamp(max=1 - 1e-9)  # e g

    def off(log_e_S: Tensor) -> tuple[Tensor, Tensor]:
        left_SW = 1 / (1 + rows.weights_W * log_e_S.exp().unsqueeze(1))
        return 1 - left_SW @ rows.shares_W - product_S, (left_SW * (1 - left_SW)) @ rows.shares_W

    e_S = _root(off, (product_S / (1 - product_S)).log()).exp()
    ratio_S = product_S / e_S / places_S  # g / s
    values_J = _between(_SMALLEST, 1.5 * largest, _GRID)
    seen_SJ = values_J * ratio_S.unsqueeze(1)
    seen_SJ = seen_SJ / (1 + seen_SJ)  # 1 - 1 / (1 + t g / s)
    sums_2J = 100 * torch.stack([torch.ones_like(values_J), values_J])  # total mass 1, mean 1
    masses_J = _non_negative(
        torch.cat([seen_SJ / rest_S.unsqueeze(1), sums_2J]),
        torch.cat([torch.ones_like(rest_S), torch.full((2,), 100.0, dtype=torch.float64)]),
    )
    kept = masses_J > 0
    values_J, masses_J = values_J[kept], masses_J[kept] / masses_J.sum()
    return Population(values_J / (values_J @ masses_J), masses_J, rows, width)


def entropy_of_rows(behind: Population, num_rows: int, rows: RowWeights | None = None) -> float:
    """Spectral entropy, nats, that a sample of this many rows shows on average.

    Args:
        behind: What they are drawn from.
        num_rows: N.
        rows: Their weights; default those of the rows that told what is behind.
    """
    freedom, values_J, rows = max(num_rows - 1, 1), behind.values_J, rows or behind.rows
    nodes_S = _between(1e-7, 1e7 * float(values_J.max()), _NODES)
    gain = behind.width / freedom

    def g_of(e_S: Tensor) -> tuple[Tensor, Tensor]:
        """``g`` and ``-e dg / de``."""
        left_SW = 1 / (1 + rows.weights_W * e_S.unsqueeze(1))
        weights_SW = rows.weights_W * left_SW
        return weights_SW @ rows.shares_W, (weights_SW * (1 - left_SW)) @ rows.shares_W

    def off(log_e_S: Tensor) -> tuple[Tensor, Tensor]:
        """``ln e`` less that of ``gain * mean of t / (s + t g)``, and its slope, which is positive."""
        g_S, fall_S = g_of(log_e_S.exp())
        held_SJ = values_J / (nodes_S.unsqueeze(1) + values_J * g_S.unsqueeze(1))
        mean_S = held_SJ @ behind.masses_J
        return log_e_S - (gain * mean_S).log(), 1 - fall_S * (held_SJ.square() @ behind.masses_J) / mean_S

    e_S = _root(off, (gain / (nodes_S + 1)).log()).exp()
    g_S, _ = g_of(e_S)
    held_S = (nodes_S.unsqueeze(1) / (nodes_S.unsqueeze(1) + values_J * g_S.unsqueeze(1))) @ behind.masses_J
    heights_S = (1 / (1 + nodes_S) - 1 + held_S) * nodes_S  # over ln s
    return math.log(behind.width) - float(torch.trapezoid(heights_S, nodes_S.log()))


def _quantiles(num: int) -> Tensor:
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


def _root(off: Callable[[Tensor], tuple[Tensor, Tensor]], first_S: Tensor) -> Tensor:
    """Where a rising function is zero: Newton's steps, halved where they would leave what is known to hold the root.

    Args:
        off: Value and slope at each place.
        first_S: Where to begin.
    """
    at_S = first_S.clamp(-_FARTHEST, _FARTHEST)
    low_S, high_S = torch.full_like(at_S, -_FARTHEST), torch.full_like(at_S, _FARTHEST)
    for _ in range(_MOST_STEPS):
        value_S, slope_S = off(at_S)
        above_S = value_S > 0
        low_S, high_S = torch.where(above_S, low_S, at_S), torch.where(above_S, at_S, high_S)
        next_S = at_S - value_S / slope_S
        inside_S = (next_S >= low_S) & (next_S <= high_S)
        next_S = torch.where(inside_S, next_S, (low_S + high_S) / 2)
        moved, at_S = float((next_S - at_S).abs().max()), next_S
        if moved < _NEAR:
            break
    return at_S


def _between(low: float, high: float, num: int) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), num, dtype=torch.float64)


def _non_negative(matrix: Tensor, right: Tensor) -> Tensor:
    from scipy.optimize import nnls

    return torch.from_numpy(nnls(matrix.numpy(), right.numpy(), maxiter=50 * matrix.shape[1])[0])
