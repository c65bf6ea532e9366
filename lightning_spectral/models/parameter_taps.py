"""Rows that meet a 3-D parameter: the experts of a mixture whose matrices are one tensor.

Such experts are no modules, and libraries multiply them in several ways: one ``linear`` an expert, a grouped product, a
batched product with gathered weights. What stays is the parameter: whatever it is multiplied with are the rows.

Axes: E experts, N rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_spectral.models.hooks import Hook, Switch

_PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"} | {
    f"{scaled}{name}" for scaled in ("", "_", "scaled_", "_scaled_") for name in ("grouped_mm",)
}
# what makes another tensor of a weight without multiplying it
_CARRIES = {"__getitem__", "index_select", "gather", "transpose", "permute", "t", "__get__", "contiguous", "to"} | {
    *("chunk", "unbind", "view", "reshape", "select", "narrow", "split", "squeeze"),
    *("clone", "type", "bfloat16", "half", "float"),
}


class _Mode(TorchFunctionMode):
    """Sees every call of a torch function while the experts run."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in weights}
        self._owners = {_memory(weight): name for name, weight in weights.items()}
        self._kept: list[Tensor] = []  # so that no other tensor takes their memory while we look

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS or name in _CARRIES:
            with torch._C.DisableTorchFunction():
                self._look(name, [value for value in _flat(args) if isinstance(value, Tensor)], out)
        return out

    def _look(self, name: str, tensors: list[Tensor], out: Any) -> None:
        owners = [self._owners.get(_memory(tensor)) for tensor in tensors]
        owner = next((found for found in owners if found is not None), None)
        if owner is None:
            return
        if name in _CARRIES:
            for tensor in _flat([out]):
                if isinstance(tensor, Tensor) and tensor.ndim >= 2:
                    self._owners[_memory(tensor)] = owner
                    self._kept.append(tensor)
            return
        place = owners.index(owner)
        others = [(index, tensor) for index, tensor in enumerate(tensors) if owners[index] is None]
        rows = next(((n, x) for n, x in reversed(others) if x.is_floating_point() and x.ndim >= 2), None)
        if rows is None or not isinstance(out, Tensor):
            return
        weight_first = rows[0] > place and name != "linear"  # W x: rows are columns
        row, result = (rows[1].mT, out.mT) if weight_first else (rows[1], out)
        self.seen[owner].append((row.detach(), result.detach()))


class EnterExperts(Hook):
    """Before the forward of fused experts: the tokens that come in are kept, and the mode is entered.

    A mode that one hook enters and another one leaves cannot be traced: inside a compiled region only the entrance is
    seen, and the reader says so.

    Attributes:
        names: Parameters to look at.
        modes: Those entered and not left.
    """

    def __init__(self, switch: Switch, path: str, target: Any, names: Sequence[str]) -> None:
        super().__init__(switch, "fused_in", path, target)
        self.names = tuple(names)
        self.modes: list[_Mode] = []

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = len(self.switch.events)
        super()._record(module, args, kwargs, output)
        if len(self.switch.events) > before:  # this call counts
            weights = {name: module._parameters[name] for name in self.names}
            mode = _Mode({name: weight for name, weight in weights.items() if weight is not None})
            mode.__enter__()  # type: ignore[no-untyped-call]
            self.modes.append(mode)


class LeaveExperts(Hook):
    """Behind the forward of fused experts, also where it failed: what was entered is left."""

    def __init__(self, switch: Switch, path: str, target: Any, enter: EnterExperts) -> None:
        super().__init__(switch, "fused_out", path, target, always=True)
        self._enter = enter

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        """Leave the mode and hand over what it saw, whatever the switch says by now."""
        if not torch.compiler.is_compiling() and self._enter.modes:
            mode = self._enter.modes.pop()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.switch.events.append((self, mode.seen, False))


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # tensors without a storage of their own
        return id(tensor)


def _flat(values: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        flat += _flat(value) if isinstance(value, (tuple, list)) else [value]
    return flat
