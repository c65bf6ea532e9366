"""What a user asks for: the arguments of every callback and loop, written, documented and checked here alone.

:class:`ProbeSettings` is shared by all that measures activations, :class:`BucketSettings` belongs to what measures
frequent and rare tokens apart. A class with arguments of its own takes the shared ones as
``**shared: Unpack[SharedArguments]``, which type checkers and editors read, and LightningCLI follows to the defaults
and documentation below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

import torch
from torch import Tensor

from lightning_spectral.functional.rank import DEFAULT_RENYI_ORDERS
from lightning_spectral.models.families import Hint, as_hints
from lightning_spectral.probe.grouping import Grouping, by_frequency, by_position, load_counts
from lightning_spectral.records import STAGES
from lightning_spectral.text import did_you_mean
from lightning_spectral.text.arguments import (
    refuse_arguments,
    require_choice,
    require_count,
    require_kinds,
    require_run_id,
)

MEASURE: Final = "measure"  # a pass over a finished model; a trainer knows the loops
LOOPS = [stage for stage in STAGES if stage != MEASURE]
STREAM = "stream"


Site = Literal["post", "pre"]
Stage = Literal["train", "validation", "test", "predict", "measure"]  # as records.STAGES
NonfinitePolicy = Literal["warn", "record", "raise"]
Convention = Literal["default", "paper"]


class SharedArguments(TypedDict, total=False):
    """Types of the arguments that :class:`ProbeSettings` documents, for ``**shared``."""

    sites: Sequence[Site]
    modules: list[str] | None
    embedding: str | None
    hints: Sequence[Hint | dict[str, str] | str] | str | None
    on: Sequence[Stage]
    token_fraction: float
    num_jackknife_groups: int
    renyi_orders: Sequence[float]
    soft: Literal["exact", "approx"]
    eigenvalues: bool
    dirpath: str | None
    run_id: str | None
    labels: dict[str, str] | None
    mask_fn: Callable[[Any], Tensor | None] | None
    log_layers: bool
    on_nonfinite: NonfinitePolicy
    memory_limit_mib: float | None
    convention: Convention
    background: bool | None
    seed: int
    strict: bool


if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:
    Unpack = {SharedArguments: Any}  # jsonargparse takes every key of an unpacked TypedDict as required


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Arguments shared by all callbacks and loops that measure activations.

    Args:
        every_n_steps: Optimizer steps between windows; the first and the last step are measured too.
        sites: ``post`` (input of the down projection), ``pre`` (output of the up projection), or both, which adds
            the reinjection ratio and the divergence of the two spectra.
        modules: Globs of the down projections, for a model whose feed-forward networks are not found automatically.
        embedding: Glob of the token embedding, where it is not found automatically.
        hints: Down projections, and perhaps up projections, by glob in blocks of which the structure is not understood:
            ``{down: "*.contract", up: "*.expand"}`` or ``"*.contract,*.expand"``. All other blocks are measured as
            without hints, unlike with ``modules``.
        on: Stages to measure: ``train``, ``validation``, ``test``, ``predict``. An evaluation stage is one window per
            dataloader.
        token_fraction: Share of the positions of every sequence to measure, in (0, 1].
        num_jackknife_groups: Deal sequences to this many groups, for ranks without the bias of few and alike tokens
            (``hard_rank_across_sequences``, ``soft_rank_debiased``) and 95 % intervals over sequences. The interval is
            about what the plain rank would be with other sequences; of two groups it is very wide, 8 are useful. K
            groups take K times the state and K + 1 solves per spectrum; 1 for neither.
        renyi_orders: Orders of the Renyi ranks in the records.
        soft: ``exact``; or ``approx`` for layers at least 1,024 wide: within 0.5 %, several times faster than the
            eigensolve, labelled ``soft_method`` in the records, without what needs the whole spectrum (Renyi ranks).
        eigenvalues: Also save every spectrum (``eigenvalues/*.safetensors``).
        dirpath: Run folder; default ``save_dir/name/version`` of the TensorBoard logger, else of the first one, or the
            trainer's root directory. With it, or a logger's fixed ``version``, a resumed run goes on in its folder.
        run_id: Id of the run; default a timestamp and a random suffix.
        labels: Free labels for analysis, e.g. ``{"optimizer": "muon"}``.
        mask_fn: ``batch -> (B, T)`` mask, False at padding, instead of what the model's arguments and the batch say; of
            a column more than the model's ids the last is cut off. Where no Lightning Trainer runs, it is given the
            keyword arguments of the model's call, or else the tuple of the others.
        log_layers: Also send the numbers of every layer and expert to the loggers, five tags for each bucket; False for
            the medians alone. Records always hold all.
        on_nonfinite: NaN or Inf activations are recorded with a status and ``warn`` once, only ``record``, or
            ``raise``.
        memory_limit_mib: What the state of a window may take on each rank; default a quarter of what is free when
            training starts. Where all rows do not fit, an even sample of them is kept: hard ranks stay unbiased, soft
            ranks are estimated, and records state both errors. With ``eigenvalues``, which needs all rows, states are
            kept on the CPU beside an accelerator, or layers take turns. The line logged at the start says what was
            chosen, and what that costs.
        convention: ``default``, or ``paper`` for comparisons with the paper's numbers: an absolute epsilon in the hard
            rank, and buckets from the tokens of rank 0 only.
        background: Solve windows in a thread during training; default where a core is free, nothing monitors a
            ``spectral`` metric and twice the state fits. Records are the same, medians come a few steps later.
        seed: Of the positions drawn where ``token_fraction < 1``.
        strict: Raise where a window gives no number, instead of recording a status. For tests.

    Raises:
        ValueError: If an argument is out of range.
    """

    every_n_steps: int = 200
    sites: Sequence[Site] = ("post",)
    modules: list[str] | None = None
    embedding: str | None = None
    hints: Sequence[Hint | dict[str, str] | str] | str | None = None
    on: Sequence[Stage] = ("train",)
    token_fraction: float = 1.0
    num_jackknife_groups: int = 2
    renyi_orders: Sequence[float] = DEFAULT_RENYI_ORDERS
    soft: Literal["exact", "approx"] = "exact"
    eigenvalues: bool = False
    dirpath: str | None = None
    run_id: str | None = None
    labels: dict[str, str] | None = None
    mask_fn: Callable[[Any], Tensor | None] | None = None
    log_layers: bool = True
    on_nonfinite: NonfinitePolicy = "warn"
    memory_limit_mib: float | None = None
    convention: Convention = "default"
    background: bool | None = None
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        if self.hints is not None:
            object.__setattr__(self, "hints", as_hints(self.hints))
        if isinstance(self.on, Collection) and (isinstance(self.on, str) or not self.on or {*self.on} - {*STAGES}):
            given = [self.on] if isinstance(self.on, str) else [one for one in self.on if one not in STAGES][:1]
            close = did_you_mean(given[0], LOOPS) if given else "."
            hint = f"; {close}" if close.endswith("?") and close.split("`")[1] != self.on else "."
            hint = f": write on=[{self.on!r}]." if isinstance(self.on, str) and self.on in LOOPS else hint
            raise ValueError(f"`on` must be a list of stages from {LOOPS}, got {self.on!r}{hint}")
        require_kinds(ProbeSettings, vars(self))
        if self.memory_limit_mib is not None and self.memory_limit_mib <= 0:
            raise ValueError(f"`memory_limit_mib` must be > 0, got {self.memory_limit_mib}.")
        if self.eigenvalues and self.soft != "exact":
            raise ValueError("`eigenvalues=True` needs `soft='exact'`: the approximation knows no eigenvalues.")
        require_run_id(self.run_id)
        require_count("every_n_steps", self.every_n_steps)


def refuse_unknown(called: Callable[..., Any], shared: Iterable[str]) -> None:
    """Refuse shared arguments that are not there; before ``ProbeSettings(**shared)``, which would name itself.

    Args:
        called: The class or function that the user has called.
        shared: Names of the arguments.

    Raises:
        TypeError: With the nearest argument that there is.
    """
    known = [one.name for one in fields(ProbeSettings)]
    own = inspect.signature(called).parameters.values()
    names = [one.name for one in own if one.kind is not one.VAR_KEYWORD and one.name not in known]
    refuse_arguments(called.__name__, shared, [*names, *known])


@dataclass(frozen=True, kw_only=True)
class BucketSettings:
    """Arguments of what measures groups of tokens apart; :class:`~lightning_spectral.TailTokenProbe` documents them."""

    counts: Any = None
    count_batches: int | None = None
    head_share: float = 0.33
    mid_share: float = 0.67
    attribute_to: Literal["input", "target"] = "input"
    group_by: str = "frequency"
    num_position_groups: int = 4
    losses: bool = True

    def __post_init__(self) -> None:
        require_kinds(BucketSettings, vars(self))
        if not 0 < self.head_share < self.mid_share < 1:
            raise ValueError(f"Need 0 < `head_share` < `mid_share` < 1, got {self.head_share} and {self.mid_share}.")
        require_choice("group_by", self.group_by, BUCKET_RULES)
        require_count("num_position_groups", self.num_position_groups)
        if self.count_batches is not None:
            require_count("count_batches", self.count_batches)

    @property
    def is_stream(self) -> bool:
        """Whether the counts are to be taken from the training data."""
        return self.needs_counts and isinstance(self.counts, str) and self.counts == STREAM

    @property
    def needs_counts(self) -> bool:
        """Whether the rule needs to know how often each token id occurs."""
        return BUCKET_RULES[self.group_by].needs_counts

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the buckets, whatever the counts."""
        return BUCKET_RULES[self.group_by].make(self, torch.arange(64, 0, -1)).names

    def grouping(self, counts: Any) -> Grouping:
        """The rule, by these counts.

        Raises:
            ValueError: If they are no counts.
        """
        rule = BUCKET_RULES[self.group_by]
        return rule.make(self, load_counts(counts) if rule.needs_counts else None)


@dataclass(frozen=True)
class BucketRule:
    """One way to group tokens. A row of :data:`BUCKET_RULES` is all that a new one needs.

    Attributes:
        make: From the settings and the token counts, shape (V,), or ``None`` where they are not needed.
        needs_counts: Whether it needs the counts.
    """

    make: Callable[[BucketSettings, Any], Grouping]
    needs_counts: bool = False


def _by_frequency(settings: BucketSettings, counts_V: Tensor) -> Grouping:
    shares = {"head_share": settings.head_share, "mid_share": settings.mid_share}
    return by_frequency(counts_V, **shares, attribute_to=settings.attribute_to)


# values of `group_by`
BUCKET_RULES: dict[str, BucketRule] = {
    "frequency": BucketRule(_by_frequency, needs_counts=True),
    "position": BucketRule(lambda settings, _: by_position(settings.num_position_groups)),
}


def known_arguments(kind: type) -> list[str]:
    """Names that a class accepts, those behind ``**shared`` included."""
    names: list[str] = []
    for base in inspect.getmro(kind):
        parameters = inspect.signature(base.__init__).parameters if "__init__" in base.__dict__ else {}  # type: ignore[misc]
        names += [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        variable = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
        if parameters and not variable:
            break
        if variable and "SharedArguments" in str(variable[0].annotation):
            names += SharedArguments.__annotations__
    return [name for name in dict.fromkeys(names) if name != "self"]
