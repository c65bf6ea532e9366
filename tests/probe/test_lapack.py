"""Two LAPACKs, one answer; the faster one is taken only where it is right."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from lightning_spectral.probe import lapack


def covariance_of(width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    rows = torch.randn(2 * width, width, generator=generator, dtype=torch.float64) * scale
    return (rows.mT @ rows / len(rows)).to(dtype)


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 128, 300, 1_000])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_eigenvalues_are_numpys(width, dtype, rounding):
    matrix = covariance_of(width, dtype)
    kept = matrix.clone()
    expected = np.linalg.eigvalsh(matrix.double().numpy())
    for found in (lapack.by_scipy(matrix), lapack.eigenvalues(matrix)):
        assert found.dtype == dtype
        assert np.allclose(found.double().numpy(), expected, rtol=0, atol=rounding * expected[-1])
    assert torch.equal(matrix, kept)  # LAPACK works in place: on a copy
    once = lapack.by_scipy(matrix)
    assert torch.equal(lapack.by_scipy(matrix.clone(), overwrite=True), once)
    other_half = lapack.by_scipy(matrix.clone().mT, overwrite=True)  # a product is symmetric up to rounding
    assert torch.allclose(other_half, once, rtol=0, atol=2 * rounding * float(once[-1]))


def test_a_view_of_a_larger_matrix_is_solved_as_what_it_shows():
    matrix = covariance_of(300, torch.float64)
    part = matrix[10:150, 10:150]
    assert torch.allclose(lapack.by_scipy(part), torch.linalg.eigvalsh(part), rtol=1e-12)


@pytest.fixture
def no_choice_made():
    lapack._is_faster.cache_clear()
    yield
    lapack._is_faster.cache_clear()


@pytest.mark.usefixtures("no_choice_made")
@pytest.mark.parametrize(("times", "taken"), [((1.0, 2.0), True), ((1.9, 2.0), False), ((2.0, 1.0), False)])
def test_the_clearly_faster_one_is_taken(monkeypatch, times, taken):
    order = iter([times[0], times[0], times[1], times[1]])
    monkeypatch.setattr(lapack, "seconds_of", lambda run, device: next(order))
    assert lapack.scipy_is_faster(512) is taken


@pytest.mark.usefixtures("no_choice_made")
def test_a_wrong_answer_is_never_taken(monkeypatch):
    right = lapack.by_scipy
    monkeypatch.setattr(lapack, "seconds_of", lambda run, device: 0.0)
    monkeypatch.setattr(lapack, "CLEAR_WIN", float("inf"))
    monkeypatch.setattr(lapack, "by_scipy", lambda matrix: right(matrix) * 1.01)
    assert not lapack.scipy_is_faster(256)


@pytest.mark.usefixtures("no_choice_made")
def test_a_scipy_without_the_functions_is_done_without(monkeypatch):
    monkeypatch.setattr(lapack, "_function", lambda name, pointers: None)
    assert not lapack.scipy_is_faster(256)
    matrix = covariance_of(256, torch.float64)
    assert torch.equal(lapack.eigenvalues(matrix), torch.linalg.eigvalsh(matrix))
    with pytest.raises(RuntimeError, match="does not export"):
        lapack.by_scipy(matrix)


def test_a_function_of_other_arguments_is_refused():
    assert lapack._function("ssytrd", lapack._REDUCE) is not None
    assert lapack._function("ssytrd", lapack._SOLVE) is None
    assert lapack._function("no_such_name", lapack._SOLVE) is None


def test_other_threads_run_while_it_solves():
    matrix, counted, done = covariance_of(1_000, torch.float64), 0, threading.Event()

    def solve():
        lapack.by_scipy(matrix)
        done.set()

    solver = threading.Thread(target=solve)
    solver.start()
    while not done.is_set():
        counted += 1
    solver.join()
    assert counted > 1_000  # with the interpreter's lock held this loop would stand still
