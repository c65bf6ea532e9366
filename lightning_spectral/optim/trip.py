"""One step of one exchange: buckets of matrices in, through their rules, and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.models.placement import local
from lightning_spectral.optim.exchange import (
    Bucket,
    Exchange,
    Message,
    Segment,
    views_into,
)
from lightning_spectral.optim.matrices import (
    Matrix,
    Observer,
    States,
    WeightUpdate,
    empty_stack,
    entering,
    entries,
    extra_here,
    facing,
    flat,
    keep_momentum,
    parts_of,
    pieces_of,
    run_rule,
    runs_of,
    write_inputs,
)
from lightning_spectral.optim.presence import Presence, wire_device


class Trip:
    """One step of one exchange."""

    def __init__(
        self,
        exchange: Exchange,
        presence: Presence,
        grads: dict[int, Tensor],
        states: States,
        update: WeightUpdate,
        observe: Observer | None,
    ) -> None:
        self.presence = presence
        self.exchange, self.grads, self.states, self.update, self.observe = exchange, grads, states, update, observe
        self.device = wire_device(exchange)
        self.present = [id(m.param) in grads for m in exchange.matrices]
        self.results: dict[int, dict[str, Tensor]] = {}

    def run(self) -> None:
        """Every bucket: receive, apply the rule, send back; two are in flight while one is computed."""
        buckets = self.exchange.buckets
        arriving = self._begin_in(buckets[0])
        leaving: tuple[Bucket, Any] | None = None
        for k, bucket in enumerate(buckets):
            now, arriving = arriving, self._begin_in(buckets[k + 1]) if k + 1 < len(buckets) else None
            self._compute(bucket, now)
            out = self._begin_out(bucket)
            if leaving is None:
                self.presence.require_same()
            else:
                self._deliver(*leaving)
            leaving = (bucket, out)
        assert leaving is not None
        self._deliver(*leaving)

    # ---- in ----------------------------------------------------------------------------------------------------------

    def _begin_in(self, bucket: Bucket) -> tuple[Tensor, Any] | None:
        if bucket.inward is None:
            return None
        outgoing = _buffer(bucket.inward[0], self.device)
        for segment, values in views_into(outgoing, bucket.inward[0]):
            matrix = self.exchange.matrices[segment.matrix]
            if not self.present[segment.matrix]:
                values.zero_()
            elif segment.rectangles:
                self._write_inputs(matrix, segment.name, values)
            else:
                values.copy_(extra_here(matrix, segment.name, self.states))
        return (*self.exchange.send(bucket.inward, outgoing), outgoing)  # type: ignore[return-value]

    def _write_inputs(self, matrix: Matrix, name: str, values: Tensor) -> None:
        position = 0
        for block in matrix.blocks:
            (part,) = entering([(matrix, block)], name, self.grads, self.states)
            values[position : position + part.numel()].view(part.shape).copy_(part)
            position += part.numel()

    # ---- the rule ----------------------------------------------------------------------------------------------------

    def _compute(self, bucket: Bucket, arriving: Any) -> None:
        matrices = self.exchange.matrices
        if bucket.runs is None:
            bucket.runs = runs_of([matrices[i] for i in bucket.owned])
        runs = bucket.runs
        index_of = {id(matrices[i]): i for i in bucket.owned}
        whole: dict[tuple[int, str], Tensor] = {}
        stacks = []
        for run in runs:  # directions arrive where the batched product reads them
            stacked = empty_stack(run, self.device)
            stacks.append(stacked)
            for matrix, target in zip(run, facing(run, stacked), strict=True):
                self._begin_whole(index_of[id(matrix)], matrix, target, whole)
        if arriving is not None:
            incoming, work, _ = arriving
            work.wait()
            assert bucket.inward is not None
            for segment, values in views_into(incoming, bucket.inward[1]):
                _fill(whole[segment.matrix, segment.name], segment, values)
        for run, stacked in zip(runs, stacks, strict=True):
            indices = [index_of[id(matrix)] for matrix in run]
            extra = {name: [whole[i, name] for i in indices] for name in run[0].extra}
            also_sees = {name: [whole.pop((i, name)) for i in indices] for name in run[0].rule.also_sees}
            if run[0].rule.rewrites_momentum:
                extra["momentum_buffer"] = [one.clone() for one in stacked.unbind(0)]
            updates = run_rule(run, stacked, {**extra, **also_sees}, self.observe)
            for position, (i, result) in enumerate(zip(indices, facing(run, updates), strict=True)):
                self.results[i] = {name: arrays[position] for name, arrays in extra.items()}
                self.results[i]["update"] = result

    def _begin_whole(self, i: int, matrix: Matrix, target: Tensor, whole: dict[tuple[int, str], Tensor]) -> None:
        """What of a matrix is here already."""
        whole[i, "input"] = target
        for name in matrix.rule.also_sees:
            whole[i, name] = torch.empty_like(target, dtype=matrix.dtype_of(name))
        for name in ("input", *matrix.rule.also_sees):
            if self.present[i]:
                write_inputs([matrix], [whole[i, name]], self.grads, self.states, name)
            elif matrix.blocks:
                whole[i, name].zero_()
        for name, extra in matrix.extra.items():
            array = torch.zeros(extra.length, dtype=torch.float32, device=self.device)
            if extra.held and self.present[i]:
                _scatter(array, extra.spans, extra_here(matrix, name, self.states))
            whole[i, name] = array

    # ---- out ---------------------------------------------------------------------------------------------------------

    def _begin_out(self, bucket: Bucket) -> Any:
        if bucket.outward is None:
            return None
        outgoing = _buffer(bucket.outward[0], self.device)
        for segment, values in views_into(outgoing, bucket.outward[0]):
            result = self.results[segment.matrix][segment.name]
            if segment.rectangles:
                position = 0
                for rectangle in segment.rectangles:
                    part = entries(result, rectangle)
                    values[position : position + part.numel()].view(part.shape).copy_(part)
                    position += part.numel()
            else:
                _gather(result, segment.spans, values)
        return (*self.exchange.send(bucket.outward, outgoing), outgoing)

    def _deliver(self, bucket: Bucket, leaving: Any) -> None:
        for i in bucket.owned:
            result, matrix = self.results.pop(i), self.exchange.matrices[i]
            if self.present[i]:
                self._deliver_own(matrix, result)
            else:  # nothing was kept of the step that its rule took
                matrix.count.known = None
        if leaving is not None:
            incoming, work, _ = leaving
            work.wait()
            assert bucket.outward is not None
            for segment, values in views_into(incoming, bucket.outward[1]):
                if self.present[segment.matrix]:
                    self._deliver_segment(self.exchange.matrices[segment.matrix], segment, values)
        self.update.store()

    def _deliver_own(self, matrix: Matrix, result: dict[str, Tensor]) -> None:
        self.update.apply(pieces_of([matrix]), parts_of([matrix], [result["update"]]))
        if matrix.rule.rewrites_momentum:
            keep_momentum(matrix, self.states, result["momentum_buffer"])
        for name, extra in matrix.extra.items():
            if extra.held:
                _gather(result[name], extra.spans, extra_here(matrix, name, self.states))

    def _deliver_segment(self, matrix: Matrix, segment: Segment, values: Tensor) -> None:
        if not segment.rectangles:
            extra_here(matrix, segment.name, self.states).copy_(values)
            return
        position = 0
        momentum = flat(local(self.states[matrix.param]["momentum_buffer"]))
        for block in matrix.blocks:
            shape = block.target.rows[1] - block.target.rows[0], block.target.columns[1] - block.target.columns[0]
            part = values[position : position + block.target.numel].view(shape)
            position += block.target.numel
            if segment.name == "update":
                self.update.apply([(matrix, block)], [part.to(local(matrix.param).device)])
            else:
                block.of(momentum).copy_(part)


def _buffer(messages: Sequence[Message], device: torch.device) -> Tensor:
    return torch.empty(sum(message.size for message in messages), dtype=torch.uint8, device=device)


def _fill(target: Tensor, segment: Segment, values: Tensor) -> None:
    if not segment.rectangles:
        _scatter(target, segment.spans, values)
        return
    position = 0
    for rectangle in segment.rectangles:
        part = entries(target, rectangle)
        part.copy_(values[position : position + part.numel()].view(part.shape))
        position += part.numel()


def _scatter(array: Tensor, spans: Sequence[tuple[int, int]], values: Tensor) -> None:
    """Write values that lie one after the other into their ranges of an array."""
    position = 0
    for low, high in spans:
        array[low:high].copy_(values[position : position + high - low])
        position += high - low


def _gather(array: Tensor, spans: Sequence[tuple[int, int]], values: Tensor) -> None:
    """Write ranges of an array one after the other into ``values``."""
    position = 0
    for low, high in spans:
        values[position : position + high - low].copy_(array[low:high])
        position += high - low
