"""Names without what wrappers (DDP, FSDP, torch.compile, checkpointing) put into them, and those of arguments."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

# the child under which Fabric, torch.compile, FSDP1 and activation checkpointing keep the module that they wrap
WRAPPERS = (
    "_forward_module",
    "_original_module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
_WRAPPERS = re.compile(rf"(?:{'|'.join(WRAPPERS)})(?:\.|$)")
_DDP_ROOT = re.compile(r"^module(?:\.|$)")


def clean_name(name: str) -> str:
    """A module's name without the wrappers of DDP, FSDP, compile and checkpointing."""
    if "_mod" not in name and "module" not in name:  # none of them: most names of a large model
        return name
    return _DDP_ROOT.sub("", _WRAPPERS.sub("", name)).rstrip(".")


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Each name and its :func:`clean_name`; a name that two would share stays as it is, so that none is lost."""
    cleaned = {name: clean_name(name) for name in names}
    shared = {name for name, times in Counter(cleaned.values()).items() if times > 1}
    return {raw: raw if name in shared else name for raw, name in cleaned.items()}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of Fabric, compile, FSDP1 and checkpointing; itself if there is none."""
    children = module._modules  # of a TorchScript module no dict
    inner = next((children[name] for name in WRAPPERS if name in children and children[name] is not None), None)
    return module if inner is None else unwrapped(inner)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Of a module's forward, in order; none where it does not tell."""
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return ()
