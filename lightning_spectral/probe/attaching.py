"""Whether a measurement can be had from a model in a loop, asked once at its start: every refusal is here."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from lightning_spectral.probe.agreement import Agreement, MissingRankError
from lightning_spectral.probe.background import has_free_core
from lightning_spectral.probe.host import Host
from lightning_spectral.probe.measurement import Measurement
from lightning_spectral.probe.memory_plan import MemoryPlan, default_limit_mib, plan_of
from lightning_spectral.probe.probe import SpectralProbe
from lightning_spectral.probe.run_folder import RunFolder
from lightning_spectral.probe.settings import ProbeSettings
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
    probe, beside, refusal, limit_mib = None, False, "", 0.0
    try:
        probe = _make_probe(model, measurement, stream, counts)
        beside = trains and solves_beside(measurement, probe, host)
        limit_mib = _memory_limit(measurement, probe, host)
    except ValueError as error:
        refusal = str(error) or type(error).__name__
    said: dict[str, Any] = {"refusal": refusal, "beside": beside, "folder": str(host.folder), "run_id": host.run_id}
    said["limit_mib"], said["sites"], said["group"] = limit_mib, _sites_of(probe), host.group_ranks
    said["keys"] = [site.key for site in probe.sites] if host.is_stage and probe is not None else []
    on_accelerator = probe is not None and probe.device.type != "cpu"
    said["host_mib"] = default_limit_mib(torch.device("cpu"), host.num_local_processes) if on_accelerator else 0.0
    try:
        parts = agreement.exchange("attach", said)
        refusals = [(rank, part["refusal"]) for rank, part in enumerate(parts) if part["refusal"]]
        if probe is None or refusals:
            raise ValueError(refusal or f"rank {refusals[0][0]}: {refusals[0][1]}")
        beside = all(part["beside"] for part in parts)
        alike = _of_stage(parts, host.group_ranks)
        if measurement.options.reduce:
            _require_same_sites([part["sites"] for part in alike])
        plan = _plan_of_all(probe, measurement, alike, beside=beside, trains=trains)
    except (ValueError, MissingRankError):
        remove(probe)
        raise
    host.folder, host.run_id = parts[0]["folder"], parts[0]["run_id"]
    if plan is None:
        return probe, beside
    probe.hold(plan)
    return probe, beside and plan.num_rows is None and not plan.on_host


def _plan_of_all(
    probe: SpectralProbe, measurement: Measurement, parts: list[dict[str, Any]], *, beside: bool, trains: bool
) -> MemoryPlan | None:
    """What is held of the rows, alike on all ranks; each has said how much room it has."""
    return plan_of(
        probe,
        min(part["limit_mib"] for part in parts),
        len(parts) if measurement.options.reduce else 1,
        twice=beside,
        needs_all=measurement.settings.eigenvalues,
        host_mib=min(part["host_mib"] for part in parts),
        may_rotate=trains,
    )


def _of_stage(parts: list[dict[str, Any]], ranks: list[int] | None) -> list[dict[str, Any]]:
    """The parts of the ranks that hold this rank's layers: all, unless the groups of pipeline stages were named.

    Raises:
        ValueError: On every rank, if these groups do not divide the ranks, or two of them hold one layer.
    """
    groups = [part["group"] for part in parts]
    if not any(groups):
        return parts
    holder: dict[str, list[int]] = {}
    for rank, (group, part) in enumerate(zip(groups, parts, strict=True)):
        if not group or rank not in group or any(groups[other] != group for other in group):
            raise ValueError(
                f"rank {rank} was given the `process_group` {group}, and the ranks say {groups}: with pipeline stages "
                "every rank names the ranks that hold its own layers and see other data."
            )
        for key in part["keys"]:
            if holder.setdefault(key, group) != group:
                raise ValueError(
                    f"`{key}` is held by the ranks {holder[key]} and {group}: layers of pipeline stages keep their "
                    "names in the whole model (an `nn.ModuleDict` whose keys are the layer numbers), and ranks that "
                    "hold one layer are one `process_group`."
                )
    return [parts[rank] for rank in ranks or ()]


def _sites_of(probe: SpectralProbe | None) -> dict[str, Any]:
    """What is measured here, short enough to be sent."""
    if probe is None:
        return {}
    names = [f"{site.name}: {site.width}" for site in probe.sites]
    keys = "\n".join(f"{site.key} {site.stack} {site.width}" for site in probe.sites)
    digest = hashlib.sha256(keys.encode()).hexdigest()
    return {"count": len(names), "first": names[0], "last": names[-1], "digest": digest}


def _require_same_sites(sites: list[dict[str, Any]]) -> None:
    other = next((rank for rank, found in enumerate(sites) if found["digest"] != sites[0]["digest"]), None)
    if other is not None:
        here, there = (f"{one['count']} sites ({one['first']} ... {one['last']})" for one in (sites[0], sites[other]))
        raise ValueError(
            f"rank 0 has {here}, rank {other} has {there}: rows are summed over ranks site by site, so that all must "
            "hold the same layers. Choose common ones by `modules`, or take rank 0's rows alone: `convention: paper`."
        )


def remove(probe: SpectralProbe | None) -> None:
    """Take the hooks off."""
    if probe is not None:
        with torch.no_grad():
            probe.remove()


def said_at_start(
    measurement: Measurement, name: str, probe: SpectralProbe, folder: RunFolder | None, *, beside: bool, writes: bool
) -> str:
    """One line about what is measured, what it takes, and where the numbers go."""
    sites, settings = probe.sites, measurement.settings
    state = "unknown before the first forward" if probe.state_mib is None else f"{probe.state_mib:.1f} MiB"
    place = "a folder that the first window opens" if folder is None else f"`{folder.path}`"
    products = "".join(f"products of width {width} by {choice}; " for width, choice in probe.products.items())
    return (
        f"{name}: {len(sites)} sites ({sites[0].name} ... {sites[-1].name}), state in a window {state} and up "
        f"to {probe.waiting_mib:.1f} MiB of rows, {_when(settings)}; {products}"
        f"{'' if probe.plan is None else f'{probe.plan}; '}"
        f"{'solved in the background; ' if beside else ''}"
        f"{f'records in {place}' if writes else 'a dry run: nothing is written'}."
    )


def _when(settings: ProbeSettings) -> str:
    """``every 200 steps of train, each validation``: an evaluation is one window, whenever the trainer begins it."""
    return ", ".join(f"every {settings.every_n_steps} steps" if on == "train" else f"each {on}" for on in settings.on)


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
    state = probe.state_mib
    fits = state is None or 2 * state <= _memory_limit(measurement, probe, host)
    return host.may_solve_beside and fits and has_free_core(probe.device, host.num_local_processes)


def _memory_limit(measurement: Measurement, probe: SpectralProbe, host: Host) -> float:
    given = measurement.settings.memory_limit_mib
    return default_limit_mib(probe.device, host.num_local_processes) if given is None else given
