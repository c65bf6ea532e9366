"""Reads the events of one micro-batch, in order, into forward calls. Pure: events in, calls out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_spectral.models.calls import Frame, Piece, RawCall, Run
from lightning_spectral.models.hooks import Hook
from lightning_spectral.models.sites import Site, Stack

COMPILED_EXPERTS = (
    "experts whose matrices are one tensor are not seen inside a compiled region: leave their module out of it "
    "(`torch.compiler.disable`), or measure an uncompiled run"
)


class Reader:
    """Forward calls of one micro-batch.

    Args:
        stacks: The stacks of the model.
        framed: Stacks that were seen to be called by a module that runs eagerly; added to. A compiled block of theirs
            that runs outside of such a call is recomputed for the backward pass.

    Attributes:
        calls: In the order in which they began.
        ids: Embedding calls: path, ids, output.
    """

    def __init__(self, stacks: Sequence[Stack], framed: set[str]) -> None:
        self._framed = framed
        self.calls: list[RawCall] = []
        self.ids: list[tuple[str, Tensor, Tensor]] = []
        self._frame: Frame | None = None
        self._open: dict[str, RawCall] = {}
        self._stacks = {stack.name: stack for stack in stacks}
        self._arrived: dict[int, Tensor] = {}
        self._sent: Tensor | None = None
        self._recomputes = self._traced = False

    def take(self, hook: Hook, content: Any, traced: bool) -> None:
        """The next event."""
        self._recomputes, self._traced = traced and self._frame is None, traced
        _TAKERS[hook.kind](self, hook, content)

    def _open_frame(self, hook: Hook, content: Any) -> None:
        values, named, handling = content
        arguments = {name: value for name, value in zip(hook.target, values, strict=False) if value is not None}
        arguments |= {name: value for name, value in named.items() if value is not None}
        self._frame = Frame(hook.path, arguments, self._frame, handling=handling)

    def _close(self, hook: Hook, content: Any) -> None:
        while self._frame is not None:
            frame, self._frame = self._frame, self._frame.parent
            frame.failed = content[0] and not frame.handling
            if frame.path == hook.path:
                return

    def _ids(self, hook: Hook, content: Any) -> None:
        ids, embedded = content
        if not ids.is_floating_point() and embedded.shape[:-1] == ids.shape and ids.numel():
            self.ids.append((hook.path, ids, embedded))

    def _block(self, hook: Hook, content: Any) -> None:
        stack, layer = hook.target
        self._enter(stack, layer, content[0])

    def _enter(self, stack: Stack, layer: int, entered: Tensor) -> Run | None:
        if self._frame is not None:
            self._framed.add(stack.name)
        elif self._recomputes and stack.name in self._framed:
            self._open.pop(stack.name, None)
            return None
        call = self._open.get(stack.name)
        if call is None or not call.continues(layer, self._frame, len(self.ids)):
            call = RawCall(stack, self._frame, len(self.ids))
            self._open[stack.name] = call
            self.calls.append(call)
        call.runs.append(Run(layer, entered))
        return call.runs[-1]

    def _run_of(self, site: Site) -> Run | None:
        """The run of a site's block that is going on: the latest one, which must have begun in this call."""
        call = self._open.get(site.stack)
        if call is None or call.frame is not self._frame or call.runs[-1].layer != site.layer:
            return None
        return call.runs[-1]

    def _route(self, hook: Hook, content: Any) -> None:
        for call in self._open.values():
            call.runs[-1].routed[id(hook.target)] = content[0]

    def _arrive(self, hook: Hook, content: Any) -> None:
        self._arrived[id(hook.target)] = content[0]

    def _rows(self, hook: Hook, content: Any) -> None:
        site: Site = hook.target
        run = self._run_of(site)
        if run is None and not (self._recomputes and site.stack in self._framed):
            # a block whose forward is never called: its rows are all that is seen of it
            run = self._enter(self._stacks[site.stack], site.layer, content[0])
        if run is not None:
            arrived = self._arrived.get(id(site.up)) if site.up is not None else None
            run.pieces.append(Piece(site, content[0], content[1], arrived))

    def _fused_in(self, hook: Hook, content: Any) -> None:
        self._sent = content[0]
        for site in hook.target if self._traced else ():
            call = self._open.get(site.stack)
            if call is not None and not (self._recomputes and site.stack in self._framed):
                call.unseen[site.key] = COMPILED_EXPERTS

    def _fused_out(self, hook: Hook, content: Any) -> None:
        """Rows and outputs of each product, paired in order: the k-th of up and of down projection."""
        sites: list[Site] = hook.target
        arrivals = content[sites[0].up_parameter]
        for site in sites:
            seen = content[site.parameter]
            run = self._run_of(site)
            if run is None or len(seen) != len(arrivals):
                continue
            for (rows, output), (arrived, _) in zip(seen, arrivals, strict=True):
                kept = rows if site.site == "post" else output
                run.pieces.append(Piece(site, kept, tuple(kept.shape[:-1]), arrived, self._sent))


# Not of the object: bound methods would hold it, and with it every tensor of the micro-batch, until the garbage
# collector comes by.
_TAKERS: dict[str, Callable[[Reader, Hook, Any], None]] = {
    "open": Reader._open_frame,
    "close": Reader._close,
    "ids": Reader._ids,
    "block": Reader._block,
    "route": Reader._route,
    "arrive": Reader._arrive,
    "rows": Reader._rows,
    "output": Reader._rows,
    "fused_in": Reader._fused_in,
    "fused_out": Reader._fused_out,
}
