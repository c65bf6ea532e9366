"""One SGD step at any d through its Gram matrices alone: no embedding has d numbers.

Item i's score for output j is ``sum_k w_k (u_j . u_k)(v_k . v_i)``: inner products are all that counts, and those of
Gaussian vectors can be drawn without them. In a basis that begins with the H heaviest items (Gram-Schmidt), item
k of them has ``sqrt(chi^2(d - k) / d)`` on the diagonal and N(0, 1/d) before it (Bartlett), every other item N(0, 1/d)
in all H coordinates. What the items beyond the heads add is Gaussian with the variance they have. The mean output,
which the gradient takes out, is left in: it moves scores by 1/sqrt(N) of their noise.
"""

# N items, H heads, C outputs of a chunk

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_spectral.theory.problem import MemoryProblem

_HEADS = 1024
_ROWS = 4096
_STREAM = 0x6772616D  # keeps these draws apart from those of embeddings and batches


def sgd_recovered(problem: MemoryProblem, heads: int = _HEADS) -> NDArray[np.bool_]:
    """Whether one SGD step from W = 0 recovers each item, shape (N,), drawn with the problem's seed.

    Only the heads are tested: an item beyond them has no signal to speak of. Not the items of
    :class:`lightning_spectral.theory.embeddings.Embeddings`, but the same distribution.

    Args:
        problem: Isotropic and square.
        heads: Items that are drawn with each other, at most d and N.

    Raises:
        ValueError: The problem is anisotropic or rectangular.
    """
    if problem.anisotropy != 0 or problem.shape[0] != problem.shape[1]:
        raise ValueError(
            f"`anisotropy` must be 0 and `d_out` d for SGD by its Gram matrix, got {problem.anisotropy:g} and "
            f"{problem.shape[0]}; use a one-step run."
        )
    weights = problem.gradient_weights()
    order = np.argsort(-weights, kind="stable")
    count = min(heads, problem.d, problem.n_items, int((weights > 0).sum()))
    rng = torch.Generator().manual_seed(int(np.random.default_rng([problem.seed, _STREAM]).integers(2**62)))
    head_w_H = torch.from_numpy(weights[order[:count]].copy()).float()
    rest_energy = float((weights[order[count:]] ** 2).sum())
    head_v_HH, head_u_HH = (_triangle(count, problem.d, rng) for _ in range(2))
    gram_v_HH = head_v_HH @ head_v_HH.mT
    pull_HH = head_u_HH.mT @ (head_w_H[:, None] * gram_v_HH)  # coordinates of W v_i, a column per item
    noise = (rest_energy / problem.d) ** 0.5 / problem.d**0.5
    own_H, best_H = _scores_of_heads(head_u_HH @ pull_HH, noise, rng)
    size, spread = problem.n_items - count, problem.d**-0.5
    for first in range(0, size, _ROWS):
        rows = min(_ROWS, size - first)
        u_CH = torch.randn(rows, count, generator=rng) * spread
        score_CH = u_CH @ pull_HH
        # a rival's own share of the gradient: w_j |u_j|^2 (v_j . v_i)
        share_C = torch.from_numpy(weights[order[count + first : count + first + rows]].copy()).float()
        if bool(share_C.any()):
            score_CH += share_C[:, None] * spread * torch.randn(rows, count, generator=rng)
        if noise:
            score_CH += noise * torch.randn(rows, count, generator=rng)
        best_H = torch.maximum(best_H, score_CH.amax(0))
    recovered = np.zeros(problem.n_items, dtype=bool)
    recovered[order[:count]] = (own_H > best_H).numpy()
    return recovered


def _triangle(count: int, d: int, rng: torch.Generator) -> Tensor:
    """Coordinates of ``count`` Gaussian vectors N(0, I/d) in their own Gram-Schmidt basis, lower triangular."""
    made = torch.randn(count, count, generator=rng).tril(-1)
    freedom = torch.arange(d, d - count, -1, dtype=torch.float64)
    # chi^2(n) is Gamma(n/2) times two; torch's own sampler takes no generator, Wilson and Hilferty's cube is exact
    # to 1e-3 of its spread from n = 10 on, and the diagonal is close to 1 in any case
    normal = torch.randn(count, generator=rng, dtype=torch.float64)
    chi_square = freedom * (1 - 2 / (9 * freedom) + normal * (2 / (9 * freedom)).sqrt()).clamp(min=0.0) ** 3
    return (made + torch.diag(chi_square.sqrt().float())) / d**0.5


def _scores_of_heads(score_HH: Tensor, noise: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Own score and best rival among the heads, each shape (H,)."""
    score_HH = score_HH + noise * torch.randn(score_HH.shape, generator=rng)
    own_H = score_HH.diagonal().clone()
    score_HH.fill_diagonal_(-torch.inf)
    return own_H, score_HH.amax(0) if len(own_H) > 1 else torch.full_like(own_H, -torch.inf)
