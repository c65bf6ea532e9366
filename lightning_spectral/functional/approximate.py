"""Soft rank without an eigensolve: within 0.5 % at a tenth of the time for wide layers.

The entropy is a trace, ``Tr f(C)`` with ``f(p) = -p ln p``. The largest modes carry most of it and make random probes
scatter, so a block power iteration takes them out exactly (deflation); what is left is estimated by stochastic Lanczos
quadrature (Ubaru, Chen and Saad 2017). Two traces of the rest are known exactly, ``Tr A`` and ``Tr A^2``: the
quadratic that fits ``f`` best is integrated with them, and only its remainder with probes (control variates).

The error is mostly of one sign, upwards: a monitor for training, not the number of a final result.

Axes: D features, K deflated modes, V probes, M Lanczos steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Tuned on power-law spectra with exponents 0.6 to 2. Half of the iterated block is kept: the last modes to converge are
# mixed with the rest, and cutting a mixture apart raises the entropy (0.5 % with all 64 of D = 1,024, 0.2 % with 32).
BLOCK, NUM_MODES, POWER_STEPS, NUM_PROBES, LANCZOS_STEPS = 64, 32, 3, 16, 15
# Narrower matrices are solved exactly in little more time.
MIN_WIDTH = 1_024


def approximate_entropy(
    covariance_DD: Float[Tensor, "D D"],
    trace: float | None = None,
    frobenius_sq: float | None = None,
    seed: int = 0,
) -> float:
    """Spectral entropy in nats of a covariance, estimated; ``exp`` of it is the soft rank.

    Args:
        covariance_DD: Symmetric positive semi-definite, fp32 or fp64, D >= 128 (worth it from :data:`MIN_WIDTH` on).
        trace: ``tr C``, if known more exactly than the matrix tells.
        frobenius_sq: ``tr C^2``, likewise.
        seed: Of the probes; the global random state is not touched.

    Raises:
        ValueError: If the matrix is not square, too narrow, not finite or has no variance.
    """
    width = covariance_DD.shape[-1]
    if covariance_DD.shape != (width, width) or width < 2 * BLOCK:
        raise ValueError(
            f"Need a square matrix at least {2 * BLOCK} wide, got shape {tuple(covariance_DD.shape)}: solve "
            "narrower ones exactly (`spectral_entropy(spectrum(C))`)."
        )
    trace = float(covariance_DD.diagonal().sum(dtype=torch.float64)) if trace is None else trace
    if frobenius_sq is None:
        frobenius_sq = float(torch.linalg.vector_norm(covariance_DD, dtype=torch.float64)) ** 2
    if not (math.isfinite(frobenius_sq) and trace > 0):
        raise ValueError(f"A covariance needs finite entries and a positive trace, got a trace of {trace}.")
    generator = torch.Generator().manual_seed(seed)
    values_K, modes_DK, residual_sq = _largest_modes(covariance_DD, generator)
    values_K = values_K / trace
    nodes, weights = _quadrature(covariance_DD, modes_DK, generator)
    nodes = (nodes / trace).clamp(min=0)
    rest_traces = [float(width - len(values_K)), 1.0 - float(values_K.sum())]
    # C = [[T, B^T], [B, A]] in the basis of the modes and their complement: B counts twice.
    rest_sq = (frobenius_sq - 2 * residual_sq) / trace**2 - float(values_K.square().sum())
    if rest_sq * trace**2 > 100 * torch.finfo(covariance_DD.dtype).eps * frobenius_sq:
        rest_traces.append(rest_sq)  # else it is the rounding of two large numbers
    return float(_entropy_terms(values_K).sum()) + _trace_with_control(nodes, weights, rest_traces)


def _largest_modes(covariance_DD: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Ritz values (fp64) and vectors of the largest modes; the squared norm of what they miss, ``|C Q - Q T|^2``."""
    width = covariance_DD.shape[0]
    modes_DK = torch.randn(width, BLOCK, device="cpu", generator=generator).to(covariance_DD)
    for _ in range(POWER_STEPS):
        modes_DK = torch.linalg.qr(covariance_DD @ modes_DK).Q
    image_DK = covariance_DD @ modes_DK
    values_K, rotation_KK = torch.linalg.eigh((modes_DK.mT @ image_DK).double())
    rotation_KK = rotation_KK.to(modes_DK.dtype)
    modes_DK, image_DK = modes_DK @ rotation_KK, image_DK @ rotation_KK
    values_K, modes_DK, image_DK = values_K[-NUM_MODES:], modes_DK[:, -NUM_MODES:], image_DK[:, -NUM_MODES:]
    missed_DK = image_DK - modes_DK * values_K.to(modes_DK.dtype)
    return values_K.clamp(min=0), modes_DK, float(torch.linalg.vector_norm(missed_DK)) ** 2


def _quadrature(covariance_DD: Tensor, modes_DK: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Nodes and weights, each ``(V, M)`` fp64, so that ``sum weights g(nodes)`` is about ``Tr g`` of the complement."""

    def outside(vectors_DV: Tensor) -> Tensor:
        return vectors_DV - modes_DK @ (modes_DK.mT @ vectors_DV)

    width = covariance_DD.shape[0]
    signs_DV = torch.randint(0, 2, (width, NUM_PROBES), generator=generator) * 2 - 1
    current_DV = outside(signs_DV.to(covariance_DD))
    norm_V = torch.linalg.vector_norm(current_DV, dim=0)
    tiny = torch.finfo(covariance_DD.dtype).tiny
    current_DV = current_DV / norm_V.clamp(min=tiny)
    previous_DV, beta_V = torch.zeros_like(current_DV), torch.zeros_like(norm_V)
    diagonal, off_diagonal = [], []
    for _ in range(LANCZOS_STEPS):
        next_DV = outside(covariance_DD @ current_DV) - beta_V * previous_DV
        alpha_V = (current_DV * next_DV).sum(0)
        next_DV -= alpha_V * current_DV
        beta_V = torch.linalg.vector_norm(next_DV, dim=0)
        diagonal.append(alpha_V)
        off_diagonal.append(beta_V)
        previous_DV, current_DV = current_DV, next_DV / beta_V.clamp(min=tiny)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, 1).double())
    beside = torch.diag_embed(torch.stack(off_diagonal[:-1], 1).double(), 1)
    nodes, vectors = torch.linalg.eigh(tridiagonal + beside + beside.mT)
    return nodes, vectors[:, 0].square() * (norm_V.double().square() / NUM_PROBES).unsqueeze(1)


def _trace_with_control(nodes: Tensor, weights: Tensor, known_traces: Sequence[float]) -> float:
    """``Tr f`` from nodes and weights, with ``Tr 1``, ``Tr A`` and maybe ``Tr A^2`` known."""
    nodes, weights = nodes.cpu(), weights.cpu()  # a few hundred numbers; CUDA has no `gelsd`
    scale = float(nodes.amax()) or 1.0
    powers = torch.stack([(nodes / scale) ** power for power in range(len(known_traces))], -1).flatten(0, 1)
    values, weights = _entropy_terms(nodes).flatten(), weights.flatten()
    root = weights.sqrt()
    fit = torch.linalg.lstsq(powers * root.unsqueeze(1), (values * root).unsqueeze(1), driver="gelsd").solution[:, 0]
    known = torch.tensor([trace / scale**power for power, trace in enumerate(known_traces)], dtype=fit.dtype)
    return float(fit @ known + weights @ (values - powers @ fit))


def _entropy_terms(shares: Tensor) -> Tensor:
    return -torch.special.xlogy(shares, shares)
