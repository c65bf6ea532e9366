"""What this rank holds of a parameter, whatever cut it: DDP, FSDP1, FSDP2, HSDP, tensor and expert parallelism.

A whole parameter and a DTensor are a box of the logical shape, an FSDP1 shard is a range of its row-major flattening.
Either way the local entries are a few rectangles of the stored matrix, which is all that the exchange between ranks and
checkpoints need to know.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_spectral.models.views import MatrixView, Range, Rectangle, Views


@dataclass(frozen=True)
class Shard:
    """What this rank holds of one parameter.

    Attributes:
        shape: Logical shape.
        box: Range of every dimension that is held here; empty ranges on a rank without a part. None for ``span``.
        span: Range of the row-major flattening (FSDP1); None for ``box``.
        group: Process group of all ranks that hold a part or a copy; None when this rank alone decides.
        cut_over: Process groups over which the entries are divided, without the copies: for sums over entries.
    """

    shape: tuple[int, ...]
    box: tuple[Range, ...] | None
    span: Range | None = None
    group: Any = None
    cut_over: tuple[Any, ...] = ()

    @property
    def numel(self) -> int:
        """Entries of the whole parameter."""
        return math.prod(self.shape)

    @property
    def held(self) -> int:
        """Entries that are here."""
        if self.box is None:
            assert self.span is not None
            return self.span[1] - self.span[0]
        return math.prod(high - low for low, high in self.box)

    @property
    def is_whole(self) -> bool:
        """Whether all entries are here."""
        return self.held == self.numel

    def cut(self, whole: Tensor) -> Tensor:
        """The local entries of a tensor of the logical shape (or its flattening), in the local layout."""
        if self.span is not None:
            return whole.reshape(-1)[self.span[0] : self.span[1]]
        assert self.box is not None
        return whole.reshape(self.shape)[tuple(slice(low, high) for low, high in self.box)]

    def rectangles(self, views: Views) -> list[tuple[Rectangle, int]]:
        """Pairs (entries of the stored matrix, where they begin in the flat local storage); each lies row by row."""
        if self.held == 0:
            return []
        rows, columns = views.stored
        if self.span is not None:
            return list(_rectangles_of_span(self.span, columns))
        assert self.box is not None
        if self.is_whole:
            return [(Rectangle((0, rows), (0, columns)), 0)]
        return _rectangles_of_box(self.box, self.shape, views.row_dims)


def _rectangles_of_span(span: Range, columns: int) -> Iterator[tuple[Rectangle, int]]:
    """A partial first row, whole rows, a partial last row."""
    start, stop = span
    position = start
    while position < stop:
        row, column = divmod(position, columns)
        whole_rows = (stop - position) // columns
        if column == 0 and whole_rows:
            end = position + whole_rows * columns
            yield Rectangle((row, row + whole_rows), (0, columns)), position - start
        else:
            end = min(stop, (row + 1) * columns)
            yield Rectangle((row, row + 1), (column, column + end - position)), position - start
        position = end


def _rectangles_of_box(box: Sequence[Range], shape: Sequence[int], row_dims: int) -> list[tuple[Rectangle, int]]:
    inner = shape[row_dims + 1 :]
    if any(low > 0 or high < size for (low, high), size in zip(box[row_dims + 1 :], inner, strict=True)):
        raise ValueError(f"a parameter of shape {tuple(shape)} is cut inside its columns, {list(box)}: not supported.")
    unit = math.prod(inner)
    columns = (0, 1) if len(shape) == row_dims else (box[row_dims][0] * unit, box[row_dims][1] * unit)
    width = columns[1] - columns[0]
    *outer, (low, high) = box[:row_dims]
    found: list[tuple[Rectangle, int]] = []
    offset = 0
    for index in product(*(range(*held) for held in outer)):
        base = 0
        for position, size in zip(index, shape[1:row_dims], strict=True):
            base = (base + position) * size
        rows = (base + low, base + high)
        if found and found[-1][0].rows[1] == rows[0]:
            last, begin = found[-1]
            found[-1] = (Rectangle((last.rows[0], rows[1]), columns), begin)
        else:
            found.append((Rectangle(rows, columns), offset))
        offset += (high - low) * width
    return found


@dataclass(frozen=True)
class Block:
    """Entries of one matrix that are here, and where.

    Attributes:
        target: Which entries of the M x N matrix.
        offset: Begin in the flat local storage.
        stride: From one stored row to the next.
        transposed: Stored as the transpose of ``target``.
        step: From one stored column to the next.
    """

    target: Rectangle
    offset: int
    stride: int
    transposed: bool
    step: int = 1

    def of(self, flat: Tensor) -> Tensor:
        """The entries inside a flat local tensor, in the matrix's orientation; shares memory with it."""
        stored = self.target.mirrored if self.transposed else self.target
        size = (stored.rows[1] - stored.rows[0], stored.columns[1] - stored.columns[0])
        found = flat.as_strided(size, (self.stride, self.step), flat.storage_offset() + self.offset)
        return found.mT if self.transposed else found


def blocks_of(view: MatrixView, shard: Shard) -> list[Block]:
    """The parts of one matrix that this rank holds."""
    blocks = []
    across = view.views.transposed
    for held, begin in shard.rectangles(view.views):
        stride = held.columns[1] - held.columns[0]
        for source, step, target in view.places():
            down, right = (1, step) if across else (step, 1)
            rows, columns = _every(source.rows, down, held.rows), _every(source.columns, right, held.columns)
            if rows is None or columns is None:
                continue
            inside = Rectangle(columns, rows) if across else Rectangle(rows, columns)
            moved = Rectangle(
                (target.rows[0] + inside.rows[0], target.rows[0] + inside.rows[1]),
                (target.columns[0] + inside.columns[0], target.columns[0] + inside.columns[1]),
            )
            row, column = source.rows[0] + rows[0] * down, source.columns[0] + columns[0] * right
            offset = begin + (row - held.rows[0]) * stride + column - held.columns[0]
            blocks.append(Block(moved, offset, stride * down, across, right))
    return blocks


def _every(source: Range, step: int, held: Range) -> Range | None:
    """Which of the places ``source[0]``, ``source[0] + step``, ... below ``source[1]`` are held, by their number."""
    low = max(0, -((source[0] - held[0]) // step))
    high = -((source[0] - min(source[1], held[1])) // step)
    return (low, high) if high > low else None


def local(tensor: Tensor) -> Tensor:
    """The storage this rank holds; writing to it writes to the tensor."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor, without importing DTensor where it is not in use."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or all of a DTensor: a collective over its mesh, unless every rank has it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def as_cut(grad: Any, param: Any) -> Any:
    """A gradient, cut as its parameter is: tensor parallelism leaves partial sums, whose mesh adds them then."""
    if is_dtensor(grad) and is_dtensor(param) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


class Shards:
    """Looks up what ``param`` is part of; walks over the heap for FSDP1 and DDP modules, so make one per plan."""

    def __init__(self) -> None:
        self._flat: dict[int, Shard] = {}
        self._replicated: dict[int, Any] = {}
        if dist.is_available() and dist.is_initialized():
            self._flat, self._replicated = _live_wrappers()

    def of(self, param: Tensor, name: str = "a parameter") -> Shard:
        """Describe what this rank holds of ``param``.

        Raises:
            ValueError: If a DTensor is cut in a way that is no box, such as a partial sum.
        """
        if is_dtensor(param):
            return dtensor_shard(param, name)
        if id(param) in self._flat:
            return self._flat[id(param)]
        return Shard(tuple(param.shape), _full(param.shape), group=self._replicated.get(id(param)))


def _full(shape: Sequence[int]) -> tuple[Range, ...]:
    return tuple((0, size) for size in shape)


def _live_wrappers() -> tuple[dict[int, Shard], dict[int, Any]]:
    """One pass over the heap: shards of FSDP1 parameters and process groups of DDP parameters, by ``id``."""
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    ddp = sys.modules.get("torch.nn.parallel.distributed")
    sharding = set() if fsdp is None else _with_subclasses(fsdp.FullyShardedDataParallel)
    replicating = set() if ddp is None else _with_subclasses(ddp.DistributedDataParallel)
    wanted = sharding | replicating
    flat: dict[int, Shard] = {}
    replicated: dict[int, Any] = {}
    for wrapper in [thing for thing in gc.get_objects() if type(thing) in wanted] if wanted else []:
        if type(wrapper) in sharding:
            flat.update(_fsdp1_shards(wrapper))
        else:
            replicated.update(_ddp_groups(wrapper))
    return flat, replicated


def _with_subclasses(kind: type) -> set[type]:
    """A class and all that derive from it: a look into a set takes a quarter of the time of ``issubclass``."""
    derived: list[type] = type.__subclasses__(kind)
    return {kind}.union(*map(_with_subclasses, derived))


def _fsdp1_shards(module: Any) -> dict[int, Shard]:
    handle = module.__dict__.get("_handle")
    if handle is None or not handle.uses_sharded_strategy:
        return {}
    flat = handle.flat_param
    if flat._params is None:
        raise ValueError(
            "FSDP was built with use_orig_params=False: the optimizer sees one vector for many parameters and "
            "cannot tell matrices apart. Build it with use_orig_params=True (Lightning's and litgpt's default)."
        )
    shards = {}
    for param, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
        whole = math.prod(shape)
        span = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (whole, whole)
        group = handle.process_group
        shards[id(param)] = Shard(tuple(shape), None, span, group, (group,))
    return shards


def _ddp_groups(module: Any) -> dict[int, Any]:
    """Parameters whose gradients this DDP module averages; not those it was told to ignore."""
    if "module" not in module.__dict__.get("_modules", {}) or dist.get_world_size(module.process_group) == 1:
        return {}
    ignored = module.parameters_to_ignore
    named = module.module.named_parameters()
    return {id(param): module.process_group for name, param in named if name not in ignored}


def dtensor_shard(param: Any, name: str = "a parameter") -> Shard:
    """What this rank holds of a DTensor.

    Raises:
        ValueError: If it is a partial sum.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements, shape = param.device_mesh, param.placements, tuple(param.shape)
    for placement in placements:
        if placement.is_partial():
            raise ValueError(f"`{name}` of shape {shape} is placed as {placements}: a partial sum cannot be updated.")
    sizes, offsets = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    box = tuple((min(o, full), min(o, full) + n) for o, n, full in zip(offsets, sizes, shape, strict=True))
    cut_over = tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())
    return Shard(shape, box, None, mesh_group(mesh), cut_over)


def mesh_group(mesh: Any) -> Any:
    """One process group of all ranks of a mesh; None for a single rank."""
    if mesh.size() == 1:
        return None
    if mesh.ndim == 1:
        return mesh.get_group()
    return group_of(mesh.mesh.flatten().tolist())


def group_of(ranks: Sequence[int]) -> Any:
    """The process group of these ranks, made once; only they need call it."""
    return _group_of(tuple(ranks), id(dist.group.WORLD))


@lru_cache(maxsize=32)
def _group_of(ranks: tuple[int, ...], world: int) -> Any:
    """The group of these ranks, made once in the life of the world's group."""
    del world
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(list(ranks), use_local_synchronization=True)
