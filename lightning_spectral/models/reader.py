"""Reads the events of one micro-batch, in order, into forward calls. Pure: events in, calls out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_spectral.models.hooks import Hook
from lightning_spectral.models.layout import looks_like_positions
from lightning_spectral.models.runs import Frame, Piece, RawCall, Run
from lightning_spectral.models.sites import Site, Stack

COMPILED_EXPERTS = (
    "in this compiled region nothing tells the experts' matrices apart, whose two widths are equal: leave their module "
    "out of it (`block.experts = torch.compiler.disable(block.experts)`), or measure an uncompiled run"
)
HIDDEN_EXPERTS = (
    "a kernel of its own multiplies packed experts, which shows no activations: load them dequantised "
    "(`Mxfp4Config(dequantize=True)`)"
)
UNPAIRED_EXPERTS = (
    "{} products with up projections and {} with down projections could be followed, which are no pairs: write them "
    "alike (an `einsum` that adds the experts' axis cannot be followed, `bmm(x.expand(E, ...), up)` can), or leave the "
    "module out of the compiled region"
)
UNFOLLOWED_EXPERTS = (
    "tokens came in, and no product with these matrices could be followed (an `einsum` that makes or adds up the "
    "experts' axis cannot, `bmm(x.expand(E, ...), up)` can); or none of the experts of this process was chosen"
)
MIXED_EXPERTS = (
    "gate and up projections cannot be told apart here, where only their widths are known: measure `post` alone, or "
    "leave the module out of the compiled region"
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
        values, named, handling, goes_round = content
        arguments = {name: value for name, value in zip(hook.target, values, strict=False) if value is not None}
        arguments |= {name: value for name, value in named.items() if value is not None}
        self._frame = Frame(hook.path, arguments, self._frame, handling=handling, goes_round=goes_round)

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
        entered, may_go_on = content
        self._enter(stack, layer, entered, may_go_on=may_go_on)

    def _enter(self, stack: Stack, layer: int, entered: Tensor, *, may_go_on: bool = True) -> Run | None:
        if self._frame is not None:
            self._framed.add(stack.name)
        elif self._recomputes and stack.name in self._framed:
            self._open.pop(stack.name, None)
            return None
        call = self._open.get(stack.name)
        if call is None or not self._goes_on(call, layer, may_go_on):
            call = RawCall(stack, self._frame, len(self.ids), may_go_on=self._maybe_pass_of(call))
            self._open[stack.name] = call
            self.calls.append(call)
        call.frame = self._frame
        call.runs.append(Run(layer, entered))
        return call.runs[-1]

    def _maybe_pass_of(self, call: RawCall | None) -> RawCall | None:
        """The call, if modules around its stack run again where nothing tells on what."""
        if call is None or call.frame is None or self._frame is None:
            return None
        is_alike = self._traced or call.num_ids == len(self.ids)  # of a compiled region ids come first
        return call if is_alike and self._frame.is_next_pass(call.frame) is None else None

    def _goes_on(self, call: RawCall, layer: int, may_go_on: bool) -> bool:
        """Whether a run of a block belongs to a call that is open."""
        again = layer in {run.layer for run in call.runs}
        return (
            call.continues(layer, self._frame, len(self.ids))
            and (may_go_on or not again)
            and not self._embeds_others(call, layer)
        )

    def _embeds_others(self, call: RawCall, layer: int) -> bool:
        """Whether the first block comes again after its table has looked other ids up: a part of the batch, no loop."""
        if layer != call.runs[0].layer:
            return False
        before = [seen for seen in self.ids[: call.num_ids] if not looks_like_positions(seen[1])]
        if not before:
            return False
        path, ids, _ = before[-1]
        return any(
            other == path and (new.data_ptr(), new.shape) != (ids.data_ptr(), ids.shape)
            for other, new, _ in self.ids[call.num_ids :]
        )

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
        seen, is_packed = content
        arrivals = seen[sites[0].up_parameter]
        down = sites[0].matrices[0][0] if sites[0].matrices else sites[0].parameter
        per_row = max(len(arrivals) // max(len(seen[down]), 1), 1)  # two where only widths tell: gate and up are alike
        for site in sites:
            run, rows = self._run_of(site), seen[site.parameter]
            call = self._open.get(site.stack)
            if run is None or call is None:
                continue
            why = self._why_unseen(len(arrivals), len(seen[down]), per_row > 1 and site.site == "pre", is_packed)
            call.unseen.pop(site.key, None)
            if why:
                call.unseen[site.key] = why
                continue
            for product, arrival in zip(rows, arrivals[::per_row], strict=True):
                kept = product.rows if site.site == "post" else product.output
                run.pieces.append(Piece(site, kept, product.lead, arrival.rows, self._sent))

    def _why_unseen(self, num_up: int, num_down: int, is_mixed: bool, is_packed: bool) -> str:
        """Why products give no rows; empty where they do, or where no token came."""
        if is_mixed:
            return MIXED_EXPERTS
        if num_up % max(num_down, 1) or (num_up and not num_down) or (num_down and not num_up):
            return UNPAIRED_EXPERTS.format(num_up, num_down)
        if num_down or self._sent is None or not len(self._sent):
            return ""
        return HIDDEN_EXPERTS if is_packed else COMPILED_EXPERTS if self._traced else UNFOLLOWED_EXPERTS


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
