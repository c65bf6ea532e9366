r"""Losses that no function of torch computes, read off the gradient of their logits.

A mean of cross-entropies ``sum_i w_i CE(z_i, y_i)`` has the gradient ``w_i (softmax(z_i) - e_{y_i})`` at the logits
``z_i``, however it was written: a negative entry at the target, and elsewhere a multiple of the probabilities. So the
gradient shows every target and its weight, and all other entries of the row prove it. Smoothed targets subtract
``w_i eps / V`` everywhere; a penalty on the normaliser (z-loss) adds a multiple of the probabilities and is left out of
the loss. Soft targets, a margin or a policy gradient on mixed advantages have another form and are not accepted.

A loss of the target's probability alone, as the focal loss, has a gradient of the same form, with a weight for every
token: weights must therefore be equal, or equal within a class or within a sequence.

Pure. Axes: N predictions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.probe.loss_calls import IGNORED, Scored

NOT_PROVEN = "the gradient of the logits is not that of a cross-entropy (soft targets, or a weight for every token)"
_MIN_CLASSES = 8  # fewer entries prove nothing
_MAX_ENTRIES = 1 << 24  # of one chunk: 64 MiB in fp32
_PROVEN_SHARE = 0.999  # rounding spoils a row now and then


def read_gradient(logits: Tensor, gradient: Tensor) -> Scored | None:
    """The predictions behind a gradient of logits.

    Args:
        logits: ``(..., V)``, as the loss saw them.
        gradient: Of the loss, the same shape; any common factor.

    Returns:
        With targets of shape ``(...)``, or ``None`` if the gradient is not proven to be that of cross-entropies.
    """
    vocab = logits.shape[-1]
    if vocab < _MIN_CLASSES or logits.shape != gradient.shape or not logits.numel():
        return None
    rows_NV, gradient_NV = logits.reshape(-1, vocab), gradient.reshape(-1, vocab)
    coarse = 2e-2 if gradient.element_size() < 4 or logits.element_size() < 4 else 1e-3
    step = max(_MAX_ENTRIES // vocab, 1)
    parts = [_read(rows_NV[i : i + step], gradient_NV[i : i + step], coarse) for i in range(0, len(rows_NV), step)]
    targets_N, weights_N, losses_N, smooth_N, right_N, proven_N = map(torch.cat, zip(*parts, strict=True))
    scored_N = weights_N != 0
    smoothing_N = smooth_N[scored_N & proven_N]
    good = proven_N[scored_N].double().mean() if bool(scored_N.any()) else torch.zeros(())
    if float(good) < _PROVEN_SHARE or not _is_one(smoothing_N.max() - smoothing_N.min(), coarse):
        return None
    counts_N = scored_N & proven_N
    weights_N = torch.where(counts_N, weights_N, 0.0)
    targets = torch.where(counts_N, targets_N, IGNORED)
    if not _explained(weights_N, targets, logits.shape, 3 * coarse):
        return None
    scored = Scored(losses_N, right_N, torch.ones_like(weights_N), targets.view(logits.shape[:-1]), trains=True)
    scored.weigh(weights_N)
    return scored


def _is_one(spread: Tensor, coarse: float) -> bool:
    """Whether smoothing is the same everywhere."""
    return bool(spread <= max(coarse, 0.01))


def _read(rows_NV: Tensor, gradient_NV: Tensor, coarse: float) -> tuple[Tensor, ...]:
    """Per row: target, weight, loss, smoothing, whether the target was the most likely token, whether it is proven."""
    scores_NV, g_NV = rows_NV.float(), gradient_NV.float()
    scale = g_NV.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    g_NV = g_NV / scale
    log_p_NV = scores_NV.log_softmax(-1)
    p_NV = log_p_NV.exp()
    target_N = g_NV.argmin(-1)
    at_NV = torch.zeros_like(g_NV, dtype=torch.bool).scatter_(1, target_N[:, None], True)
    rest_p_NV, rest_g_NV = p_NV.masked_fill(at_NV, 0.0).double(), g_NV.masked_fill(at_NV, 0.0).double()
    own_p_N, own_g_N = (
        p_NV.gather(1, target_N[:, None])[:, 0].double(),
        g_NV.gather(1, target_N[:, None])[:, 0].double(),
    )
    norm_N = rest_g_NV.norm(dim=1)
    slope_N = (rest_g_NV * rest_p_NV).sum(1) / rest_p_NV.square().sum(1)
    off_N = (rest_g_NV - slope_N[:, None] * rest_p_NV).norm(dim=1) / norm_N
    weight_N, smooth_N = slope_N * own_p_N - own_g_N, torch.zeros_like(slope_N)
    proven_N = (off_N <= coarse) & (slope_N > 0) & (weight_N > 0)
    if not bool((proven_N | (norm_N == 0)).all()):
        fitted = _fit_smoothed(rest_p_NV, rest_g_NV, own_p_N, own_g_N, coarse)
        take_N = ~proven_N & fitted[2]
        weight_N, smooth_N = torch.where(take_N, fitted[0], weight_N), torch.where(take_N, fitted[1], smooth_N)
        proven_N |= take_N
    nll_N = -log_p_NV.gather(1, target_N[:, None])[:, 0].double()
    loss_N = (1 - smooth_N) * nll_N - smooth_N * log_p_NV.double().mean(1)
    silent_N = (norm_N == 0) & (own_g_N == 0)
    weight_N = torch.where(silent_N, 0.0, weight_N * scale.double())
    right_N = (scores_NV.argmax(-1) == target_N).double()
    return target_N, weight_N, loss_N, smooth_N, right_N, proven_N & ~silent_N


def _fit_smoothed(
    rest_p_NV: Tensor, rest_g_NV: Tensor, own_p_N: Tensor, own_g_N: Tensor, coarse: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and smoothing of each row, and whether the row proves them: a line through the other entries."""
    vocab = rest_p_NV.shape[1]
    others = vocab - 1
    mean_p_N, mean_g_N = rest_p_NV.sum(1) / others, rest_g_NV.sum(1) / others
    spread_N = rest_p_NV.square().sum(1) - others * mean_p_N.square()
    joint_N = (rest_p_NV * rest_g_NV).sum(1) - others * mean_p_N * mean_g_N
    weight_N = joint_N / spread_N
    shift_N = weight_N * mean_p_N - mean_g_N
    smooth_N = shift_N * vocab / weight_N
    square_N = rest_g_NV.square().sum(1) - 2 * weight_N * (rest_g_NV * rest_p_NV).sum(1) + others * shift_N.square()
    square_N += weight_N.square() * rest_p_NV.square().sum(1)
    square_N += 2 * shift_N * (rest_g_NV.sum(1) - weight_N * rest_p_NV.sum(1))
    off_N = square_N.clamp(min=0).sqrt() / rest_g_NV.norm(dim=1)
    own_N = weight_N * (own_p_N - 1 + smooth_N - smooth_N / vocab)
    fits_N = (own_N - own_g_N).abs() <= 3 * coarse * weight_N
    return weight_N, smooth_N, fits_N & (off_N <= coarse) & (smooth_N > 0) & (smooth_N < 1) & (weight_N > 0)


def _explained(weights_N: Tensor, targets_N: Tensor, shape: torch.Size, coarse: float) -> bool:
    """Whether weights are equal, or equal within each class, or within each sequence."""
    counts_N = targets_N != IGNORED
    labels = [torch.zeros_like(targets_N), targets_N]
    if len(shape) > 2:
        labels.append(torch.arange(len(targets_N), device=targets_N.device) // max(len(targets_N) // shape[0], 1))
    for label_N in labels:
        names, member_N = label_N[counts_N].unique(return_inverse=True)
        if len(names) > counts_N.sum() // 2:
            continue  # a label for every token explains everything
        low = torch.full((len(names),), torch.inf, dtype=weights_N.dtype, device=weights_N.device)
        low = low.scatter_reduce(0, member_N, weights_N[counts_N], "amin")
        high = torch.zeros_like(low).scatter_reduce(0, member_N, weights_N[counts_N], "amax")
        if bool((high <= low * (1 + coarse)).all()):
            return True
    return False
