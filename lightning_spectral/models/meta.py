"""Building a model without memory, and without the draws that its numbers would need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_SMALL = 1 << 16  # numbers that a tensor may have and be real: positions, rotations, scales
_FACTORIES = {"zeros", "ones", "full", "rand", "randn"}
# without effect on the meta device, where torch would go through decompositions that import the compiler
_DRAWS = {f"{kind}_" for kind in ("normal", "uniform", "trunc_normal", "exponential", "random", "bernoulli")}
_DRAWS |= {f"{kind}_{how}_" for kind in ("kaiming", "xavier") for how in ("uniform", "normal")} | {"orthogonal_"}


class _Unallocated(TorchFunctionMode):
    """Weights on the meta device; what is small and has a value, such as positions, as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _DRAWS:
            first = args[0] if args else kwargs.get("tensor")
            if isinstance(first, Tensor) and first.is_meta:
                return first
        elif name == "empty" or (name in _FACTORIES and _num_numbers(args, kwargs) > _SMALL):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _num_numbers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
    return math.prod(side for side in size if isinstance(side, int))


@contextmanager
def without_memory() -> Iterator[None]:
    """Weights that are made inside have shapes and no numbers (the meta device)."""
    with _Unallocated():
        yield
