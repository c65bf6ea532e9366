"""The problem: which items there are, how often each one occurs, and what a batch of them looks like.

Setting of arXiv:2603.26554: item i has an input v_i and an output u_i, both Gaussian in R^d, and occurs with
probability p_i proportional to i^-alpha. A linear map W is to send v_i to u_i, under softmax cross-entropy over all
outputs.
"""

# N items, D features of v (inputs), M features of u (outputs)

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import poisson

DTYPES = ("float32", "float64")
# 2 N d numbers of 4 bytes, streamed or not, have to be drawn at least twice: past this size a run is a mistake
MAX_ITEM_FEATURES = 2**36

_MANY = 1e4  # draws of one item from which their number is Gaussian; far beyond, scipy's Poisson quantiles are NaN
_GOLDEN = (5**0.5 - 1) / 2
_BATCH_STREAM = 0x6261746368  # keeps the draw of batches apart from the draw of embeddings

_FP32_DECADES = 30  # between the longest and the shortest direction of an input that fp32 can still multiply


@dataclass(frozen=True)
class MemoryProblem:
    """One associative-memory problem; equal fields give equal embeddings and equal batches.

    Args:
        d: Features of v, and of u unless ``d_out`` says otherwise, >= 2.
        n_items: Items N, >= 2 (with one item every map recovers it).
        alpha: Power of the item frequencies, > 1 unless ``allow_flat``.
        batch_size: Items drawn for one gradient; ``None`` is the population gradient.
        seed: >= 0; seeds embeddings and batches.
        anisotropy: beta in ``v ~ N(0, Sigma)``, ``Sigma_kk`` proportional to ``k^-beta``, trace 1; 0 is isotropic.
        dtype: Type of the large products, ``float32`` or ``float64``. Embeddings are the same numbers in both.
        allow_flat: Accept ``0 < alpha <= 1``, where the capacity law makes no promise.
        d_out: Features of u, >= 2: W has the shape (d_out, d). ``None`` is ``d``, a square W.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    d: int
    n_items: int
    alpha: float
    batch_size: int | None = None
    seed: int = 0
    anisotropy: float = 0.0
    dtype: str = "float32"
    allow_flat: bool = False
    d_out: int | None = None

    def __post_init__(self) -> None:
        require_integer("d", self.d, 2, "a map needs at least two features")
        if self.d_out is not None:
            require_integer("d_out", self.d_out, 2, "leave it out for a square map")
        require_integer("n_items", self.n_items, 2, "with a single item every map recovers it")
        require_integer("seed", self.seed, 0, "seeds are non-negative integers")
        require_real("alpha", self.alpha)
        if self.alpha <= 0:
            raise ValueError(f"`alpha` must be > 0, got {self.alpha}; the law needs alpha > 1.")
        if self.alpha <= 1 and not self.allow_flat:
            raise ValueError(
                f"`alpha` must be > 1 for the capacity law, got {self.alpha}; "
                "pass `allow_flat=True` (--allow-flat) to run it all the same: counts are still predicted, their "
                "growth with d is not."
            )
        require_real("anisotropy", self.anisotropy)
        if self.anisotropy < 0:
            raise ValueError(f"`anisotropy` must be >= 0, got {self.anisotropy}; 0 is isotropic.")
        most = 2 * _FP32_DECADES / math.log10(self.d)
        if self.anisotropy > most:
            raise ValueError(
                f"`anisotropy` must be at most {most:.3g} at d={self.d}, got {self.anisotropy:g}: beyond it "
                "the inputs' last direction is too short for fp32."
            )
        if self.batch_size is not None:
            require_integer("batch_size", self.batch_size, 1, "leave it out for the population gradient")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        widest = max(self.shape)
        if self.n_items * widest > MAX_ITEM_FEATURES:
            raise ValueError(
                f"`n_items` x `d` = {self.n_items * widest:.3g} exceeds {MAX_ITEM_FEATURES:.3g} "
                f"(n_items={self.n_items}, d={widest}); lower one of them."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W: (features of u, features of v)."""
        return (self.d if self.d_out is None else self.d_out, self.d)

    def with_(self, **changes: Any) -> MemoryProblem:
        """The same problem with some fields changed."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain fields, for ``results.jsonl``."""
        return {**asdict(self), "d_out": self.shape[0]}

    def frequencies(self) -> NDArray[np.float64]:
        """p_i proportional to i^-alpha, shape (N,), sum 1, descending."""
        return power_law(self.n_items, self.alpha)

    def input_scales(self) -> NDArray[np.float64]:
        """Eigenvalues of ``d * Cov(v)``, shape (D,), mean 1, descending; all ones without anisotropy."""
        scales = np.arange(1, self.d + 1, dtype=np.float64) ** -self.anisotropy
        return scales / scales.mean()

    def gradient_weights(self, step: int = 0) -> NDArray[np.float64]:
        """Weight of each item in the gradient of one step, shape (N,), sum 1.

        The frequencies themselves for the population gradient, else the counts of ``batch_size`` independent draws
        over ``batch_size``; each step has draws of its own.
        """
        frequencies = self.frequencies()
        if self.batch_size is None:
            return frequencies
        rng = np.random.default_rng([self.seed, _BATCH_STREAM, step])
        return rng.multinomial(self.batch_size, frequencies) / float(self.batch_size)


def power_law(n_items: int, alpha: float) -> NDArray[np.float64]:
    """Normalised ``i^-alpha`` for i = 1..n_items, shape (N,)."""
    weights = np.arange(1, n_items + 1, dtype=np.float64) ** -alpha
    return weights / weights.sum()


def typical_draw(frequencies: NDArray[np.float64], batch_size: int, shift: float = 0.0) -> NDArray[np.float64]:
    """Counts of each item as a batch typically has them, over ``batch_size``, shape (N,); nothing is random.

    A draw of B items is nearly N independent Poisson counts. Their quantiles are taken at golden-ratio points, which
    spread evenly over any run of neighbours: about as many items are drawn once, twice, ... as is expected, where one
    random draw of 128 items is 5 to 10 % off.

    Args:
        frequencies: Descending, sum 1.
        batch_size: B.
        shift: In [0, 1): another, equally typical draw.
    """
    quantile_N = (np.arange(1, len(frequencies) + 1) * _GOLDEN + shift) % 1.0
    mean_N = batch_size * frequencies
    drawn_N = np.zeros(len(frequencies))
    some_N = quantile_N > np.exp(-mean_N)  # the others are drawn not once
    few_N, many_N = some_N & (mean_N < _MANY), mean_N >= _MANY
    drawn_N[few_N] = poisson.ppf(quantile_N[few_N], mean_N[few_N])
    drawn_N[many_N] = np.rint(mean_N[many_N] + np.sqrt(mean_N[many_N]) * ndtri(quantile_N[many_N]))
    return drawn_N / max(drawn_N.sum(), 1.0)


def check_weights(weights: NDArray[np.float64], n_items: int) -> NDArray[np.float64]:
    """Weights as fp64, shape (N,).

    Raises:
        ValueError: Wrong length, a negative or non-finite entry, or nothing but zeros.
    """
    checked = np.asarray(weights, dtype=np.float64)
    if checked.shape != (n_items,):
        raise ValueError(f"`weights` must have shape ({n_items},), one per item, got {checked.shape}.")
    if not np.isfinite(checked).all() or (checked < 0).any():
        raise ValueError("`weights` must be finite and >= 0; look for NaN or negative entries.")
    if checked.sum() == 0:
        raise ValueError("`weights` sum to 0: no item has a gradient. Is every item masked?")
    return checked


def require_integer(field: str, value: object, at_least: int, why: str) -> None:
    """Raise a ``ValueError`` naming ``field`` unless ``value`` is an integer >= ``at_least`` (and not a bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"`{field}` must be an integer, got {value!r} ({type(value).__name__}).")
    if value < at_least:
        raise ValueError(f"`{field}` must be >= {at_least}, got {value}: {why}.")


def require_real(field: str, value: object) -> None:
    """Raise a ``ValueError`` naming ``field`` unless ``value`` is a finite real number (and not a bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not math.isfinite(value):
        raise ValueError(f"`{field}` must be a finite number, got {value!r}.")
