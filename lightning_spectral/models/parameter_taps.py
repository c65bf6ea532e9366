"""Rows that meet a bare parameter: a network's matrices, or those of the experts of a mixture in one tensor.

Such networks have no modules inside, and libraries multiply in several ways: one ``linear`` an expert, a grouped
product, a batched product with gathered weights. What stays is the parameter: whatever it is multiplied with are the
rows. Of parameters in packed numbers (MXFP4) not even that stays: there a matrix is known by its two widths.

Axes: E experts, N rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from lightning_spectral.models.bare_networks import packed_matrices
from lightning_spectral.models.hooks import Hook, Switch
from lightning_spectral.models.sites import Site
from lightning_spectral.text import one_line

_PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"} | {
    f"{scaled}{name}" for scaled in ("", "_", "scaled_", "_scaled_") for name in ("grouped_mm",)
}
# what makes another tensor of a weight without multiplying it
_CARRIES = {"__getitem__", "index_select", "gather", "transpose", "permute", "t", "__get__", "contiguous", "to"} | {
    *("chunk", "unbind", "view", "reshape", "select", "narrow", "split", "squeeze"),
    *("clone", "type", "type_as", "bfloat16", "half", "float"),
}


Matrix = tuple[str, int, int]  # name of the parameter, input and output width


class Product(NamedTuple):
    """Rows that met a matrix, what came out, and the leading shape of both."""

    rows: Tensor
    output: Tensor
    lead: tuple[int, ...]


class _Mode(TorchFunctionMode):
    """Sees every call of a torch function while the network runs.

    A plain matrix is known by its memory, whatever view of it is multiplied; one that is unpacked on the way by its
    two widths.
    """

    def __init__(self, names: Sequence[str], weights: Mapping[str, Tensor], matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self.seen: dict[str, list[Product]] = {name: [] for name in names}
        self.trouble = ""
        self.has_packed = set(weights) < set(names)
        self._matrices = matrices
        self._packed = [matrix for matrix in matrices if matrix[0] not in weights]
        self._memory: dict[int, list[tuple[int, int, str]]] = {}  # a storage may hold many (FSDP's flat parameters)
        for name, weight in weights.items():
            self._own(weight, name)
        self._kept: list[Tensor] = []  # so that no other tensor takes their memory while we look

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        try:
            with torch._C.DisableTorchFunction():
                name = getattr(func, "__name__", "")
                tensors = [value for value in _flat([*args, *(kwargs or {}).values()]) if isinstance(value, Tensor)]
                if name in _CARRIES:
                    self._carry(tensors, out)
                elif len(tensors) > 1 and isinstance(out, Tensor):
                    self._multiplied(name, args, tensors, out)
        except Exception as error:  # the model's own call has succeeded: it must not hear of ours
            self.trouble = one_line(error)
        return out

    def _own(self, tensor: Tensor, name: str) -> None:
        storage, start, stop = _memory(tensor)
        self._memory.setdefault(storage, []).append((start, stop, name))

    def _owner(self, tensor: Tensor) -> str | None:
        storage, start, _ = _memory(tensor)
        return next((name for low, high, name in self._memory.get(storage, ()) if low <= start < high), None)

    def _carry(self, tensors: list[Tensor], out: Any) -> None:
        owner = next((found for tensor in tensors[:1] if (found := self._owner(tensor)) is not None), None)
        for tensor in _flat([out]) if owner is not None else ():
            if isinstance(tensor, Tensor) and tensor.ndim >= 2 and self._owner(tensor) is None:
                self._own(tensor, owner)  # type: ignore[arg-type]
                self._kept.append(tensor)

    def _multiplied(self, name: str, args: Sequence[Any], tensors: list[Tensor], out: Tensor) -> None:
        owners = [self._owner(tensor) for tensor in tensors]
        for n, weight in enumerate(tensors[1:], 1):
            if owners[n] is None:
                owners[n] = by_widths(weight, tensors[0], out, self._packed)
        place = next((n for n, owner in reversed(list(enumerate(owners))) if owner is not None), None)
        others = [(n, x) for n, x in enumerate(tensors) if owners[n] is None and x.is_floating_point() and x.ndim >= 2]
        if place is None or not others:
            return
        n, rows = others[-1]
        if name == "einsum":
            features = _einsum_axes(args[0], n, place)
            if features is None:
                return
            rows, out = rows.movedim(features[0], -1), out.movedim(features[1], -1)
        elif name not in _PRODUCTS:  # a kernel of somebody's own
            if by_widths(tensors[place], rows, out, self._matrices) is None:
                return
        elif n > place and name != "linear":  # W x: rows are columns
            rows, out = rows.mT, out.mT
        owner = owners[place]
        assert owner is not None
        self.seen[owner].append(Product(rows.detach(), out.detach(), tuple(rows.shape[:-1])))


class _TracedMode(TorchFunctionMode):
    """The same where a compiler traces it: no addresses there, matrices are known by their two widths."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self.matrices = tuple(matrices)
        self.seen: list[tuple[str, Product]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            for weight in tensors[1:]:
                owner = by_widths(weight, tensors[0], out, self.matrices)
                if owner:
                    rows = tensors[0].detach()
                    self.seen.append((owner, Product(rows, out.detach(), tuple(rows.shape[:-1]))))
                    break
        return out


def by_widths(weight: Tensor, rows: Tensor, out: Tensor, matrices: Sequence[Matrix]) -> str | None:
    """The parameter that a matrix is, by its widths: rows of one width met it, and rows of the other came out."""
    if weight.ndim < 2 or rows.ndim < 2:
        return None
    for name, num_in, num_out in matrices:
        sides = (weight.shape[-2], weight.shape[-1])
        if rows.shape[-1] == num_in and out.shape[-1] == num_out and sides in ((num_in, num_out), (num_out, num_in)):
            return name
    return None


def _einsum_axes(equation: Any, rows: int, weight: int) -> tuple[int, int] | None:
    """The axis of features in the rows, and in what comes out; ``None`` where the equation does not tell."""
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    summed = [label for label in terms[rows] if label in terms[weight] and label not in output]
    made = [label for label in output if label in terms[weight] and label not in terms[rows]]
    return (terms[rows].index(summed[0]), output.index(made[0])) if len(summed) == len(made) == 1 else None


class EnterExperts(Hook):
    """Before the forward of a bare network: the tokens that come in are kept, and a mode is entered.

    Attributes:
        names: Parameters to look at.
        modes: Those entered and not left.
        traced_mode: The one that a compiler traces.
        is_inside: Whether that one was entered.
    """

    def __init__(self, switch: Switch, path: str, target: list[Site]) -> None:
        super().__init__(switch, "fused_in", path, target)
        known = (name for name, _, _ in target[0].matrices)
        self.names = sorted({*(site.parameter for site in target), target[0].up_parameter, *known})
        self.modes: list[_Mode] = []
        self.traced_mode = _TracedMode(target[0].matrices)
        self.is_inside = False

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = len(self.switch.events)
        super()._record(module, args, kwargs, output)
        if len(self.switch.events) > before:  # this call counts
            try:
                mode = self._mode(module)
            except Exception as error:  # an observer never ends what it observes
                self.switch.note("hook_failed", f"`{self.path}` could not be recorded ({one_line(error)}).")
                return
            mode.__enter__()  # type: ignore[no-untyped-call]
            self.modes.append(mode)

    def _mode(self, module: nn.Module) -> _Mode:
        unpacked = packed_matrices(module)
        own = {name: module._parameters.get(name) for name in self.names if name not in unpacked}
        weights = {name: weight for name, weight in own.items() if weight is not None}
        return _Mode(self.names, weights, self.target[0].matrices)

    def _trace(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = len(self.traced)
        super()._trace(module, args, kwargs, output)
        if len(self.traced) > before:
            self.is_inside = True
            _push_mode(self.traced_mode)


class LeaveExperts(Hook):
    """Behind the forward of a bare network, also where it failed: what was entered is left."""

    def __init__(self, switch: Switch, path: str, target: list[Site], enter: EnterExperts) -> None:
        super().__init__(switch, "fused_out", path, target, always=True)
        self._enter = enter

    def __call__(self, module: nn.Module, args: Any, *rest: Any) -> None:
        """Leave the mode and hand over what it saw, whatever the switch says by now."""
        enter = self._enter
        if torch.compiler.is_compiling():
            if enter.is_inside:
                enter.is_inside = False
                _pop_mode()
                seen: dict[str, list[Product]] = {name: [] for name in enter.names}
                for name, product in enter.traced_mode.seen:
                    seen[name].append(product)
                enter.traced_mode.seen.clear()
                self.traced.append((seen, False))
                self.switch.has_traced = True
        elif enter.modes:
            mode = enter.modes.pop()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if mode.trouble:
                self.switch.note("hook_failed", f"`{self.path}` could not be recorded ({mode.trouble}).")
            self.switch.events.append((self, (self._thinned(mode.seen), mode.has_packed), False))

    def _thinned(self, seen: dict[str, list[Product]]) -> dict[str, list[Product]]:
        """The kept rows, of networks that see all tokens; experts, which see few, keep all."""
        if self.target[0].is_routed:
            return seen
        rows = self.switch.rows
        return {
            name: [Product(rows(one.rows)[0], rows(one.output)[0], one.lead) for one in products]
            for name, products in seen.items()
        }


def _memory(tensor: Tensor) -> tuple[int, int, int]:
    """Storage of a tensor, and the first and the last address in it; tensors without one are their own."""
    try:
        storage = tensor.untyped_storage()
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return id(tensor), 0, 1
    if not storage.data_ptr():
        return id(tensor), 0, 1
    return storage.data_ptr(), start, start + max(tensor.numel() * tensor.element_size(), 1)


def _flat(values: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        flat += _flat(value) if isinstance(value, (tuple, list)) else [value]
    return flat
