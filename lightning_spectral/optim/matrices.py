"""One matrix as the step sees it: where its entries are here, which run it goes through, how the weight is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.same_shape import same_shape_runs
from lightning_spectral.models.placement import Block, blocks_of, local
from lightning_spectral.models.views import MatrixView, Range, Rectangle
from lightning_spectral.optim.matrix_rule import Group, MatrixRule
from lightning_spectral.optim.members import Member
from lightning_spectral.optim.weights import keeps_more, widened, write_back

Piece = tuple["Matrix", Block]  # what is here of a matrix, in one rectangle of it
States = Any  # Optimizer.state: parameter -> {name: tensor}
Observer = Callable[[str, Tensor, Tensor, Group], None]


@dataclass(frozen=True)
class Extra:
    """Where the extra state of one matrix lies.

    Attributes:
        length: Entries of the whole array.
        offset: Begin of this matrix's local entries in the flat state tensor of the parameter.
        spans: Ranges of the array that are here, in the order in which they lie.
    """

    length: int
    offset: int
    spans: tuple[Range, ...]

    @property
    def held(self) -> int:
        """Entries that are here."""
        return sum(high - low for low, high in self.spans)


@dataclass
class HostCount:
    """A count that lies on the device, as far as the host knows it; None until it has asked."""

    known: int | None = None


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix of one parameter: shape, local blocks, extra state, rule and settings."""

    member: Member
    rule: MatrixRule
    view: MatrixView
    blocks: tuple[Block, ...]
    extra: dict[str, Extra]
    position: int | None
    count: HostCount = field(default_factory=HostCount)

    @property
    def param(self) -> Tensor:
        """The parameter that holds it."""
        return self.member.param

    @property
    def name(self) -> str:
        """Of the parameter, with the position of the matrix where it holds several."""
        return self.member.name if self.position is None else f"{self.member.name}[{self.position}]"

    @property
    def group(self) -> Group:
        """Settings of its parameter group."""
        return self.member.group

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.view.shape

    @property
    def numel(self) -> int:
        """Entries of the whole matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether all its entries are here."""
        return sum(block.target.numel for block in self.blocks) == self.numel

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the direction and of the update, also on the wire."""
        held = local(self.param)
        return self.rule.dtype(self.group, held.dtype, held.device)

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype in which an array of this shape travels; a weight in its own, so that no bit of it is lost."""
        return local(self.param).dtype if name == "weight" else self.dtype


def matrices_of_member(member: Member, rule: MatrixRule) -> list[Matrix]:
    """All matrices of a parameter, also those of which nothing is here."""
    assert member.views is not None
    found = []
    used: dict[str, int] = {}
    for position, view in enumerate(member.views):
        blocks = tuple(blocks_of(view, member.shard))
        extra = {}
        for name, length in rule.extra_state(view.shape, member.group).items():
            spans = spans_of([block.target for block in blocks], view.shape[1], length)
            extra[name] = Extra(length, used.get(name, 0), spans)
            used[name] = used.get(name, 0) + extra[name].held
        found.append(Matrix(member, rule, view, blocks, extra, position if len(member.views) > 1 else None))
    return found


def spans_of(targets: Sequence[Rectangle], columns: int, length: int) -> tuple[Range, ...]:
    """Which of ``length`` values, laid along the first rows of a matrix, lie in these rectangles of it."""
    spans: list[Range] = []
    for target in targets:
        for row in range(target.rows[0], min(target.rows[1], -(-length // columns))):
            low = min(length, row * columns + target.columns[0])
            high = min(length, row * columns + target.columns[1])
            if high > low and spans and spans[-1][1] == low:
                spans[-1] = (spans[-1][0], high)
            elif high > low:
                spans.append((low, high))
    return tuple(spans)


def runs_of(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Matrices that go through one ``update_matrices``: one group, one shape, as many as are worth one batch.

    An accelerator, where launches cost more than products, takes those of the transposed shape along if the rule knows
    no rows from columns: the two projections of an MLP are one chain of launches. They come last.
    """
    by_group: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        by_group.setdefault(id(matrix.group), []).append(matrix)
    runs: list[list[Matrix]] = []
    for members in by_group.values():
        device = local(members[0].param).device
        turn = _saves_launches(device) and members[0].rule.is_transposable(members[0].group)
        shapes = [min(m.shape, m.shape[::-1]) if turn else m.shape for m in members]
        shells = [torch.empty(shape, dtype=m.dtype, device="meta") for shape, m in zip(shapes, members, strict=True)]
        alike = [[members[i] for i in indices] for indices in same_shape_runs(shells, device=device)]
        runs.extend(sorted(run, key=lambda matrix: matrix.shape) for run in alike)
    return runs


def _saves_launches(device: torch.device) -> bool:
    return device.type != "cpu"


def flat(tensor: Tensor) -> Tensor:
    """A local tensor as one row; a copy if it does not lie in order."""
    return tensor.reshape(-1)


def entering(pieces: Sequence[Piece], name: str, grads: dict[int, Tensor], states: States) -> Sequence[Tensor]:
    """Local entries of what one rule is given: its ``input``, or something that it ``also_sees``."""
    if name == "weight":
        return [block.of(flat(local(matrix.param))) for matrix, block in pieces]
    gradients = [block.of(flat(grads[id(matrix.param)])) for matrix, block in pieces]
    if name == "gradient":
        return gradients
    momenta = [block.of(flat(local(states[matrix.param]["momentum_buffer"]))) for matrix, block in pieces]
    first, _ = pieces[0]
    return first.rule.orthogonalizer_inputs(momenta, gradients, first.group)


def write_inputs(
    run: Sequence[Matrix], targets: Sequence[Tensor], grads: dict[int, Tensor], states: States, name: str = "input"
) -> None:
    """Write the local entries of what enters the rule into ``targets``, M x N each.

    A CPU takes them one by one, an accelerator as many as need no more room in the parameters' dtype than all targets.
    """
    pieces = pieces_of(run)
    places = parts_of(run, targets)
    if not pieces:
        return
    held = local(run[0].param)
    at_once = 1 if held.device.type == "cpu" else max(1, len(pieces) * targets[0].itemsize // held.itemsize)
    for i in range(0, len(pieces), at_once):
        some = slice(i, i + at_once)
        torch._foreach_copy_(places[some], list(entering(pieces[some], name, grads, states)))


def pieces_of(run: Sequence[Matrix]) -> list[Piece]:
    """What is here of these matrices, block by block."""
    return [(matrix, block) for matrix in run for block in matrix.blocks]


def parts_of(run: Sequence[Matrix], whole: Iterable[Tensor]) -> list[Tensor]:
    """Where these pieces lie in their M x N matrices."""
    return [entries(one, block.target) for matrix, one in zip(run, whole, strict=True) for block in matrix.blocks]


def extra_here(matrix: Matrix, name: str, states: States) -> Tensor:
    """The local entries of extra state; writing to them writes to the state."""
    extra = matrix.extra[name]
    found: Tensor = states[matrix.param][name][extra.offset : extra.offset + extra.held]
    return found


def run_rule(
    run: Sequence[Matrix], stacked: Tensor, extra: dict[str, list[Tensor]], observe: Observer | None
) -> Tensor:
    """Updates (B, M, N) of whole directions, extra state changed in place."""
    first = run[0]
    entering = stacked.clone() if observe is not None else stacked
    if "count" in extra:
        extra = {**extra, "steps": [torch.tensor(step) for step in _step_numbers(run, extra["count"])]}
    # Rounded to the wire's dtype everywhere: otherwise an owner would apply another update than it sends.
    updates = first.rule.update_matrices(stacked, extra, first.group).to(first.dtype)
    if observe is not None:
        for matrix, direction, update in zip(run, facing(run, entering), facing(run, updates), strict=True):
            observe(matrix.name, direction, update, matrix.group)
    return updates


def _step_numbers(run: Sequence[Matrix], counts: Sequence[Tensor]) -> list[int]:
    """Number of the step that each matrix takes now, from 1; the host asks the device once and counts along."""
    if any(matrix.count.known is None for matrix in run):
        for matrix, taken in zip(run, torch.cat(list(counts)).tolist(), strict=True):
            matrix.count.known = int(taken)
    numbers = [(matrix.count.known or 0) + 1 for matrix in run]
    for matrix, number in zip(run, numbers, strict=True):
        matrix.count.known = number
    return numbers


def empty_stack(run: Sequence[Matrix], device: torch.device) -> Tensor:
    """Room for the directions of a run, (B, M, N); the wide shape where a run has both."""
    return torch.empty((len(run), *run[0].shape), dtype=run[0].dtype, device=device)


def facing(run: Sequence[Matrix], stacked: Tensor) -> list[Tensor]:
    """Each matrix of a stack as its parameter has it, (M, N); writing to one writes to the stack."""
    return [one if one.shape == m.shape else one.mT for m, one in zip(run, stacked.unbind(0), strict=True)]


def standing(run: Sequence[Matrix], stacked: Tensor) -> list[Tensor]:
    """As ``facing`` but each C-contiguous; those that lie across are turned in one launch."""
    straight = _straight(run)
    return [*stacked[:straight].unbind(0), *stacked[straight:].mT.contiguous().unbind(0)]


def fill_stack(run: Sequence[Matrix], stacked: Tensor, grads: dict[int, Tensor], states: States) -> None:
    """``write_inputs`` into a stack, whatever lies across in it."""
    straight = _straight(run)
    across = stacked[straight:].mT
    apart = torch.empty(across.shape, dtype=across.dtype, device=across.device)
    write_inputs(run, [*stacked[:straight].unbind(0), *apart.unbind(0)], grads, states)
    if straight < len(run):
        across.copy_(apart)


def _straight(run: Sequence[Matrix]) -> int:
    """How many matrices lie in the stack as in their parameters: the first ones."""
    return sum(matrix.shape == run[0].shape for matrix in run)


def entries(matrix: Tensor, rectangle: Rectangle) -> Tensor:
    """Entries of an M x N matrix."""
    (r0, r1), (c0, c1) = rectangle.rows, rectangle.columns
    return matrix[r0:r1, c0:c1]


def keep_momentum(matrix: Matrix, states: States, momentum: Tensor) -> None:
    """Write the local entries of a momentum that the rule has rewritten."""
    held = flat(local(states[matrix.param]["momentum_buffer"]))
    for block in matrix.blocks:
        part = entries(momentum, block.target)
        here = block.of(held)
        if here.data_ptr() != part.data_ptr():
            here.copy_(part)


class WeightUpdate:
    """Moves weights by parts of updates.

    A bf16 weight that keeps more than its rounding is widened to fp32 first, one that does not lie in order is copied;
    ``store`` writes them back.
    """

    def __init__(self, states: States, bf16_weights: str) -> None:
        self._states, self._how = states, bf16_weights
        self._open: dict[int, tuple[Member, Tensor]] = {}

    def apply(self, pieces: Sequence[Piece], parts: Sequence[Tensor]) -> None:
        """Decay and move the entries of every block by their part (rows x columns) of the update."""
        alike: dict[tuple[float, float], tuple[list[Tensor], list[Tensor]]] = {}
        for (matrix, block), part in zip(pieces, parts, strict=True):
            member, rule = matrix.member, matrix.rule
            kept = 1 - member.lr * member.weight_decay if rule.decays_weights else 1.0
            moved = -member.lr * rule.shape_factor(matrix.shape, matrix.group)
            weights, moves = alike.setdefault((kept, moved), ([], []))
            weights.append(block.of(self._flat(member)))
            moves.append(part)
        for (kept, moved), (weights, moves) in alike.items():
            if kept != 1:
                torch._foreach_mul_(weights, kept)
            torch._foreach_add_(weights, moves, alpha=moved)

    def store(self) -> None:
        """Write back what was widened or copied; rounding what has not changed changes nothing."""
        for member, wide in self._open.values():
            held = local(member.param)
            if keeps_more(held, self._how):
                write_back(self._states[member.param], held, wide.view(held.shape), member)
            else:
                held.copy_(wide.view(held.shape))
        self._open.clear()

    def _flat(self, member: Member) -> Tensor:
        held = local(member.param)
        if not keeps_more(held, self._how) and held.is_contiguous():
            return held.view(-1)
        if id(member.param) not in self._open:
            wide = widened(self._states[member.param], held) if keeps_more(held, self._how) else held.reshape(-1)
            self._open[id(member.param)] = (member, wide.reshape(-1))
        return self._open[id(member.param)][1]
