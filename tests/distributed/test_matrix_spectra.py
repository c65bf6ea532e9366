"""Singular values of sharded matrices: those of the whole ones, one matrix at a time, each solved once."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_spectral.models.views import Views
from lightning_spectral.probe.matrix_spectra import spectra
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed

# shape, placements as (kind, axis) by mesh axis, views
CASES = {
    "rows": ((10, 6), [("shard", 0)], {}),
    "uneven rows": ((3, 5), [("shard", 0)], {}),
    "columns": ((6, 10), [("shard", 1)], {}),
    "copies": ((6, 4), [("copy", 0)], {}),
    "experts": ((3, 6, 4), [("shard", 0)], {"row_dims": 2, "stack": 3}),
    "experts, cut inside": ((4, 6, 5), [("shard", 1)], {"row_dims": 2, "stack": 4, "transposed": True}),
    "experts, cut in columns": ((2, 6, 4), [("shard", 2)], {"row_dims": 2, "stack": 2}),
    "q, k and v": ((12, 4), [("shard", 0)], {"parts": (((0, 4),), ((4, 8),), ((8, 12),))}),
    "filters, cut in columns that are not the first": ((4, 3, 6), [("shard", 2)], {}),
}


def whole(name: str) -> torch.Tensor:
    return torch.randn(CASES[name][0], generator=torch.Generator().manual_seed(len(name)))


def views_of(name: str) -> Views:
    shape, _, options = CASES[name]
    return Views(shape, **options)


def distributed(name: str, tensor: torch.Tensor, mesh) -> torch.Tensor:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(axis) if kind == "shard" else Replicate() for kind, axis in CASES[name][1]]
    copies = [Replicate()] * (mesh.ndim - len(placements))
    return distribute_tensor(tensor, mesh, [*copies, *placements])


def found_by(rank: int, world_size: int, shape: tuple[int, ...]) -> list[list[list[float]]]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", shape)
    tensors = [distributed(name, whole(name), mesh) for name in CASES]
    return [[line.tolist() for line in of] for of in spectra(tensors, [views_of(name) for name in CASES])]


@pytest.mark.parametrize("shape", [(2,), pytest.param((2, 2), marks=pytest.mark.slow)], ids=str)
def test_singular_values_of_sharded_matrices_are_those_of_the_whole(shape):
    expected = spectra([whole(name) for name in CASES], [views_of(name) for name in CASES])
    for ours in run_ranks(found_by, torch.Size(shape).numel(), shape):
        for name, of_case, wanted in zip(CASES, ours, expected, strict=True):
            assert len(of_case) == len(wanted), name
            for one, other in zip(of_case, wanted, strict=True):
                assert one == pytest.approx(other.tolist(), rel=1e-12), name  # the same fp64 solve


def odd(rank: int, world_size: int) -> list[list[float]]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world_size,))
    tensors = [whole("rows"), torch.full((10, 6), torch.nan), torch.zeros(10, 6), whole("rows").bfloat16()]
    solve = torch.linalg.svdvals

    def gives_up(matrix: torch.Tensor) -> torch.Tensor:
        if not matrix.any():
            raise RuntimeError("did not converge")
        return solve(matrix)

    torch.linalg.svdvals = gives_up
    views = Views((10, 6))
    found = spectra([distributed("rows", tensor, mesh) for tensor in tensors], [views] * 4)
    return [line.tolist() for (line,) in found]


def test_what_is_not_finite_or_not_solved_is_told_on_every_rank():
    for fine, infinite, failed, half in run_ranks(odd, 2):
        assert fine == pytest.approx(torch.linalg.svdvals(whole("rows").double()).tolist(), rel=1e-12)
        assert len(infinite) == 1
        assert infinite[0] != infinite[0]
        assert failed == []
        assert half == pytest.approx(torch.linalg.svdvals(whole("rows").bfloat16().double()).tolist(), rel=1e-12)


class Peak(TorchDispatchMode):
    """Most bytes that tensors made inside it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                self.now += 0 if self.holders[key] else size
                self.holders[key] += 1
                weakref.finalize(tensor, self.gone, key, size)
                self.most = max(self.most, self.now)
        return out

    def gone(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        self.now -= 0 if self.holders[key] else size


def counted(rank: int, world_size: int, number: int) -> tuple[int, int, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (world_size,))
    matrices = [torch.randn(64, 64) for _ in range(number)]
    tensors = [distributed("rows", matrix, mesh) for matrix in matrices]
    gathers, solves = [], []
    full, solve = DTensor.full_tensor, torch.linalg.svdvals
    DTensor.full_tensor = lambda self, **options: gathers.append(1) or full(self, **options)
    torch.linalg.svdvals = lambda matrix: solves.append(1) or solve(matrix)
    with Peak() as peak:
        spectra(tensors, [Views((64, 64))] * number)
    return len(gathers), len(solves), peak.most


def test_one_matrix_at_a_time_and_owners_take_turns():
    matrix, most = 64 * 64 * 4, {}
    for number in (4, 16):
        ranks = run_ranks(counted, 2, number)
        assert [(gathers, solves) for gathers, solves, _ in ranks] == [(0, number // 2)] * 2
        most[number] = max(peak for _, _, peak in ranks)
    assert most[4] < 8 * matrix  # one in fp32 and in fp64, its absolute values in fp64, and the solver's copy
    assert most[16] < most[4] + 16 * 64 * 8 * 3  # twelve matrices more: only their singular values are
