"""The spectrum of a memory's gradient from the item weights alone: no matrix, no fit, no random number.

For ``G = sum_i w_i u_i v_i^T`` with independent Gaussian u and v, resolvents concentrate. Write
``a(y) = (1/d) tr y (G G^T + y^2)^-1`` and ``b(y) = (1/d) tr Sigma y (G^T G + y^2)^-1``, Sigma the covariance of v
scaled to mean eigenvalue 1. Taking one item out and putting it back gives

    u_i^T G (G^T G + y^2)^-1 v_i = w_i c / (1 + w_i^2 c),    c = a b,

and with ``T(c) = (1/d) sum_i w_i^2 c / (1 + w_i^2 c)`` the two traces close:

    y^2 = T (1 - T) / (t c),    (1/d) sum_k t s_k / (1 + t s_k) = T,    y b = T / t.

Everything is explicit in c, so a grid over c is the whole solution. Isotropic inputs have ``t = T / (1 - T)``, hence
``y = (1 - T) / sqrt(c)``: the equation ``g y + T = 1`` of the design page with ``g^2 = c``.
"""

# B bins of items with (nearly) equal weight, C points of the grid over c, K directions of v

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Array = NDArray[np.float64]

_GRID = 1500
_BIN_WIDTH = 0.004  # relative; each bin keeps its exact mean, so sums over items err by its square


@dataclass(frozen=True)
class WeightBins:
    """Items with nearly equal weight, put together.

    Attributes:
        value: Mean weight of each bin, descending, > 0, shape (B,).
        multiplicity: Items in it, shape (B,).
        bin_of_item: Bin of each item, -1 for items without weight, shape (N,).
    """

    value: Array
    multiplicity: Array
    bin_of_item: NDArray[np.int64]

    def spread(self, per_bin: Array, without_weight: float) -> Array:
        """Per-bin numbers handed back to the items, shape (N,)."""
        return np.append(per_bin, without_weight)[self.bin_of_item]


def bin_weights(weights: Array) -> WeightBins:
    """Put items together whose weights differ by less than 0.4 %."""
    active = np.flatnonzero(weights > 0)
    key = np.floor(-np.log(weights[active] / weights.max()) / _BIN_WIDTH).astype(np.int64)
    _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
    value = np.bincount(inverse, weights[active]) / counts
    bin_of_item = np.full(len(weights), -1, dtype=np.int64)
    bin_of_item[active] = inverse
    return WeightBins(value, counts.astype(np.float64), bin_of_item)


class GradientSpectrum:
    """The map c -> (T, t, y) of one set of weights.

    Args:
        bins: Item weights.
        input_scales: Eigenvalues s_k of Sigma, mean 1, shape (D,).
    """

    def __init__(self, bins: WeightBins, input_scales: Array) -> None:
        self.bins = bins
        self.d = len(input_scales)
        self._isotropic = bool(np.ptp(input_scales) == 0)
        self.scales = input_scales
        smallest, largest = 1e-13 / bins.value[0] ** 2, 1e13 / bins.value[-1] ** 2
        self.rank_deficient = bins.multiplicity.sum() <= self.d
        if not self.rank_deficient:
            log_end = brentq(
                lambda log_c: float(self.occupied(np.exp(np.array([log_c])))[0]) - 1, np.log(smallest), np.log(largest)
            )
            largest = float(np.exp(log_end))
        # dense towards the end, where y(c) goes to zero
        away = np.concatenate(
            [np.geomspace(smallest / largest, 0.5, _GRID), 1 - np.geomspace(0.5, 1e-9, _GRID // 3)[1:]]
        )
        self.c = largest * np.append(away, 1.0)
        self.T = np.minimum(self.occupied(self.c), 1.0)
        self.y, self.yb = self._argument(self.c, self.T)
        if not self.rank_deficient:
            self.y[-1], self.yb[-1] = 0.0, 0.0

    def occupied(self, c: Array) -> Array:
        """T(c): the share of the d directions that items hold at this scale, shape (C,)."""
        weight_CB = self.bins.value**2 * c[:, None]
        return np.asarray((weight_CB / (1 + weight_CB)) @ self.bins.multiplicity / self.d)

    def _argument(self, c: Array, occupied: Array) -> tuple[Array, Array]:
        """Y and y b at each c."""
        free = np.maximum(1 - occupied, 1e-300)
        if self._isotropic:
            return free / np.sqrt(c), free
        t = self._invert(occupied)
        return np.sqrt(occupied * free / (t * c)), occupied / t

    def _invert(self, occupied: Array) -> Array:
        """Solve for t in ``mean_k t s_k / (1 + t s_k) = occupied``: a table of the monotone map, read backwards."""
        table = np.geomspace(1e-16, 1e16 / self.scales[-1], 6000)
        share = np.array([np.mean(t * self.scales / (1 + t * self.scales)) for t in table])
        rising = np.concatenate([[True], np.diff(share) > 0])
        logit = np.log(share[rising]) - np.log(np.maximum(1 - share[rising], 1e-300))
        wanted = np.clip(occupied, share[0], 1 - 1e-15)
        return np.exp(np.interp(np.log(wanted) - np.log1p(-wanted), logit, np.log(table[rising])))

    def smoothed(self, lam: float) -> tuple[Array, Array, float]:
        """What ``h_lambda(G)`` does to an item of each bin.

        Returns:
            Mean of ``u_i^T h(G) v_i``, shape (B,); mean of ``|h(G) v_i|^2``, shape (B,); the same norm for an item
            that has no weight.
        """
        c, step = self._grid_of(lam)
        share = c[:, None] / (1 + self.bins.value**2 * c[:, None])
        signal = (2 / np.pi) * self.bins.value * (step @ share)
        lost = float(np.interp(-lam, -self.y, self.yb)) if lam > 0 else float(self.yb[-1])
        norm = 1 - lost / (1 + self.bins.value**2 * c[-1])
        return signal, norm, 1 - lost

    def responses(self, weights: Array, lam: float) -> Array:
        """How ``u_j^T h(G) v`` answers along each direction of v, for items of the given weights, shape (J, K).

        With ``g`` that answer and z the standardised coordinates of v, item j's own score has the mean
        ``mean_k g_jk z_k^2``, and what j answers to another item's v has the variance ``mean_k g_jk^2 z_k^2 / d``.
        """
        c, step = self._grid_of(lam)
        occupied = np.minimum(self.occupied(c), 1.0)
        if self._isotropic:
            shape_CK = np.ones((len(c), self.d))
        else:
            shape_CK = self.scales / (1 + self._invert(occupied)[:, None] * self.scales)
            shape_CK /= shape_CK.mean(1, keepdims=True)
        strength_JC = weights[:, None] * c / (1 + weights[:, None] ** 2 * c)
        return np.asarray((2 / np.pi) * (strength_JC * step) @ shape_CK)

    def _grid_of(self, lam: float) -> tuple[Array, Array]:
        """C down to ``y = lambda``, and the trapezoid weights of ``x = sqrt(y^2 - lambda^2)`` there."""
        c, y = self.c, self.y
        if lam > 0:
            log_end = np.interp(np.log(lam), np.log(np.maximum(y[::-1], 1e-300)), np.log(c[::-1]))
            end = float(np.exp(log_end))
            c = end * np.concatenate(
                [np.geomspace(c[0] / end, 0.5, _GRID), 1 - np.geomspace(0.5, 1e-6, _GRID // 3)[1:], [1.0]]
            )
            y = self._argument(c, np.minimum(self.occupied(c), 1.0))[0]
            lam = float(y[-1])
        x = np.sqrt(np.maximum(y**2 - lam**2, 0.0))
        step = np.empty_like(x)  # trapezoid weights of x, which falls along the grid
        step[1:-1] = (x[:-2] - x[2:]) / 2
        step[0], step[-1] = (x[0] - x[1]) / 2, (x[-2] - x[-1]) / 2
        return c, step
