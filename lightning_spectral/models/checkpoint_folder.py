"""Sharded checkpoints of ``torch.distributed.checkpoint``, looked at before anything of them is loaded.

torch unpickles ``.metadata``, and every entry that is no tensor, without a check: a foreign folder could run code. Here
they are read first, with what such files need and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from typing_extensions import override

from lightning_spectral.models.checkpoint_file import CheckpointError, check_entry
from lightning_spectral.text import one_line

METADATA = ".metadata"
_OTHERS = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): getattr(torch.serialization, "_get_layout", None),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("pathlib", "PosixPath"): PosixPath,
}


def check_checkpoint_folder(folder: Path) -> None:
    """Whether reading a sharded checkpoint executes nothing; its tensors are not read.

    Raises:
        FileNotFoundError: If it has no ``.metadata``, which is written last.
        CheckpointError: If it is incomplete or corrupted, or holds objects whose reading would execute code.
    """
    if not (folder / METADATA).is_file():
        raise FileNotFoundError(f"`{folder}` has no `{METADATA}`: it is incomplete, or no sharded checkpoint.")
    try:
        with (folder / METADATA).open("rb") as file:
            content = _Unpickler(file).load()
        for index, place in content.storage_data.items():
            kind = content.state_dict_metadata[index.fqn]
            part = folder / str(place.relative_path)
            if part.parent != folder or getattr(place, "transform_descriptors", None):
                raise pickle.UnpicklingError(f"an entry lies in `{place.relative_path}`")
            if isinstance(kind, metadata.BytesStorageMetadata):
                with part.open("rb") as file:
                    file.seek(place.offset)
                    check_entry(file.read(place.length))
            elif part.stat().st_size < place.offset + place.length:
                raise EOFError(f"`{part.name}` is cut")
    except Exception as error:  # any of pickle's and torch's: the folder may be anybody's
        raise CheckpointError(
            f"`{folder}` cannot be read, it is incomplete, corrupted, or holds what could execute code: "
            f"{one_line(error)[:200]}."
        ) from error


class _Unpickler(pickle.Unpickler):
    """Knows the plain classes of the metadata, and types of tensors."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        own = getattr(metadata, name, None) if module == metadata.__name__ else None
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(own, type) and own.__module__ == metadata.__name__:
            return own
        if isinstance(dtype, torch.dtype):
            return dtype
        known = _OTHERS.get((module, name))
        if known is None:
            raise pickle.UnpicklingError(f"it names `{module}.{name}`")
        return known
