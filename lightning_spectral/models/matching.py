"""Which token ids a forward call is of, and in which order: what embeddings looked up, proven by content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.models.calls import UNPROVEN
from lightning_spectral.models.layout import Ids, Layout, candidates, looks_like_positions, prove
from lightning_spectral.models.masks import call_mask
from lightning_spectral.models.runs import RawCall

# Embedding calls looked at for one forward call: a generation inside the step makes hundreds.
_LOOK_BACK = 8
Lookup = tuple[str, Tensor, Tensor]  # path of the table, ids, what it returned


@dataclass(frozen=True)
class Match:
    """The ids of a forward call, and which row is which of them.

    Attributes:
        ids: ``None`` if there are none, or their order could not be proven.
        layout: Likewise.
        reason: Why there are none; empty if there are.
    """

    ids: Ids | None = None
    layout: Layout | None = None
    reason: str = ""


class Matcher:
    """Finds the ids of forward calls.

    Args:
        has_tables: Whether the model has an embedding that is watched.
    """

    def __init__(self, *, has_tables: bool) -> None:
        where = "" if has_tables else ", in which no table was found: name it (`embedding='*.wte'`)"
        self._no_ids = Match(reason=f"no token ids entered an embedding of the model{where}")
        self._proven: dict[tuple[Any, ...], tuple[str, float]] = {}
        self._won: dict[tuple[Any, ...], str] = {}

    def forget(self) -> None:
        """What was proven: a window has ended."""
        self._proven.clear()
        self._won.clear()

    def match(self, call: RawCall, lookups: Sequence[Lookup]) -> Match:
        """The ids of a call, proven once a window for each combination of shapes.

        Args:
            call: The call.
            lookups: Embedding calls of its micro-batch, in order.
        """
        entered = call.entered
        arguments = () if call.frame is None else tuple(frame.arguments for frame in call.frame.chain())
        looked_up = _in_order(lookups, call.num_ids)
        if not looked_up:
            return self._no_ids
        best, most = Match(reason=UNPROVEN), 0.0
        shapes = (call.stack.name, tuple(entered.shape))
        won = self._won.get(shapes)
        num_rows = len(entered.reshape(-1, entered.shape[-1]))
        alike = Counter((path, tuple(ids.shape)) for path, ids, _ in looked_up)
        for path, tokens, embedded in sorted(looked_up, key=lambda lookup: lookup[0] != won):
            ids = _time_first(Ids(tokens, embedded, call_mask(tokens, arguments)), call)
            key = (*shapes, path, tuple(ids.ids.shape))
            # where several inputs of one shape, or one in parts, were embedded, only content tells which this is
            alone = alike[path, tuple(tokens.shape)] == 1 and num_rows >= tokens.numel()
            layout = self._known(key, ids, num_rows) if alone else None
            if layout is not None and path == won:
                return Match(ids, layout)
            layout = layout or prove(ids, entered)
            if layout is None:
                continue
            self._proven[key] = layout.name, layout.agreement
            num_tokens = int((layout.tokens_N >= 0).sum())  # a table of virtual tokens explains few rows
            if layout.agreement * num_tokens > most:
                best, most, self._won[shapes] = Match(ids, layout), layout.agreement * num_tokens, path
            if layout.agreement > 0.9 and num_tokens == num_rows:
                break
        return best

    def _known(self, key: tuple[Any, ...], ids: Ids, num_rows: int) -> Layout | None:
        """The layout that was proven for these shapes in this window."""
        if key not in self._proven or self._proven[key][1] < 0.9:
            return None
        name, agreement = self._proven[key]
        tokens_N = next((found for other, found in candidates(ids, num_rows) if other == name), None)
        return None if tokens_N is None else Layout(name, tokens_N, agreement)


def is_pass(call: RawCall, match: Match, before: RawCall, its_match: Match) -> bool:
    """Whether content says that modules ran again on what came out of them: what entered is of no other text."""
    if its_match.ids is None or call.entered.shape != before.entered.shape:
        return False
    same_text = match.ids is None or match.ids.ids.data_ptr() == its_match.ids.ids.data_ptr()
    return same_text and not torch.equal(call.entered, before.entered)


def _in_order(lookups: Sequence[Lookup], num_before: int) -> list[Lookup]:
    """Embedding calls, the latest before the forward call first, those behind it last; positions are left out."""
    ordered = [*reversed(lookups[:num_before]), *lookups[num_before:]]
    return [lookup for lookup in ordered[:_LOOK_BACK] if not looks_like_positions(lookup[1])]


def _time_first(ids: Ids, call: RawCall) -> Ids:
    """Ids with sequences along the first axis, where it can be seen that they were turned."""
    if ids.ids.ndim != 2 or 1 in ids.ids.shape:
        return ids
    turned = ids.ids.stride()[0] == 1 and ids.ids.stride()[1] > 1
    attention = next((m for _, block in call.stack.blocks for m in block.modules() if hasattr(m, "batch_first")), None)
    time_first = attention is not None and not attention.batch_first and call.entered.shape[:2] == ids.ids.shape
    if not turned and not time_first:
        return ids
    mask = None if ids.mask is None else ids.mask.T
    return Ids(ids.ids.T, ids.embedded.transpose(0, 1), mask)
