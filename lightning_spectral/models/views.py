"""Which matrices a parameter holds: one declaration, for routing, rules, the exchange between ranks and checkpoints.

A parameter is stored as rows x columns (``row_dims`` leading dimensions make the rows, the others the columns), as
``stack`` matrices below each other. Each may be kept transposed, as (inputs, outputs), and may be divided into parts:
groups of output rows that are matrices of their own, such as q, k and v or single attention heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]
# output rows of one matrix, in order: (low, high), or (low, high, step) for every step-th one
Part = tuple[tuple[int, int] | tuple[int, int, int], ...]


@dataclass(frozen=True)
class Rectangle:
    """Entries ``rows x columns`` of something two-dimensional, both half-open."""

    rows: Range
    columns: Range

    @property
    def numel(self) -> int:
        """Number of entries."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    @property
    def mirrored(self) -> Rectangle:
        """The same entries of the transpose."""
        return Rectangle(self.columns, self.rows)


@dataclass(frozen=True)
class Views:
    """The matrices of one parameter.

    Attributes:
        shape: Logical shape of the parameter.
        row_dims: Leading dimensions that make the stored rows: 1 for a Linear or a convolution, 2 for (E, M, N).
        stack: Equally many stored rows each, one below the other: experts, groups of a convolution.
        transposed: Kept as (inputs, outputs): Hugging Face's Conv1D, some experts, transposed convolutions.
        parts: Output rows of each matrix of the stack; None when it is one matrix.
    """

    shape: tuple[int, ...]
    row_dims: int = 1
    stack: int = 1
    transposed: bool = False
    parts: tuple[Part, ...] | None = None

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns in which the parameter lies in memory."""
        return math.prod(self.shape[: self.row_dims]), math.prod(self.shape[self.row_dims :])

    @property
    def matrix(self) -> tuple[int, int]:
        """Outputs and inputs of one matrix of the stack, before it is divided into parts."""
        rows, columns = self.stored
        rows //= self.stack
        return (columns, rows) if self.transposed else (rows, columns)

    def __iter__(self) -> Iterator[MatrixView]:
        """All matrices, in the order of the stack and then of the parts."""
        outputs = self.matrix[0]
        for index in range(self.stack):
            for part in self.parts or (((0, outputs),),):
                yield MatrixView(self, index, part)

    def __len__(self) -> int:
        return self.stack * len(self.parts or (1,))

    @property
    def label(self) -> str:
        """``64 x 32``, ``8 x (64 x 32), transposed``, in 12 parts: for the routing table."""
        shapes = list(dict.fromkeys(view.shape for view in self))
        text = " | ".join(f"{m} x {n}" for m, n in shapes)
        text = f"{len(self)} x ({text})" if len(self) > 1 else text
        return f"{text}, transposed" if self.transposed else text


@dataclass(frozen=True)
class MatrixView:
    """One matrix of a parameter.

    Attributes:
        views: The declaration it belongs to.
        index: Position in the stack.
        part: Its output rows.
    """

    views: Views
    index: int
    part: Part

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs M and inputs N."""
        return sum(len(range(*rows)) for rows in self.part), self.views.matrix[1]

    def places(self) -> Iterator[tuple[Rectangle, int, Rectangle]]:
        """Where it lies in the stored rows and columns, at every which output, which entries of the matrix that is."""
        inputs = self.views.matrix[1]
        height = self.views.stored[0] // self.views.stack
        first = self.index * height
        row = 0
        for low, high, *step in self.part:
            count = len(range(low, high, *step))
            target = Rectangle((row, row + count), (0, inputs))
            if self.views.transposed:
                yield Rectangle((first, first + inputs), (low, high)), step[0] if step else 1, target
            else:
                yield Rectangle((first + low, first + high), (0, inputs)), step[0] if step else 1, target
            row += count

    def of(self, tensor: Tensor) -> Tensor:
        """The M x N matrix of a whole tensor of the parameter's shape; shares its memory where that is possible."""
        stored = tensor.reshape(self.views.stored)
        pieces = []
        for source, step, _ in self.places():
            piece = stored[source.rows[0] : source.rows[1], source.columns[0] : source.columns[1]]
            pieces.append((piece.mT if self.views.transposed else piece)[::step])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
