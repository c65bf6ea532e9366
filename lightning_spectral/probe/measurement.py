"""What a user wants measured, as one thing: settings of the rows, and of the buckets if tokens are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from lightning_spectral.models.families import as_hints
from lightning_spectral.probe.grouping import Grouping, load_counts, pooled_only
from lightning_spectral.probe.options import PAPER_EPSILON, ProbeOptions, conventions_of
from lightning_spectral.probe.settings import BucketSettings, ProbeSettings
from lightning_spectral.records import POOLED


@dataclass(frozen=True)
class Measurement:
    """What is measured and how, checked.

    Attributes:
        settings: When, where, how.
        buckets: Which groups of tokens are measured apart; ``None`` for all tokens together.
        facts: Further choices that change a number, for the records' conventions.
    """

    settings: ProbeSettings
    buckets: BucketSettings | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.options  # an argument out of range is an error now
        if self.buckets is not None and self.buckets.needs_counts:
            counts = self.buckets.counts
            if counts is not None and not self.buckets.is_stream:  # a wrong path fails before any training
                object.__setattr__(self, "buckets", replace(self.buckets, counts=load_counts(counts)))

    @cached_property
    def options(self) -> ProbeOptions:
        """Options of the probe."""
        s = self.settings
        return ProbeOptions(
            sites=(s.sites,) if isinstance(s.sites, str) else tuple(s.sites),
            modules=None if s.modules is None else tuple(s.modules),
            embedding=s.embedding,
            hints=as_hints(s.hints),
            token_fraction=s.token_fraction,
            num_jackknife_groups=s.num_jackknife_groups,
            renyi_orders=tuple(s.renyi_orders),
            absolute_epsilon=PAPER_EPSILON if s.convention == "paper" else 0.0,
            with_losses=self.buckets is not None and self.buckets.losses,
            reduce=self.buckets is None or s.convention != "paper",
            soft=s.soft,
            eigenvalues=s.eigenvalues,
        )

    @cached_property
    def conventions(self) -> dict[str, str]:
        """The choices that change a number, for the records."""
        if self.buckets is None:
            return conventions_of(self.options, **self.facts)
        b = self.buckets
        return conventions_of(
            self.options,
            group_by=b.group_by,
            attribute_to=b.attribute_to,
            shares=f"{b.head_share:g}/{b.mid_share:g}",
            **self.facts,
        )

    @property
    def bucket_names(self) -> tuple[str, ...]:
        """Buckets of the records, the merge of all rows included."""
        return (POOLED,) if self.buckets is None else (*self.buckets.names, POOLED)

    def grouping(self, fallback_counts: Any = None) -> Grouping:
        """Which bucket a row belongs to.

        Args:
            fallback_counts: Counts to use where none were given, e.g. a datamodule's.

        Raises:
            ValueError: Without counts, or with something that is none.
        """
        if self.buckets is None:
            return pooled_only()
        counts = fallback_counts if self.buckets.counts is None else self.buckets.counts
        if counts is None and self.buckets.needs_counts:
            raise ValueError(
                "no token counts: pass `counts='counts.npy'` (make it with `lightning-spectral count-tokens --data "
                "TEXT --out counts.npy`), an array with one count per id, `counts='stream'` to count the training "
                "data, or give your datamodule a `token_counts` attribute."
            )
        return self.buckets.grouping(counts)

    def covers(self, other: Measurement) -> bool:
        """Whether every record of ``other``, which measures all tokens together, is one of this one's and no poorer."""
        ours, theirs = self.settings, other.settings
        return (
            self.buckets is not None
            and other.buckets is None
            and self.buckets.attribute_to == "input"
            and _measures_as_much(self.options, other.options)
            and theirs.every_n_steps % ours.every_n_steps == 0
            and set(theirs.on) <= set(ours.on)
            and ours.eigenvalues >= theirs.eigenvalues
            and ours.dirpath == theirs.dirpath
        )

    @property
    def identity(self) -> dict[str, str]:
        """What tells two measurements of one training apart, and stays the same when it is resumed."""
        left_out = {"background", "log_layers", "memory_limit_mib", "on_nonfinite", "labels", "run_id", "strict"}
        content = {f.name: getattr(self.settings, f.name) for f in fields(self.settings) if f.name not in left_out}
        if self.buckets is not None:
            content |= asdict(replace(self.buckets, counts=None)) | {"counts": self.buckets.counts}
        return {name: _spelled(value) for name, value in content.items() if value is not None}


def _measures_as_much(ours: ProbeOptions, theirs: ProbeOptions) -> bool:
    """Whether nothing that ``theirs`` reports of all tokens is missing from ``ours``, or another number there."""
    as_wide = (
        set(theirs.sites) <= set(ours.sites)
        and set(theirs.renyi_orders) <= set(ours.renyi_orders)
        and theirs.num_jackknife_groups <= ours.num_jackknife_groups  # more groups say the same, and better
    )
    may_differ = ("sites", "renyi_orders", "num_jackknife_groups", "with_losses", "eigenvalues")
    given = {name: getattr(ours, name) for name in may_differ}
    return as_wide and ours == replace(theirs, **given)


def _spelled(value: Any) -> str:
    if isinstance(value, Tensor):
        return hashlib.sha256(value.cpu().contiguous().numpy().tobytes()).hexdigest()[:12]
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return str(list(value)) if isinstance(value, (list, tuple)) else str(value)
