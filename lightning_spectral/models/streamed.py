"""A model larger than memory: the weights of a block are read when the block runs, and forgotten after it.

Between forward passes each of its parameters is one number, expanded to the right shape on the right device: whoever
asks for shape, dtype or device is answered, and nothing is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[str], Tensor]


class SafetensorsFiles:
    """The tensors of a folder of safetensors files, mapped into memory and read one by one.

    Args:
        folder: Holds ``*.safetensors``.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        self._home: Mapping[str, Any] = {name: file for file in files for name in _names(file)}

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return set(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        return tuple(self._home[name].get_slice(name).get_shape())

    def __call__(self, name: str) -> Tensor:
        """One tensor, in its own dtype."""
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor


def _names(file: Any) -> list[str]:
    return list(file.keys())


def stream(model: nn.Module, blocks: Iterable[nn.Module], read: Read, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model without weights (on the meta device) its weights: those of blocks while they run, others now.

    Args:
        model: In eval mode; its buffers have their values.
        blocks: Modules that hold most of the weights and run one after another.
        read: Full name of a parameter -> its values, any dtype and device.
        dtype: In which the model computes.
        device: Where.
    """
    names = {id(p): name for name, p in model.named_parameters()}  # of a parameter with two names the first
    _replace(model, lambda p: nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(p.shape), False), names)
    streamed: set[int] = set()
    for block in blocks:
        own = {names[id(p)]: p for p in block.parameters() if id(p) not in streamed}
        streamed |= {id(p) for p in own.values()}
        _read_while_running(block, own, read)
    for p in model.parameters():
        if id(p) not in streamed:
            p.data = read(names[id(p)]).to(p.device, p.dtype)
    for module in model.modules():
        module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})


def _replace(model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter], names: dict[int, str]) -> None:
    """Put other parameters in the places of a model's, one that is in two places once; ``names`` learns of them."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                new = made.setdefault(id(p), make(p))
                names[id(new)] = names[id(p)]
                module._parameters[leaf] = new


def _read_while_running(block: nn.Module, own: dict[str, nn.Parameter], read: Read) -> None:
    nothing = {name: p.data for name, p in own.items()}

    def before(*_: Any) -> None:
        for name, p in own.items():
            p.data = read(name).to(p.device, p.dtype)

    def after(*_: Any) -> None:
        for name, p in own.items():
            p.data = nothing[name]

    block.register_forward_pre_hook(before, prepend=True)
    block.register_forward_hook(after, always_call=True)
