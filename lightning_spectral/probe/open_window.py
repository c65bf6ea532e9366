"""What a window has seen and added up so far, and what the ranks tell each other of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_spectral.functional.covariance import Moments
from lightning_spectral.functional.sample import Gram
from lightning_spectral.probe.losses import BucketLosses
from lightning_spectral.probe.row_sample import RowSample
from lightning_spectral.probe.texts import Texts


@dataclass
class StackSeen:
    """What a window has seen of one stack.

    Attributes:
        num_calls: Forward calls.
        texts: What the window has seen of sequences, to know them again.
        sequences_K: Sequences with rows in each bucket, and in any.
        layout: How rows were matched to tokens in the first call.
        agreement: Smallest share of rows that the match was proven for.
        ids: Of the first call that has some.
    """

    num_calls: int = 0
    texts: Texts = field(default_factory=Texts)
    sequences_K: Tensor | None = None
    layout: str = ""
    agreement: float | None = None
    ids: Tensor | None = None


@dataclass
class OpenWindow:
    """What a window has accumulated so far; all keys but those of ``stacks`` are ``Site.key``.

    Attributes:
        sample: Rows that are kept instead of ``states``, where not all can be added up.
        turn: Which layers are measured, where they take turns.
        unmatched: Why rows of a site could not be matched to tokens. All of them are in the first bucket: pooled
            numbers are right, those of the buckets are ``not_matched``.
        unseen: Why the rows of a site that ran could not be seen.
    """

    states: dict[str, Moments | Gram] = field(default_factory=dict)
    sample: RowSample | None = None
    dtypes: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, list[Tensor]] = field(default_factory=dict)
    groups: dict[str, list[Tensor]] = field(default_factory=dict)
    stacks: dict[str, StackSeen] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)
    losses: BucketLosses | None = None
    num_waiting: int = 0
    turn: int = 0
    busy_s: float = 0.0


def sequence_counts(
    window: OpenWindow, stacks: Collection[str], reported: Sequence[str], device: torch.device
) -> Tensor:
    """Sequences in each reported bucket and forward calls of each stack on this rank, to be added over ranks."""
    counts_SK = torch.zeros(len(stacks), len(reported) + 1, dtype=torch.int64, device=device)
    for counts_K, name in zip(counts_SK, sorted(stacks), strict=True):
        seen = window.stacks.get(name)
        if seen is not None and seen.sequences_K is not None:
            counts_K[:-1] = seen.sequences_K[: len(reported)]
            counts_K[-1] = seen.num_calls
    return counts_SK


def by_stack(
    counts_SK: Tensor, stacks: Collection[str], reported: Sequence[str]
) -> tuple[dict[str, dict[str, int]], int]:
    """Of :func:`sequence_counts`: sequences of each bucket of the stacks that ran, and forward calls of all."""
    rows = zip(sorted(stacks), counts_SK.tolist(), strict=True)
    ran = {name: dict(zip(reported, counts[:-1], strict=True)) for name, counts in rows if counts[-1]}
    return ran, int(counts_SK[:, -1].sum())


@dataclass(frozen=True)
class Seen:
    """What one rank saw in a window.

    Attributes:
        num_passes: Forward calls.
        widths: Features of each site that had a row, by site key.
        unmatched: Why rows could not be matched to tokens, by site key; sites whose rows all were are absent.
        deeper: Name, site, depth and run of sites that only running has shown (shared and looped layers), by key.
        reason: Why nothing was seen, where there is a reason to tell.
        doubles: Keys of the sites whose rows are summed in fp64.
    """

    num_passes: int = 0
    widths: dict[str, int] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    deeper: dict[str, tuple[str, str, int, int]] = field(default_factory=dict)
    reason: str = ""
    doubles: list[str] = field(default_factory=list)


def merge(parts: Sequence[Seen]) -> Seen:
    """What all ranks together saw; equal on all of them."""
    unmatched: dict[str, str] = {}
    for part in parts:
        unmatched = part.unmatched | unmatched  # the first rank's reason
    widths = {key: width for part in parts for key, width in part.widths.items()}
    deeper = {key: place for part in parts for key, place in part.deeper.items()}
    reason = next((part.reason for part in parts if part.reason), "")
    doubles = sorted({key for part in parts for key in part.doubles})
    return Seen(sum(part.num_passes for part in parts), widths, unmatched, deeper, reason, doubles)
