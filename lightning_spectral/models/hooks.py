"""Hooks that look at one bool, and that neither copies nor files of the model can carry away.

A :class:`Hook` leaves a deep copy of its module when the copying is done, and is pickled as a harmless standard-library
callable that takes anything and returns ``None``: a copy of the model, a file of it or an exported program holds
nothing of ours.

In eager code events go onto one list, in order. Inside a compiled region each hook has a list of its own (one list
would be guarded by its length and recompile): :meth:`Switch.drain` puts them in order when eager code is reached again.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.models.modes import in_backward, in_function_forward
from lightning_spectral.models.passes import Outputs
from lightning_spectral.models.traced import in_order

KINDS = (
    "open",  # a module that encloses stacks is called: its arguments
    "close",  # it returns, or an exception passes through it
    "ids",  # an embedding looked ids up
    "block",  # a block of a stack is entered
    "route",  # a module is entered that sends tokens to experts
    "arrive",  # rows come to an expert's up projection
    "rows",  # rows come to a down projection
    "output",  # an up projection returns
    "fused_in",  # fused experts are entered
    "fused_out",  # they return: rows that met their parameters
)
_AFTER = {"close", "ids", "output", "fused_out"}  # hooks that are called with what the module returned
# Numbers that jitter the kept rows; more rows than this reuse them cyclically.
_NUM_JITTERS = 1 << 16


class Switch:
    """What every hook of one recorder looks at, and where events go.

    Attributes:
        on: Whether anything is recorded.
        training: Record only modules in training mode, with gradients enabled.
        fraction: Share of the rows to keep.
        max_rows: Rows to keep of one call of a module at most (experts, which see few, keep all); ``None`` for any.
        jitter: Numbers in [0, 1) that place the kept rows, or ``None`` for all rows.
        kept: Indices of the kept rows, and the leading shape that they were drawn for last.
        events: ``(hook, content, whether a compiled region made it)`` in order.
        notes: One sentence per cause.
        first: Called once, when the first block or row that counts is seen in eager code.
        around: Called where eager code enters (``False``) or leaves (``True``) a module that encloses stacks.
        was_traced: Whether a compiled region has ever made events.
        hooks: Every hook, in the order in which a forward would meet them.
        has_traced: Whether a compiled region made events that are not among them yet.
        outputs: Of modules that enclose stacks.
    """

    def __init__(self, fraction: float = 1.0) -> None:
        self.on = False
        self.training = True
        self.fraction = fraction
        self.max_rows: int | None = None
        self.jitter: Tensor | None = None
        self.kept: tuple[tuple[int, ...], Tensor] | None = None
        self.events: list[tuple[Hook, Any, bool]] = []
        self.notes: dict[str, str] = {}
        self.first: Callable[[], None] | None = None
        self.around: Callable[[bool], None] | None = None
        self.was_traced = False
        self.hooks: list[Hook] = []
        self.has_traced = False
        self.outputs = Outputs()

    def seed(self, seed: int, device: torch.device) -> None:
        """Draw the jitter for one micro-batch from a generator of its own."""
        self.kept = None
        if self.fraction < 1 or self.max_rows is not None:
            generator = torch.Generator()
            generator.manual_seed(seed)
            self.jitter = torch.rand(_NUM_JITTERS, dtype=torch.float32, device="cpu", generator=generator).to(device)

    def share_of(self, lead: tuple[int, ...]) -> float:
        """Share of the rows of a call to keep."""
        if self.max_rows is None:
            return self.fraction
        return min(self.fraction, self.max_rows / max(math.prod(lead), 1))

    def rows(self, tensor: Tensor, *, copy: bool = False) -> tuple[Tensor, tuple[int, ...]]:
        """The kept rows and the leading shape that they were kept of."""
        lead = tuple(tensor.shape[:-1])
        if self.jitter is None:
            return (tensor.clone() if copy else tensor), lead
        if self.kept is None or self.kept[0] != lead:
            self.kept = (lead, kept_rows(lead, self.share_of(lead), self.jitter))
        return tensor.reshape(-1, tensor.shape[-1]).index_select(0, self.kept[1]), lead

    def drain(self) -> None:
        """Events of compiled regions, in order, behind those seen so far."""
        if not self.has_traced:
            return
        self.has_traced, self.was_traced = False, True
        compiled = [hook for hook in self.hooks if hook.traced]
        self.events += [(hook, content, True) for hook, content in in_order(compiled)]
        for hook in compiled:
            hook.traced.clear()

    def clear(self) -> None:
        """Forget every event."""
        self.has_traced = False
        self.outputs.clear()
        self.events.clear()
        for hook in self.hooks:
            hook.traced.clear()

    def note(self, cause: str, sentence: str) -> None:
        """Remember what could not be recorded, once a cause."""
        self.notes.setdefault(cause, sentence)


@lru_cache
def _eager_record(kind: type) -> Callable[..., None]:
    """Recording between two compiled regions: dynamo would compile it as a frame of its own, and gets shapes wrong."""
    return torch.compiler.disable(getattr(kind, "_record"))  # noqa: B009  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_exporting() -> bool:
    """``torch.compiler.is_exporting`` as it is: traced, up to torch 2.11, it is ``True`` in every compiled region."""
    return torch.compiler.is_exporting()


def _nothing() -> Callable[..., Any]:
    """Takes anything and returns ``None``; needs only the standard library where it is unpickled."""
    exit_: Callable[..., Any] = getattr(contextlib.nullcontext(), "__exit__")  # noqa: B009  # as pickle spells it
    return exit_


def leave_copy(memo: dict[int, Any], place: tuple[Any, int] | None) -> Callable[..., Any]:
    """What stands for a hook in a deep copy: nothing that acts, and no entry once the copying is done.

    Args:
        memo: Of ``copy.deepcopy``, which drops it at its end.
        place: The original dictionary of hooks, and the hook's key.
    """
    copied = None if place is None else memo.get(id(place[0]))
    if place is not None and copied is not None:
        leaver = _Leaver(copied, place[1])
        memo[id(leaver)] = leaver
    return _nothing()


class _Leaver:
    """Takes an entry out of a dictionary when it goes itself."""

    def __init__(self, entries: Any, key: int) -> None:
        self._entries, self._key = entries, key

    def __del__(self) -> None:
        self._entries.pop(self._key, None)


class Hook:
    """One hook on one module.

    Args:
        switch: What it looks at.
        kind: What it records, see :data:`KINDS`.
        path: Of the module, for messages.
        target: What it belongs to: a site, a stack with the depth of a block, a module.
        always: Record whatever the modes are (ids and boundaries).

    Attributes:
        place: The module's dictionary of hooks that it is in, and its key there.
    """

    def __init__(self, switch: Switch, kind: str, path: str, target: Any = None, *, always: bool = False) -> None:
        self.switch = switch
        self.kind = kind
        self.path = path
        self.target = target
        self.always = always
        self.traced: list[Any] = []
        self.place: tuple[Any, int] | None = None

    def __call__(self, module: nn.Module, args: Any, *rest: Any) -> None:
        """Record, if the switch is on.

        Args:
            module: Which is called.
            args: Of the call.
            *rest: Its keyword arguments, which hooks are not given that ``torch.ao`` carries over to another module;
                then what it returned, after it has run.
        """
        if self.switch.on:
            kwargs = rest[0] if len(rest) > (self.kind in _AFTER) else {}
            output = rest[-1] if self.kind in _AFTER else None
            if torch.compiler.is_compiling():
                if not _is_exporting():
                    self._trace(module, args, kwargs, output)
            elif "torch._dynamo" in sys.modules:
                _eager_record(type(self))(self, module, args, kwargs, output)  # type: ignore[arg-type]
            else:
                self._record(module, args, kwargs, output)

    def __deepcopy__(self, memo: Any) -> Callable[..., Any]:
        return leave_copy(memo, self.place)

    def __copy__(self) -> Callable[..., Any]:
        return _nothing()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def _trace(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.always or not self.switch.training or (module.training and torch.is_grad_enabled()):
            content = self.content(args, kwargs, output)
            if content is not None:
                self.traced.append(content)
                self.switch.has_traced = True

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        switch = self.switch
        try:
            if in_backward() or torch._C._get_tracing_state() is not None or not self._counts(module):
                return
            if switch.first is not None and not self.always:
                first, switch.first = switch.first, None
                first()
            switch.drain()
            if switch.around is not None and self.kind in ("open", "close"):
                switch.around(self.kind == "close")
            content = self.content(args, kwargs, output)
            if content is None:
                switch.note("no_tensor", f"`{self.path}` was called without a tensor that could be recorded.")
            elif _is_real(content):
                switch.events.append((self, content, False))
            else:
                switch.note(
                    "transformed",
                    f"`{self.path or type(module).__name__}` ran inside vmap, functional gradients or an export.",
                )
        except Exception as error:  # an observer never ends what it observes
            switch.note("hook_failed", f"`{self.path}` could not be recorded ({type(error).__name__}: {error}).")

    def _counts(self, module: nn.Module) -> bool:
        """Training steps count modules in training mode with gradients enabled, seen from outside of checkpointing."""
        if self.always or not self.switch.training:
            return True
        if not module.training:
            self.switch.note(
                "eval_mode", f"`{self.path}` ran in eval mode during training: such calls are not measured."
            )
            return False
        if not torch.is_grad_enabled() and not in_function_forward():
            self.switch.note(
                "no_grad", f"`{self.path}` ran without gradients in training: such calls are not measured."
            )
            return False
        return True

    def content(self, args: Any, kwargs: Any, output: Any) -> Any:
        """What is kept of a call: no copy, but for outputs that a nonlinearity may overwrite."""
        kind = self.kind
        if kind == "open":
            named = {name: _argument(value) for name, value in kwargs.items()}
            positional = tuple(_argument(value) for value in args)
            return positional, named, self._is_handling(), self._goes_round(args, kwargs)
        if kind == "close":
            if not torch.compiler.is_compiling():
                self.switch.outputs.leave(self.path, _tensor_of(output))
            return (sys.exc_info()[1] is not None,)
        if kind == "ids":
            ids, looked_up = _first_tensor(args, kwargs), _tensor_of(output)
            return None if ids is None or looked_up is None else (ids.detach(), looked_up.detach())
        tensor = _tensor_of(output) if kind == "output" else _first_tensor(args, kwargs)
        if tensor is None:
            return None
        if kind == "block":
            return tensor.detach(), torch.compiler.is_compiling() or self._may_go_on(tensor)
        if kind in ("rows", "output"):
            if kind == "rows" and not torch.compiler.is_compiling():
                self.switch.outputs.leave_rows(self.target.stack, tensor)
            return self.switch.rows(tensor.detach(), copy=kind == "output")
        return (tensor.detach(),)

    def _is_handling(self) -> bool:
        """Whether the caller is handling an exception: one that passes through later is then another one."""
        return not torch.compiler.is_compiling() and sys.exc_info()[1] is not None

    def _may_go_on(self, entering: Tensor) -> bool:
        """Whether a block may enter what the blocks of its stack have returned."""
        return self.switch.outputs.may_lead_to(self.target[0].name, entering)

    def _goes_round(self, args: Any, kwargs: Any) -> bool | None:
        """Whether what the module returned last goes into it; ``None`` where that cannot be seen."""
        if torch.compiler.is_compiling():
            return None
        return self.switch.outputs.lead_to(self.path, _first_tensor(args, kwargs))


def kept_rows(lead: tuple[int, ...], fraction: float, jitter: Tensor) -> Tensor:
    """Flat indices of the rows kept: one drawn in each of m equal parts of every leading index."""
    num_leading = lead[0] if len(lead) > 1 else 1
    num_inner = math.prod(lead[1:]) if len(lead) > 1 else (lead[0] if lead else 1)
    kept = max(round(fraction * num_inner), 1)
    index = torch.arange(num_leading * kept, device=jitter.device)
    part = index % kept + jitter[index % _NUM_JITTERS]
    position = (part * (num_inner / kept)).long().clamp(max=num_inner - 1)
    return index // kept * num_inner + position


def _first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    for value in args:
        if isinstance(value, Tensor):
            return value
    for name in kwargs:
        if isinstance(kwargs[name], Tensor):
            found: Tensor = kwargs[name]
            return found
    return None


def _tensor_of(output: Any) -> Tensor | None:
    """A module's output, or the first tensor of a tuple: layers may return ``(output, bias)``."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return _first_tensor(output, {})
    return None


def _argument(value: Any) -> Tensor | None:
    """An argument as it is: ids, masks and positions. Without an operation, which would be a graph of its own."""
    return value if isinstance(value, Tensor) and not value.is_floating_point() else None


def _is_real(content: Any) -> bool:
    """Whether tensors hold numbers: not batched by vmap, not fake as during an export, not nested."""
    if isinstance(content, Tensor):
        fake = type(content).__name__ in ("FakeTensor", "FunctionalTensor") or content.is_meta or content.is_nested
        return not fake and not torch._C._functorch.is_functorch_wrapped_tensor(content)
    if isinstance(content, dict):
        return all(_is_real(value) for value in content.values())
    return all(_is_real(value) for value in content) if isinstance(content, (tuple, list)) else True
