"""Which items one step recovers, predicted from (weights, shape of W, rule) without a fitted parameter.

Item i's own score is a signal plus Gaussian noise, every other output's score is noise: it is recovered with
probability ``E_z prod_j Phi((signal_i + z sd_i) / sd_j)``. What remains is the signal and the noise of each rule:

* ``muon``: from the spectrum of the gradient (:mod:`spectrum`);
* ``ns<k>``, ``power<p>``: any map of the singular values, from their density (:mod:`density`);
* ``newton``, ``sgd``: :mod:`capacity_rules`.

``sign`` has no prediction here.
"""

# N items, B bins of items, Z quadrature nodes, S samples, J groups of rivals, P probed bins

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from lightning_spectral.theory import capacity_rules
from lightning_spectral.theory.density import density_of, map_of
from lightning_spectral.theory.problem import MemoryProblem, check_weights
from lightning_spectral.theory.recovery import recovery_curve
from lightning_spectral.theory.rules import RuleSettings, is_singular, parse_rule
from lightning_spectral.theory.spectrum import GradientSpectrum, MapEffect, WeightBins, bin_weights

Array = NDArray[np.float64]

PREDICTED_RULES = ("sgd", "muon", "newton", "ns", "power")
_NODES, _NODE_WEIGHTS = capacity_rules.NODES, capacity_rules.NODE_WEIGHTS
_MUON_SAMPLES = 200  # of v, anisotropic inputs only
_MUON_PROBES = 200  # bins at which anisotropic recovery is evaluated; between them it is interpolated
_RIVAL_GROUPS = 80  # rivals of like loudness share one variance
_SCORES = np.sinh(np.linspace(-5.0, 5.0, 4000))  # of the own score, in units of a silent rival's spread
_TRUSTED_D = 128
_TRUSTED_ANISOTROPY = 1.0  # muon at beta = 1.5: 6 % too high at d = 256; sgd 30 %; newton is invariant
_TRUSTED_WHITENING = 0.2  # d_out / N above which Newton's output covariance is no constant
_TRUSTED_CONDITION = 1e12  # of the gradient: the smallest singular values are rounding noise in fp64


@dataclass(frozen=True)
class Prediction:
    """Expected recovery of one step.

    Attributes:
        probability: Recovery probability of every item, shape (N,).
        count: Their sum.
        prefix: Expected length of the recovered prefix, items taken as independent.
        spread: Standard deviation of the count over seeds, items taken as independent.
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
    """Expected recovery after one step from W = 0, or ``None`` (:func:`no_prediction` says why).

    Args:
        problem: The problem; with a ``batch_size``, the counts of its own seed are the weights.
        rule: As in :func:`lightning_spectral.theory.rules.direction`.
        settings: Options of the rules.
        weights: Weight of each item in the gradient, shape (N,), instead of the problem's own.

    Returns:
        The prediction. It holds for d >= 128 to about 1 % (:func:`distrust` names the exceptions).

    Example:
        >>> prediction = predict(MemoryProblem(d=128, n_items=30000, alpha=1.5), "muon")
        >>> round(prediction.count)
        123
    """
    name, settings = parse_rule(rule, settings or RuleSettings())
    weights = problem.gradient_weights() if weights is None else weights
    lam = settings.lambda_of(problem) if name == "muon" else 0.0
    return predict_weights(weights, problem.shape, rule, settings, lam, problem.input_scales())


def predict_weights(
    weights: Array,
    shape: tuple[int, int],
    rule: str,
    settings: RuleSettings | None = None,
    lam: float = 0.0,
    input_scales: Array | None = None,
    shared_mean: bool = False,
) -> Prediction | None:
    """As :func:`predict`, for any item weights and any shape of W.

    Args:
        weights: Weight of each item in the gradient, shape (N,), >= 0.
        shape: Features of u (outputs) and of v (inputs).
        rule: As in :func:`lightning_spectral.theory.rules.direction`.
        settings: Options of the rules; lambda is taken from ``lam``.
        lam: Of ``muon``, for these very weights.
        input_scales: Eigenvalues of the inputs' second moment, mean 1, shape (shape[1],); ``None`` is isotropic.
        shared_mean: The first input direction is the inputs' common mean: the same for all items, not Gaussian.
    """
    name, settings = parse_rule(rule, settings or RuleSettings())
    weights = check_weights(weights, len(weights))
    scales = np.ones(shape[1]) if input_scales is None else input_scales
    if no_prediction(weights, shape, rule, settings, scales) is not None:
        return None
    if name == "sgd":
        return _prediction(capacity_rules.sgd(weights, shape, scales, shared_mean))
    bins = bin_weights(weights)
    if name == "newton":
        return _prediction(capacity_rules.newton(bins, shape, settings.ridge, len(weights)))
    if name == "muon":
        spectrum = GradientSpectrum(bins, scales, shape[0])
        effect = spectrum.smoothed(lam)
        if np.ptp(scales):
            return _prediction(_anisotropic(spectrum, effect, lam, len(weights), shared_mean))
    else:
        effect = density_of(bins, shape).effect(map_of(name, settings, weights, shape))
    return _prediction(_isotropic(effect, bins, shape, len(weights)))


def no_prediction(
    weights: Array, shape: tuple[int, int], rule: str, settings: RuleSettings, scales: Array
) -> str | None:
    """Why there is no prediction, in a few words, or ``None`` where there is one."""
    name, settings = parse_rule(rule, settings)
    if name not in PREDICTED_RULES:
        return f"no formula for {name}"
    if name in ("ns", "power") and np.ptp(scales):
        return f"no formula for {name} with anisotropic inputs"
    if name == "ns" and settings.ns_steps is None:
        return "give the Newton-Schulz steps as a number"
    distinct = int((weights > 0).sum())
    if is_singular(rule, settings, distinct, shape[1]):
        return f"singular: {distinct} distinct items for d={shape[1]}; set a ridge"
    return None


def distrust(problem: MemoryProblem, rule: str, settings: RuleSettings, prediction: Prediction | None) -> str | None:
    """Why a prediction may be off by more than 3 %, in a few words, or ``None`` where it met simulations.

    One rule for one-step, batch and deflation rows alike.
    """
    name, settings = parse_rule(rule, settings)
    if prediction is None:
        return no_prediction(problem.gradient_weights(), problem.shape, rule, settings, problem.input_scales())
    narrow = min(problem.shape)
    lam_unit = float(problem.frequencies()[0]) * narrow**-problem.alpha
    condition = narrow ** (problem.alpha + problem.anisotropy / 2)
    reasons = {
        f"d={narrow} is below {_TRUSTED_D}": narrow < _TRUSTED_D,
        f"censored: more than a third of n_items={problem.n_items}": 3 * prediction.count > problem.n_items,
        f"anisotropy={problem.anisotropy:g} is above {_TRUSTED_ANISOTROPY:g}": name != "newton"
        and problem.anisotropy > _TRUSTED_ANISOTROPY,
        "lambda is above p_1 d^-alpha": name == "muon" and settings.lambda_of(problem) > lam_unit,
        "bfloat16 products round": name == "ns" and settings.ns_dtype == "bfloat16",
        "power above 0.2: heads do not average out": name == "power" and settings.power > 0.2,
        f"d / n_items is above {_TRUSTED_WHITENING:g}": name == "newton"
        and problem.shape[0] > _TRUSTED_WHITENING * problem.n_items,
        f"the gradient's condition number d^alpha is above {_TRUSTED_CONDITION:.0e}": name in ("muon", "newton")
        and condition > _TRUSTED_CONDITION,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def win_probability(signal_to_noise: Array, spread: Array, rivals: int) -> Array:
    """``E_z Phi(signal_to_noise + z spread)^rivals`` for standard normal z; any shape."""
    argument = signal_to_noise[..., None] + spread[..., None] * _NODES
    return np.asarray(np.exp(rivals * log_ndtr(argument)) @ _NODE_WEIGHTS)


def _prediction(probability: Array) -> Prediction:
    return Prediction(
        probability,
        count=float(probability.sum()),
        prefix=float(np.cumprod(probability).sum()),
        spread=float(np.sqrt((probability * (1 - probability)).sum())),
    )


def _isotropic(effect: MapEffect, bins: WeightBins, shape: tuple[int, int], n_items: int) -> Array:
    """Recovery of every item, shape (N,), scores in units of a silent rival's spread."""
    outputs, inputs = shape
    ratio = effect.signal * np.sqrt(outputs / effect.image)
    spread = np.sqrt(1 + ratio**2 * 1.25 * (1 / outputs + 1 / inputs))
    plain = win_probability(ratio, spread, n_items - 1)
    loud = effect.answer / effect.answer[-1]
    if np.abs(loud - 1).max() < 1e-6:
        return bins.spread(plain[:-1], float(plain[-1]))
    # rivals that are stored answer louder than silent ones, where the rank is smaller than the outputs
    silent = n_items - bins.multiplicity.sum()
    loudness, count = capacity_rules.coarsen(np.sqrt(loud[:-1]), bins.multiplicity, _RIVAL_GROUPS)
    log_win = silent * log_ndtr(_SCORES) + log_ndtr(_SCORES[:, None] / loudness) @ count
    own = ratio[:, None] + spread[:, None] * _NODES
    itself = log_ndtr(own / np.sqrt(loud)[:, None])
    probability = np.exp(np.minimum(np.interp(own, _SCORES, log_win) - itself, 0.0)) @ _NODE_WEIGHTS
    # fewer items than directions: all are held whole, and do not answer to one another
    held_whole = bins.multiplicity.sum() <= min(shape)
    return bins.spread(plain[:-1] if held_whole else probability[:-1], float(probability[-1]))


def relu_features(inputs: int, hidden: int) -> Array:
    """Second moments of ``relu(A v)``, A random (hidden, inputs) and v Gaussian: for ``shared_mean=True``, mean 1.

    Hermite series of the ReLU: ``1 / (2 pi)`` of the square is the mean, 1/4 the linear part, which spans as many
    directions as v has features, the rest everything else.
    """
    if hidden < inputs + 2:
        raise ValueError(f"`hidden` must be >= {inputs + 2} (the inputs' features and two), got {hidden}.")
    mean, linear = 1 / (2 * np.pi), 0.25
    rest = hidden - inputs - 1
    energy = [np.array([mean]), np.full(inputs, linear / inputs), np.full(rest, (0.5 - mean - linear) / rest)]
    return np.concatenate(energy) * 2 * hidden


def _anisotropic(spectrum: GradientSpectrum, effect: MapEffect, lam: float, n_items: int, shared_mean: bool) -> Array:
    """Recovery of every item, shape (N,), where few directions carry v: an average over sampled v_i.

    Its length is far from Gaussian, and stored rivals answer to it along the directions they share with it.
    """
    bins, (outputs, inputs) = spectrum.bins, (spectrum.outputs, spectrum.inputs)
    probe = np.unique(np.round(np.geomspace(1, len(bins.value), _MUON_PROBES)).astype(int)) - 1
    probe = np.append(probe, len(bins.value))  # and an item without weight
    value = np.append(bins.value, 0.0)
    square_SK = np.random.default_rng(0).standard_normal((_MUON_SAMPLES, inputs)) ** 2
    if shared_mean:
        square_SK[:, 0] = 1.0
    energy_S = square_SK @ spectrum.scales / inputs
    own_SP = np.sqrt(outputs / energy_S)[:, None] * (square_SK @ spectrum.responses(value[probe], lam).T) / inputs
    own_SP = own_SP / np.sqrt(effect.image[probe])
    # rival j's score, squared, over that of a silent one: what it answers, and what being stored leaves of its noise
    rival, count = capacity_rules.coarsen(bins.value, bins.multiplicity, _RIVAL_GROUPS)
    answer_SJ = (square_SK @ (spectrum.responses(rival, lam) ** 2).T) / inputs / energy_S[:, None]
    stored_J, loud_J = (
        np.interp(-rival, -bins.value, of[:-1]) for of in (effect.signal, effect.answer / effect.answer[-1])
    )
    variance_SJ = (answer_SJ - stored_J**2) * outputs / inputs / effect.image[-1] + loud_J
    total = np.zeros(len(probe))
    for own_P, variance_J in zip(own_SP, variance_SJ, strict=True):
        log_win = log_ndtr(_SCORES[::8, None] / np.sqrt(np.maximum(variance_J, 1e-6))) @ count
        log_win += (n_items - 1 - count.sum()) * log_ndtr(_SCORES[::8])
        spread_P = np.sqrt(1 + own_P**2 * (1 / outputs + 1 / inputs))
        total += np.exp(np.interp(own_P[:, None] + spread_P[:, None] * _NODES, _SCORES[::8], log_win)) @ _NODE_WEIGHTS
    total /= _MUON_SAMPLES
    found = np.interp(np.arange(len(bins.value)), probe[:-1], total[:-1])
    return bins.spread(found, float(total[-1]))
