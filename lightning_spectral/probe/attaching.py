"""Whether a measurement can be had from a model in a loop, asked once at its start: every refusal is here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_spectral.probe.agreement import Agreement, MissingRankError
from lightning_spectral.probe.background import has_free_core
from lightning_spectral.probe.host import Host
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.settings import Measurement
from lightning_spectral.probe.token_counts import StreamCounts


def agree_to_measure(
    model: nn.Module,
    measurement: Measurement,
    host: Host,
    agreement: Agreement,
    stream: StreamCounts | None,
    counts: Any,
    *,
    trains: bool,
) -> tuple[SpectralProbe, bool]:
    """Hooks on the model, and whether training windows are solved in another thread; every rank must call it.

    Folder and run id of ``host`` become those of rank 0.

    Args:
        model: Module that holds the blocks, wrapped or not.
        measurement: What is asked for.
        host: The loop.
        agreement: With the other ranks.
        stream: Token counts that are taken while training, if they are.
        counts: Token counts to use where the user gave none.
        trains: Whether steps will be taken.

    Raises:
        ValueError: On every rank, if it cannot be measured; the message says what to do. No hook is left.
        MissingRankError: If not every rank comes.
    """
    probe, beside, refusal = None, False, ""
    try:
        probe = _make_probe(model, measurement, stream, counts)
        beside = trains and solves_beside(measurement, probe, host)
        _check_memory(measurement, probe, twice=beside)
    except ValueError as error:
        refusal = str(error) or type(error).__name__
    said = {"refusal": refusal, "beside": beside, "folder": str(host.folder), "run_id": host.run_id}
    try:
        parts = agreement.exchange("attach", said)
        refusals = [(rank, part["refusal"]) for rank, part in enumerate(parts) if part["refusal"]]
        if probe is None or refusals:
            raise ValueError(refusal or f"rank {refusals[0][0]}: {refusals[0][1]}")
    except (ValueError, MissingRankError):
        remove(probe)
        raise
    host.folder, host.run_id = parts[0]["folder"], parts[0]["run_id"]
    return probe, all(part["beside"] for part in parts)


def remove(probe: SpectralProbe | None) -> None:
    """Take the hooks off."""
    if probe is not None:
        with torch.no_grad():
            probe.remove()


def said_at_start(
    measurement: Measurement, name: str, probe: SpectralProbe, folder: RunFolder | None, *, beside: bool
) -> str:
    """One line about what is measured, what it takes, and where the numbers go."""
    sites, settings = probe.sites, measurement.settings
    state = "unknown before the first forward" if probe.state_mib is None else f"{probe.state_mib:.1f} MiB"
    products = "".join(f"products of width {width} by {choice}; " for width, choice in probe.products.items())
    return (
        f"{name}: {len(sites)} sites ({sites[0].name} ... {sites[-1].name}), state in a window {state} and up "
        f"to {probe.waiting_mib:.1f} MiB of rows, every {settings.every_n_steps} steps on "
        f"{', '.join(settings.on)}; {products}"
        f"{'solved in the background; ' if beside else ''}records in `{folder.path if folder else None}`."
    )


def _make_probe(model: nn.Module, measurement: Measurement, stream: StreamCounts | None, counts: Any) -> SpectralProbe:
    if stream is None:
        return SpectralProbe(model, measurement.grouping(counts), measurement.options)
    return stream.make_probe(model, measurement)


def solves_beside(measurement: Measurement, probe: SpectralProbe, host: Host) -> bool:
    """Whether training windows are solved in another thread."""
    settings = measurement.settings
    if settings.background is False or settings.on_nonfinite == "raise" or settings.strict:
        return False
    if settings.background:
        return True
    limit, state = settings.memory_limit_mib, probe.state_mib
    fits = limit is None or (state is not None and 2 * state <= limit)
    return host.may_solve_beside and fits and has_free_core(probe.device, host.num_local_processes)


def _check_memory(measurement: Measurement, probe: SpectralProbe, *, twice: bool) -> None:
    limit, needed = measurement.settings.memory_limit_mib, probe.state_mib
    if needed is not None and twice:
        needed *= 2  # one window is solved while the next one fills
    if limit is not None and needed is not None and needed > limit:
        raise ValueError(
            f"needs {needed:.1f} MiB in a window ({len(probe.sites)} sites x {probe.buckets.num_groups} "
            f"groups x 9/16 D^2 x 4 bytes), `memory_limit_mib` allows {limit:.1f}: measure fewer layers "
            "(`modules=[...]`), one site, or fewer jackknife groups."
        )
