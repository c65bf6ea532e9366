"""Any map h of the singular values: ``u_i^T h(G) v_i = int h(s) dnu_i(s)``, with nu_i from the item weights alone.

The resolvents of :mod:`spectrum` are known for real y; at ``y = -i s`` they become densities over the singular values
s. With ``c(y)`` the solution of ``y^2 c = (1 - R/M)(1 - R/D)``, ``R(c) = sum_i w_i^2 c / (1 + w_i^2 c)``:

    nu_i(s)  = (2/pi) Im [w_i c / (1 + w_i^2 c)],                      the signal of item i;
    rho_i(s) = (2 s/pi) Im [(1 - R/D) / (y^2 (1 + w_i^2 c))],          where v_i lies, for |h(G) v_i|^2;
    the same with M in place of D                                      where u_j lies, for |h(G)^T u_j|^2.

The equation is followed from the real axis to the imaginary one, stopping short of it by a small angle, which smears
densities; the smear's far tail is proportional to the angle, so two angles extrapolate it away, and no smooth h sees
the rest. The null space (an atom at s = 0) is taken out in closed form. Isotropic inputs only.
"""

# B bins of items, C singular values of the grid

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_spectral.functional.coefficients import apply_to_singular_values, coefficient_set
from lightning_spectral.theory.rules import RuleSettings
from lightning_spectral.theory.spectrum import GradientSpectrum, MapEffect, WeightBins

Array = NDArray[np.float64]
SpectralMap = Callable[[Array], Array]

_GRID = 400
_BINS = 120  # heads alone, tails in groups
_ANGLES = 16
_SHORT_OF = (0.02, 0.01)  # radians; the second is half the first
_NEWTON_STEPS = 40


def map_of(name: str, settings: RuleSettings, weights: Array, shape: tuple[int, int]) -> SpectralMap:
    """The map of the rules ``ns`` and ``power``; ``ns`` divides by a norm of G first, Frobenius or Schatten-4."""
    if name == "power":
        return lambda s: np.asarray(s**settings.power)
    steps = settings.ns_steps or 5
    squares = float((weights**2).sum())
    norm = squares**0.5
    if coefficient_set(settings.coefficients).normalizer == "schatten4":
        norm = (float((weights**4).sum()) + squares**2 * (1 / shape[0] + 1 / shape[1])) ** 0.25

    def iterated(s: Array) -> Array:
        image = apply_to_singular_values(settings.coefficients, steps, torch.from_numpy(np.minimum(s / norm, 1.0)))
        return np.asarray(image.numpy())

    return iterated


class SpectralDensity:
    """Densities of one set of weights over the singular values of its gradient.

    Args:
        bins: Item weights.
        shape: Features of u and of v.
    """

    def __init__(self, bins: WeightBins, shape: tuple[int, int]) -> None:
        self.bins, self.shape = bins, shape
        spectrum = GradientSpectrum(bins, np.ones(shape[1]), shape[0])
        self._end = np.inf if spectrum.rank_deficient else float(spectrum.c[-1])
        self._rank = float(spectrum.held[-1])
        smallest = spectrum.y[:-1][spectrum.held[:-1] < self._rank - 0.01][-1]
        self.s = np.geomspace(max(smallest, 1e-14 * bins.value[0]) / 30, 4 * bins.value[0], _GRID)
        known = spectrum.y > 0
        order = np.argsort(spectrum.y[known])
        log_c = np.interp(np.log(self.s), np.log(spectrum.y[known][order]), np.log(spectrum.c[known][order]))
        self._value, self._count = _grouped(bins)
        self._log_c = self._follow(log_c.astype(np.complex128))
        self._norm = float(np.sqrt(self._value**2 @ self._count))

    def effect(self, h: SpectralMap) -> MapEffect:
        """What ``h(G)`` does to the items of each bin; h is asked for singular values up to the norm of G."""
        image = h(np.minimum(self.s, self._norm))
        coarse, fine = (self._smeared(image, *at) for at in zip(_SHORT_OF, self._log_c, strict=True))
        return MapEffect(*(2 * near - far for near, far in zip(fine, coarse, strict=True)))

    def _smeared(self, image: Array, short_of: float, log_c: NDArray[np.complex128]) -> tuple[Array, Array, Array]:
        """Signal, image and answer with densities smeared by an angle, each shape (B + 1,)."""
        c, y = np.exp(log_c), self.s * np.exp(-1j * (np.pi / 2 - short_of))
        value = np.append(self.bins.value, 0.0)
        kept_BC = 1 + value[:, None] ** 2 * c
        held = np.sum(self._count[:, None] * (1 - 1 / (1 + self._value[:, None] ** 2 * c)), axis=0)
        step = self.s * np.gradient(np.log(self.s))  # ds
        signal = (2 / np.pi) * np.imag(value[:, None] * c / kept_BC) @ (image * step)
        square = (2 / np.pi) * image**2 * self.s * step
        kept_at_zero = np.where(value > 0, np.inf, 1.0) if np.isinf(self._end) else 1 + value**2 * self._end
        seen = []
        for size in self.shape[::-1]:
            atom_B1 = (1 - self._rank / size) / kept_at_zero[:, None]
            seen.append(np.imag(((1 - held / size) / kept_BC - atom_B1) / y**2) @ square)
        return signal, seen[0], seen[1]

    def _follow(self, log_c: NDArray[np.complex128]) -> list[NDArray[np.complex128]]:
        """Newton's method on ``y^2 c = (1 - R/M) (1 - R/D)``, y turned step by step; ln c at the last two angles."""
        outputs, inputs = self.shape
        squares = self._value[:, None] ** 2
        found = []
        turns = np.pi / 2 - np.array(_SHORT_OF)
        for angle in [*np.linspace(0.0, turns[0], _ANGLES), turns[1]]:
            target = 2 * np.log(self.s) - 2j * angle
            for _ in range(_NEWTON_STEPS):
                kept = 1 + squares * np.exp(log_c)
                held = np.sum(self._count[:, None] * (1 - 1 / kept), axis=0)
                slope = np.sum(self._count[:, None] * (1 - 1 / kept) / kept, axis=0)  # d R / d ln c
                free_out, free_in = 1 - held / outputs, 1 - held / inputs
                gap = np.exp(target + log_c) - free_out * free_in
                rate = np.exp(target + log_c) + slope * (free_in / outputs + free_out / inputs)
                change = gap / rate
                change *= np.minimum(1.0, 0.3 / np.maximum(np.abs(change), 1e-300))
                log_c = log_c - change
                if np.abs(change).max() < (1e-9 if angle in turns else 1e-3):
                    break
            if angle in turns:
                found.append(log_c)
        return found


@lru_cache(maxsize=16)
def _cached(value: bytes, count: bytes, shape: tuple[int, int]) -> SpectralDensity:
    values, counts = np.frombuffer(value), np.frombuffer(count)
    return SpectralDensity(WeightBins(values, counts, np.empty(0, dtype=np.int64)), shape)


def density_of(bins: WeightBins, shape: tuple[int, int]) -> SpectralDensity:
    """The density of these weights; several maps of the same gradient share it."""
    return _cached(bins.value.tobytes(), bins.multiplicity.tobytes(), shape)


def _grouped(bins: WeightBins) -> tuple[Array, Array]:
    """Root-mean-square value and number of items of at most ``_BINS`` runs of bins."""
    edges = np.unique(np.round(np.geomspace(1, len(bins.value) + 1, _BINS + 1)).astype(int)) - 1
    count = np.add.reduceat(bins.multiplicity, edges[:-1])
    return np.sqrt(np.add.reduceat(bins.value**2 * bins.multiplicity, edges[:-1]) / count), count
