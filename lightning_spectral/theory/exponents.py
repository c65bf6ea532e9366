"""The asymptotic law: exponents, constants and crossings in closed form.

These are limits for d to infinity and a square W. At d = 128..512 the local slope of a count is still 0.06 above its
limit for Muon and 0.2 above it for SGD: compare a measured slope with the finite-size prediction (:mod:`capacity`) and
show the limit beside it, labelled as what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import log_ndtr, zeta

from lightning_spectral.theory.capacity import predict
from lightning_spectral.theory.problem import MemoryProblem, power_law, require_integer, require_real, typical_draw
from lightning_spectral.theory.rules import RuleSettings, parse_rule

SATURATED_SHARE = 0.9  # of the population count, at the critical batch
_TYPICAL_DRAWS = 4  # of a batch below _LARGE_BATCH; one is enough above
_LARGE_BATCH = 4096


def one_step_exponent(rule: str, alpha: float) -> float | None:
    """Limit of d(ln count) / d(ln d) after one population step.

    ``1 + 1/(2 alpha)`` for Muon and Newton, ``1/(2 alpha)`` for SGD and sign.

    ``None`` for truncated Newton-Schulz, which follows no power of d. ``sign`` is of SGD's order.
    """
    _require_law(alpha)
    name, _ = parse_rule(rule, RuleSettings())
    if name in ("muon", "newton"):
        return 1 + 1 / (2 * alpha)
    return 1 / (2 * alpha) if name in ("sgd", "sign") else None


def critical_batch_exponent(rule: str, alpha: float) -> float | None:
    """Limit of d(ln B*) / d(ln d): alpha times the count's exponent, since B items hold B^(1/alpha) distinct ones."""
    exponent = one_step_exponent(rule, alpha)
    return None if exponent is None else alpha * exponent


def batch_exponent(alpha: float) -> float:
    """Growth of the count with B below the critical batch, where every sampled item is stored: ``1 / alpha``."""
    _require_law(alpha)
    return 1 / alpha


def multi_step_exponent(rule: str, alpha: float, step: int) -> float | None:
    """e_t of ``d_t ~ d^e_t`` after ``step`` >= 0 steps of the deflation law.

    Muon and Newton: ``e_t = 2 - (1 - 1/(2 alpha))^t``. SGD:
    ``e_{t+1} = min(e_t + 1/(2 alpha), 1/alpha + (1 - 1/(2 alpha)) e_t)``
    from 0: a straight line until e = 1 after 2 alpha steps, then Muon's own recursion.
    """
    require_integer("step", step, 0, "count steps from 0")
    _require_law(alpha)
    name, _ = parse_rule(rule, RuleSettings())
    if name in ("muon", "newton"):
        return 2 - (1 - 1 / (2 * alpha)) ** step
    if name != "sgd":
        return None
    exponent = 0.0
    for _ in range(step):
        exponent = min(exponent + 1 / (2 * alpha), 1 / alpha + (1 - 1 / (2 * alpha)) * exponent)
    return exponent


@lru_cache(maxsize=64)
def capacity_constant(rule: str, alpha: float) -> float | None:
    """Kappa of the limiting law.

    ``count -> kappa (2 ln N)^(-1/(2 alpha)) d^(1 + 1/(2 alpha))`` (Muon, Newton) or ``kappa d^(1/(2 alpha))`` (SGD).
    """
    _require_law(alpha)
    if rule == "muon":
        gamma = 2 * alpha * math.sin(math.pi / (2 * alpha)) / math.pi
        return gamma * (4 / (math.pi * (alpha + 1))) ** (1 / alpha)
    if rule == "newton":
        return alpha * math.sin(math.pi / alpha) / math.pi * (alpha - 1) ** (-1 / (2 * alpha))
    if rule == "sgd":
        heads = np.arange(1, 20001, dtype=np.float64)

        def all_heads_lose(x: float) -> float:
            return float(np.exp(log_ndtr(np.exp(np.minimum(alpha * np.log(heads / x), 50.0))).sum()))

        return float(quad(all_heads_lose, 1e-6, 40, limit=400, epsabs=1e-8)[0])
    return None


def asymptotic_count(rule: str, alpha: float, d: int, n_items: int) -> float | None:
    """The limiting power law itself, to be drawn as a line beside the finite-size prediction."""
    name, _ = parse_rule(rule, RuleSettings())
    constant, exponent = capacity_constant(name, alpha), one_step_exponent(rule, alpha)
    if constant is None or exponent is None:
        return None
    if name == "sgd":
        return float(constant * d**exponent)
    return float(constant * (2 * math.log(n_items)) ** (-1 / (2 * alpha)) * d**exponent)


def information_limit(d: int, n_items: int) -> float:
    """``d^2 / (2 ln N)``: uniform pairs that a d x d map retrieves at best (arXiv:2605.05189, conjectured sharp)."""
    require_integer("d", d, 2, "a map needs at least two features")
    require_integer("n_items", n_items, 2, "with a single item every map recovers it")
    return d**2 / (2 * math.log(n_items))


def expected_distinct(alpha: float, n_items: int, batch_size: int) -> float:
    """Expected number of distinct items among ``batch_size`` draws: ``sum_i 1 - (1 - p_i)^B``; any alpha > 0."""
    require_integer("batch_size", batch_size, 1, "a batch holds at least one item")
    return _distinct(power_law(n_items, alpha), batch_size)


def _distinct(frequencies: NDArray[np.float64], batch_size: int) -> float:
    return float(-np.expm1(batch_size * np.log1p(-np.minimum(frequencies, 1 - 1e-16))).sum())


def crossing_batch(alpha: float, population_count: float) -> float:
    """B at which the distinct items ``Gamma(1 - 1/alpha) (B / zeta(alpha))^(1/alpha)`` reach the population count."""
    _require_law(alpha)
    return float(zeta(alpha) * (population_count / math.gamma(1 - 1 / alpha)) ** alpha)


def critical_batch(
    problem: MemoryProblem, rule: str = "muon", settings: RuleSettings | None = None, share: float = SATURATED_SHARE
) -> float | None:
    """Smallest batch with ``share`` of the population count, from the counts of typical draws.

    ``None`` for rules without a prediction.
    """
    whole = problem.with_(batch_size=None)
    frequencies = whole.frequencies()

    def count(batch: int | None) -> float | None:
        if batch is None:
            made = [predict(whole, rule, settings)]
        else:
            number = _TYPICAL_DRAWS if batch < _LARGE_BATCH else 1
            draws = (typical_draw(frequencies, batch, shift / number) for shift in range(number))
            made = [predict(whole, rule, settings, draw) for draw in draws if draw.any()]
        known = [prediction.count for prediction in made if prediction is not None]
        return float(np.mean(known)) if known else None

    return saturating_batch(count, frequencies, share)


def saturating_batch(
    count: Callable[[int | None], float | None], frequencies: NDArray[np.float64], share: float = SATURATED_SHARE
) -> float | None:
    """Smallest batch whose count reaches ``share`` of the population's; between powers of two on log scales.

    ``None`` if there is no prediction, or if none up to 2^40 does: a steep law has items that no batch ever holds.

    Args:
        count: Of a batch size, ``None`` being the population; may return ``None`` where there is no prediction.
        frequencies: Of the items, sum 1: batches that hold too few distinct ones are not asked about.
        share: In (0, 1).
    """
    whole = count(None)
    if whole is None:
        return None
    previous = (1.0, 0.0)
    for power in range(0, 41):
        batch = 2**power
        if 1 + _distinct(frequencies, 2 * batch) < share * whole:
            continue  # neither this batch nor the next holds enough, but for an item by chance
        reached = count(batch) or 0.0  # none for Newton on fewer items than features
        if reached >= share * whole:
            before, below = previous
            if below <= 0:
                return float(batch)
            fraction = math.log(share * whole / below) / math.log(reached / below)
            return float(before * (batch / before) ** fraction)
        previous = (float(batch), reached)
    return None


def predict_deflation(
    problem: MemoryProblem, rule: str, steps: int, settings: RuleSettings | None = None
) -> list[float] | None:
    """d_1..d_steps of the deflation law: each step sees the items after d_t only, and stores some of them.

    With a ``batch_size`` each step sees the draws that the solver makes for it. ``None`` where a step has no
    prediction.
    """
    require_integer("steps", steps, 1, "predict at least one step")
    stored: list[float] = []
    reached = 0.0
    for step in range(steps):
        masked = deflated(problem.gradient_weights(step), round(reached))
        if masked is not None:
            prediction = predict(problem, rule, settings, masked)
            if prediction is None:
                return None
            left = prediction.probability[round(reached) :]
            # d_t is a whole number in the solver and a mean here: each item left has the mean chance of those unmasked
            reached += float(left.mean()) * (problem.n_items - reached)
        stored.append(reached)
    return stored


def deflated(weights: np.ndarray, reached: int) -> np.ndarray | None:
    """Weights with the first ``reached`` items masked out, or ``None`` if nothing is left."""
    if reached >= len(weights) or not weights[reached:].any():
        return None
    masked = weights.copy()
    masked[:reached] = 0.0
    return masked


def _require_law(alpha: float) -> None:
    require_real("alpha", alpha)
    if alpha <= 1:
        raise ValueError(f"`alpha` must be > 1 for the law, got {alpha}.")
