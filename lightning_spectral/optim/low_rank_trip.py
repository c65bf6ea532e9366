"""One step of Dion whose factors travel: parts to the owner, sums back, and every holder moves what it holds.

Axes: M rows, N columns, R rank of the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.functional.magnitude import largest_magnitude, unit_scale
from lightning_spectral.models.placement import Block, local
from lightning_spectral.optim.factors import next_right_factor, orthonormal_columns
from lightning_spectral.optim.low_rank import Leg, LowRankExchange, Size, inside, pick, rank_of, used_size
from lightning_spectral.optim.matrices import States, WeightUpdate, entering, extra_here, flat
from lightning_spectral.optim.matrix_rule import fading_of
from lightning_spectral.optim.presence import Presence, wire_device


class LowRankTrip:
    """One step of one ``LowRankExchange``."""

    def __init__(
        self,
        exchange: LowRankExchange,
        presence: Presence,
        grads: dict[int, Tensor],
        states: States,
        update: WeightUpdate,
    ) -> None:
        self.exchange, self.presence, self.grads, self.states, self.update = exchange, presence, grads, states, update
        self.device, self.dtype = wire_device(exchange), exchange.matrices[0].dtype
        self.present = [id(matrix.param) in grads for matrix in exchange.matrices]

    def run(self) -> None:
        """Bucket by bucket."""
        for bucket in self.exchange.buckets:
            self._run(bucket)

    def _run(self, bucket: list[int]) -> None:
        exchange, here = self.exchange, self.exchange.rank
        held = [i for i in bucket if exchange.holds[here][i]]
        owned = [i for i in bucket if exchange.owners[i] == here]
        kept = self._gather_state(bucket, held, owned)
        scales, rights = self._send_right_factors(bucket, kept)
        lefts: dict[int, Tensor] = {}
        whole: dict[int, Tensor] = {}
        for _ in range(exchange.power_iterations):
            mine = {i: self._left_part(i, scales[i], rights[i]) for i in held}
            added = self._add(self._to_owner(bucket, self.exchange.left_size, mine), owned, by_rows=True)
            whole = {i: orthonormal_columns(left.unsqueeze(0))[0] for i, left in added.items()}
            lefts = self._spread(bucket, self.exchange.left_size, whole, by_rows=True)
            mine = {i: self._right_part(i, scales[i], lefts[i]) for i in held}
            whole = self._add(self._to_owner(bucket, self.exchange.right_size, mine), owned, by_rows=False)
            rights = self._spread(bucket, self.exchange.right_size, whole, by_rows=False)
        self.presence.require_same()
        self._finish(bucket, kept, whole, {i: (scales[i], lefts[i], rights[i]) for i in held})

    # ---- the beginning: extra state to the owner, scale and right factor to the holders ------------------------------

    def _gather_state(self, bucket: list[int], held: list[int], owned: list[int]) -> dict[int, dict[str, Tensor]]:
        """Of owned matrices: all extra state, and ``largest``, the largest magnitude of the direction."""
        mine = {}
        for i in held:
            matrix = self.exchange.matrices[i]
            if self.present[i]:
                largest = [largest_magnitude(self._direction(i, b)).view(()) for b in matrix.blocks]
                state = [extra_here(matrix, name, self.states).to(self.dtype) for name in matrix.extra]
                mine[i] = torch.cat([torch.stack(largest).amax().view(1).to(self.dtype), *state]).to(self.device)
        found: dict[int, dict[str, Tensor]] = {}
        for i, parts in self._to_owner(bucket, self.exchange.state_size, mine).items():
            matrix = self.exchange.matrices[i]
            found[i] = {name: self._zeros(extra.length) for name, extra in matrix.extra.items()}
            found[i]["largest"] = torch.stack([part[0] for part in parts.values()]).amax()
            for holder, part in parts.items():
                position = 1
                for name, spans in self.exchange.spans(i, holder).items():
                    for low, high in spans:
                        found[i][name][low:high] = part[position : position + high - low]
                        position += high - low
        return found

    def _send_right_factors(
        self, bucket: list[int], kept: dict[int, dict[str, Tensor]]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        for i, state in kept.items():
            state["scale"] = unit_scale(state["largest"].view(1, 1)).view(1)
            state["right_factor"] = state["right_factor"].view(-1, self.exchange.matrices[i].shape[1])

        def made(i: int, holder: int) -> Tensor:
            columns = pick(kept[i]["right_factor"], self.exchange.frames[holder][i].columns, 1)
            return torch.cat([kept[i]["scale"], columns.reshape(-1)])

        got = self._to_holders(bucket, self.exchange.first_size, made)
        rights = {i: values[1:].view(rank_of(self.exchange.matrices[i]), -1) for i, values in got.items()}
        return {i: values[0] for i, values in got.items()}, rights

    # ---- products of what is here ------------------------------------------------------------------------------------

    def _direction(self, i: int, block: Block) -> Tensor:
        return entering([(self.exchange.matrices[i], block)], "input", self.grads, self.states)[0]

    def _left_part(self, i: int, scale: Tensor, right: Tensor) -> Tensor:
        """``B Q^T`` over the entries that are here, (rows here, R)."""
        frame, matrix = self.exchange.frames[self.exchange.rank][i], self.exchange.matrices[i]
        part = self._zeros(frame.height, right.shape[0])
        for block in matrix.blocks if self.present[i] else ():
            rows, columns = inside(frame.rows, block.target.rows), inside(frame.columns, block.target.columns)
            part[rows] += (self._direction(i, block).to(self.device, self.dtype) * scale) @ right[:, columns].mT
        return part

    def _right_part(self, i: int, scale: Tensor, left: Tensor) -> Tensor:
        """``P^T B`` over the entries that are here, (R, columns here)."""
        frame, matrix = self.exchange.frames[self.exchange.rank][i], self.exchange.matrices[i]
        part = self._zeros(left.shape[1], frame.width)
        for block in matrix.blocks if self.present[i] else ():
            rows, columns = inside(frame.rows, block.target.rows), inside(frame.columns, block.target.columns)
            part[:, columns] += left[rows].mT @ (self._direction(i, block).to(self.device, self.dtype) * scale)
        return part

    # ---- the end: the new right factor, momentum, weights, state -----------------------------------------------------

    def _finish(
        self,
        bucket: list[int],
        kept: dict[int, dict[str, Tensor]],
        final: dict[int, Tensor],
        factors: dict[int, tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        for i, state in kept.items():
            group = self.exchange.matrices[i].group
            fade = fading_of(state["largest"].view(1), {n: [state[n]] for n in state if n == "peak"}, group)
            state["fade"] = torch.ones_like(state["scale"]) if fade is None else fade.view(1).to(self.dtype)
            used, stored = next_right_factor(final[i].unsqueeze(0), state["right_factor"].unsqueeze(0), group)
            state["used"], state["right_factor"] = used[0], stored[0].reshape(-1)
            if not group["orthogonal_right"]:  # its rows are those that travelled, at unit length
                length = final[i].norm(dim=-1)
                state["used"] = torch.where(length > 0, 1 / length.where(length > 0, 1.0), 0.0)

        def made(i: int, holder: int) -> Tensor:
            state = kept[i]
            used = state["used"]
            if used.ndim == 2:
                used = pick(used, self.exchange.frames[holder][i].columns, 1).reshape(-1)
            spans = [
                state[name][low:high] for name, ranges in self.exchange.spans(i, holder).items() for low, high in ranges
            ]
            return torch.cat([state["fade"], used, *spans])

        for i, values in self._to_holders(bucket, self.exchange.final_size, made).items():
            if self.present[i]:
                self._apply(i, values, *factors[i])
        self.update.store()

    def _apply(self, i: int, values: Tensor, scale: Tensor, left: Tensor, right: Tensor) -> None:
        """Move the momentum, the weights and the extra state that are here."""
        matrix, frame = self.exchange.matrices[i], self.exchange.frames[self.exchange.rank][i]
        count = used_size(matrix, frame)
        fade, used = values[0], values[1 : 1 + count]
        used = used.view(right.shape) if matrix.group["orthogonal_right"] else right * used.view(-1, 1)
        explained = right / scale
        held = flat(local(self.states[matrix.param]["momentum_buffer"]))
        for block in matrix.blocks:
            rows, columns = inside(frame.rows, block.target.rows), inside(frame.columns, block.target.columns)
            momentum = block.of(held)
            momentum.sub_((left[rows] @ explained[:, columns]).mul_(1 - matrix.group["momentum"]).to(momentum))
            self.update.apply([(matrix, block)], [(left[rows] @ used[:, columns]).mul_(fade).to(held.device)])
        position = 1 + count
        for name, extra in matrix.extra.items():
            extra_here(matrix, name, self.states).copy_(values[position : position + extra.held])
            position += extra.held

    # ---- travel ------------------------------------------------------------------------------------------------------

    def _to_owner(self, bucket: list[int], size: Size, mine: dict[int, Tensor]) -> dict[int, dict[int, Tensor]]:
        """Bring values of every source to the owners: {owned matrix: {source: values}}; zeros for what is missing."""
        exchange, here = self.exchange, self.exchange.rank

        def value(i: int) -> Tensor:
            return mine[i].reshape(-1) if i in mine else self._zeros(size(i, here))

        leg = exchange.leg(bucket, True, size)
        parts: dict[int, dict[int, Tensor]] = {i: {here: value(i)} for i in leg.stays}
        outgoing = [value(i) for peer in leg.to for i in peer]
        for i, peer, values in self._swap(leg, outgoing):
            parts.setdefault(i, {})[peer] = values
        return {i: dict(sorted(of_holder.items())) for i, of_holder in parts.items()}

    def _to_holders(self, bucket: list[int], size: Size, made: Callable[[int, int], Tensor]) -> dict[int, Tensor]:
        """Bring what the owners make for every holder to it: {held matrix: values}."""
        leg = self.exchange.leg(bucket, False, size)
        found = {i: made(i, self.exchange.rank) for i in leg.stays}
        outgoing = [made(i, peer) for peer, indices in enumerate(leg.to) for i in indices]
        found.update({i: values for i, _, values in self._swap(leg, outgoing)})
        return found

    def _swap(self, leg: Leg, outgoing: list[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
        """One ``all_to_all`` of values that lie one after the other; (matrix, peer, what came)."""
        sent = torch.cat(outgoing) if outgoing else self._zeros(0)
        came = torch.empty(sum(leg.arrives), dtype=self.dtype, device=self.device)
        dist.all_to_all_single(came, sent, leg.arrives, leg.leaves, group=self.exchange.group)
        for i, peer, begin, end in leg.slots:
            yield i, peer, came[begin:end]

    def _add(self, parts: dict[int, dict[int, Tensor]], owned: list[int], by_rows: bool) -> dict[int, Tensor]:
        """The whole left (M, R) or right (R, N) factors from their parts."""
        added = {}
        for i in owned:
            matrix = self.exchange.matrices[i]
            rank = rank_of(matrix)
            added[i] = self._zeros(matrix.shape[0], rank) if by_rows else self._zeros(rank, matrix.shape[1])
            for holder, part in parts[i].items():
                frame = self.exchange.frames[holder][i]
                shaped = part.view(-1, rank) if by_rows else part.view(rank, -1)
                position, dim = 0, 0 if by_rows else 1
                for low, high in frame.rows if by_rows else frame.columns:
                    added[i].narrow(dim, low, high - low).add_(shaped.narrow(dim, position, high - low))
                    position += high - low
        return added

    def _spread(self, bucket: list[int], size: Size, whole: dict[int, Tensor], by_rows: bool) -> dict[int, Tensor]:
        """The rows of left factors, or the columns of right ones, that are needed here."""

        def made(i: int, holder: int) -> Tensor:
            frame = self.exchange.frames[holder][i]
            return pick(whole[i], frame.rows if by_rows else frame.columns, 0 if by_rows else 1).reshape(-1)

        got = self._to_holders(bucket, size, made)
        shapes = {i: (-1, rank_of(self.exchange.matrices[i])) for i in got}
        return {i: values.view(shapes[i] if by_rows else shapes[i][::-1]) for i, values in got.items()}

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)
