"""What is said of the places of a forward call: padding, bucket, shard; and of its rows through their places.

Axes: B sequences, T positions, P places of a call, N rows, K buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_spectral.functional.buckets import EXCLUDED, target_ids
from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.probe.grouping import Grouping
from lightning_spectral.probe.open_window import StackSeen
from lightning_spectral.probe.window import Buckets


def groups_of(
    call: ForwardCall,
    seen: StackSeen,
    grouping: Grouping,
    buckets: Buckets,
    mask: Tensor | None,
    targets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Group of each place ``(P,)``, negative where it is padding; texts are dealt to the shards in turn.

    Args:
        call: The forward call.
        seen: What the window has seen of its stack; added to.
        grouping: Which bucket a token belongs to. All places of a call without ids are in the first one.
        buckets: How groups are laid out.
        mask: False at padding, of the call's shape.
        targets: The token to predict at each place; ``None``: the next one of the sequence.

    Returns:
        The groups, and the number of each place's text in the window ``(P,)``.

    Raises:
        ValueError: If the mask has another shape.
    """
    real_P = _real_places(call, mask)
    texts_B, is_first_B = seen.texts.of(call)
    texts_P = texts_B[call.sequences_P]
    codes_P = _codes(call, seen, grouping, real_P, targets)
    _count(call, seen, buckets, codes_P, is_first_B)
    shard_P = texts_P % buckets.num_jackknife_groups
    return torch.where(codes_P >= 0, codes_P * buckets.num_jackknife_groups + shard_P, EXCLUDED), texts_P


def of_rows(values_P: Tensor, places_N: Tensor) -> Tensor:
    """What is said of each place, for each row; rows that are no place are left out."""
    return torch.where(places_N >= 0, values_P[places_N.clamp(min=0)], EXCLUDED)


def _codes(call: ForwardCall, seen: StackSeen, grouping: Grouping, real_P: Tensor, targets: Tensor | None) -> Tensor:
    """Bucket of each place ``(P,)``."""
    if call.ids is None:
        return torch.where(real_P, 0, EXCLUDED)
    seen.layout = seen.layout or call.layout
    seen.ids = call.ids if seen.ids is None else seen.ids
    if call.agreement is not None:
        seen.agreement = call.agreement if seen.agreement is None else min(seen.agreement, call.agreement)
    ids_BT = call.ids if call.ids.ndim == 2 else call.ids.reshape(1, -1)
    if targets is None or targets.shape != ids_BT.shape:
        targets = target_ids(ids_BT)
    return torch.where(real_P.view_as(ids_BT), grouping.codes(ids_BT, targets), EXCLUDED).flatten()


def _count(call: ForwardCall, seen: StackSeen, buckets: Buckets, codes_P: Tensor, is_first_B: Tensor) -> None:
    """Add the texts with rows in each bucket, and in any; a copy is no text of its own."""
    present = _places_with_rows(call, codes_P)
    num_codes = len(buckets.names)
    sequences_K = codes_P.new_zeros(num_codes + 1)
    for code in (*range(num_codes), None):
        member_P = present & (codes_P >= 0 if code is None else codes_P == code)
        of_sequence = codes_P.new_zeros(call.num_sequences)
        of_sequence.index_add_(0, call.sequences_P, member_P.to(codes_P.dtype))
        sequences_K[num_codes if code is None else code] = ((of_sequence > 0) & is_first_B).sum()
    seen.sequences_K = sequences_K if seen.sequences_K is None else seen.sequences_K + sequences_K


def _places_with_rows(call: ForwardCall, codes_P: Tensor) -> Tensor:
    present = torch.zeros_like(codes_P, dtype=torch.bool)
    for places_N in {id(places_N): places_N for places_N in call.places.values()}.values():
        present[places_N[places_N >= 0]] = True
    return present


def _real_places(call: ForwardCall, mask: Tensor | None) -> Tensor:
    """False where a place is padding, ``(P,)``."""
    if mask is None:
        return torch.ones_like(call.sequences_P, dtype=torch.bool)
    if tuple(mask.shape) != call.shape:
        raise ValueError(
            f"The padding mask has shape {tuple(mask.shape)} but the model was given ids of shape "
            f"{call.shape}: pass a `mask_fn(batch)` that returns one value per id."
        )
    return mask.to(device=call.sequences_P.device, dtype=torch.bool).flatten()
