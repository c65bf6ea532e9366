"""From a spectrum to a rank: soft, hard, Renyi, and what the sample size does to them.

All ranks read eigenvalues of a covariance as a distribution ``p_i = l_i / sum l`` and count how many of its modes are
in use; they are scale-invariant. Definitions: Jha and Reagen, arXiv:2605.21803; early enrichment and divergence: NerVE,
arXiv:2603.06922.

Axes: D features; a leading ``...`` is a batch of spectra.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Eigenvalues below zero by less than this share of the largest are rounding of a singular covariance.
ROUNDING = 1e-5
DEFAULT_RENYI_ORDERS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
# A bucket with fewer rows than this is reported, not trusted.
MIN_ROWS = 1_000


def spectrum(covariance_DD: Float[Tensor, "*batch D D"], rounding: float = ROUNDING) -> Float[Tensor, "*batch D"]:
    """Eigenvalues of a symmetric positive semi-definite matrix, descending, rounding below zero removed.

    Args:
        covariance_DD: The matrix.
        rounding: Negative eigenvalues up to this share of the largest become zero.

    Raises:
        ValueError: If the matrix is not square, not finite, or clearly not positive semi-definite.
    """
    if covariance_DD.ndim < 2 or covariance_DD.shape[-1] != covariance_DD.shape[-2]:
        raise ValueError(f"A covariance must be square, got shape {tuple(covariance_DD.shape)}.")
    if not bool(covariance_DD.isfinite().all()):
        raise ValueError("The covariance has a non-finite entry: drop the rows with NaN or Inf first.")
    return _nonnegative(torch.linalg.eigvalsh(covariance_DD).flip(-1), rounding)


def spectral_entropy(eigs: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy ``-sum_i p_i ln p_i`` of the normalised spectrum, in nats, in [0, ln D].

    Args:
        eigs: Covariance eigenvalues, any order, >= 0, not all zero.

    Raises:
        ValueError: If ``eigs`` has a negative or non-finite entry, or only zeros.
    """
    return _entropy(_probabilities(eigs))


def soft_rank(eigs: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
    """Shannon effective rank ``exp(spectral_entropy)``, in [hard_rank, D]; Renyi order 1.

    Args:
        eigs: Covariance eigenvalues, any order, >= 0, not all zero.

    Raises:
        ValueError: If ``eigs`` has a negative or non-finite entry, or only zeros.

    Example:
        >>> float(soft_rank(torch.ones(8)))
        8.0
    """
    return spectral_entropy(eigs).exp()


def hard_rank(eigs: Float[Tensor, "*batch D"], absolute_epsilon: float = 0.0) -> Float[Tensor, "*batch"]:
    """Participation ratio ``(sum l)^2 / sum l^2``: number of modes that carry substantial variance, in [1, D].

    Renyi order 2 (arXiv:2605.21803, "hard spectral rank").

    Args:
        eigs: Covariance eigenvalues, any order, >= 0, not all zero.
        absolute_epsilon: Added to ``sum l^2``, which breaks scale invariance. The paper's code uses 1e-12; only for
            comparing with its numbers.

    Raises:
        ValueError: If ``eigs`` has a negative or non-finite entry, or only zeros.
    """
    if absolute_epsilon:
        return eigs.sum(-1).square() / (eigs.square().sum(-1) + absolute_epsilon)
    return _participation(_probabilities(eigs))


def renyi_rank(eigs: Float[Tensor, "*batch D"], order: float) -> Float[Tensor, "*batch"]:
    """Renyi effective rank ``(sum_i p_i^a)^(1/(1-a))``; non-increasing in the order ``a``.

    Order 1 is :func:`soft_rank`, order 2 :func:`hard_rank`, infinity ``1 / max p``.

    Args:
        eigs: Covariance eigenvalues, any order, >= 0, not all zero.
        order: ``a > 0``.

    Raises:
        ValueError: If ``order`` is not > 0, or ``eigs`` is no spectrum.
    """
    if not order > 0:
        raise ValueError(f"A Renyi order must be > 0, got {order}.")
    return _renyi(_probabilities(eigs), order)


def eigenvalue_early_enrichment(eigs: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
    """How far the cumulative spectrum rises above a flat one, in [0, 1] (NerVE, arXiv:2603.06922).

    ``clamp(sum_k (C_k - k/D) / (D/2), 0, 1)`` with ``C_k`` the share of the k largest eigenvalues.
    """
    return _early_enrichment(_probabilities(eigs).sort(-1, descending=True).values)


def top_share(eigs: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
    """Share of the variance in the largest eigenvalue, in [1/D, 1]."""
    return _probabilities(eigs).amax(-1)


def js_divergence(first: Float[Tensor, "*batch D"], second: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence of two sorted, normalised spectra, in [0, ln 2] nats (NerVE, arXiv:2603.06922).

    Raises:
        ValueError: If the widths differ or either is no spectrum.
    """
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(f"Spectra of widths {first.shape[-1]} and {second.shape[-1]} cannot be compared mode by mode.")
    p = _probabilities(first).sort(-1, descending=True).values
    q = _probabilities(second).sort(-1, descending=True).values
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)).clamp(min=0) / 2


@dataclass(frozen=True)
class RankMetric:
    """One number of a spectrum. A row of :data:`RANK_METRICS` is all that a new one needs.

    Attributes:
        name: Field of the record, part of the TensorBoard tag, name in tables and figures.
        function: Eigenvalues, descending, ``(*batch, D)`` -> ``(*batch,)``.
        unit: What it counts, e.g. ``modes``, ``nats``; empty for a share.
        range: Smallest and largest value, for layers of width D.
        doc: One sentence.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    unit: str
    range: str
    doc: str


_ROWS = (
    RankMetric("soft_rank", soft_rank, "modes", "[hard_rank, D]", "Effective rank: exp of the Shannon entropy."),
    RankMetric("hard_rank", hard_rank, "modes", "[1, D]", "Participation ratio (sum l)^2 / sum l^2."),
    RankMetric("spectral_entropy", spectral_entropy, "nats", "[0, ln D]", "Shannon entropy of l_i / sum l."),
    RankMetric("early_enrichment", eigenvalue_early_enrichment, "", "[0, 1]", "How early the variance accumulates."),
    RankMetric("top_share", top_share, "", "[1/D, 1]", "Largest eigenvalue over the trace."),
)
RANK_METRICS: dict[str, RankMetric] = {row.name: row for row in _ROWS}


def rank_values(
    eigs_D: Float[Tensor, " D"], renyi_orders: Sequence[float] = DEFAULT_RENYI_ORDERS
) -> tuple[dict[str, float], dict[str, float]]:
    """Every one of :data:`RANK_METRICS` by name, and the Renyi ranks by order, of one spectrum.

    The same numbers as one function after the other, at a fraction of the time for narrow layers.

    Args:
        eigs_D: Covariance eigenvalues, descending, >= 0, not all zero.
        renyi_orders: Orders, each > 0.

    Raises:
        ValueError: If ``eigs_D`` is no spectrum.
    """
    p = _probabilities(eigs_D)
    entropy = _entropy(p)
    shared = {
        "soft_rank": entropy.exp(),
        "hard_rank": _participation(p),
        "spectral_entropy": entropy,
        "early_enrichment": _early_enrichment(p),
        "top_share": p.amax(-1),
    }
    values = [shared[name] if name in shared else row.function(eigs_D) for name, row in RANK_METRICS.items()]
    known = {1.0: shared["soft_rank"], 2.0: shared["hard_rank"]}
    renyi = [known[order] if order in known else _renyi(p, order) for order in renyi_orders]
    numbers = torch.stack([*(value.to(p.dtype) for value in values), *renyi]).tolist()
    orders = [f"{order:g}" for order in renyi_orders]
    named = dict(zip(RANK_METRICS, numbers[: len(values)], strict=True))
    return named, dict(zip(orders, numbers[len(values) :], strict=True))


def debiased_hard_rank(num_tokens: int, trace: float, frobenius_sq: float, quartic: float) -> float:
    """Participation ratio with the finite-sample bias of both its parts removed.

    Ratio of the unbiased estimators of ``(tr Sigma)^2`` and ``tr Sigma^2`` for independent rows of any distribution
    with fourth moments (Himeno and Yamada 2014). Tokens of one sequence are correlated: a diagnostic to stand beside
    the plain value, never instead of it.

    Args:
        num_tokens: N.
        trace: ``tr S`` of the sample covariance (divisor N-1).
        frobenius_sq: ``tr S^2``.
        quartic: ``sum_i |x_i - mean|^4``.

    Returns:
        The corrected rank; NaN where N < 4 or the estimate of ``tr Sigma^2`` is not positive.
    """
    n = float(num_tokens)
    if n < 4:
        return math.nan
    kurtosis = n * quartic / (n - 1)
    frobenius_part = (n - 1) * (n - 2) * frobenius_sq + trace**2 - kurtosis
    trace_part = 2 * frobenius_sq + (n * n - 3 * n + 1) * trace**2 - kurtosis
    return trace_part / frobenius_part if frobenius_part > 0 else math.nan


def possible_rank(estimate: float, width: int) -> float:
    """An estimate of a rank, within what a rank of this width can be: noise takes one beyond, a nearly empty ratio far.

    Args:
        estimate: Of a rank; not positive or NaN where it could not be told.
        width: D.

    Returns:
        In [1, D], or NaN.
    """
    return min(max(estimate, 1.0), float(width)) if estimate > 0 else math.nan


def sampling_status(num_tokens: int, width: int, trace: float, rounding: float = 0.0) -> str:
    """How far a rank of this window can be trusted; one of ``records.STATUSES``.

    Args:
        num_tokens: N.
        width: D.
        trace: Total variance; NaN or Inf if a row was not finite.
        rounding: Variance that rounding alone could have made.
    """
    if num_tokens == 0:
        return "empty"
    if not math.isfinite(trace):
        return "nonfinite"
    if num_tokens < 2 or trace <= 10 * rounding:
        return "degenerate"
    if num_tokens < MIN_ROWS:
        return "few_tokens"
    if num_tokens < width:
        return "undersampled"
    return "ok"


def _probabilities(eigs: Tensor) -> Tensor:
    if not isinstance(eigs, Tensor):
        raise TypeError(f"`eigs` must be a tensor of eigenvalues, got {type(eigs).__name__}: `torch.tensor(eigs)`.")
    eigs = eigs if eigs.dtype == torch.float64 else eigs.to(torch.float32)
    top = eigs.amax(-1, keepdim=True)
    if not bool(eigs.isfinite().all()) or bool((top <= 0).any()):
        raise ValueError(
            f"A spectrum needs finite eigenvalues that are not all zero, got {eigs.flatten()[:4].tolist()}."
        )
    scaled = _nonnegative(eigs) / top  # first: sums of squares of tiny or huge eigenvalues would under- or overflow
    return scaled / scaled.sum(-1, keepdim=True)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def _participation(p: Tensor) -> Tensor:
    return 1.0 / p.square().sum(-1)


def _renyi(p: Tensor, order: float) -> Tensor:
    if order == 1:
        return _entropy(p).exp()
    if math.isinf(order):
        return 1.0 / p.amax(-1)
    # log 0 = -inf adds nothing to the sum
    return (torch.logsumexp(order * p.log(), -1) / (1.0 - order)).exp()


def _early_enrichment(sorted_p: Tensor) -> Tensor:
    width = sorted_p.shape[-1]
    flat = torch.arange(1, width + 1, dtype=sorted_p.dtype, device=sorted_p.device) / width
    return ((sorted_p.cumsum(-1) - flat).sum(-1) / (width / 2)).clamp(0.0, 1.0)


def _nonnegative(eigs: Tensor, rounding: float = ROUNDING) -> Tensor:
    top = eigs.amax(-1, keepdim=True).clamp(min=0)
    if bool((eigs < -rounding * top).any()):
        raise ValueError(f"Eigenvalue {float(eigs.min()):.3g} beside {float(eigs.max()):.3g}: not of a covariance.")
    return eigs.clamp(min=0)


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)
