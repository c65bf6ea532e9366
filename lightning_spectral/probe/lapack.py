"""Eigenvalues of a symmetric matrix on the CPU, by torch or by SciPy's LAPACK, whichever is faster here.

torch's LAPACK is MKL, which on an AMD takes 1.7 times as long at 1,024 features. SciPy's own functions keep the
interpreter's lock, so that a solve in a background thread would stop the training: LAPACK is called through the
pointers that ``scipy.linalg.cython_lapack`` exports to compiled code.

Axes: M rows and columns.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_spectral.functional.products import seconds_of

MIN_WIDTH, MAX_WIDTH = 128, 2_048  # below both take no time, above MKL wins everywhere
CLEAR_WIN = 0.85
_TRIAL_WIDTH = 1_024
_BLOCK = 64  # of the tridiagonal reduction
_ROUNDING = 1e-4  # of the largest eigenvalue: fp32 gives 1e-6
_REDUCE = ("char", "int", "x", "int", "x", "x", "x", "x", "int", "int")  # pointers to
_SOLVE = ("int", "x", "x", "int")


def eigenvalues(matrix_MM: Tensor, *, overwrite: bool = False) -> Tensor:
    """All eigenvalues, ascending, ``(M,)``, in the type of the matrix.

    Args:
        matrix_MM: Symmetric and finite, fp32 or fp64.
        overwrite: The matrix is not needed afterwards: it may be worked in.
    """
    width = len(matrix_MM)
    if matrix_MM.device.type == "cpu" and MIN_WIDTH <= width <= MAX_WIDTH and scipy_is_faster(width):
        return by_scipy(matrix_MM, overwrite=overwrite)
    return torch.linalg.eigvalsh(matrix_MM)


def scipy_is_faster(width: int) -> bool:
    """Whether SciPy's LAPACK is right here, and clearly faster than torch at about this width."""
    return _is_faster(min(1 << (width - 1).bit_length(), _TRIAL_WIDTH))


def by_scipy(matrix_MM: Tensor, *, overwrite: bool = False) -> Tensor:
    """All eigenvalues, ascending; to tridiagonal form, then by Pal, Walker and Kahan's QL.

    Args:
        matrix_MM: As for :func:`eigenvalues`.
        overwrite: As for :func:`eigenvalues`.

    Raises:
        RuntimeError: If LAPACK does not converge, or this SciPy does not export it.
    """
    width, kind = len(matrix_MM), matrix_MM.dtype
    letter = {torch.float32: "s", torch.float64: "d"}[kind]
    reduce, solve = _function(f"{letter}sytrd", _REDUCE), _function(f"{letter}sterf", _SOLVE)
    if reduce is None or solve is None:
        raise RuntimeError("this SciPy does not export LAPACK's `sytrd` and `sterf`.")
    in_place = overwrite and matrix_MM.is_contiguous()
    work_MM = matrix_MM if in_place else matrix_MM.clone(memory_format=torch.contiguous_format)
    diagonal_M, beside_M, reflectors_M = torch.empty(3, width, dtype=kind)
    work = torch.empty(_BLOCK * width, dtype=kind)
    side, size, room = ctypes.c_char(b"U"), ctypes.c_int(width), ctypes.c_int(len(work))
    info = ctypes.c_int(0)
    tensors = [one.data_ptr() for one in (diagonal_M, beside_M, reflectors_M, work)]
    at = ctypes.addressof
    reduce(at(side), at(size), work_MM.data_ptr(), at(size), *tensors, at(room), at(info))
    if info.value == 0:
        solve(at(size), *tensors[:2], at(info))
    if info.value:
        raise RuntimeError(f"LAPACK found no eigenvalues of a {width} x {width} matrix (info {info.value}).")
    return diagonal_M


@functools.cache
def _is_faster(width: int) -> bool:
    if _function("ssytrd", _REDUCE) is None or _function("ssterf", _SOLVE) is None:
        return False
    rows = torch.randn(2 * width, width, device="cpu", generator=torch.Generator().manual_seed(0))
    matrix_MM = rows.mT @ rows
    theirs = torch.linalg.eigvalsh(matrix_MM)
    if not bool((by_scipy(matrix_MM) - theirs).abs().max() <= _ROUNDING * theirs[-1]):
        return False
    return _best_of_two(by_scipy, matrix_MM) < CLEAR_WIN * _best_of_two(torch.linalg.eigvalsh, matrix_MM)


def _best_of_two(solve: Callable[[Tensor], Tensor], matrix_MM: Tensor) -> float:
    return min(seconds_of(lambda: solve(matrix_MM), matrix_MM.device) for _ in range(2))


@functools.cache
def _function(name: str, pointers: tuple[str, ...]) -> Callable[..., None] | None:
    """A function of SciPy's LAPACK, if its arguments are what is expected."""
    try:
        from scipy.linalg import cython_lapack

        capsule = cython_lapack.__pyx_capi__[name]
    except (ImportError, AttributeError, KeyError):
        return None
    of_capsule = ctypes.pythonapi.PyCapsule_GetName
    of_capsule.restype, of_capsule.argtypes = ctypes.c_char_p, [ctypes.py_object]
    signature = of_capsule(capsule)
    number = re.compile(rf"__pyx_t_\w+_{name[0]}$")  # Cython's name of the type that the matrix holds
    kinds = [number.sub("x", kind) for kind in re.findall(r"(\w+) \*", signature.decode())]
    if not signature.startswith(b"void (") or tuple(kinds) != pointers:
        return None
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer_of(capsule, signature)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(pointers))(address)
