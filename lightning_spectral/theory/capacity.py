"""Which items one step recovers, predicted from (d, N, alpha, B, rule, lambda) without a fitted parameter.

Item i's own score is a signal plus Gaussian noise, every other output's score is noise of the same size: it is
recovered with probability ``E_z Phi(signal / noise + z sd)^(N-1)``. What remains is the signal and the noise of each
rule:

* ``muon``: from the spectrum of the gradient (:mod:`spectrum`);
* ``newton``: from the resolvent of the input covariance;
* ``sgd``: the binding rivals are a few head items, which do not average out: an average over their overlaps.

``sign`` and truncated Newton-Schulz have no prediction here.
"""

# N items, B bins of items, Z quadrature nodes, S samples, H head rivals

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtri
from scipy.stats import qmc

from lightning_spectral.theory.problem import MemoryProblem, check_weights
from lightning_spectral.theory.recovery import recovery_curve
from lightning_spectral.theory.rules import RuleSettings, parse_rule
from lightning_spectral.theory.spectrum import GradientSpectrum, WeightBins, bin_weights

Array = NDArray[np.float64]

PREDICTED_RULES = ("sgd", "muon", "newton")
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(41)
_NODE_WEIGHTS = _NODE_WEIGHTS / _NODE_WEIGHTS.sum()
_MUON_SAMPLES = 200  # of v, anisotropic inputs only
_MUON_PROBES = 200  # bins at which anisotropic recovery is evaluated; between them it is interpolated
_RIVAL_GROUPS = 60  # rivals of like weight share one variance
_SGD_SAMPLES = 1024
_SGD_HEADS = 64
_OWN_SPREAD = 1.8  # of the sampled own noise: tail items need 4 standard deviations of it
_SGD_PROBES = 120  # weights at which the probability is evaluated; between them it is interpolated


@dataclass(frozen=True)
class Prediction:
    """Expected recovery of one step.

    Attributes:
        probability: Recovery probability of every item, shape (N,).
        count: Their sum.
        prefix: Expected length of the recovered prefix, items taken as independent.
        spread: Standard deviation of the count over seeds, items taken as independent (too small for ``sgd``).
    """

    probability: Array
    count: float
    prefix: float
    spread: float

    def as_dict(self) -> dict[str, Any]:
        """Scalars and curve, for ``results.jsonl``."""
        rank, recall = recovery_curve(self.probability)
        return {
            "predicted_count": self.count,
            "predicted_prefix": self.prefix,
            "predicted_spread": self.spread,
            "predicted_curve_rank": [round(float(x), 2) for x in rank],
            "predicted_curve_recall": [round(float(x), 6) for x in recall],
        }


def predict(
    problem: MemoryProblem, rule: str, settings: RuleSettings | None = None, weights: Array | None = None
) -> Prediction | None:
    """Expected recovery after one step from W = 0, or ``None`` for rules without a formula.

    Args:
        problem: The problem; with a ``batch_size``, the counts of its own seed are the weights.
        rule: As in :func:`lightning_spectral.theory.rules.direction`.
        settings: Options of the rules.
        weights: Weight of each item in the gradient, shape (N,), instead of the problem's own.

    Returns:
        The prediction. It holds for d >= 128 to about 1 %, and for lambda up to about ``p_1 d^-alpha``.

    Example:
        >>> prediction = predict(MemoryProblem(d=128, n_items=30000, alpha=1.5), "muon")
        >>> round(prediction.count)
        123
    """
    name, settings = parse_rule(rule, settings or RuleSettings())
    if name not in PREDICTED_RULES:
        return None
    weights = problem.gradient_weights() if weights is None else weights
    weights = check_weights(weights, problem.n_items)
    bins = bin_weights(weights)
    if name == "sgd":
        probability = _sgd(problem, weights)
    elif name == "muon":
        probability = _muon(problem, bins, settings.lambda_of(problem))
    else:
        probability = _newton(problem, bins, settings.ridge)
    return Prediction(
        probability,
        count=float(probability.sum()),
        prefix=float(np.cumprod(probability).sum()),
        spread=float(np.sqrt((probability * (1 - probability)).sum())),
    )


def win_probability(signal_to_noise: Array, spread: Array, rivals: int) -> Array:
    """``E_z Phi(signal_to_noise + z spread)^rivals`` for standard normal z; any shape."""
    argument = signal_to_noise[..., None] + spread[..., None] * _NODES
    return np.asarray(np.exp(rivals * log_ndtr(argument)) @ _NODE_WEIGHTS)


def _muon(problem: MemoryProblem, bins: WeightBins, lam: float) -> Array:
    spectrum = GradientSpectrum(bins, problem.input_scales())
    signal, norm, _ = spectrum.smoothed(lam)
    chance = 1.0 / problem.n_items
    if problem.anisotropy == 0:
        ratio = signal * np.sqrt(problem.d / norm)
        return bins.spread(win_probability(ratio, np.sqrt(1 + ratio**2 * 2.5 / problem.d), problem.n_items - 1), chance)
    probe = np.unique(np.round(np.geomspace(1, len(bins.value), _MUON_PROBES)).astype(int)) - 1
    found = _anisotropic(problem, spectrum, signal, norm, probe, lam)
    return bins.spread(np.interp(np.arange(len(bins.value)), probe, found), chance)


def _anisotropic(
    problem: MemoryProblem, spectrum: GradientSpectrum, signal: Array, norm: Array, probe: NDArray[np.int64], lam: float
) -> Array:
    """Recovery of the probed bins when few directions carry v, shape (P,): an average over sampled v_i.

    Its length is far from Gaussian, and stored rivals answer to it along the directions they share with it.
    """
    d, bins = problem.d, spectrum.bins
    square_SK = np.random.default_rng(0).standard_normal((_MUON_SAMPLES, d)) ** 2
    energy_S = square_SK @ problem.input_scales() / d
    own_SP = np.sqrt(d / energy_S)[:, None] * (square_SK @ spectrum.responses(bins.value[probe], lam).T) / d
    # rival j's score, squared, over |v_i|^2 / d: what it answers, and the share of noise that being stored leaves it
    rival, count = _coarsen(bins.value, bins.multiplicity, _RIVAL_GROUPS)
    answer_SJ = (square_SK @ (spectrum.responses(rival, lam) ** 2).T) / d / energy_S[:, None]
    stored_J = np.interp(-rival, -bins.value, signal)
    variance_SJ = answer_SJ + np.interp(-rival, -bins.value, norm) - stored_J**2
    threshold = np.linspace(-2.0, 12.0, 160)
    total = np.zeros(len(probe))
    for own_P, variance_J in zip(own_SP, variance_SJ, strict=True):
        log_win = log_ndtr(threshold[:, None] / np.sqrt(np.maximum(variance_J, 1e-6))) @ count
        log_win += (problem.n_items - 1 - count.sum()) * log_ndtr(threshold)
        spread_P = np.sqrt(norm[probe] + own_P**2 * 2 / d)
        total += np.exp(np.interp(own_P[:, None] + spread_P[:, None] * _NODES, threshold, log_win)) @ _NODE_WEIGHTS
    return total / _MUON_SAMPLES


def _newton(problem: MemoryProblem, bins: WeightBins, ridge: float) -> Array:
    """Ridge in units of the mean input eigenvalue; the prediction does not depend on the anisotropy without one."""
    d, value, multiplicity = problem.d, bins.value, bins.multiplicity
    ridge = ridge * float(value @ multiplicity) / d

    def excess(log_q: float) -> float:
        q = np.exp(log_q)
        return float(ridge * q + (value * q / (1 + value * q)) @ multiplicity / d - 1)

    low, high = np.log(1e-6 / value[0]), np.log(1e12 / value[-1])
    if excess(high) <= 0:  # fewer items than features and no ridge: each is inverted exactly
        return bins.spread(np.ones(len(value)), 1.0 / problem.n_items)
    q = float(np.exp(brentq(excess, low, high)))
    share = value * q / (1 + value * q)  # r_i, the signal
    energy = float(share**2 @ multiplicity / d)
    # Squared noise of rival k's score, times d: (r_k^2 + A) (1 - r_i)^2 / (1 - A) from the other items, r_i^2 from the
    # overlap of u_k with u_i itself. Whitening by the covariance of N sampled outputs takes a share d / N of it out.
    whitening = max(1 - d / problem.n_items, 1e-9)
    scale = whitening * (1 - share) ** 2 / ((1 - energy) * d)
    itself = whitening * share**2 / d
    own_sd = np.sqrt(scale * energy + share**2 * 2.5 / d)
    # log prod_k Phi(x / sqrt(r_k^2 + A)) over rivals k; most have r_k of no account and are put together
    coarse_share, coarse_count = _coarsen(share, multiplicity, 60)
    silent = problem.n_items - 1 - coarse_count.sum()
    rival_energy = np.append(coarse_share**2, 0.0) + energy
    rival_count = np.append(coarse_count, max(silent, 0.0))
    own = share[:, None] + own_sd[:, None] * _NODES
    log_win = np.zeros_like(own)
    for variance, count in zip(rival_energy, rival_count, strict=True):
        log_win += count * log_ndtr(own / np.sqrt(scale * variance + itself)[:, None])
    return bins.spread(np.exp(log_win) @ _NODE_WEIGHTS, 1.0 / problem.n_items)


def _coarsen(value: Array, multiplicity: Array, groups: int) -> tuple[Array, Array]:
    """Root-mean-square of ``value`` in at most ``groups`` runs of neighbouring bins, heads alone."""
    edges = np.unique(np.round(np.geomspace(1, len(value) + 1, groups + 1)).astype(int)) - 1
    counts = np.add.reduceat(multiplicity, edges[:-1])
    return np.sqrt(np.add.reduceat(value**2 * multiplicity, edges[:-1]) / counts), counts


def _sgd(problem: MemoryProblem, weights: Array) -> Array:
    """Average over v_i's overlaps with the heads and its own noise: a Sobol sequence, scrambled with a fixed seed."""
    d = problem.d
    order = np.argsort(-weights, kind="stable")
    sorted_weights = weights[order]
    heads = sorted_weights[:_SGD_HEADS]
    tail_energy = float(np.sum(sorted_weights[_SGD_HEADS:] ** 2))
    # |v|^2 and v^T Sigma v of a fresh item, sampled exactly
    rng, scales = np.random.default_rng(0), problem.input_scales()
    length, overlap = np.empty(_SGD_SAMPLES), np.empty(_SGD_SAMPLES)
    for sample in range(_SGD_SAMPLES):
        square = rng.standard_normal(d) ** 2 * scales
        length[sample], overlap[sample] = square.mean(), (square * scales).mean()
    normal = ndtri(qmc.Sobol(2 + len(heads), rng=np.random.default_rng(0)).random(_SGD_SAMPLES))
    own_z, length_z, head_z = _OWN_SPREAD * normal[:, 0], normal[:, 1], normal[:, 2:]
    # a tail item needs rare own noise: it is drawn too wide, and each draw weighed by what that overdoes
    draw_weight = _OWN_SPREAD * np.exp((normal[:, 0] ** 2 - own_z**2) / 2) / _SGD_SAMPLES
    head_overlap = head_z * np.sqrt(overlap / d)[:, None]
    own_length = length * (1 + np.sqrt(2 / d) * length_z)
    energy = (heads * head_overlap) ** 2
    tail_S = tail_energy * overlap / d
    noise = np.sqrt((energy.sum(1) + tail_S) / d)  # of u_j . W v_i for an output that is no head
    own_noise = noise * own_z
    coarse, coarse_count = (
        _coarsen(sorted_weights[_SGD_HEADS:], np.ones(len(weights) - len(heads)), 24)
        if len(weights) > len(heads)
        else (np.empty(0), np.empty(0))
    )
    # a rival outside the heads has its own share of the gradient as well
    coarse_sd = np.sqrt(noise[:, None] ** 2 + coarse**2 * (overlap / d)[:, None])
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
        itself = (weight * length) ** 2 / d
        rival_noise = np.sqrt(noise**2 + itself)
        log_win = log_ndtr((own[:, None] - heads * head_overlap) / rival_noise[:, None])
        if rank < len(heads):
            log_win[:, rank] = 0.0
        total = log_win.sum(1) + log_ndtr(own[:, None] / np.sqrt(coarse_sd**2 + itself[:, None])) @ coarse_count
        found.append(float(np.exp(total) @ draw_weight))
        if found[-1] < lucky:
            break
    known = np.interp(np.log(first_rank + 1.0), np.log(first_rank[probe][: len(found)] + 1.0), found, right=lucky)
    probability = known[np.searchsorted(distinct, -sorted_weights)]
    result = np.empty(len(weights))
    result[order] = np.maximum(probability, lucky)
    return result
