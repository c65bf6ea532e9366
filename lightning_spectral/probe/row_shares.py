"""Whether token counts are those of the tokens that a window saw: rows by bucket against what the counts say.

Axes: V vocabulary, K buckets.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_spectral.functional.buckets import TAIL
from lightning_spectral.records import BUCKETS

LEAST_ROWS = 500  # fewer, of a few sequences, may be of one subject
APART = 0.25  # of all rows; the buckets hold a third each
_MUCH = 0.05  # of all rows, of one id


def unlike_counts(rows: Mapping[str, int], table_V: Tensor, counts_V: Tensor, ids: Tensor | None) -> str:
    """A sentence where far more or far fewer rows are of rare tokens than the counts say; else nothing.

    Args:
        rows: Rows of one layer by bucket.
        table_V: Bucket of each id.
        counts_V: Occurrences of each id.
        ids: Some of the window's ids, of any shape, to name one that explains it.
    """
    seen = [rows.get(bucket, 0) for bucket in BUCKETS]
    table_V, counts_V = table_V.cpu(), counts_V.cpu()
    said = float(counts_V[table_V == TAIL].sum()) / float(counts_V.sum())
    share = seen[TAIL] / max(sum(seen), 1)
    if sum(seen) < LEAST_ROWS or abs(share - said) <= APART:
        return ""
    found = f"{share:.0%} of the rows are of rare tokens (TAIL) where `counts` say {said:.0%}"
    return f"{found}: {_one_id(table_V, counts_V, ids) or 'they are counts of other text, or of another tokenizer'}."


def _one_id(table_V: Tensor, counts_V: Tensor, ids: Tensor | None) -> str:
    """The rare id that is no rare one."""
    if ids is None or not ids.numel():
        return ""
    ids_M = ids.flatten().cpu()
    rare_M = ids_M[(ids_M >= 0) & (ids_M < len(table_V))]
    rare_M = rare_M[table_V[rare_M] == TAIL]
    if not len(rare_M):
        return ""
    values, times = torch.unique(rare_M, return_counts=True)
    one, share = int(values[times.argmax()]), float(times.max()) / len(ids_M)
    if share < _MUCH:
        return ""
    return (
        f"token id {one} alone is {share:.0%} of them and has the count {int(counts_V[one])}. If it masks or fills, "
        f"give it one (`counts[{one}] = counts.max()`), or leave its rows out (`mask_fn`)"
    )
