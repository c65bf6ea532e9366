"""Reading what ``torch.save`` wrote, in one way: nothing in a file is ever executed."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, said in one sentence: the file, what is wrong with it, the remedy."""


def read_checkpoint(path: str | Path, *, device: str = "cpu") -> Any:
    """The content of a checkpoint file: tensors and plain values (``weights_only``), memory-mapped where that works.

    Args:
        path: The file.
        device: Where the tensors go; ``meta`` reads the structure and no numbers.

    Raises:
        FileNotFoundError: If it is not there.
        CheckpointError: If it is incomplete, corrupted, or holds objects whose reading would execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at `{path}`.")
    try:
        # the zip format of torch >= 1.6 can be mapped into memory, older files cannot
        return torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # any of zip's, pickle's and torch's: the file may be anybody's
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise CheckpointError(
                f"`{path}` holds objects of `{foreign[1]}`, and reading them could execute code: save tensors and "
                "plain values only, e.g. `torch.save(model.state_dict(), FILE)`."
            ) from error
        raise CheckpointError(
            f"`{path}` cannot be read, it is incomplete or corrupted, or no file of `torch.save`."
        ) from error


def check_entry(content: bytes) -> None:
    """Whether what ``torch.save`` made of one value can be read without executing anything.

    Raises:
        Exception: Any of zip's, pickle's and torch's, if it cannot.
    """
    torch.load(io.BytesIO(content), weights_only=True)
