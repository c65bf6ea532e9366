"""litgpt's model without the rest of litgpt, for verbs that only look at one: the rest takes seconds to import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# what `litgpt.model` takes from the rest: how to read checkpoints of another order of q, k and v
_UNUSED = {"litgpt.scripts.convert_hf_checkpoint": "qkv_reassemble"}


@contextmanager
def litgpt_alone() -> Iterator[None]:
    """``litgpt.config`` and ``litgpt.model`` can be imported inside, quickly; nothing else of it.

    Where litgpt is imported already, nothing is different. Behind the block everything that was imported in it is
    forgotten, so that a later import gives the whole.
    """
    package = None if "litgpt" in sys.modules else find_spec("litgpt")
    if package is None or package.origin is None:
        yield
        return
    before = set(sys.modules)
    bare = ModuleType("litgpt")
    bare.__path__ = [str(Path(package.origin).parent)]
    sys.modules["litgpt"] = bare
    for name, attribute in _UNUSED.items():
        sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], attribute, None)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "litgpt" or name == "lightning_spectral.gpt.architecture":
                del sys.modules[name]
