"""The state of one parameter: what a fresh one is, what is saved of it, and what a saved one becomes here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_spectral.models.placement import local
from lightning_spectral.optim.checkpoint import extra_to_saved, saved_to_extra, saved_to_param_layout
from lightning_spectral.optim.matrices import Matrix, matrices_of_member
from lightning_spectral.optim.matrix_rule import MatrixRule
from lightning_spectral.optim.members import Member
from lightning_spectral.optim.migrate import translated
from lightning_spectral.optim.vector_rules import VECTOR_STATE
from lightning_spectral.optim.weights import LOW_BITS, keeps_more

State = dict[str, Any]


@dataclass(frozen=True)
class StateLayout:
    """What the rules of one optimizer keep with a parameter.

    Attributes:
        rules: Algorithm name -> rule of matrices.
        bf16_weights: See ``weights``.
    """

    rules: Mapping[str, MatrixRule]
    bf16_weights: str

    def matrices(self, member: Member) -> list[Matrix]:
        """The matrices of a parameter under a matrix rule, else none."""
        rule = self.rules.get(member.algorithm)
        return [] if rule is None else matrices_of_member(member, rule)

    def elementwise(self, member: Member) -> tuple[str, ...]:
        """Names of the arrays that lie as the parameter does."""
        return ("momentum_buffer",) if member.algorithm in self.rules else VECTOR_STATE[member.algorithm]

    def fresh(self, member: Member) -> State:
        """All state at the beginning."""
        held = local(member.param)
        wide = keeps_more(held, self.bf16_weights)
        state: State = {"step": torch.zeros((), dtype=torch.float32, device=held.device)}
        layout: dict[str, Any] = {"memory_format": torch.contiguous_format, "requires_grad": False}
        vector = member.algorithm not in self.rules
        for name in self.elementwise(member):
            dtype = torch.float32 if vector and wide else member.param.dtype
            state[name] = torch.zeros_like(member.param, dtype=dtype, **layout)
        if self.bf16_weights == "compensated" and wide:
            state[LOW_BITS] = torch.zeros_like(member.param, dtype=torch.int16, **layout)
        matrices = self.matrices(member)
        for name in matrices[0].extra if matrices else ():
            parts = []
            for position, matrix in enumerate(matrices):
                extra = matrix.extra[name]
                whole = matrix.rule.initial_state(name, matrix.shape, member.group, member.index + 7_919 * position)
                whole = torch.zeros(extra.length) if whole is None else whole.reshape(-1)
                parts += [whole[low:high] for low, high in extra.spans]
            state[name] = torch.cat([*parts, torch.zeros(0)]).to(held.device, torch.float32, copy=True)
        return state

    def saved(self, member: Member, state: State) -> State:
        """The form of a checkpoint: every array lies as its parameter does."""
        matrices = self.matrices(member)
        extra = matrices[0].extra if matrices else {}
        return {
            name: extra_to_saved(value, name, matrices, member.param) if name in extra else value
            for name, value in state.items()
        }

    def saved_if_whole(self, member: Member, state: State) -> State | None:
        """``saved`` where the parameter was whole, else None."""
        if not member.shard.is_whole or member.shard.cut_over or local(member.param).device.type == "meta":
            return None
        return self.saved(member, state)

    def loaded(self, member: Member, saved: State, source: str) -> State:
        """What a saved state, of us or of torch (``source``), becomes here; what it does not have is fresh.

        Raises:
            ValueError: If it belongs to another optimizer or a parameter of another shape.
        """
        wanted = self.elementwise(member)
        saved = translated(saved, member, wanted, source)
        matrices = self.matrices(member)
        kept: State = {"step": torch.as_tensor(saved["step"], dtype=torch.float32).reshape(()).clone()}
        for name in wanted:
            if name not in saved:
                raise ValueError(
                    f"the checkpoint has no `{name}` for `{member.name}`: it was written by another optimizer. "
                    f"It holds {sorted(saved)}."
                )
            try:
                kept[name] = saved_to_param_layout(saved[name], member.param, member.shard)
            except ValueError as error:
                raise ValueError(f"`{name}` of `{member.name}` does not fit: {error}.") from None
        if matrices and "count" in matrices[0].extra and "count" not in saved:
            kept["momentum_buffer"].zero_()  # its bias is corrected by steps that nobody counted
        fresh = self.fresh(member)
        kept.update({name: kept[name].to(fresh[name].dtype).contiguous() for name in wanted})
        for name in fresh.keys() - kept.keys():
            if name not in saved:  # an older version, or another optimizer
                kept[name] = fresh[name]
            elif name == LOW_BITS:
                kept[name] = saved_to_param_layout(saved[name], member.param, member.shard).to(torch.int16)
            else:
                kept[name] = saved_to_extra(saved[name], name, matrices, member.shard).to(fresh[name].device)
        return kept
