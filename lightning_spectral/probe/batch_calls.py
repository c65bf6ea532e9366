"""Which forward calls of an evaluation are over the tokens of its batch; text that the model generates is not.

A run of calls of one stack is generation where each call's ids go on from those before: the same with columns more, or
one new column behind a cache. Of such a run the first call counts if its ids are those of the batch (the prompt). Where
the batch shows which calls are over it, others (a fixed prompt, a second pass over the same batch) do not count.

Pure. Axes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.probe.adapters import holds_ids

GENERATED = "forward calls over text that the model generates are not measured"
NOT_OF_THE_BATCH = "forward calls over other ids than those of the evaluation's batch are not measured"


def of_batch(calls: Sequence[ForwardCall], batch: Any) -> tuple[list[ForwardCall], dict[str, str]]:
    """The calls that count, in order, and what is to be said of the others.

    Args:
        calls: Forward calls of one batch of an evaluation.
        batch: What the script was given.
    """
    kept: list[ForwardCall] = []
    notes: dict[str, str] = {}
    for stack in dict.fromkeys(call.stack for call in calls):
        mine = [call for call in calls if call.stack == stack]
        runs = _runs(mine)
        if len(runs) < len(mine):
            notes["generated"] = GENERATED
        firsts = [run[0] for run in runs if len(run) == 1 or holds_ids(batch, run[0].ids)]
        ours = _without_repeats([call for call in firsts if holds_ids(batch, call.ids)])
        if ours and len(ours) < len(firsts):
            notes["other_ids"] = NOT_OF_THE_BATCH
        kept += ours or firsts
    order = {id(call): place for place, call in enumerate(calls)}
    return sorted(kept, key=lambda call: order[id(call)]), notes


def _runs(calls: Sequence[ForwardCall]) -> list[list[ForwardCall]]:
    """Calls that go on from each other, together."""
    runs: list[list[ForwardCall]] = []
    for call in calls:
        if runs and _goes_on(runs[-1][-1].ids, call.ids):
            runs[-1].append(call)
        else:
            runs.append([call])
    return runs


def _goes_on(before: Tensor | None, ids: Tensor | None) -> bool:
    if before is None or ids is None or before.ndim != 2 or ids.ndim != 2 or len(before) != len(ids):
        return False
    if ids.shape[1] == 1:
        return True
    longer = ids.shape[1] > before.shape[1]
    return longer and bool(torch.equal(ids[:, : before.shape[1]], before))


def _without_repeats(calls: Sequence[ForwardCall]) -> list[ForwardCall]:
    kept: list[ForwardCall] = []
    for call in calls:
        seen = any(_equal(call.ids, other.ids) for other in kept)
        if not seen:
            kept.append(call)
    return kept


def _equal(ids: Tensor | None, other: Tensor | None) -> bool:
    if ids is None or other is None:
        return False
    return ids is other or (ids.shape == other.shape and bool(torch.equal(ids, other)))
