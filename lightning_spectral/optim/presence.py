"""Which matrices have a gradient, asked of all ranks that hold them: a small sum, and one answer for the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_spectral.models.placement import local
from lightning_spectral.optim.matrices import Matrix


class Timetable(Protocol):
    """What travels in one process group: an ``Exchange`` or a ``LowRankExchange``."""

    group: Any
    matrices: list[Matrix]

    @property
    def holds(self) -> list[list[bool]]:
        """``holds[rank][matrix]``."""


class Presence:
    """The gradients of one step. The sums begin when it is made; ``require_same`` waits for them once.

    Args:
        timetables: The same on every rank of their groups.
        grads: Local gradients by ``id(param)``.
    """

    def __init__(self, timetables: Sequence[Timetable], grads: dict[int, Tensor]) -> None:
        self._timetables = list(timetables)
        self._said: list[list[bool]] = []
        self._counts: list[Tensor] = []
        self._works: list[Any] = []
        for timetable in self._timetables:
            held = timetable.holds[dist.get_rank(timetable.group)]
            said = [id(matrix.param) in grads and here for matrix, here in zip(timetable.matrices, held, strict=True)]
            counts = torch.tensor(said, dtype=torch.int32).to(wire_device(timetable), non_blocking=True)
            self._said.append([id(matrix.param) in grads for matrix in timetable.matrices])
            self._counts.append(counts)
            self._works.append(dist.all_reduce(counts, group=timetable.group, async_op=True))

    def require_same(self, beside: Tensor | None = None) -> float:
        """The one question a step that the host waits for. All ranks of a group raise, or none.

        Args:
            beside: A number on the device that the host wants to know, too.

        Returns:
            The value of ``beside``; zero without it.

        Raises:
            RuntimeError: If a matrix has a gradient on some of its holders only.
        """
        if not self._works:
            return 0.0 if beside is None else float(beside)
        for work in self._works:
            work.wait()
        self._works = []
        device = self._counts[0].device
        asked = [] if beside is None else [beside.to(device, torch.int32).view(1)]
        answers = torch.cat([counts.to(device) for counts in self._counts] + asked).tolist()
        self._compare(answers)
        return 0.0 if beside is None else float(answers[-1])

    def _compare(self, answers: list[int]) -> None:
        for timetable, said in zip(self._timetables, self._said, strict=True):
            found, answers = answers[: len(said)], answers[len(said) :]
            holders = [sum(of_rank) for of_rank in zip(*timetable.holds, strict=True)]
            if any(n not in (0, all_of_them) for n, all_of_them in zip(found, holders, strict=True)):
                everybody: list[Any] = [None] * len(timetable.holds)
                dist.all_gather_object(everybody, said, group=timetable.group)
                present = [
                    [int(has) if here else None for has, here in zip(of_rank, held, strict=True)]
                    for of_rank, held in zip(everybody, timetable.holds, strict=True)
                ]
                require_same_gradients(present, [matrix.member.name for matrix in timetable.matrices])


def wire_device(timetable: Timetable) -> torch.device:
    """Where buffers live: with the weights, or on the GPU if the group cannot carry tensors of the CPU (offloading)."""
    device = local(timetable.matrices[0].param).device
    if device.type == "cpu" and dist.get_backend(timetable.group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def require_same_gradients(present: Sequence[Sequence[int | None]], names: Sequence[str]) -> None:
    """Refuse a step in which a matrix has a gradient on some of its holders only.

    Args:
        present: ``present[rank][matrix]``: 1, 0, or None for a rank that holds nothing of it; the same on every rank,
            so that all of them raise.
        names: For the message.

    Raises:
        RuntimeError: If holders disagree.
    """
    for i, name in enumerate(names):
        said = {rank: of_rank[i] for rank, of_rank in enumerate(present) if of_rank[i] is not None}
        if len(set(said.values())) > 1:
            missing = [rank for rank, has in said.items() if not has]
            raise RuntimeError(
                f"`{name}` has a gradient on some ranks but `grad is None` on ranks {missing}. Momentum would drift "
                "apart: give every rank a gradient (zeros where the matrix was not used), or clear it on all ranks."
            )
