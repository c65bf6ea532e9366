"""The negative gradient of the softmax loss, at W = 0 and anywhere, without ever holding an N x N matrix.

At W = 0 every output is equally likely and the sum collapses to two products of N x d matrices. Anywhere else a tile of
scores is turned into probabilities and used up before the next one.
"""

# N items, D features, C rows of a chunk

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_spectral.theory.embeddings import BLOCK_ROWS, Embeddings
from lightning_spectral.theory.problem import check_weights

# The heads carry most of the weight: their products are always in fp64, whose error no later item can see.
_HEAD_ROWS = 512
_BLOCKS_OF_A_SUM = 4  # blocks whose products are summed in the problem's own type before they join the fp64 sum
_FP64 = torch.float64


def negative_gradient_at_zero(embeddings: Embeddings, weights: NDArray[np.float64]) -> Tensor:
    """``sum_i w_i (u_i - mean u) v_i^T``: minus the gradient of the loss at W = 0, shape (D, D), fp64.

    Items are added block by block in a fixed order, so the result does not depend on any chunk size. With
    ``dtype="float32"`` the products of four blocks are summed in fp32, and those sums in fp64.

    Args:
        embeddings: The items.
        weights: Weight of each item, shape (N,).
    """
    weights = check_weights(weights, embeddings.problem.n_items)
    weight_N = torch.from_numpy(weights).to(embeddings.device)
    size, device = embeddings.problem.d, embeddings.device
    tail_dtype = getattr(torch, embeddings.problem.dtype)
    total_DD = torch.zeros(size, size, dtype=_FP64, device=device)
    mean_u_D = torch.zeros(size, dtype=_FP64, device=device)
    weighted_v_D = torch.zeros(size, dtype=_FP64, device=device)
    tail_DD = torch.zeros(size, size, dtype=tail_dtype, device=device)
    head = _heaviest(weights)
    for start, u_CD in embeddings.blocks("u"):
        stop = start + len(u_CD)
        mean_u_D += u_CD.sum(0, dtype=_FP64)  # the heads multiply it: fp32 would show in the smallest singular value
        weight_C = weight_N[start:stop]
        active = torch.nonzero(weight_C)[:, 0]
        if len(active):
            v_CD = embeddings.rows("v", start, stop)
            if len(active) < len(u_CD):
                u_CD, v_CD, weight_C = u_CD[active], v_CD[active], weight_C[active]
            is_head = start < head
            dtype = _FP64 if is_head else tail_dtype
            u_CD, v_CD, weight_C = u_CD.to(dtype), v_CD.to(dtype), weight_C.to(dtype)
            weighted_v_D += weight_C @ v_CD
            (total_DD if is_head else tail_DD).addmm_((u_CD * weight_C[:, None]).mT, v_CD)
        if stop // BLOCK_ROWS % _BLOCKS_OF_A_SUM == 0 or stop == embeddings.problem.n_items:
            total_DD += tail_DD
            tail_DD.zero_()
    mean_u_D /= embeddings.problem.n_items
    return total_DD - torch.outer(mean_u_D, weighted_v_D)


def negative_gradient(
    embeddings: Embeddings, weight_DD: Tensor, weights: NDArray[np.float64], chunk_size: int = 1024
) -> tuple[Tensor, float]:
    """``sum_i w_i (u_i - sum_j softmax_j(u_j . W v_i) u_j) v_i^T`` and the loss, at any W.

    Args:
        embeddings: The items.
        weight_DD: W, shape (D, D).
        weights: Weight of each item in the gradient, shape (N,).
        chunk_size: Items whose N scores are held at once.

    Returns:
        Minus the gradient, shape (D, D), fp64, and the weighted cross-entropy in nats.
    """
    problem = embeddings.problem
    dtype = getattr(torch, problem.dtype)
    check_map(weight_DD, problem.d)
    weight_N = torch.from_numpy(check_weights(weights, problem.n_items)).to(embeddings.device)
    map_DD = weight_DD.to(embeddings.device, dtype)
    total_DD = torch.zeros(problem.d, problem.d, dtype=_FP64, device=embeddings.device)
    loss = 0.0
    # `v` and `u` of the active items only: a minibatch has gradients for the items it holds and for no others
    active_A = torch.nonzero(weight_N)[:, 0]
    for part_C in active_A.split(chunk_size):
        u_CD, v_CD = (embeddings.select(side, part_C).to(dtype) for side in ("u", "v"))
        weight_C = weight_N[part_C]
        image_CD = v_CD @ map_DD.mT
        log_sum_C, mean_CD = _softmax_mean(embeddings, image_CD)
        own_C = (u_CD * image_CD).sum(1)
        loss += float(weight_C @ (log_sum_C - own_C).double())
        difference_CD = (u_CD - mean_CD).double() * weight_C[:, None]
        total_DD += difference_CD.mT @ v_CD.double()
    return total_DD, loss


def population_loss(embeddings: Embeddings, weight_DD: Tensor, chunk_size: int = 1024) -> float:
    """Cross-entropy of all items under their frequencies, in nats; ``log N`` at W = 0."""
    frequency_N = torch.from_numpy(embeddings.problem.frequencies()).to(embeddings.device)
    return -float(frequency_N @ log_probabilities(embeddings, weight_DD, chunk_size))


def log_probabilities(embeddings: Embeddings, weight_DD: Tensor, chunk_size: int = 1024) -> Tensor:
    """Log of the softmax probability of each item's own output, shape (N,), fp64; ``-log N`` at W = 0."""
    problem = embeddings.problem
    dtype = getattr(torch, problem.dtype)
    check_map(weight_DD, problem.d)
    map_DD = weight_DD.to(embeddings.device, dtype)
    parts: list[Tensor] = []
    for start, v_CD in embeddings.blocks("v", chunk_size):
        image_CD = v_CD.to(dtype) @ map_DD.mT
        u_CD = embeddings.rows("u", start, start + len(v_CD)).to(dtype)
        log_sum_C = torch.full((len(v_CD),), -torch.inf, dtype=dtype, device=embeddings.device)
        for _, other_CD in embeddings.blocks("u", _score_columns(chunk_size)):
            log_sum_C = torch.logaddexp(log_sum_C, torch.logsumexp(image_CD @ other_CD.to(dtype).mT, 1))
        parts.append(((u_CD * image_CD).sum(1) - log_sum_C).double())
    return torch.cat(parts)


def check_map(weight_DD: Tensor, d: int) -> None:
    """Raise unless W is a finite (d, d) matrix."""
    if weight_DD.shape != (d, d):
        raise ValueError(f"`W` must have shape ({d}, {d}), got {tuple(weight_DD.shape)}.")
    if not torch.isfinite(weight_DD).all():
        raise ValueError("`W` must be finite, got NaN or Inf entries; lower the step size.")


def _softmax_mean(embeddings: Embeddings, image_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Log-partition of each row's scores and the mean output under its softmax, tile by tile with a running maximum."""
    dtype, device = image_CD.dtype, image_CD.device
    peak_C = torch.full((len(image_CD),), -torch.inf, dtype=dtype, device=device)
    partition_C = torch.zeros(len(image_CD), dtype=dtype, device=device)
    mean_CD = torch.zeros_like(image_CD)
    for _, other_CD in embeddings.blocks("u", _score_columns(len(image_CD))):
        other_CD = other_CD.to(dtype)
        score_CC = image_CD @ other_CD.mT
        new_peak_C = torch.maximum(peak_C, score_CC.amax(1))
        shrink_C = torch.exp(peak_C - new_peak_C)
        score_CC.sub_(new_peak_C[:, None]).exp_()
        partition_C = partition_C * shrink_C + score_CC.sum(1)
        mean_CD = torch.addmm(mean_CD * shrink_C[:, None], score_CC, other_CD)
        peak_C = new_peak_C
    return peak_C + partition_C.log(), mean_CD / partition_C[:, None]


def _score_columns(rows: int) -> int:
    """Columns of a score tile: 16 M scores at most, so that a tile never outgrows the embeddings by much."""
    return max(1024, 2**24 // max(rows, 1) // 1024 * 1024)


def _heaviest(weights: NDArray[np.float64]) -> int:
    """Items before this index are multiplied in fp64: the first rows that carry weight."""
    active = np.flatnonzero(weights)
    return int(active[min(_HEAD_ROWS, len(active)) - 1]) + 1
