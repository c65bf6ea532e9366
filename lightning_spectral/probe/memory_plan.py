"""Whether a window fits into the memory it is allowed, and what is done where it does not.

All rows as moments is exact and takes ``9/16 D^2`` numbers per site and group on every rank. Where that is too much, an
even sample of the rows is kept instead, each layer's owner computes ranks from it
(:mod:`~lightning_spectral.functional.row_ranks`), and every record states its error. Where a sample does not do (it
does not fit, or spectra are asked for), the moments of all rows are kept in the memory of the host, which an
accelerator fills site by site; or those of some layers at a time, in turns.

Peak of a sample on one rank, in bytes: what hooks hold of a micro-batch and what is kept of the window, at most
``2 N / R`` rows of every site, and at the owner one layer's rows with their products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_spectral.models.sites import Site

if TYPE_CHECKING:
    from lightning_spectral.probe.probe import SpectralProbe

DEFAULT_SHARE = 0.25  # of the memory that is free when training starts
MAX_ROWS = 4_096  # more make the owner's eigenvalue problem the bottleneck
MIN_ROWS = 256
EXPERTS_OF_A_TOKEN = 8  # taken for the number of a layer's experts that a token is sent to
_STEP = 64


@dataclass(frozen=True)
class MemoryPlan:
    """How the rows of a window are held.

    Attributes:
        limit_mib: What may be used on each rank.
        needed_mib: Peak by this module's accounting.
        num_rows: Rows of the sample over all ranks; ``None`` for all rows, as moments.
        rows_per_rank: Of them, on one rank.
        limit_bytes: Memory of the rows kept on one rank.
        on_host: Moments are kept on the CPU.
        turns: Windows in which every layer is measured once.
    """

    limit_mib: float
    needed_mib: float
    num_rows: int | None = None
    rows_per_rank: int = 0
    limit_bytes: float = 0.0
    on_host: bool = False
    turns: int = 1

    def __str__(self) -> str:
        takes = f"{_mib(self.needed_mib)} of {_mib(self.limit_mib)} MiB"
        if self.on_host:
            return (
                f"all rows, in the memory of the host ({takes} of each process; they do not fit beside the model): the "
                "same numbers, with every state copied to the host and back"
            )
        if self.turns > 1:
            return (
                f"all rows of some layers at a time, {takes} (all layers do not fit): exact numbers, every layer in "
                f"each {self.turns}. window, `not_in_turn` in the others. For all in each raise `memory_limit_mib`"
            )
        if self.num_rows is None:
            return f"all rows, {takes}"
        return (
            f"an even sample of {self.num_rows:,} rows per window, {takes} "
            "on each rank (all rows do not fit): hard ranks unbiased, soft ranks estimated, the error of both in each "
            "record (`extra`); no Renyi ranks, spectra or reinjection. For exact numbers raise `memory_limit_mib`"
        )


def _mib(value: float) -> str:
    """Whole from ten on, else two digits that count: a small limit is not 0."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def sample_mib(widths: Sequence[int], num_rows: int, world_size: int, item_bytes: int) -> float:
    """Peak of a sample of this many rows on one rank, MiB.

    Args:
        widths: Features of every site.
        num_rows: Rows over all ranks.
        world_size: Ranks that share them.
        item_bytes: Of one number of a row.
    """
    per_rank = -(-num_rows // world_size)
    kept = per_rank * sum(widths) * item_bytes
    widest, side = max(widths), min(num_rows, max(widths))
    # the rows gathered and in fp32 about their mean, one product, and what the solver takes beside it
    solve = num_rows * widest * (2 * item_bytes + 8) + 4 * side * side * 4
    return (2 * kept + solve) / 2**20


def choose(
    widths: Sequence[int],
    moments_mib: float,
    limit_mib: float,
    *,
    world_size: int,
    item_bytes: int,
) -> MemoryPlan | None:
    """All rows, or as many as fit; ``None`` if even :data:`MIN_ROWS` rows do not.

    Args:
        widths: Features of every site.
        moments_mib: What all rows take.
        limit_mib: What may be used.
        world_size: Ranks whose rows are added.
        item_bytes: Of one number of a row: 2 under bf16.
    """
    if moments_mib <= limit_mib:
        return MemoryPlan(limit_mib, moments_mib)
    for num_rows in range(MAX_ROWS, MIN_ROWS - 1, -_STEP):
        needed = sample_mib(widths, num_rows, world_size, item_bytes)
        if needed <= limit_mib:
            per_rank = -(-num_rows // world_size)
            return MemoryPlan(limit_mib, needed, num_rows, per_rank, per_rank * sum(widths) * item_bytes)
    return None


def in_host_memory(largest_mib: float, moments_mib: float, limit_mib: float, host_mib: float) -> MemoryPlan | None:
    """All rows, on the CPU; ``None`` if one site's do not fit beside the model, or all of them not on the host.

    Args:
        largest_mib: Moments of the largest site.
        moments_mib: Of all sites.
        limit_mib: What may be used beside the model.
        host_mib: What may be used of the host.
    """
    # the layer that is filled or solved, what is added to it, and the rows on their way
    if 2 * largest_mib > limit_mib or moments_mib > host_mib:
        return None
    return MemoryPlan(host_mib, moments_mib, on_host=True)


def in_turns(layers_mib: Mapping[int, float], limit_mib: float) -> MemoryPlan | None:
    """All rows of as many layers at a time as fit: layer ``l`` in windows ``l``, ``l + turns``, ...

    Args:
        layers_mib: Moments of each layer, by depth.
        limit_mib: What may be used.
    """
    for turns in range(1, max(layers_mib) + 2):
        needed = max(sum(mib for layer, mib in layers_mib.items() if layer % turns == turn) for turn in range(turns))
        if needed <= limit_mib:
            return MemoryPlan(limit_mib, needed, turns=turns)
    return None


def plan_of(
    probe: SpectralProbe,
    limit_mib: float,
    world_size: int,
    *,
    twice: bool = False,
    needs_all: bool = False,
    host_mib: float = 0.0,
    may_rotate: bool = False,
) -> MemoryPlan | None:
    """The plan for one probe; ``None`` where a width is not known before the first forward.

    Args:
        probe: What is measured.
        limit_mib: What may be used on each rank.
        world_size: Ranks whose rows are added.
        twice: One window is solved while the next one fills.
        needs_all: Something that a sample does not give is asked for.
        host_mib: What may be used of the host, where that is not where the model is.
        may_rotate: More windows will come, so that a layer may wait for its turn.

    Raises:
        ValueError: If nothing fits.
    """
    moments_mib = probe.state_mib
    if moments_mib is None:
        return None
    copies = 2 if twice else 1
    moments_mib *= copies
    item_bytes = 2 if probe.row_dtype in (torch.bfloat16, torch.float16) else 4
    plan = choose(row_widths(probe.sites), moments_mib, limit_mib, world_size=world_size, item_bytes=item_bytes)
    if plan is None or (needs_all and plan.num_rows is not None):
        layers = {layer: copies * mib for layer, mib in probe.layers_mib.items()}
        plan = in_host_memory(max(layers.values()), moments_mib / copies, limit_mib, host_mib)
        if plan is None and may_rotate:
            plan = in_turns(layers, limit_mib)
    if plan is None:
        least = sample_mib(row_widths(probe.sites), MIN_ROWS, world_size, item_bytes)
        sample = "`eigenvalues=True` needs them all" if needs_all else f"a sample of {MIN_ROWS} takes {_mib(least)} MiB"
        raise ValueError(
            f"all rows of a window need {_mib(moments_mib)} MiB ({len(probe.sites)} sites x {probe.buckets.num_groups} "
            f"groups x 9/16 D^2 x 4 bytes), {sample}, `memory_limit_mib` allows {_mib(limit_mib)}: raise it, measure "
            "fewer layers (`modules=[...]`), one site, or fewer jackknife groups."
        )
    return plan


def row_widths(sites: Sequence[Site]) -> list[int]:
    """Features of every site that one token reaches: of a layer's experts a few."""
    plain = [site.width for site in sites if site.width and not site.is_routed]
    routed: dict[tuple[str, int, str], list[int]] = {}
    for site in sites:
        if site.width and site.is_routed:
            routed.setdefault((site.stack, site.layer, site.site), []).append(site.width)
    return plain + [width for experts in routed.values() for width in experts[:EXPERTS_OF_A_TOKEN]]


def default_limit_mib(device: torch.device, num_local_processes: int = 1) -> float:
    """A quarter of the memory that is free: of the accelerator, or of this machine divided by its processes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return DEFAULT_SHARE * free / 2**20
    return DEFAULT_SHARE * available_bytes() / max(num_local_processes, 1) / 2**20


def available_bytes() -> float:
    """Memory of this machine that is free."""
    try:
        with open("/proc/meminfo") as file:
            found = next(line for line in file if line.startswith("MemAvailable:"))
        return float(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return 8 * 2.0**30  # a machine that does not say: take it for a small one
