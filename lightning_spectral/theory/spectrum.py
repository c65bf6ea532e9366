"""The spectrum of a memory's gradient from the item weights alone: no matrix, no fit, no random number.

For ``G = sum_i w_i u_i v_i^T`` with independent Gaussian u in R^M and v in R^D, resolvents concentrate. Write
``a(y) = (1/M) tr y (G G^T + y^2)^-1`` and ``b(y) = (1/D) tr Sigma y (G^T G + y^2)^-1``, Sigma the covariance of v
scaled to mean eigenvalue 1. Taking one item out and putting it back gives

    u_i^T G (G^T G + y^2)^-1 v_i = w_i c / (1 + w_i^2 c),    c = a b,

and with ``R(c) = sum_i w_i^2 c / (1 + w_i^2 c)``, the directions that items hold at this scale, the traces close:

    y a = 1 - R/M,    (1/D) sum_k t s_k / (1 + t s_k) = R/D,    y b = R / (D t).

Everything is explicit in c, so a grid over c is the whole solution. Isotropic inputs have ``t = R / (D - R)``, hence
``y = sqrt((1 - R/M) (1 - R/D) / c)``. The grid ends where R is the rank of G: min(M, D), or the number of items.
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
_LOG_C_AT_MOST = 650.0  # exp of it is a float
_HARD_ZERO = 1e13  # w^2 c where an item is held for good


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


@dataclass(frozen=True)
class MapEffect:
    """What a spectral map ``h(G)`` does to the items of each bin; the last entry is an item without weight.

    Attributes:
        signal: Mean of ``u_i^T h(G) v_i``, shape (B + 1,).
        image: Mean of ``|h(G) v_i|^2``, shape (B + 1,): item i's scores have the variance ``image / M``.
        answer: Mean of ``|h(G)^T u_j|^2``, shape (B + 1,): how loud output j is, relative to the last entry.
    """

    signal: Array
    image: Array
    answer: Array


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
    """The map c -> (R, t, y) of one set of weights.

    Args:
        bins: Item weights.
        input_scales: Eigenvalues s_k of Sigma, mean 1, shape (D,).
        outputs: Features M of u; ``None`` for as many as v has.

    Raises:
        ValueError: The weights span more orders of magnitude than fp64 can follow.
    """

    def __init__(self, bins: WeightBins, input_scales: Array, outputs: int | None = None) -> None:
        self.bins = bins
        self.scales = input_scales
        self.inputs = len(input_scales)
        self.outputs = self.inputs if outputs is None else outputs
        self._isotropic = bool(np.ptp(input_scales) == 0)
        log_value = np.log(bins.value)
        smallest = float(np.log(1 / _HARD_ZERO) - 2 * log_value[0])
        end = float(min(np.log(_HARD_ZERO) - 2 * log_value[-1], _LOG_C_AT_MOST))
        narrow = min(self.inputs, self.outputs)
        self.rank_deficient = bool(bins.multiplicity.sum() <= narrow)
        if not self.rank_deficient:
            if self._held(np.array([end]))[0] < narrow:
                raise ValueError(
                    f"the item weights fall to {bins.value[-1]:.1g} before d={narrow} directions are held, more than "
                    "fp64 can follow: lower `alpha`, or d."
                )
            end = brentq(lambda log_c: float(self._held(np.array([log_c]))[0]) - narrow, smallest, end)
        # dense towards the end, where y(c) goes to zero
        away = np.concatenate(
            [np.geomspace(np.exp(max(smallest - end, -700.0)), 0.5, _GRID), 1 - np.geomspace(0.5, 1e-9, _GRID // 3)[1:]]
        )
        self.c = np.exp(end) * np.append(away, 1.0)
        self.held = np.minimum(self._held(np.log(self.c)), narrow)
        self.y, self.yb = self._argument(self.c, self.held)
        if not self.rank_deficient:
            self.y[-1] = 0.0

    def _held(self, log_c: Array) -> Array:
        """R(c), shape (C,)."""
        share_CB = 1 / (1 + np.exp(-np.clip(2 * np.log(self.bins.value) + log_c[:, None], -700, 700)))
        return np.asarray(share_CB @ self.bins.multiplicity)

    def _argument(self, c: Array, held: Array) -> tuple[Array, Array]:
        """Y and y b at each c."""
        free_out = np.maximum(1 - held / self.outputs, 0.0)
        if self._isotropic:
            free_in = np.maximum(1 - held / self.inputs, 0.0)
            return np.sqrt(free_out * free_in / c), free_in
        t = self._invert(held / self.inputs)
        return np.sqrt(free_out * held / self.inputs / (t * c)), held / (self.inputs * t)

    def _invert(self, occupied: Array) -> Array:
        """Solve for t in ``mean_k t s_k / (1 + t s_k) = occupied``: a table of the monotone map, read backwards."""
        table = np.geomspace(1e-16, 1e16 / self.scales[-1], 6000)
        share = np.array([np.mean(t * self.scales / (1 + t * self.scales)) for t in table])
        rising = np.concatenate([[True], np.diff(share) > 0])
        logit = np.log(share[rising]) - np.log(np.maximum(1 - share[rising], 1e-300))
        wanted = np.clip(occupied, share[0], 1 - 1e-15)
        return np.exp(np.interp(np.log(wanted) - np.log1p(-wanted), logit, np.log(table[rising])))

    def smoothed(self, lam: float) -> MapEffect:
        """The effect of ``h(s) = s / sqrt(s^2 + lam^2)``, the polar factor at 0."""
        c, step = self._grid_of(lam)
        value = np.append(self.bins.value, 0.0)
        share = c[:, None] / (1 + value**2 * c[:, None])
        signal = (2 / np.pi) * value * (step @ share)
        held = min(float(self._held(np.log(c[-1:]))[0]), float(min(self.inputs, self.outputs)))
        lost_in = float(np.interp(-lam, -self.y, self.yb)) if lam > 0 else float(self.yb[-1])
        lost_out = 1 - held / self.outputs
        kept = 1 + value**2 * c[-1]
        return MapEffect(signal, 1 - lost_in / kept, 1 - lost_out / kept)

    def responses(self, weights: Array, lam: float) -> Array:
        """How ``u_j^T h(G) v`` answers along each direction of v, for items of the given weights, shape (J, K).

        With ``g`` that answer and z the standardised coordinates of v, item j's own score has the mean
        ``mean_k g_jk z_k^2``, and what j answers to another item's v has the variance ``mean_k g_jk^2 z_k^2 / d``.
        """
        c, step = self._grid_of(lam)
        occupied = np.minimum(self._held(np.log(c)) / self.inputs, 1.0)
        if self._isotropic:
            shape_CK = np.ones((len(c), self.inputs))
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
            held = np.minimum(self._held(np.log(c)), min(self.inputs, self.outputs))
            y = self._argument(c, held)[0]
            lam = float(y[-1])
        x = np.sqrt(np.maximum(y**2 - lam**2, 0.0))
        step = np.empty_like(x)  # trapezoid weights of x, which falls along the grid
        step[1:-1] = (x[:-2] - x[2:]) / 2
        step[0], step[-1] = (x[0] - x[1]) / 2, (x[-2] - x[-1]) / 2
        return c, step
