"""How unevenly a map knows its items (arXiv:2509.26030): the gap Delta, and rho, the worst item once the best is known.

Both are functions of the probability ``f_i`` that the softmax over all outputs gives to item i's own output.
"""

# N items, D features

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.theory.embeddings import Embeddings
from lightning_spectral.theory.gradient import log_probabilities

_BISECTIONS = 50


@dataclass(frozen=True)
class Imbalance:
    """Spread of the correct probabilities over items.

    Attributes:
        best: Largest ``f_i``.
        worst: Smallest ``f_i``.
    """

    best: float
    worst: float

    @property
    def delta(self) -> float:
        """``Delta = max_ij f_i - f_j``, in [0, 1]; 0 where all items are known equally well."""
        return self.best - self.worst


def imbalance(log_probability_N: Tensor) -> Imbalance:
    """Best and worst item of ``log f_i``, shape (N,), as :func:`log_probabilities` gives it."""
    return Imbalance(math.exp(float(log_probability_N.max())), math.exp(float(log_probability_N.min())))


def rho(embeddings: Embeddings, direction_MD: Tensor, epsilon: float = 0.1, chunk_size: int = 1024) -> float:
    """Worst correct probability along ``W = t direction`` at the first t where the best one reaches ``1 - epsilon``.

    One step of a rule from W = 0, its step size chosen so that one item is known: 1 - epsilon for a rule that serves
    all items alike, near 0 for one that serves the frequent ones. About 60 passes of ``2 N^2 D`` operations.

    Args:
        embeddings: The items.
        direction_MD: The step, shape (M, D).
        epsilon: In (0, 1), below ``1 - 1/N``.
        chunk_size: Items whose scores are held at once.

    Raises:
        ValueError: ``epsilon`` out of range, or no scale up to 2^40 over the direction's norm makes any item known.
    """
    if not 0 < epsilon < 1 - 1 / embeddings.problem.n_items:
        raise ValueError(f"`epsilon` must lie in (0, 1 - 1/N), got {epsilon}.")
    norm = float(torch.linalg.matrix_norm(direction_MD))
    if norm == 0:
        raise ValueError("`direction` is all zero: it makes no item known.")

    def at(scale: float) -> Imbalance:
        return imbalance(log_probabilities(embeddings, direction_MD * (scale / norm), chunk_size))

    low, high = 0.0, 1.0
    while at(high).best < 1 - epsilon:
        low, high = high, 2 * high
        if high > 2**40:
            raise ValueError("`direction` never makes an item known: it is nobody's best output.")
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle).best >= 1 - epsilon else (middle, high)
        if high - low < 1e-9 * high:
            break
    return at(high).worst
