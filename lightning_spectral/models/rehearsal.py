"""Which row will be which token, found before any training: a forward pass through all but the blocks.

What lies outside the blocks (embeddings, positions, norms, projections between towers) decides the layout and is small.
It is given numbers; a block on the meta device computes shapes, and its output is drawn at random. So the layout of a
model of any size is proven in the way in which a window proves it, in the time of a few small tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_spectral.models.calls import ForwardCall
from lightning_spectral.models.recorder import Recorder
from lightning_spectral.models.sites import Found, Stack
from lightning_spectral.models.stacks import is_embedding
from lightning_spectral.models.walk import modules_of

_BATCH, _LENGTH, _NUM_IDS = 3, 17, 48
_LARGE = 1 << 22  # numbers of a parameter outside the blocks above which it stays without memory (a head)


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal showed of one stack.

    Attributes:
        layout: As in :class:`ForwardCall`; empty where it could not be proven.
        agreement: Share of the rows that the proof holds for.
        reason: Why there is no layout.
    """

    layout: str = ""
    agreement: float | None = None
    reason: str = ""


class _Enough(BaseException):
    """Every stack was entered; not an ``Exception``, so that the model's own handlers let it pass."""


def rehearse(model: nn.Module, found: Found) -> dict[str, Rehearsed]:
    """The layout of each stack, by its name.

    Args:
        model: Built for this purpose: what it has on the meta device outside its blocks is replaced by numbers.
        found: What :func:`~lightning_spectral.models.stacks.find_stacks` found in it.
    """
    names = [stack.name for stack in found.stacks]
    if found.embedding is None:
        return {name: Rehearsed(reason="the model embeds no token ids") for name in names}
    seen: dict[str, Rehearsed] = {}
    wanted = set(names)
    blocks_only = replace(found, stacks=tuple(replace(stack, sites=()) for stack in found.stacks))
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        recorder = Recorder(model, blocks_only)

        def entered(*_: Any) -> None:
            for call in recorder.peek():
                _keep(seen, call)
            if set(seen) == wanted:
                raise _Enough

        first = [stack.blocks[0][1] for stack in found.stacks]
        handles = [block.register_forward_pre_hook(entered) for block in first]  # before anything of a block runs
        handles += _prepare(model, found)
        reason = _run(model, found.stacks, recorder)
        for handle in handles:
            handle.remove()
        recorder.remove()
    return {name: seen.get(name, Rehearsed(reason=reason)) for name in names}


def _keep(seen: dict[str, Rehearsed], call: ForwardCall) -> None:
    known = seen.get(call.stack)
    if known is None or (call.layout and not known.layout):
        seen[call.stack] = Rehearsed(call.layout, call.agreement, call.reason)


def _run(model: nn.Module, stacks: Sequence[Stack], recorder: Recorder) -> str:
    """Call the model; why not every stack was entered."""
    recorder.start(training=False)
    try:
        for entrance in _entrances(model, stacks):
            arguments, named = _arguments(entrance.forward)
            entrance(*arguments, **named)
    except _Enough:
        return ""
    except Exception as error:
        return f"a forward pass with token ids alone ended in {type(error).__name__}: {error}".splitlines()[0]
    return "a forward pass with token ids alone does not enter it"


def _entrances(model: nn.Module, stacks: Sequence[Stack]) -> Iterator[nn.Module]:
    """The model, or where it has no forward of its own (a LightningModule's default) its children that have stacks."""
    own = type(model).forward
    if own is not nn.Module.forward and "LightningModule.forward" not in own.__qualname__:
        yield model
        return
    blocks = {id(block) for stack in stacks for _, block in stack.blocks}
    for child in model.children():
        if any(id(inner) in blocks for inner in modules_of(child)):
            yield from _entrances(child, stacks)


def _arguments(forward: Callable[..., Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Token ids for every argument that takes them."""
    parameters = inspect.signature(forward).parameters
    named: dict[str, Any] = {}
    for name in ("input_ids", "decoder_input_ids"):
        if name in parameters:
            named[name] = torch.randint(1, _NUM_IDS, (_BATCH, _LENGTH))
    if "use_cache" in parameters:
        named["use_cache"] = False
    if "input_ids" in named:
        return [], named
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters.values() if p.kind in kinds]
    required = [p for p in positional if p.default is inspect.Parameter.empty] or positional[:1]
    return [torch.randint(1, _NUM_IDS, (_BATCH, _LENGTH)) for _ in required], named


# numbers outside the blocks, shapes inside


def _prepare(model: nn.Module, found: Found) -> Iterator[RemovableHandle]:
    inside = [module for stack in found.stacks for _, block in stack.blocks for module in _islands(block)]
    for module in modules_of(model, without=inside):
        if is_embedding(module) and _is_meta(module):
            module.forward = _Lookup(module)  # type: ignore[method-assign]
        elif any(p.is_meta and p.numel() > _LARGE for p in module._parameters.values() if p is not None):
            inside.append(module)
        else:
            _give_numbers(module)
    for island in inside:
        if _is_meta(island):
            island.to("meta")  # with what small numbers of its own it has
            yield island.register_forward_pre_hook(_to_meta, with_kwargs=True)
            yield island.register_forward_hook(_to_numbers)


def _islands(block: nn.Module) -> list[nn.Module]:
    """Modules that are called: a container is not, its members are."""
    if not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
        return [block]
    return [module for child in block.children() for module in _islands(child)]


def _is_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


class _Lookup:
    """A table of a few random rows in place of a whole one."""

    def __init__(self, table: nn.Module) -> None:
        self._rows = torch.randn(256, int(table.embedding_dim))  # type: ignore[arg-type]

    def __call__(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return self._rows[ids % len(self._rows)]


def _give_numbers(module: nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            module._parameters[name] = nn.Parameter(_numbers(parameter, name), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = _numbers(buffer, name)


def _numbers(like: Tensor, name: str) -> Tensor:
    """Norms that change nothing, small matrices, positions that count up."""
    if not like.is_floating_point() and not like.is_complex():
        count = torch.arange(like.shape[-1] if like.ndim else 1).expand(like.shape or (1,))
        return count.reshape(like.shape).to(like.dtype)
    if like.ndim < 2:
        return (torch.zeros if "bias" in name else torch.ones)(like.shape, dtype=torch.float32)
    return 0.02 * torch.randn(like.shape)


def _to_meta(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _mapped(args, lambda t: t.to("meta")), _mapped(kwargs, lambda t: t.to("meta"))


def _to_numbers(module: nn.Module, args: Any, output: Any) -> Any:
    return _mapped(output, _drawn)


def _drawn(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, dtype=tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = {key: _mapped(inner, change) for key, inner in value.items()}
        with suppress(Exception):  # a subclass with a constructor of its own (outputs of Hugging Face)
            return type(value)(**changed)
        return changed
    if isinstance(value, (tuple, list)):
        parts = [_mapped(inner, change) for inner in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
