"""The losses of a probe's windows: a tap on what the script computes, open while its forward calls are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.models.sites import Found
from lightning_spectral.probe.grouping import Grouping
from lightning_spectral.probe.loss_calls import Scored
from lightning_spectral.probe.loss_tap import LossTap
from lightning_spectral.probe.losses import BucketLosses, codes_of
from lightning_spectral.probe.vocabulary import vocabulary_sizes


class LossWatch:
    """Losses by bucket.

    Args:
        found: Says how wide logits over the vocabulary are.
        grouping: Which bucket a predicted token belongs to.
        watches: Whether losses are asked for; without, everything here does nothing.
    """

    def __init__(self, found: Found, grouping: Grouping, *, watches: bool) -> None:
        self._tap = LossTap(vocabulary_sizes(found, grouping)) if watches else None
        self._grouping = grouping
        self._last_shape: tuple[int, ...] | None = None
        self._was_open = self._outside = False

    def empty(self) -> BucketLosses | None:
        """Losses of a window that begins; what was scored before is forgotten."""
        self.scored()
        return None if self._tap is None else BucketLosses(len(self._grouping.names))

    def start(self, *, training: bool) -> None:
        """Look for losses from now on."""
        self._was_open, self._outside = True, False
        if self._tap is not None:
            self._tap.start(training=training)

    def starter(self, *, training: bool) -> Callable[[], None] | None:
        """What looks for losses from the moment it is called; nothing is looked for before."""
        self._was_open = self._outside = False
        return None if self._tap is None else partial(self._tap.start, training=training)

    def start_outside(self, *, training: bool) -> Callable[[bool], None] | None:
        """What looks for losses while it was told so last: outside of modules with compiled regions in them."""
        self._was_open, self._outside = False, True
        if self._tap is None:
            return None
        tap, self._tap.training = self._tap, training
        return lambda outside: tap.start(training=training) if outside else tap.stop()

    def end_forward(self) -> None:
        """After a forward pass: what was not looked for in it may come now."""
        if self._tap is not None and self._outside:
            self._tap.start(training=self._tap.training)

    def begin_update(self) -> None:
        """Before the optimizer moves the weights, within its step."""
        if self._tap is not None:
            self._tap.suspend()

    def pause(self) -> None:
        """Before the backward pass."""
        if self._tap is not None:
            self._was_open = self._tap.is_active
            self._tap.stop()

    def resume(self, *, also_unopened: bool) -> None:
        """After it, if losses were looked for before, or ``also_unopened``."""
        if self._tap is not None and (self._was_open or (also_unopened and not self._outside)):
            self._tap.start(training=self._tap.training)

    def scored(self) -> list[Scored]:
        """What the script has scored since it was last asked."""
        return [] if self._tap is None else self._tap.take()

    def saw(self, call: ForwardCall) -> None:
        """Its shape is that of predictions whose own call is not known."""
        self._last_shape = call.shape if len(call.shape) == 2 else self._last_shape

    def add(self, losses: BucketLosses | None, scored: Sequence[Scored], calls: Sequence[ForwardCall]) -> None:
        """Put what was scored in a micro-batch into its buckets."""
        if self._tap is None or losses is None:
            return
        losses.reason = losses.reason or self._tap.reason
        for one in scored:
            shape = next((call.shape for call in reversed(calls) if len(call.shape) == 2), self._last_shape)
            codes_N = codes_of(one, self._grouping, shape)
            if codes_N is not None:
                losses.add(one, codes_N)
