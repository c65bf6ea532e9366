"""Whether a measurement can be had from a model in a loop, asked once at its start: every refusal is here."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_spectral.models.placement import group_of
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
        probe = _make_probe(model, measurement, stream, counts, is_part=host.is_stage)
        beside = trains and solves_beside(measurement, probe, host)
        limit_mib = _memory_limit(measurement, probe, host)
    except ValueError as error:
        refusal = str(error) or type(error).__name__
    said = {"refusal": refusal, "beside": beside, "limit_mib": limit_mib, **_said_of(probe, host)}
    try:
        parts = agreement.exchange("attach", said)
        if probe is None or any(part["refusal"] for part in parts):
            raise ValueError(_refusal_of(parts, agreement.rank))
        stages = _stages_of(parts)
        if measurement.options.reduce:
            for ranks in stages:
                _require_same_sites(parts, ranks)
        beside = all(part["beside"] for part in parts)
        _leave_out_peers(host, [part["peers"] for part in parts], agreement.rank)
        own = next([parts[rank] for rank in ranks] for ranks in stages if agreement.rank in ranks)
        num_owners = len(own) if host.process_group is None else dist.get_world_size(host.process_group)
        plan, beside = _agreed_plan(probe, measurement, own, num_owners, agreement, beside, trains)
    except (ValueError, MissingRankError):
        remove(probe)
        raise
    host.folder, host.run_id = parts[0]["folder"], parts[0]["run_id"]
    if plan is not None:
        probe.hold(plan)
    return probe, beside


def _said_of(probe: SpectralProbe | None, host: Host) -> dict[str, Any]:
    """What the other ranks need to know of this one."""
    said: dict[str, Any] = {"folder": str(host.folder), "run_id": host.run_id, "sites": _sites_of(probe)}
    said["group"] = host.group_ranks
    said["peers"] = _peers_of(probe) if host.process_group is None else []
    if host.is_stage and probe is not None:
        said["keys"], said["elsewhere"] = [site.key for site in probe.sites], probe.found.elsewhere
    on_accelerator = probe is not None and probe.device.type != "cpu"
    said["host_mib"] = default_limit_mib(torch.device("cpu"), host.num_local_processes) if on_accelerator else 0.0
    return said


def _refusal_of(parts: list[dict[str, Any]], rank: int) -> str:
    """What this rank has to say; else what the first rank that refuses has, or nothing."""
    other = next((other for other, part in enumerate(parts) if part["refusal"]), None)
    return parts[rank]["refusal"] or ("" if other is None else f"rank {other}: {parts[other]['refusal']}")


def _agreed_plan(
    probe: SpectralProbe,
    measurement: Measurement,
    parts: list[dict[str, Any]],
    num_owners: int,
    agreement: Agreement,
    beside: bool,
    trains: bool,
) -> tuple[MemoryPlan | None, bool]:
    """What is held of the rows, and whether windows are solved in another thread.

    Ranks that hold the same layers hold their rows alike, each has said how much room it has; those with other data
    (``num_owners``) divide the layers. Stages may differ in the first, not in the second: results of all of them are
    shared at the same step.

    Raises:
        ValueError: On every rank, if what one has to hold does not fit.
    """
    plan, refusal = None, ""
    try:
        plan = plan_of(
            probe,
            min(part["limit_mib"] for part in parts),
            num_owners if measurement.options.reduce else 1,
            twice=beside,
            needs_all=measurement.settings.eigenvalues,
            host_mib=min(part["host_mib"] for part in parts),
            may_rotate=trains,
        )
    except ValueError as error:
        refusal = str(error)
    beside = beside and (plan is None or (plan.num_rows is None and not plan.on_host))
    held = agreement.exchange("plan", {"refusal": refusal, "beside": beside})
    if any(part["refusal"] for part in held):
        raise ValueError(_refusal_of(held, agreement.rank))
    return plan, all(part["beside"] for part in held)


def _stages_of(parts: list[dict[str, Any]]) -> list[list[int]]:
    """The ranks of each stage, which hold the same layers: all, unless the groups of pipeline stages were named.

    Raises:
        ValueError: On every rank, if these groups do not divide the ranks, or two of them hold one layer.
    """
    groups = [part["group"] for part in parts]
    if not any(groups):
        return [list(range(len(parts)))]
    holder: dict[str, list[int]] = {}
    for rank, (group, part) in enumerate(zip(groups, parts, strict=True)):
        if not group or rank not in group or any(groups[other] != group for other in group):
            raise ValueError(
                f"rank {rank} was given the `process_group` {group}, and the ranks say {groups}: with pipeline stages "
                "every rank names the ranks that hold its own layers and see other data."
            )
        for key in part.get("keys", ()):
            if holder.setdefault(key, group) != group:
                raise ValueError(
                    f"`{key}` is held by the ranks {holder[key]} and {group}: layers of pipeline stages keep their "
                    "names in the whole model (an `nn.ModuleDict` whose keys are the layer numbers), and ranks that "
                    "hold one layer are one `process_group`."
                )
    nowhere = set.intersection(*(set(part["elsewhere"]) for part in parts))
    if nowhere or not holder:
        what = f"module matches `{min(nowhere)}`" if nowhere else "feed-forward network was found"
        raise ValueError(
            f"No {what} in any pipeline stage. Name down projections as they are in the whole model: "
            "`modules=['layers.3.ffn.down']`."
        )
    return [list(group) for group in dict.fromkeys(tuple(group) for group in groups)]


def _peers_of(probe: SpectralProbe | None) -> list[int]:
    """The ranks that hold the model's layers together with this one, itself among them; empty for none."""
    mesh = None if probe is None else probe.recorder.mesh
    return [] if mesh is None else dist.get_process_group_ranks(mesh.get_group())


def _leave_out_peers(host: Host, peers: list[list[int]], rank: int) -> None:
    """Under tensor parallelism, add rows over the ranks with other data alone: peers hold a layer together."""
    if any(peers):
        ranks = _with_other_data(peers, rank)
        host.process_group, host.num_replicas = group_of(ranks), len(ranks)


def _with_other_data(peers: list[list[int]], rank: int) -> list[int]:
    """The ranks at the same place among their peers.

    Args:
        peers: Of each rank, the ranks that it shares its features with, itself among them; empty for none.
        rank: This one.
    """
    teams = sorted({tuple(team) for team in peers if team})
    place = peers[rank].index(rank) if peers[rank] else None
    return [rank] if place is None else [team[place] for team in teams if len(team) > place]


def _sites_of(probe: SpectralProbe | None) -> dict[str, Any]:
    """What is measured here, short enough to be sent."""
    if probe is None:
        return {}
    if not probe.sites:
        return {"count": 0, "first": "", "last": "", "digest": ""}
    names = [f"{site.name}: {site.width}" for site in probe.sites]
    keys = "\n".join(f"{site.key} {site.stack} {site.width}" for site in probe.sites)
    digest = hashlib.sha256(keys.encode()).hexdigest()
    return {"count": len(names), "first": names[0], "last": names[-1], "digest": digest}


def _require_same_sites(parts: list[dict[str, Any]], ranks: list[int]) -> None:
    sites = [parts[rank]["sites"] for rank in ranks]
    other = next((place for place, found in enumerate(sites) if found["digest"] != sites[0]["digest"]), None)
    if other is not None:
        here, there = (f"{one['count']} sites ({one['first']} ... {one['last']})" for one in (sites[0], sites[other]))
        raise ValueError(
            f"rank {ranks[0]} has {here}, rank {ranks[other]} has {there}: rows are summed over ranks site by site, so "
            "that all must hold the same layers. Choose common ones by `modules`, or take rank 0's rows alone: "
            "`convention: paper`."
        )


def remove(probe: SpectralProbe | None) -> None:
    """Take the hooks off."""
    if probe is not None:
        with torch.no_grad():
            probe.remove()


def said_at_start(
    measurement: Measurement, name: str, probe: SpectralProbe, folder: RunFolder | None, *, beside: bool, is_first: bool
) -> str:
    """One line about what is measured, what it takes, and where the numbers go."""
    sites, settings = probe.sites, measurement.settings
    state = "unknown before the first forward" if probe.state_mib is None else f"{probe.state_mib:.1f} MiB"
    place = "records in a folder that the first window opens" if folder is None else f"records in `{folder.path}`"
    is_dry = folder is not None and is_first and not folder.writes
    products = "".join(f"products of width {width} by {choice}; " for width, choice in probe.products.items())
    named = f" ({sites[0].name} ... {sites[-1].name})" if sites else ", none in this stage"
    return (
        f"{name}: {len(sites)} sites{named}, state in a window {state} and up "
        f"to {probe.waiting_mib:.1f} MiB of rows, {_when(settings)}; {products}"
        f"{'' if probe.plan is None else f'{probe.plan}; '}"
        f"{'solved in the background; ' if beside else ''}"
        f"{'a dry run: nothing is written' if is_dry else place}."
    )


def _when(settings: ProbeSettings) -> str:
    """``every 200 steps of train, each validation``: an evaluation is one window, whenever the trainer begins it."""
    return ", ".join(f"every {settings.every_n_steps} steps" if on == "train" else f"each {on}" for on in settings.on)


def _make_probe(
    model: nn.Module, measurement: Measurement, stream: StreamCounts | None, counts: Any, *, is_part: bool
) -> SpectralProbe:
    if stream is None:
        return SpectralProbe(model, measurement.grouping(counts), measurement.options, is_part=is_part)
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
