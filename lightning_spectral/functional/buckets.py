"""Which group a row belongs to: HEAD, MID and TAIL by token frequency, or position in the sequence.

Axes: V vocabulary, B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

HEAD, MID, TAIL = 0, 1, 2
EXCLUDED = -1


def frequency_buckets(
    counts_V: Int[Tensor, " V"] | Sequence[int], head_share: float = 0.33, mid_share: float = 0.67
) -> Int[Tensor, " V"]:
    """Bucket of each token id by its frequency in the training corpus (arXiv:2605.21803, HEAD / MID / TAIL).

    Counts are sorted descending and accumulated; the most frequent ids whose cumulative count stays within
    ``head_share`` of all occurrences set the HEAD threshold, those within ``mid_share`` the MID threshold. Ties join
    the higher bucket; ids never seen are TAIL.

    Args:
        counts_V: Occurrences of each id, >= 0.
        head_share: Share of occurrences up to which ids are HEAD.
        mid_share: Share up to which they are MID.

    Returns:
        For each id 0 (head), 1 (mid) or 2 (tail), int64.

    Raises:
        ValueError: If there are fewer than three ids, a negative or fractional count, or no occurrence at all.
    """
    counts_V = counts_V if isinstance(counts_V, Tensor) else torch.as_tensor(counts_V, device="cpu")
    require_counts(counts_V)
    counts_V = counts_V.to(torch.int64)
    total = int(counts_V.sum())
    if not 0 < head_share < mid_share < 1:
        raise ValueError(f"Need 0 < head_share < mid_share < 1, got {head_share} and {mid_share}.")
    vocab = counts_V.numel()
    sorted_V = counts_V.sort(descending=True).values
    cumulative_V = sorted_V.cumsum(0).to(torch.float64)
    last_head = min(max(int((cumulative_V <= head_share * total).sum()), 1), vocab - 1)
    last_mid = min(max(int((cumulative_V <= mid_share * total).sum()), last_head + 1), vocab - 1)
    head_min, mid_min = sorted_V[last_head - 1], sorted_V[last_mid - 1]
    buckets_V = torch.full_like(counts_V, TAIL)
    buckets_V[counts_V >= mid_min] = MID
    buckets_V[counts_V >= head_min] = HEAD
    return buckets_V


def require_counts(counts_V: Tensor) -> None:
    """Raise unless these can be occurrences of token ids.

    Raises:
        ValueError: If they are not whole numbers >= 0, one per id, of three ids or more, or all are zero.
    """
    if counts_V.ndim != 1 or counts_V.numel() < 3:
        raise ValueError(f"Token counts must be one number per id for >= 3 ids, got shape {tuple(counts_V.shape)}.")
    if counts_V.is_complex() or (counts_V.is_floating_point() and not bool((counts_V == counts_V.floor()).all())):
        raise ValueError("Token counts must be whole numbers: pass occurrences, not frequencies.")
    if bool((counts_V < 0).any()):
        raise ValueError(f"Token counts must be >= 0, got {int(counts_V.min())} for id {int(counts_V.argmin())}.")
    if not bool((counts_V > 0).any()):
        raise ValueError("Token counts are all zero: count the training corpus first.")


def look_up(ids: Int[Tensor, "*shape"], table_V: Int[Tensor, " V"]) -> Int[Tensor, "*shape"]:
    """Bucket of each token id.

    Raises:
        ValueError: If an id is negative or not in the table.
    """
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= table_V.numel()):
        raise ValueError(
            f"Token ids span [{int(ids.min())}, {int(ids.max())}] but the table has ids 0 to {table_V.numel() - 1}: "
            "was it made with another tokenizer? Count this one's ids (`lightning-spectral count-tokens "
            "--tokenizer_dir DIR`)."
        )
    return table_V.to(ids.device)[ids]


def position_groups(num_positions: int, num_groups: int) -> Int[Tensor, " T"]:
    """Equal parts of the sequence by position: 0 for the first ``T / num_groups`` positions, and so on.

    Raises:
        ValueError: If there are fewer positions than groups.
    """
    if not 1 <= num_groups <= num_positions:
        raise ValueError(f"`num_groups` must be in [1, {num_positions}], got {num_groups}.")
    return torch.arange(num_positions) * num_groups // num_positions


def target_ids(ids_BT: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The token that each position predicts: the next one; ``EXCLUDED`` at the last position, which has none."""
    targets_BT = torch.full_like(ids_BT, EXCLUDED)
    targets_BT[:, :-1] = ids_BT[:, 1:]
    return targets_BT


def occurrences(values_N: Int[Tensor, " N"], num: int) -> Int[Tensor, " num"]:
    """How often each of 0 ... num - 1 occurs; others are left out.

    ``torch.bincount`` refuses to run on a GPU under ``torch.use_deterministic_algorithms``.
    """
    if values_N.device.type == "cpu":
        return torch.bincount(values_N, minlength=num)[:num]
    return _occurrences_by_sorting(values_N, num)


def _occurrences_by_sorting(values_N: Tensor, num: int) -> Tensor:
    edges = torch.arange(num + 1, device=values_N.device, dtype=values_N.dtype)
    return torch.searchsorted(values_N.sort().values, edges).diff()


def sort_by_group(groups_N: Int[Tensor, " N"], num_groups: int) -> tuple[list[int], Tensor | None]:
    """Size of each group, and the rows' indices in the order of their groups; a negative group is left out.

    The order is ``None`` where all rows are in one group: they need no sorting.

    Raises:
        ValueError: If a group is not below ``num_groups``.
    """
    left_out, *sizes = occurrences(groups_N.clamp(min=-1) + 1, num_groups + 1).tolist()
    if left_out + sum(sizes) < len(groups_N):
        raise ValueError(f"Groups must be in [0, {num_groups}), got a largest group {int(groups_N.max())}.")
    if len(groups_N) in sizes:
        return sizes, None
    return sizes, torch.argsort(groups_N, stable=True)[left_out:]
