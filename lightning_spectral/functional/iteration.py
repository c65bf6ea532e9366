"""The steps of a polynomial iteration towards the polar factor, as matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.functional.coefficients import Row

# M rows, N columns, B matrices of one shape

# Multiplications of one product with the long side from which an accelerator saves more than three launches take: on an
# H100 two matrices of 1,024 x 4,096 take the same time either way, six of 768 x 3,072 16 % less, two of them 40 % more.
_PAIR_FROM = 8 * 10**9
TINY = 1e-30  # keeps 0 / 0 out of zero matrices; every other norm is scaled to 1e-7 or more first


def iterate_rows(iterate: Tensor, rows: Sequence[Row], normalizer: str, overwrite: bool, pair: bool = True) -> Tensor:
    """Apply the rows to (M, N) or (B, M, N) of Frobenius norm at most one.

    The Gram matrix is that of the short side, so a wide iterate is multiplied from the left and a tall one from the
    right. With ``overwrite`` the steps go back and forth between the iterate and one more buffer of its size. Where one
    side is twice the other, two steps share a pass over the long side (``_two_steps``) unless ``pair`` is False or an
    accelerator would spend more on their launches than it saves.
    """
    room = _Room.beside(iterate) if overwrite else _Room()
    short, long = sorted(iterate.shape[-2:])
    pair = pair and long >= 2 * short and (iterate.device.type == "cpu" or iterate.numel() * short >= _PAIR_FROM)
    step = 0
    while step < len(rows):
        # The first step goes alone: before it the spectrum is at its widest.
        if pair and 0 < step < len(rows) - 1:
            iterate = _two_steps(iterate, rows[step], rows[step + 1], room)
            step += 2
        else:
            iterate = _one_step(iterate, rows[step], normalizer if step == 0 else "frobenius", room)
            step += 1
    return iterate


@dataclass
class _Room:
    """Where results go: (..., M, N) of the iterate's size and two of its Gram matrix's; fresh tensors when None."""

    spare: Tensor | None = None
    gram: Tensor | None = None
    polynomial: Tensor | None = None

    @classmethod
    def beside(cls, iterate: Tensor) -> _Room:
        short = min(iterate.shape[-2:])
        gram = iterate.new_empty((*iterate.shape[:-2], short, short))
        return cls(iterate.new_empty(iterate.shape), gram, torch.empty_like(gram))

    def in_spare(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Two more Gram matrices in the memory of ``spare``, for as long as nothing is written there."""
        if self.spare is None or self.gram is None or not self.spare.is_contiguous():
            return None, None
        halves = self.spare.view(-1)[: 2 * self.gram.numel()].view(2, *self.gram.shape)
        return halves[0], halves[1]

    def swap(self, result: Tensor, before: Tensor) -> Tensor:
        """``result``, which went into ``spare``; what it was made from is spare now."""
        self.spare = None if self.spare is None else before
        return result


def _one_step(iterate: Tensor, row: Row, normalizer: str, room: _Room) -> Tensor:
    """``a X + (b G + c G^2) X`` with ``G = X X^T``."""
    multiply, multiply_add, wide = _products(iterate)
    gram = multiply(*wide(iterate, iterate.mT), out=room.gram)
    if normalizer == "aol":
        # At most one by Gershgorin: no row of the scaled Gram matrix sums to more.
        scale = gram.abs().sum(dim=-1, keepdim=True).clamp(min=TINY).rsqrt()
        gram = gram.mul_(scale).mul_(scale.mT)
        iterate = iterate * wide(scale, scale.mT)[0]
    if normalizer == "schatten4":
        # ||X X^T||_F = sum s^4: its root bounds s_max^2 far closer than ||X||_F^2 does, at the price of one pass.
        square = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp(min=TINY)
        gram, iterate = (
            (gram / square, iterate / square.sqrt())
            if room.spare is None
            else (gram.div_(square), iterate.div_(square.sqrt()))
        )
    polynomial = _polynomial(gram, row, room.polynomial)
    return room.swap(multiply_add(iterate, *wide(polynomial, iterate), beta=row[0], out=room.spare), iterate)


def _two_steps(iterate: Tensor, first: Row, second: Row, room: _Room) -> Tensor:
    """Two steps on one Gram matrix: ``G' = P G P`` and ``P' P X``, all of them polynomials in ``G``, which commute.

    Two passes over the long side instead of four. No third step: where the iterate is nearly singular rounding makes
    eigenvalues of ``G'`` negative, and a polynomial meant for positive ones lets them grow.
    """
    multiply, multiply_add, wide = _products(iterate)
    in_spare, polynomial_out = room.in_spare()
    gram = multiply(*wide(iterate, iterate.mT), out=in_spare)
    polynomial = _polynomial(gram, first, polynomial_out)
    factor = polynomial.clone() if room.gram is None else room.gram.copy_(polynomial)
    factor.diagonal(dim1=-2, dim2=-1).add_(first[0])
    half = multiply_add(gram, polynomial, gram, beta=first[0], out=room.polynomial)
    gram = multiply_add(half, polynomial, half, beta=first[0], out=in_spare)
    polynomial = _polynomial(gram, second, polynomial_out)
    factor = multiply_add(factor, polynomial, factor, beta=second[0], out=room.polynomial)
    return room.swap(multiply(*wide(factor, iterate), out=room.spare), iterate)


def _polynomial(gram: Tensor, row: Row, out: Tensor | None) -> Tensor:
    """``b G + c G^2``."""
    _, b, c = row
    if c == 0:
        return torch.mul(gram, b, out=out)
    multiply_add = torch.addmm if gram.ndim == 2 else torch.baddbmm
    return multiply_add(gram, gram, gram, beta=b, alpha=c, out=out)


def _products(iterate: Tensor) -> tuple[Any, Any, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Product, product with addition, and the order of two factors: as given for a wide iterate, else exchanged."""
    multiply, multiply_add = (torch.mm, torch.addmm) if iterate.ndim == 2 else (torch.bmm, torch.baddbmm)
    if iterate.shape[-2] > iterate.shape[-1]:
        return multiply, multiply_add, lambda left, right: (right, left)
    return multiply, multiply_add, lambda left, right: (left, right)
