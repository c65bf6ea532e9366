"""Saved eigenvalues of a run folder: which files there are, and the spectrum of one layer in one of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_spectral.records import EIGENVALUES_FOLDER, STACKS_KEY, find_eigenvalues


def spectrum_files(folder: Path, stage: str) -> dict[int, Path]:
    """Step -> file, in the order of the steps; files of earlier versions are named by the step alone."""
    names = re.compile(rf"(?:{re.escape(stage)}_)?(\d+)")
    files = (folder / EIGENVALUES_FOLDER).glob("*.safetensors")
    return dict(sorted((int(found[1]), file) for file in files if (found := names.fullmatch(file.stem))))


def read_spectrum(file: Path, layer: str, site: str, bucket: str, *, stack: str = "") -> NDArray[np.float64] | None:
    """Eigenvalues of one layer, shape (D,), descending, >= 0.

    Args:
        file: One of :func:`spectrum_files`.
        layer: Name of the layer, e.g. ``layer_03`` or ``layer_03.expert_01``.
        site: ``pre`` or ``post``.
        bucket: Token bucket.
        stack: Stack of blocks that the layer is in; by default the first one of the file.

    Returns:
        ``None`` if the file has no such spectrum or is incomplete, or if the spectrum is not finite or all zero.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            stacks = (tensors.metadata() or {}).get(STACKS_KEY)
            key = find_eigenvalues(tensors.keys(), layer, site, bucket, stack=stack, stacks=stacks)
            if key is None:
                return None
            eigs_D = np.asarray(tensors.get_tensor(key), dtype=np.float64)
    except (SafetensorError, OSError):
        return None
    return np.maximum(eigs_D, 0.0) if np.isfinite(eigs_D).all() and eigs_D.sum() > 0 else None
