"""Ways to compute ``sum y y^T``, and which of them is fastest here and still right.

The same product costs 0.3 to 1.0 of a plain GEMM depending on library and processor, so the choice is measured at
set-up (:func:`calibrate`), each candidate checked against fp64 first. Measured so far: on an AMD EPYC (Zen 5)
oneDNN's kernels do the strips in half the time of torch's MKL; on an Intel Sapphire Rapids MKL is the fastest and
oneDNN's flag means bf16, which the check refuses. Nowhere measured: ARM, where BLAS may gain most, and CUDA.

A product backend adds to the packed upper strips of :mod:`~lightning_spectral.functional.packed`.

Axes: N rows, D features.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_spectral.functional.packed import packed_size, strip_views

Product = Callable[[Sequence[Tensor], Tensor], None]

# Relative error (Frobenius) above which a product is not fp32: fp32 sums of 256 terms err by 3e-7, bf16 by 3e-4.
TOLERANCE = 1e-6
# Another backend must be clearly faster: timing noise must not make two equal runs choose differently.
CLEAR_WIN = 0.9
MIN_WIDTH = 256  # narrower products take microseconds whatever the backend
# Wider ones rank the same on a CPU and would take seconds to try; on a GPU narrow ones are over when they are launched.
_MAX_WIDTH = {"cpu": 2_048, "cuda": 8_192}
_SWITCHING = threading.RLock()
_CHECK_ROWS, _TRIAL_ROWS, _TRIAL_S = 256, 2_048, 0.05


def strips(uppers: Sequence[Tensor], rows_ND: Float[Tensor, "N D"]) -> None:
    """The matrix product of torch itself, strip by strip."""
    start = 0
    for upper in uppers:
        upper.addmm_(rows_ND[:, start : start + upper.shape[0]].mT, rows_ND[:, start:])
        start += upper.shape[0]


def onednn(uppers: Sequence[Tensor], rows_ND: Float[Tensor, "N D"]) -> None:
    """The strips by oneDNN, which torch asks only if bf16 is allowed; without bf16 units it computes in fp32.

    The switch is global to the process and put back before this returns.
    """
    with _precision_of(torch.backends.mkldnn.matmul, "bf16"):  # type: ignore[attr-defined]
        rows_DN = rows_ND.mT.contiguous()  # on strided operands oneDNN can fall to a slow reference kernel
        start = 0
        for upper in uppers:
            upper.addmm_(rows_DN[start : start + upper.shape[0]], rows_DN[start:].mT)
            start += upper.shape[0]


def syrk(uppers: Sequence[Tensor], rows_ND: Float[Tensor, "N D"]) -> None:
    """BLAS SYRK from scipy's OpenBLAS: half the work of a full product, and a D x D buffer on top."""
    from scipy.linalg import blas

    rank_k = blas.dsyrk if rows_ND.dtype == torch.float64 else blas.ssyrk
    upper_DD = torch.from_numpy(rank_k(1.0, rows_ND.contiguous().numpy().T, lower=1).T)
    start = 0
    for upper in uppers:
        stop = start + upper.shape[0]
        upper += upper_DD[start:stop, start:]
        upper[:, : stop - start] += upper_DD[start:stop, start:stop].triu(1).mT
        start = stop


def cuda_bf16(uppers: Sequence[Tensor], rows_ND: Float[Tensor, "N D"]) -> None:
    """bf16 inputs, fp32 sums and output, on tensor cores: 8,192 rows of D = 14,336 take 7.7 ms, not 42 (an H200)."""
    low_ND = rows_ND.to(torch.bfloat16)
    start = 0
    for upper in uppers:
        left = low_ND[:, start : start + upper.shape[0]].mT
        upper += torch.mm(left, low_ND[:, start:], out_dtype=torch.float32)  # type: ignore[call-overload]
        start += upper.shape[0]


def row_buffer(like: Tensor, num_tokens: int, width: int) -> Tensor:
    """Memory for rows that are about to be multiplied, of the type and on the device of ``like``.

    A cache line longer than they need: rows 2^k bytes apart all fall into the same few lines of a cache, which costs up
    to a quarter of the product (D = 1,024 on an Intel Sapphire Rapids).
    """
    return like.new_empty(num_tokens, width + 64 // like.element_size())[:, :width]


@dataclass(frozen=True)
class Backend:
    """One way to compute the product.

    Attributes:
        run: The product.
        devices: Device types it is for.
        tolerance: Relative error up to which it is accepted.
        activations: Type of the rows it is offered for; ``None`` for any.
        needs: Whether this torch and this machine have it.
    """

    run: Product
    devices: tuple[str, ...]
    tolerance: float = TOLERANCE
    activations: torch.dtype | None = None
    needs: Callable[[], bool] = lambda: True


def _has_onednn_switch() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.backends.mkldnn, "matmul")


BACKENDS: dict[str, Backend] = {
    "strips": Backend(strips, ("cpu", "cuda", "mps", "xpu")),
    "onednn": Backend(onednn, ("cpu",), needs=_has_onednn_switch),
    "syrk": Backend(syrk, ("cpu",)),
    # Rows that are bf16 themselves have 3 digits; rounding them again after the shift moved ranks by 7e-4 (an H200, a
    # soft rank of 5 of D = 4,096). Of fp32 trial rows the product is off by 2e-3: 2^-9, the rounding of one number.
    "cuda_bf16": Backend(cuda_bf16, ("cuda",), tolerance=4e-3, activations=torch.bfloat16),
}


@dataclass(frozen=True)
class Calibration:
    """What was tried and what was chosen.

    Attributes:
        name: Key of :data:`BACKENDS`.
        seconds: Best time of each accepted backend for one trial product.
        errors: Relative error of each backend tried.
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def product(self) -> Product:
        """The chosen backend."""
        return BACKENDS[self.name].run

    def __str__(self) -> str:
        if not self.errors:
            return self.name
        base = self.seconds["strips"]
        tried = [
            f"{name} {self.seconds[name] / base:.2f}x" if name in self.seconds else f"{name} refused, error {error:.0e}"
            for name, error in self.errors.items()
        ]
        return f"{self.name} ({', '.join(tried)})"


def calibrate(
    width: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    activations: torch.dtype | None = None,
) -> Calibration:
    """The fastest product that is right here; about 50 ms for each candidate, nothing global left changed.

    Args:
        width: Features D. Below :data:`MIN_WIDTH` nothing is tried.
        dtype: Type of the products; other than fp32 nothing is tried.
        device: Where the rows are.
        activations: Type of the rows before they enter the products, if known.
    """
    device = torch.device(device)
    if width < MIN_WIDTH or dtype != torch.float32:
        return Calibration("strips")
    offered = {name: BACKENDS[name] for name in offered_for(device, activations)}
    if set(offered) <= {"strips"}:
        return Calibration("strips")
    rows_ND = _trial_rows(min(width, _MAX_WIDTH.get(device.type, 2_048)), device)
    seconds: dict[str, float] = {}
    errors: dict[str, float] = {}
    with torch.no_grad(), full_precision(device):
        for name, backend in offered.items():
            errors[name] = relative_error(backend.run, rows_ND[:_CHECK_ROWS])
            if name == "strips" or errors[name] <= backend.tolerance:
                seconds[name] = _best_time(backend.run, rows_ND)
    fastest = min(seconds, key=seconds.__getitem__)
    clear = seconds[fastest] < CLEAR_WIN * seconds["strips"]
    return Calibration(fastest if clear else "strips", seconds, errors)


def offered_for(device: torch.device, activations: torch.dtype | None) -> tuple[str, ...]:
    """Names of the products that may be tried for rows of this type."""
    return tuple(
        name
        for name, backend in BACKENDS.items()
        if device.type in backend.devices and backend.activations in (None, activations) and backend.needs()
    )


def relative_error(product: Product, rows_ND: Float[Tensor, "N D"]) -> float:
    """``|P - X^T X| / |X^T X|`` (Frobenius, upper strips) against fp64."""
    uppers, exact = _empty_strips(rows_ND), _empty_strips(rows_ND.double())
    product(uppers, rows_ND)
    strips(exact, rows_ND.double())
    difference = sum(float((a.double() - b).square().sum()) for a, b in zip(uppers, exact, strict=True))
    return (difference / sum(float(b.square().sum()) for b in exact)) ** 0.5


def is_full_precision(device: torch.device) -> bool:
    """Whether the process allows no TF32 or bf16 shortcut, so that :func:`full_precision` has nothing to switch."""
    switch = _switch(device)
    if switch is not None:
        return switch.fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """True fp32 products: outside autocast, and with TF32 or bf16 shortcuts off for their duration."""
    with _without_autocast(device):
        switch = _switch(device)
        if switch is not None:
            with _precision_of(switch, "ieee"):
                yield
            return
        before = torch.get_float32_matmul_precision()  # torch < 2.9 has this one switch for all devices
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Autocast off in this thread; leaving ``torch.autocast`` would empty the cache of weights of all threads."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        yield
        return
    torch.set_autocast_enabled(device.type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device.type, True)


def _switch(device: torch.device) -> Any:
    """The precision switch of one kind of device; torch < 2.9 has none."""
    matmul = getattr({"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(device.type), "matmul", None)
    return matmul if hasattr(matmul, "fp32_precision") else None


@contextlib.contextmanager
def _precision_of(switch: Any, value: str) -> Iterator[None]:
    if switch.fp32_precision == value or (value == "ieee" and switch.fp32_precision == "none"):
        yield
        return
    with _SWITCHING:  # two threads must not take each other's setting for the one to put back
        before = switch.fp32_precision
        switch.fp32_precision = value
        try:
            yield
        finally:
            switch.fp32_precision = before


def _trial_rows(width: int, device: torch.device) -> Tensor:
    rows_ND = row_buffer(torch.empty(0, device=device), _TRIAL_ROWS, width)
    return rows_ND.copy_(torch.randn(rows_ND.shape, device="cpu", generator=torch.Generator().manual_seed(0)))


def _empty_strips(rows_ND: Tensor) -> list[Tensor]:
    width = rows_ND.shape[1]
    return strip_views(rows_ND.new_zeros(packed_size(width)), width)


def _best_time(product: Product, rows_ND: Tensor) -> float:
    """Seconds of the best of a few runs."""
    uppers, best, began = _empty_strips(rows_ND), float("inf"), time.perf_counter()
    product(uppers, rows_ND)
    while best == float("inf") or time.perf_counter() - began < _TRIAL_S:
        best = min(best, seconds_of(lambda: product(uppers, rows_ND), rows_ND.device))
    return best


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """What a call costs: on a CPU a library that takes more cores than torch was given pays for them.

    With one thread it is the CPU time, which a machine busy with other things does not change.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if device.type != "cpu":
        return wall
    threads = torch.get_num_threads()
    return cpu if threads == 1 else max(wall, cpu / threads)
