"""Names of the spectra in an eigenvalue file: ``encoder.layers/layer_00.post.tail``, a stack and a place in it.

Files of earlier versions have names without a stack: ``layer_00.post.tail``.
"""

from __future__ import annotations

from collections.abc import Collection

STACKS_KEY = "stacks"  # metadata of a file: its stacks in the model's order, one a line


def eigenvalues_key(place: str, site: str, bucket: str, *, stack: str = "", module: str = "") -> str:
    """Name of one spectrum.

    Args:
        place: ``layer_00`` or ``layer_00.expert_01``.
        site: ``post`` or ``pre``.
        bucket: ``tail``, ..., ``pooled``.
        stack: Path of the list of blocks.
        module: Path of the network, for a block's second one.
    """
    name = f"{place}.{site}.{bucket}"
    return "/".join(part for part in (stack, name, module) if part)


def find_eigenvalues(
    keys: Collection[str], place: str, site: str, bucket: str, *, stack: str = "", stacks: str | None = None
) -> str | None:
    """The name under which a file has a spectrum, or ``None``.

    Args:
        keys: Names in the file.
        place: As in :func:`eigenvalues_key`.
        site: Likewise.
        bucket: Likewise.
        stack: Path of the list of blocks; empty for the model's first.
        stacks: Metadata :data:`STACKS_KEY` of the file, if it has any.
    """
    first = (stacks or "").split("\n")[0]
    tried = [eigenvalues_key(place, site, bucket, stack=stack or first), eigenvalues_key(place, site, bucket)]
    return next((key for key in tried if key in keys), None)
