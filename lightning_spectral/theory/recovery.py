"""Which items a map recovers: ``argmax_j u_j . (W v_i) == i``, strictly, over all N outputs.

All N items are tested against all N outputs, but most of them lose early: items meet the outputs in growing stages and
drop out when an output beats them clearly. The stages run in a cheap type; pairs that are closer than that type can
tell are decided again in fp64, so the result is the brute-force fp64 one.
"""

# N items, D features of v, M features of u, C candidates of a chunk, A rows of outputs in one stage

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_spectral.theory.embeddings import BLOCK_ROWS, Embeddings
from lightning_spectral.theory.gradient import check_map

# Rounding errors of a score, in units of its own spread |W v| / sqrt(d) and of its size. A bf16 product of random
# vectors errs by about 0.006 of the spread (two rounded factors twice, one rounded result); the tolerance is ten times
# that. fp32 errs by 1e-6.
_TOLERANCE = {torch.bfloat16: (0.06, 2**-5), torch.float32: (1e-4, 1e-5), torch.float64: (1e-10, 1e-11)}
_STAGES = (512, 4096)  # outputs met before the last stage, which meets all the others
_WORTH_DROPPING = 32  # a thirty-second of the candidates: then the products saved outweigh the copy
CURVE_POINTS = 64


@dataclass(frozen=True)
class RecoveryStats:
    """What a map recovers.

    Attributes:
        count: Items recovered.
        prefix: Largest k with all of 1..k recovered.
        k50: Largest rank whose neighbourhood (log-spaced bin) has a recall >= 0.5; 0 if none.
        k90: Likewise for 0.9.
        head_recall: Recall weighted by frequency over the head half of the probability mass.
        tail_recall: Recall weighted by frequency over the rest.
        mass: Probability mass of the recovered items (top-1 accuracy).
        curve_rank: Geometric centre of each log-spaced rank bin.
        curve_recall: Share recovered in that bin.
    """

    count: int
    prefix: int
    k50: float
    k90: float
    head_recall: float
    tail_recall: float
    mass: float
    curve_rank: tuple[float, ...]
    curve_recall: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain fields, for ``results.jsonl``."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def recovered_mask(
    embeddings: Embeddings, weight_MD: Tensor, chunk_size: int = 4096, screen: str = "auto"
) -> NDArray[np.bool_]:
    """Whether each item is recovered, shape (N,).

    A tie is not a recovery, so an all-zero map recovers nothing.

    Args:
        embeddings: The items.
        weight_MD: W, shape (M, D).
        chunk_size: Items whose scores are held at once.
        screen: Type of the screening stages: ``bfloat16``, ``float32``, ``float64`` (no screening: every score in
            fp64), or ``auto``: bf16 where the hardware multiplies it fast, else fp32.

    Raises:
        ValueError: W has the wrong shape or is not finite, or ``screen`` is unknown.
    """
    problem = embeddings.problem
    check_map(weight_MD, problem.shape)
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be >= 1, got {chunk_size}.")
    map_MD = weight_MD.to(embeddings.device, torch.float64)
    scale = float(map_MD.abs().amax())
    if scale == 0:
        return np.zeros(problem.n_items, dtype=np.bool_)
    map_MD = map_MD / scale  # the argmax has no scale; bf16 and fp32 have a range
    dtype = _screen_dtype(screen, embeddings.device)
    if dtype is torch.float64:
        everyone_N = torch.arange(problem.n_items, device=embeddings.device)
        return _decide(embeddings, map_MD, everyone_N, chunk_size, dtype).cpu().numpy()
    won_N, unsure_N = _screen(embeddings, map_MD, dtype, chunk_size)
    unsure = torch.nonzero(unsure_N)[:, 0]
    if len(unsure):
        won_N[unsure] = _decide(embeddings, map_MD, unsure, chunk_size, dtype)
    return won_N.cpu().numpy()


def recovery_stats(recovered: NDArray[np.bool_], frequencies: NDArray[np.float64]) -> RecoveryStats:
    """Summarise a recovery mask, shape (N,)."""
    mask = np.asarray(recovered, dtype=bool)
    if mask.shape != frequencies.shape or mask.ndim != 1:
        raise ValueError(f"`recovered` has shape {mask.shape}, `frequencies` {frequencies.shape}; both must be (N,).")
    ranks, recalls = recovery_curve(mask)
    head = np.cumsum(frequencies) - frequencies < 0.5 * frequencies.sum()
    misses = np.flatnonzero(~mask)

    def recall(members: NDArray[np.bool_]) -> float:
        weight = frequencies[members].sum()
        return float(frequencies[members & mask].sum() / weight) if weight > 0 else 0.0

    return RecoveryStats(
        count=int(mask.sum()),
        prefix=int(misses[0]) if len(misses) else len(mask),
        k50=_last_rank(ranks, recalls, 0.5),
        k90=_last_rank(ranks, recalls, 0.9),
        head_recall=recall(head),
        tail_recall=recall(~head),
        mass=float(frequencies[mask].sum()),
        curve_rank=tuple(round(float(rank), 2) for rank in ranks),
        curve_recall=tuple(round(float(value), 6) for value in recalls),
    )


def recovery_curve(values: NDArray[Any], points: int = CURVE_POINTS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean of per-item ``values`` in log-spaced bins of rank: (geometric centre of the bin, mean), no empty bins."""
    edges = np.unique(np.round(np.geomspace(1, len(values) + 1, points + 1)).astype(np.int64))
    sums = np.add.reduceat(np.asarray(values, dtype=np.float64), edges[:-1] - 1)
    return np.sqrt(edges[:-1] * (edges[1:] - 1.0)), sums / np.diff(edges)


def _last_rank(ranks: NDArray[np.float64], recalls: NDArray[np.float64], level: float) -> float:
    reached = np.flatnonzero(recalls >= level)
    return float(ranks[reached[-1]]) if len(reached) else 0.0


def _screen_dtype(screen: str, device: torch.device) -> torch.dtype:
    if screen == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_has_fast_bf16() else torch.float32
    if screen not in ("bfloat16", "float32", "float64"):
        raise ValueError(f"`screen` must be auto, bfloat16, float32 or float64, got {screen!r}.")
    return getattr(torch, screen)  # type: ignore[no-any-return]


def _cpu_has_fast_bf16() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def _screen(embeddings: Embeddings, map_MD: Tensor, dtype: torch.dtype, chunk_size: int) -> tuple[Tensor, Tensor]:
    """(won, unsure): won counts only where not unsure."""
    problem, device = embeddings.problem, embeddings.device
    cheap_map_MD = map_MD.to(dtype)
    bounds = sorted({0, *(min(stage, problem.n_items) for stage in _STAGES)})
    first_stages = [(a, b, embeddings.rows("u", a, b).to(dtype)) for a, b in itertools.pairwise(bounds)]
    rows = _whole_blocks(chunk_size)
    kept: list[tuple[Tensor, ...]] = []
    for start, v_CD in embeddings.blocks("v", rows):
        index_C = torch.arange(start, start + len(v_CD), device=device)
        image_CM = v_CD.to(dtype) @ cheap_map_MD.mT
        own_C = (embeddings.rows("u", start, start + len(v_CD)).to(dtype) * image_CM).sum(1, dtype=torch.float32)
        tolerance_C = _tolerance(image_CM, own_C, dtype)
        rival_C = torch.full_like(own_C, -torch.inf)
        for first, last, other_AM in first_stages:
            rival_C = torch.maximum(rival_C, _best_rival(image_CM, index_C, other_AM, first, last))
            alive = rival_C - own_C <= tolerance_C + _relative(rival_C, dtype)
            index_C, image_CM, own_C, tolerance_C, rival_C = (
                part[alive] for part in (index_C, image_CM, own_C, tolerance_C, rival_C)
            )
        kept.append((index_C, image_CM, own_C, tolerance_C, rival_C))
    left = tuple(torch.cat(parts) for parts in zip(*kept, strict=True))
    del kept
    for first in range(bounds[-1], problem.n_items, rows):
        last = min(first + rows, problem.n_items)
        other_AM = embeddings.rows("u", first, last).to(dtype)
        for part in (slice(a, a + chunk_size) for a in range(0, len(left[0]), chunk_size)):
            index_C, image_CM, _, _, rival_C = (each[part] for each in left)
            torch.maximum(rival_C, _best_rival(image_CM, index_C, other_AM, first, last), out=rival_C)
        lost = left[4] - left[2] > left[3] + _relative(left[4], dtype)
        if int(lost.sum()) * _WORTH_DROPPING > len(lost):  # dropping copies the images of those that stay
            left = tuple(each[~lost] for each in left)
    index_C, _, own_C, tolerance_C, rival_C = left
    won_N = torch.zeros(problem.n_items, dtype=torch.bool, device=device)
    unsure_N = won_N.clone()
    margin_C = own_C - rival_C
    won_N[index_C] = margin_C > 0
    unsure_N[index_C] = margin_C.abs() <= tolerance_C + _relative(rival_C, dtype)
    return won_N, unsure_N


def _best_rival(image_CM: Tensor, index_C: Tensor, other_AM: Tensor, first: int, last: int) -> Tensor:
    """Highest score of outputs ``first``..``last`` for each candidate, its own output left out."""
    if not len(index_C):
        return torch.empty(0, device=image_CM.device)
    score_CA = image_CM @ other_AM.mT
    own = torch.nonzero((index_C >= first) & (index_C < last))[:, 0]
    score_CA[own, index_C[own] - first] = -torch.inf
    return score_CA.amax(1).float()


def _tolerance(image_CM: Tensor, own_C: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(image_CM.dtype, torch.float32)
    spread_C = torch.linalg.vector_norm(image_CM, dim=1, dtype=wide) / image_CM.shape[1] ** 0.5
    return _TOLERANCE[dtype][0] * spread_C + _TOLERANCE[dtype][1] * own_C.abs()


def _relative(rival_C: Tensor, dtype: torch.dtype) -> Tensor:
    return _TOLERANCE[dtype][1] * rival_C.abs().nan_to_num(posinf=0.0)


def _decide(
    embeddings: Embeddings, map_MD: Tensor, index_A: Tensor, chunk_size: int, screen: torch.dtype = torch.float64
) -> Tensor:
    """Whether the named items are recovered, decided in fp64.

    With a cheaper ``screen`` type that type's scores name the pairs that could matter; only those are put to fp64.
    """
    won = []
    for index_C in index_A.split(chunk_size):
        image_CM = embeddings.select("v", index_C).double() @ map_MD.mT
        own_C = _pair_scores(embeddings.select("u", index_C), image_CM)
        cheap_CD = image_CM.to(screen)
        slack_C, share = _tolerance(image_CM, own_C, screen), _TOLERANCE[screen][1]
        wide = torch.promote_types(screen, torch.float32)
        # a cheap score below the floor belongs to a rival that loses, one above the ceiling to a rival that wins
        floor_C = (own_C - slack_C - share * own_C.abs()).to(wide)
        ceiling_C = own_C + slack_C + share * own_C.abs()
        ceiling_C = torch.maximum(ceiling_C, ceiling_C / (1 - share)).to(wide)
        lost_C = torch.zeros(len(index_C), dtype=torch.bool, device=image_CM.device)
        for first, u_AM in embeddings.blocks("u", _whole_blocks(chunk_size)):
            score_CA = cheap_CD @ u_AM.to(screen).mT
            mine = torch.nonzero((index_C >= first) & (index_C < first + len(u_AM)))[:, 0]
            score_CA[mine, index_C[mine] - first] = -torch.inf
            lost_C |= score_CA.amax(1) > ceiling_C
            near_CA = (score_CA >= floor_C[:, None]) & ~lost_C[:, None]
            for pair_P2 in torch.nonzero(near_CA).split(BLOCK_ROWS):
                item_P, rival_P = pair_P2.unbind(1)
                beaten_P = _pair_scores(u_AM[rival_P], image_CM[item_P]) >= own_C[item_P]
                lost_C[item_P[beaten_P]] = True
        won.append(~lost_C)
    return torch.cat(won)


def _pair_scores(u_PM: Tensor, image_PM: Tensor) -> Tensor:
    """One score for each row, in fp64: always the same sum, so that equal outputs tie exactly."""
    return (u_PM.double() * image_PM).sum(1)


def _whole_blocks(rows: int) -> int:
    """Chunk boundaries on block boundaries, so that a streamed block is never drawn twice for one pass."""
    return max(BLOCK_ROWS, rows // BLOCK_ROWS * BLOCK_ROWS)
