"""Do two versions of this package give the same numbers? Run one recipe with each, then compare the run folders.

::

    git worktree add /tmp/before HEAD~1
    cd /tmp/before && lightning-spectral pretrain --config quickstart --out_dir /tmp/old
    cd -           && lightning-spectral pretrain --config quickstart --out_dir /tmp/new
    python tools/same_numbers.py /tmp/old /tmp/new

Compared: every record but its run id and times (an older schema is read as today's), the final weights bit by bit, and,
with ``--tags``, the TensorBoard tags. Exit code 1 and one line per difference if anything moved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_spectral.records import LOSSES_FILE, SPECTRAL_FILE, read_losses, read_spectral

_NOT_COMPARED = ("run_id", "window_s", "schema_version")
_NEW_IN_2 = ("stack", "reason", "layout", "layout_agreement")  # a run of schema 1 does not say
_SHOWN = 5


def main() -> int:
    """Print the differences; 0 if there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tags", action="store_true", help="compare TensorBoard tags too")
    arguments = parser.parse_args()
    found = [*differences(arguments.old, arguments.new)]
    if arguments.tags:
        found += different_tags(arguments.old, arguments.new)
    print("\n".join([*found[:_SHOWN], f"{len(found)} differences"]) if found else "the same numbers")
    return 1 if found else 0


def differences(old: Path, new: Path) -> Iterator[str]:
    """One line per record or weight that is not the same."""
    for name, read in ((SPECTRAL_FILE, read_spectral), (LOSSES_FILE, read_losses)):
        before, after = (_by_place(read(folder).records) for folder in (old, new))
        for place in sorted(before.keys() ^ after.keys(), key=str):
            yield f"{name}: {place} is in one run only"
        for place in sorted(before.keys() & after.keys(), key=str):
            for field, value in before[place].items():
                if value != after[place][field]:
                    yield f"{name}: {place}: {field} {value} -> {after[place][field]}"
    yield from _different_weights(old / "final" / "lit_model.pth", new / "final" / "lit_model.pth")


def _by_place(records: Any) -> dict[tuple[Any, ...], dict[str, Any]]:
    fields = [asdict(record) for record in records]
    for content in fields:
        for name in (*_NOT_COMPARED, *_NEW_IN_2):
            content.pop(name, None)
    names = ("stage", "step", "layer", "expert", "site", "bucket", "loader", "ordinal")
    return {tuple(content.get(name) for name in names): content for content in fields}


def _different_weights(old: Path, new: Path) -> Iterator[str]:
    if not (old.exists() and new.exists()):
        yield f"no final weights to compare in {old.parent} and {new.parent}"
        return
    before, after = (torch.load(path, map_location="cpu", weights_only=True) for path in (old, new))
    before, after = before.get("model", before), after.get("model", after)
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or not torch.equal(before[name], after[name]):
            yield f"weights: {name} differs"


def different_tags(old: Path, new: Path) -> list[str]:
    """Scalar tags that only one of the runs logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = []
    for folder in (old, new):
        found: set[str] = set()
        for file in folder.rglob("events.out.tfevents.*"):
            found |= set(EventAccumulator(str(file.parent)).Reload().Tags()["scalars"])
        tags.append(found)
    return [f"tag {tag} is in one run only" for tag in sorted(tags[0] ^ tags[1])]


if __name__ == "__main__":
    sys.exit(main())
