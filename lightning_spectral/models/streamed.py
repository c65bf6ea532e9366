"""A model larger than memory: the weights of a block are read when the block runs, and forgotten after it.

Between forward passes each of its parameters is one number, expanded to the right shape on the right device: whoever
asks for shape, dtype or device is answered, and nothing is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.text import is_name, one_line, parse_json

Read = Callable[[str], Tensor]


class SafetensorsFiles:
    """The tensors of a Hugging Face folder, mapped into memory and read one by one.

    Args:
        folder: Holds ``model.safetensors``, or the files that ``model.safetensors.index.json`` names, or other
            ``*.safetensors``; what lies beside the first two is not of the model.

    Raises:
        FileNotFoundError: If a file that the index names is not there.
        ValueError: If the index is none, or a tensor is in two files.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._home: dict[str, Any] = {}
        home: dict[str, Path] = {}
        for file in files_of(folder):
            opened = safe_open(file, framework="pt")
            for name in _names(opened):
                if name in home:
                    raise ValueError(f"`{name}` is in `{home[name].name}` and in `{file.name}`: remove one of them")
                home[name], self._home[name] = file, opened

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return set(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        return tuple(self._home[name].get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Of one tensor's numbers, as safetensors spells it: ``BF16``, ``I8``."""
        return str(self._home[name].get_slice(name).get_dtype())

    def __call__(self, name: str) -> Tensor:
        """One tensor, in its own dtype."""
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor


def files_of(folder: Path) -> list[Path]:
    """Files that hold a model's weights, chosen as ``transformers`` does.

    Raises:
        FileNotFoundError: If a file that the index names is not there.
        ValueError: If the index is none.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or single.is_symlink():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(parse_json(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`{index.name}` is no index of weights: {one_line(error)}") from error
    missing = sorted(name for name in names if not is_name(name) or not (folder / name).is_file())
    if missing:
        raise FileNotFoundError(f"`{missing[0]}` is not there, and `{index.name}` names it")
    return sorted(folder / name for name in names)


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
