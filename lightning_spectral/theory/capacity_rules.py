"""Recovery by one step of Newton and of SGD, whose noise is not that of a spectral map.

* Newton: from the resolvent of the input covariance;
* SGD: the binding rivals are a few head items, which do not average out: an average over their overlaps.

Shapes are (outputs M, inputs D), the features of u and of v.
"""

# N items, B bins of items, Z quadrature nodes, S samples, H head rivals

from __future__ import annotations

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

    A Sobol sequence, scrambled with a fixed seed.

    Args:
        weights: Shape (N,).
        shape: Of W.
        scales: Eigenvalues of the inputs' second moment, mean 1, shape (D,).
        shared_mean: The first of them is the inputs' common mean.
    """
    outputs, inputs = shape
    order = np.argsort(-weights, kind="stable")
    sorted_weights = weights[order]
    heads = sorted_weights[:_SGD_HEADS]
    tail_energy = float(np.sum(sorted_weights[_SGD_HEADS:] ** 2))
    common = float(scales[0]) / inputs if shared_mean else 0.0  # of every overlap v_k . v_i
    length, overlap = _sampled_inputs(scales, shared_mean)
    from scipy.stats import qmc  # takes most of a second, which every import of the package would wait

    normal = ndtri(qmc.Sobol(2 + len(heads), rng=np.random.default_rng(0)).random(_SGD_SAMPLES))
    own_z, length_z, head_z = _OWN_SPREAD * normal[:, 0], normal[:, 1], normal[:, 2:]
    # a tail item needs rare own noise: it is drawn too wide, and each draw weighed by what that overdoes
    draw_weight = _OWN_SPREAD * np.exp((normal[:, 0] ** 2 - own_z**2) / 2) / _SGD_SAMPLES
    head_overlap = common + head_z * np.sqrt(overlap / inputs)[:, None]
    own_length = length * (1 + np.sqrt(2 / outputs) * length_z)
    energy = (heads * head_overlap) ** 2
    noise = np.sqrt(
        (energy.sum(1) + tail_energy * (overlap / inputs + common**2)) / outputs
    )  # of u_j . W v_i for j no head
    own_noise = noise * own_z
    coarse, coarse_count = (
        coarsen(sorted_weights[_SGD_HEADS:], np.ones(len(weights) - len(heads)), 24)
        if len(weights) > len(heads)
        else (np.empty(0), np.empty(0))
    )
    # a rival outside the heads has its own share of the gradient as well
    coarse_sd = np.sqrt(noise[:, None] ** 2 + coarse**2 * (overlap / inputs)[:, None])
    # An item without a signal still wins once in N times, if no head towers over the noise.
    highest = noise * np.sqrt(2 * np.log(len(weights)))
    lucky = np.exp(log_ndtr((highest[:, None] - heads * head_overlap) / noise[:, None]).sum(1)).mean() / len(weights)
    distinct, first_rank = np.unique(-sorted_weights, return_index=True)
    probe = np.unique(np.round(np.geomspace(1, len(distinct), _SGD_PROBES)).astype(int)) - 1
    found: list[float] = []
    for rank in first_rank[probe]:
        weight = sorted_weights[rank]
        own = weight * own_length + own_noise
        # the item itself adds u_j . u_i times its signal to every rival
        itself = (weight * length) ** 2 / outputs
        rival_noise = np.sqrt(noise**2 + itself)
        log_win = log_ndtr((own[:, None] - heads * head_overlap) / rival_noise[:, None])
        if rank < len(heads):
            log_win[:, rank] = 0.0
        total = (
            log_win.sum(1)
            + log_ndtr((own[:, None] - coarse * common) / np.sqrt(coarse_sd**2 + itself[:, None])) @ coarse_count
        )
        found.append(float(np.exp(total) @ draw_weight))
        if found[-1] < lucky:
            break
    known = np.interp(np.log(first_rank + 1.0), np.log(first_rank[probe][: len(found)] + 1.0), found, right=lucky)
    probability = known[np.searchsorted(distinct, -sorted_weights)]
    result = np.empty(len(weights))
    result[order] = np.maximum(probability, lucky)
    return result


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
