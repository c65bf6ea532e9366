"""Gaussian embeddings that are a pure function of the seed, block by block.

Every block of :data:`BLOCK_ROWS` items has a generator of its own, so any range of items can be drawn again at any
time: nothing depends on the order or the size of the chunks they are asked for. Small problems keep the rows in
memory; large ones draw them again whenever they are needed.
"""

# N items, D features of the side asked for

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from lightning_spectral.theory.problem import MemoryProblem

BLOCK_ROWS = 1024
DEFAULT_CACHE_BYTES = 4 * 2**30

Side = Literal["u", "v"]
_SIDE_STREAM = {"u": 0, "v": 1}


class Embeddings:
    """Rows u_i and v_i of one problem, as fp32 numbers.

    Args:
        problem: What to draw; only ``d``, ``d_out``, ``n_items``, ``seed`` and ``anisotropy`` matter.
        device: Where rows are handed out. They are always drawn on the CPU: the same numbers on every device.
        cache_bytes: Keep all rows when their ``4 N (d + d_out)`` bytes fit into this, else draw them again each time.
    """

    def __init__(
        self,
        problem: MemoryProblem,
        device: torch.device | str = "cpu",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.problem = problem
        self.device = torch.device(device)
        self.features = dict(zip(("u", "v"), problem.shape, strict=True))
        self.cached = 4 * problem.n_items * sum(problem.shape) <= cache_bytes
        self._scale_D = torch.from_numpy(problem.input_scales() ** 0.5).float() if problem.anisotropy else None
        self._rows: dict[str, Tensor] = {}

    def rows(self, side: Side, start: int, stop: int) -> Tensor:
        """Items ``start`` (included) to ``stop`` (excluded), shape (stop - start, D), fp32."""
        if not 0 <= start < stop <= self.problem.n_items:
            raise ValueError(
                f"`start`, `stop` must satisfy 0 <= start < stop <= {self.problem.n_items}, got {start}, {stop}."
            )
        if self.cached:
            return self._all(side)[start:stop]
        return self._draw(side, start, stop).to(self.device)

    def select(self, side: Side, indices: Tensor) -> Tensor:
        """The items named by sorted ``indices``, shape (len(indices), D), fp32."""
        if self.cached:
            return self._all(side)[indices]
        parts = []
        for start, block in self.blocks(side):
            inside = indices[(indices >= start) & (indices < start + len(block))]
            if len(inside):
                parts.append(block[inside - start])
        return torch.cat(parts) if parts else torch.empty(0, self.features[side], device=self.device)

    def blocks(self, side: Side, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, Tensor]]:
        """(start, rows) over all items in chunks of ``rows``."""
        for start in range(0, self.problem.n_items, rows):
            yield start, self.rows(side, start, min(start + rows, self.problem.n_items))

    def _all(self, side: Side) -> Tensor:
        if side not in self._rows:
            self._rows[side] = self._draw(side, 0, self.problem.n_items).to(self.device)
        return self._rows[side]

    def _draw(self, side: Side, start: int, stop: int) -> Tensor:
        size = self.features[side]
        out_ND = torch.empty(stop - start, size)

        def fill(block: int) -> None:
            block_start = block * BLOCK_ROWS
            generator = torch.Generator().manual_seed(_mix(self.problem.seed, _SIDE_STREAM[side], block))
            first, last = max(start, block_start), min(stop, block_start + BLOCK_ROWS)
            whole = last - first == BLOCK_ROWS  # then the rows are drawn where they belong, without a copy
            block_ND = out_ND[first - start : last - start] if whole else torch.empty(BLOCK_ROWS, size)
            block_ND.normal_(0.0, size**-0.5, generator=generator)
            if side == "v" and self._scale_D is not None:
                block_ND *= self._scale_D
            if not whole:
                out_ND[first - start : last - start] = block_ND[first - block_start : last - block_start]

        blocks = range(start // BLOCK_ROWS, (stop - 1) // BLOCK_ROWS + 1)
        if len(blocks) == 1 or torch.get_num_threads() == 1:
            for block in blocks:
                fill(block)
        else:  # drawing is serial inside one generator; blocks are independent
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(fill, blocks))
        return out_ND


def _mix(*parts: int) -> int:
    """SplitMix64 over the parts: neighbouring seeds, sides and blocks get unrelated generator seeds."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state
