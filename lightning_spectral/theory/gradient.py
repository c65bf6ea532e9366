"""The negative gradient of the softmax loss, at W = 0 and anywhere, without ever holding an N x N matrix.

At W = 0 every output is equally likely and the sum collapses to two products of N x d matrices. Anywhere else a tile of
scores is turned into probabilities and used up before the next one.
"""

# N items, D features of v, M features of u, C rows of a chunk

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
_SCORE_ERROR = 1e-3  # nats by which the rounding of a score may move a log-probability
_FP64 = torch.float64


def negative_gradient_at_zero(embeddings: Embeddings, weights: NDArray[np.float64]) -> Tensor:
    """``sum_i w_i (u_i - mean u) v_i^T``: minus the gradient of the loss at W = 0, shape (M, D), fp64.

    Items are added block by block in a fixed order, so the result does not depend on any chunk size. With
    ``dtype="float32"`` the products of four blocks are summed in fp32, and those sums in fp64.

    Args:
        embeddings: The items.
        weights: Weight of each item, shape (N,).
    """
    weights = check_weights(weights, embeddings.problem.n_items)
    weight_N = torch.from_numpy(weights).to(embeddings.device)
    (outputs, size), device = embeddings.problem.shape, embeddings.device
    tail_dtype = getattr(torch, embeddings.problem.dtype)
    total_MD = torch.zeros(outputs, size, dtype=_FP64, device=device)
    mean_u_M = torch.zeros(outputs, dtype=_FP64, device=device)
    weighted_v_D = torch.zeros(size, dtype=_FP64, device=device)
    tail_MD = torch.zeros(outputs, size, dtype=tail_dtype, device=device)
    head = _heaviest(weights)
    for start, u_CM in embeddings.blocks("u"):
        stop = start + len(u_CM)
        mean_u_M += u_CM.sum(0, dtype=_FP64)  # the heads multiply it: fp32 would show in the smallest singular value
        weight_C = weight_N[start:stop]
        active = torch.nonzero(weight_C)[:, 0]
        if len(active):
            v_CD = embeddings.rows("v", start, stop)
            if len(active) < len(u_CM):
                u_CM, v_CD, weight_C = u_CM[active], v_CD[active], weight_C[active]
            is_head = start < head
            dtype = _FP64 if is_head else tail_dtype
            u_CM, v_CD, weight_C = u_CM.to(dtype), v_CD.to(dtype), weight_C.to(dtype)
            weighted_v_D += weight_C @ v_CD
            (total_MD if is_head else tail_MD).addmm_((u_CM * weight_C[:, None]).mT, v_CD)
        if stop // BLOCK_ROWS % _BLOCKS_OF_A_SUM == 0 or stop == embeddings.problem.n_items:
            total_MD += tail_MD
            tail_MD.zero_()
    mean_u_M /= embeddings.problem.n_items
    return total_MD - torch.outer(mean_u_M, weighted_v_D)


def negative_gradient(
    embeddings: Embeddings, weight_MD: Tensor, weights: NDArray[np.float64], chunk_size: int = 1024
) -> tuple[Tensor, float]:
    """``sum_i w_i (u_i - sum_j softmax_j(u_j . W v_i) u_j) v_i^T`` and the loss, at any W.

    Args:
        embeddings: The items.
        weight_MD: W, shape (M, D).
        weights: Weight of each item in the gradient, shape (N,).
        chunk_size: Items whose N scores are held at once.

    Returns:
        Minus the gradient, shape (M, D), fp64, and the weighted cross-entropy in nats.
    """
    problem = embeddings.problem
    check_map(weight_MD, problem.shape)
    dtype = _score_dtype(embeddings, weight_MD)
    weight_N = torch.from_numpy(check_weights(weights, problem.n_items)).to(embeddings.device)
    map_MD = weight_MD.to(embeddings.device, dtype)
    total_MD = torch.zeros(*problem.shape, dtype=_FP64, device=embeddings.device)
    loss = 0.0
    # `v` and `u` of the active items only: a minibatch has gradients for the items it holds and for no others
    active_A = torch.nonzero(weight_N)[:, 0]
    for part_C in active_A.split(chunk_size):
        u_CM, v_CD = (embeddings.select(side, part_C).to(dtype) for side in ("u", "v"))
        weight_C = weight_N[part_C]
        log_probability_C, mean_CM = _softmax(embeddings, v_CD @ map_MD.mT, part_C, with_mean=True)
        loss -= float(weight_C @ log_probability_C)
        difference_CM = (u_CM - mean_CM).double() * weight_C[:, None]
        total_MD += difference_CM.mT @ v_CD.double()
    return total_MD, loss


def population_loss(embeddings: Embeddings, weight_MD: Tensor, chunk_size: int = 1024) -> float:
    """Cross-entropy of all items under their frequencies, in nats; ``log N`` at W = 0."""
    frequency_N = torch.from_numpy(embeddings.problem.frequencies()).to(embeddings.device)
    return -float(frequency_N @ log_probabilities(embeddings, weight_MD, chunk_size))


def log_probabilities(embeddings: Embeddings, weight_MD: Tensor, chunk_size: int = 1024) -> Tensor:
    """Log of the softmax probability of each item's own output, shape (N,), fp64, <= 0; ``-log N`` at W = 0."""
    check_map(weight_MD, embeddings.problem.shape)
    dtype = _score_dtype(embeddings, weight_MD)
    map_MD = weight_MD.to(embeddings.device, dtype)
    parts: list[Tensor] = []
    for start, v_CD in embeddings.blocks("v", chunk_size):
        index_C = torch.arange(start, start + len(v_CD), device=embeddings.device)
        parts.append(_softmax(embeddings, v_CD.to(dtype) @ map_MD.mT, index_C, with_mean=False)[0])
    return torch.cat(parts)


def check_map(weight_MD: Tensor, shape: tuple[int, int]) -> None:
    """Raise unless W is a finite matrix of that shape."""
    if weight_MD.shape != shape:
        raise ValueError(f"`W` must have shape {shape}, got {tuple(weight_MD.shape)}.")
    if not torch.isfinite(weight_MD).all():
        raise ValueError("`W` must be finite, got NaN or Inf entries; lower the step size.")


def _score_dtype(embeddings: Embeddings, weight_MD: Tensor) -> torch.dtype:
    """The problem's own type where it resolves the scores of W to ``_SCORE_ERROR`` nats, else fp64.

    Raises:
        ValueError: Scores so large that fp64 does not resolve them either: every probability would be rounding noise.
    """
    map_MD = weight_MD.to(embeddings.device, _FP64)
    scale = float(map_MD.abs().amax()) or 1.0
    unit_MD = (map_MD / scale).float()
    image = max(float(torch.linalg.vector_norm(v_CD @ unit_MD.mT, dim=1).amax()) for _, v_CD in embeddings.blocks("v"))
    length = max(float(torch.linalg.vector_norm(u_CM, dim=1).amax()) for _, u_CM in embeddings.blocks("u"))
    largest = image * length * scale
    own = getattr(torch, embeddings.problem.dtype)
    for dtype in (own, _FP64):
        if largest * torch.finfo(dtype).eps <= _SCORE_ERROR:
            return dtype  # type: ignore[no-any-return]
    raise ValueError(
        f"`W` is too large: its scores reach {largest:.2g}, where fp64 cannot tell probabilities apart; lower the step "
        "size (`step_scale`)."
    )


def _softmax(embeddings: Embeddings, image_CM: Tensor, index_C: Tensor, with_mean: bool) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's own output, fp64, and the mean output under its softmax, tile by tile.

    An item's own score is read from the very product that enters the partition sum, so that no probability exceeds 1.
    The mean has no rows unless it is asked for.
    """
    dtype, device = image_CM.dtype, image_CM.device
    peak_C, own_C = (torch.full((len(image_CM),), -torch.inf, dtype=dtype, device=device) for _ in range(2))
    partition_C = torch.zeros(len(image_CM), dtype=dtype, device=device)
    mean_CM = torch.zeros_like(image_CM) if with_mean else image_CM.new_zeros(0)
    for first, other_CM in embeddings.blocks("u", _score_columns(len(image_CM))):
        other_CM = other_CM.to(dtype)
        score_CC = image_CM @ other_CM.mT
        inside = torch.nonzero((index_C >= first) & (index_C < first + len(other_CM)))[:, 0]
        own_C[inside] = score_CC[inside, index_C[inside] - first]
        new_peak_C = torch.maximum(peak_C, score_CC.amax(1))
        shrink_C = torch.exp(peak_C - new_peak_C)
        score_CC.sub_(new_peak_C[:, None]).exp_()
        partition_C = partition_C * shrink_C + score_CC.sum(1)
        if with_mean:
            mean_CM = torch.addmm(mean_CM * shrink_C[:, None], score_CC, other_CM)
        peak_C = new_peak_C
    # a sum of rounded exponentials may end an ulp below its largest term
    log_probability_C = ((own_C - peak_C).double() - partition_C.double().log()).clamp(max=0.0)
    return log_probability_C, mean_CM / partition_C[:, None] if with_mean else mean_CM


def _score_columns(rows: int) -> int:
    """Columns of a score tile: 16 M scores at most, so that a tile never outgrows the embeddings by much."""
    return max(1024, 2**24 // max(rows, 1) // 1024 * 1024)


def _heaviest(weights: NDArray[np.float64]) -> int:
    """Items before this index are multiplied in fp64: the first rows that carry weight."""
    active = np.flatnonzero(weights)
    return int(active[min(_HEAD_ROWS, len(active)) - 1]) + 1
