"""Recovery by one step of Newton and of SGD, whose noise is not that of a spectral map.

* Newton: from the resolvent of the input covariance;
* SGD: the binding rivals are a few head items, which do not average out: an average over their overlaps.

Shapes are (outputs M, inputs D), the features of u and of v.
"""

# N items, B bins of items, Z quadrature nodes, S samples, H head rivals

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtri

from lightning_spectral.theory.spectrum import WeightBins

Array = NDArray[np.float64]

NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(41)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()
_SGD_SAMPLES = 1024
_SGD_HEADS = 64
_OWN_SPREAD = 1.8  # of the sampled own noise: tail items need 4 standard deviations of it
_SGD_PROBES = 120  # weights at which the probability is evaluated; between them it is interpolated


def newton(bins: WeightBins, shape: tuple[int, int], ridge: float, n_items: int) -> Array:
    """Recovery of every item, shape (N,); without a ridge it does not depend on the anisotropy of the inputs.

    Args:
        bins: Item weights; as many distinct items as inputs have features, or a ridge.
        shape: Of W.
        ridge: In units of the mean input eigenvalue.
        n_items: N.
    """
    outputs, inputs = shape
    value, multiplicity = np.append(bins.value, 0.0), np.append(bins.multiplicity, 0.0)
    ridge = ridge * float(value @ multiplicity) / inputs

    def excess(log_q: float) -> float:
        held = 1 / (1 + np.exp(-np.clip(log_q + np.log(bins.value), -700, 700)))
        return float(ridge * np.exp(log_q) + held @ bins.multiplicity / inputs - 1)

    low, high = np.log(1e-6 / value[0]), min(np.log(1e12) - np.log(bins.value[-1]), 700.0)
    q = float(np.exp(brentq(excess, low, high))) if excess(high) > 0 else float(np.exp(high))
    share = value * q / (1 + value * q)  # r_i, the signal
    energy = float(share**2 @ multiplicity / inputs)
    # Squared noise of rival k's score: from the other items A / M, from its own r_k^2 / D, both times
    # (1 - r_i)^2 / (1 - A); r_i^2 / M from the overlap of u_k with u_i itself. Whitening by the covariance of N sampled
    # outputs takes a share M / N of it out.
    whitening = max(1 - outputs / n_items, 1e-9)
    scale = whitening * (1 - share) ** 2 / (1 - min(energy, 1 - 1e-9))
    itself = whitening * share**2 / outputs
    own_sd = np.sqrt(scale * energy / outputs + share**2 * 1.25 * (1 / outputs + 1 / inputs))
    # log prod_k Phi(x / sd_k) over rivals k; most have r_k of no account and are put together
    coarse_share, coarse_count = coarsen(share[:-1], bins.multiplicity, 60)
    silent = max(n_items - 1 - coarse_count.sum(), 0.0)
    rival_energy = np.append(coarse_share**2 / inputs, 0.0) + energy / outputs
    rival_count = np.append(coarse_count, silent)
    own = share[:, None] + own_sd[:, None] * NODES
    log_win = np.zeros_like(own)
    for variance, count in zip(rival_energy, rival_count, strict=True):
        log_win += count * log_ndtr(own / np.sqrt(scale * variance + itself)[:, None])
    probability = np.exp(log_win) @ NODE_WEIGHTS
    return bins.spread(probability[:-1], float(probability[-1]))


def coarsen(value: Array, multiplicity: Array, groups: int) -> tuple[Array, Array]:
    """Root-mean-square of ``value`` in at most ``groups`` runs of neighbouring bins, heads alone."""
    edges = np.unique(np.round(np.geomspace(1, len(value) + 1, groups + 1)).astype(int)) - 1
    counts = np.add.reduceat(multiplicity, edges[:-1])
    return np.sqrt(np.add.reduceat(value**2 * multiplicity, edges[:-1]) / counts), counts


def sgd(weights: Array, shape: tuple[int, int], scales: Array, shared_mean: bool = False) -> Array:
    """Recovery of every item, shape (N,): an average over v_i's overlaps with the heads and its own noise.

    Args:
        weights: Shape (N,).
        shape: Of W.
        scales: Eigenvalues of the inputs' second moment, mean 1, shape (D,).
        shared_mean: The first of them is the inputs' common mean.
    """
    order = np.argsort(-weights, kind="stable")
    sorted_weights = weights[order]
    drawn = _Drawn.of(sorted_weights, shape, scales, shared_mean)
    # An item without a signal still wins once in N times, if no head towers over the noise.
    highest = drawn.noise * np.sqrt(2 * np.log(len(weights)))
    lucky = np.exp(drawn.log_above_heads(highest, drawn.noise).sum(1)).mean() / len(weights)
    distinct, first_rank = np.unique(-sorted_weights, return_index=True)
    probe = np.unique(np.round(np.geomspace(1, len(distinct), _SGD_PROBES)).astype(int)) - 1
    found: list[float] = []
    for rank in first_rank[probe]:
        found.append(drawn.recovery(int(rank), sorted_weights[rank]))
        if found[-1] < lucky:
            break
    known = np.interp(np.log(first_rank + 1.0), np.log(first_rank[probe][: len(found)] + 1.0), found, right=lucky)
    probability = known[np.searchsorted(distinct, -sorted_weights)]
    result = np.empty(len(weights))
    result[order] = np.maximum(probability, lucky)
    return result


@dataclass(frozen=True)
class _Drawn:
    """Inputs v_i of an item and what a step of SGD answers to them, S draws.

    Attributes:
        outputs: Of W.
        heads: Weights of the most frequent items, (H,).
        common: Part that all inputs share of every overlap v_k . v_i.
        length: |v_i|^2, (S,); ``own_length`` that of u_i . u_i times it.
        head_overlap: v_k . v_i of the heads, (S, H).
        noise: Standard deviation of u_j . W v_i for j no head, (S,); ``own_noise`` the item's own.
        draw_weight: Of each draw in the average, (S,).
        coarse: Weights of all other items in groups, (G,), of ``coarse_count`` items and deviations ``coarse_sd``.
    """

    outputs: int
    heads: Array
    common: float
    length: Array
    own_length: Array
    head_overlap: Array
    noise: Array
    own_noise: Array
    draw_weight: Array
    coarse: Array
    coarse_count: Array
    coarse_sd: Array

    @classmethod
    def of(cls, sorted_weights: Array, shape: tuple[int, int], scales: Array, shared_mean: bool) -> _Drawn:
        """A Sobol sequence, scrambled with a fixed seed."""
        from scipy.stats import qmc  # takes most of a second, which every import of the package would wait

        outputs, inputs = shape
        heads, rest = sorted_weights[:_SGD_HEADS], sorted_weights[_SGD_HEADS:]
        common = float(scales[0]) / inputs if shared_mean else 0.0
        length, overlap = _sampled_inputs(scales, shared_mean)
        normal = ndtri(qmc.Sobol(2 + len(heads), rng=np.random.default_rng(0)).random(_SGD_SAMPLES))
        own_z, length_z, head_z = _OWN_SPREAD * normal[:, 0], normal[:, 1], normal[:, 2:]
        head_overlap = common + head_z * np.sqrt(overlap / inputs)[:, None]
        energy = (heads * head_overlap) ** 2
        noise = np.sqrt((energy.sum(1) + float(np.sum(rest**2)) * (overlap / inputs + common**2)) / outputs)
        coarse, coarse_count = coarsen(rest, np.ones(len(rest)), 24) if len(rest) else (np.empty(0), np.empty(0))
        return cls(
            outputs, heads, common, length,
            own_length=length * (1 + np.sqrt(2 / outputs) * length_z),
            head_overlap=head_overlap,
            noise=noise,
            own_noise=noise * own_z,
            # a tail item needs rare own noise: it is drawn too wide, and each draw weighed by what that overdoes
            draw_weight=_OWN_SPREAD * np.exp((normal[:, 0] ** 2 - own_z**2) / 2) / _SGD_SAMPLES,
            coarse=coarse,
            coarse_count=coarse_count,
            # a rival outside the heads has its own share of the gradient as well
            coarse_sd=np.sqrt(noise[:, None] ** 2 + coarse**2 * (overlap / inputs)[:, None]),
        )  # fmt: skip

    def log_above_heads(self, score: Array, noise: Array) -> Array:
        """Log probability, (S, H), that a score (S,) is above each head's, whose noise is given, (S,)."""
        return np.asarray(log_ndtr((score[:, None] - self.heads * self.head_overlap) / noise[:, None]))

    def recovery(self, rank: int, weight: float) -> float:
        """Probability that the item of this rank and weight is above all others."""
        own = weight * self.own_length + self.own_noise
        itself = (weight * self.length) ** 2 / self.outputs  # it adds u_j . u_i times its signal to every rival
        above_heads = self.log_above_heads(own, np.sqrt(self.noise**2 + itself))
        if rank < len(self.heads):
            above_heads[:, rank] = 0.0
        rivals = np.sqrt(self.coarse_sd**2 + itself[:, None])
        above_rest = log_ndtr((own[:, None] - self.coarse * self.common) / rivals) @ self.coarse_count
        return float(np.exp(above_heads.sum(1) + above_rest) @ self.draw_weight)


def _sampled_inputs(scales: Array, shared_mean: bool) -> tuple[Array, Array]:
    """``|v|^2`` and ``v^T Sigma v`` of fresh items, sampled exactly, each shape (S,); Sigma without a shared mean."""
    rng = np.random.default_rng(0)
    length, overlap = np.empty(_SGD_SAMPLES), np.empty(_SGD_SAMPLES)
    for sample in range(_SGD_SAMPLES):
        square = rng.standard_normal(len(scales)) ** 2 * scales
        if shared_mean:
            square[0] = scales[0]
        length[sample] = square.mean()
        overlap[sample] = (square * scales)[1 if shared_mean else 0 :].sum() / len(scales)
    return length, overlap
