"""Many runs from one recipe: axes -> runs with stable ids -> workers -> one table.

A run's id is made of its axis values alone, so a sweep can be stopped, changed and started again: what is finished is
skipped, what was interrupted resumes, what failed is tried again. A run whose recipe has changed since it finished is
refused, not silently kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lightning_spectral.records import PROGRESS_FILE
from lightning_spectral.sweep.axes import distinct, read
from lightning_spectral.text import parse_json, write_text
from lightning_spectral.training.document import RecipeError
from lightning_spectral.training.same_recipe import differences, shown

if TYPE_CHECKING:  # imported when a plan is made: names are checked before, without litgpt
    from lightning_spectral.training.recipe import Recipe

JOB_FILE: Final = "sweep_job.json"
STATE_FILE: Final = "sweep_state.json"
SWEEP_FILE: Final = "sweep.json"
MONITOR: Final = "lightning_spectral.sweep.monitor.SweepMonitor"
_LABELLED: Final = ("SpectralRankCallback", "TailTokenProbe")
ENDED: Final = ("finished", "diverged")
# keys that may differ between two starts of one run
_NOT_PART_OF_A_RUN: Final = ("out_dir", "resume", "devices", "sweep")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        run_id: Made from the axis values.
        folder: The run folder.
        source: Recipe file.
        overrides: Dotted recipe keys and values.
        labels: Axis values as text; the labels of ``run.json``.
        fingerprint: Hash of recipe and overrides, without what may change between two starts.
        recipe: Dotted key -> value of what is hashed, to say what has changed.
        accept_changes: Go on from a checkpoint that another recipe made.
    """

    run_id: str
    folder: str
    source: str
    overrides: dict[str, Any]
    labels: dict[str, str]
    fingerprint: str
    recipe: dict[str, Any] = field(default_factory=dict)
    accept_changes: bool = False


@dataclass(frozen=True)
class State:
    """How far a run is.

    Attributes:
        name: ``new``, ``interrupted``, ``finished``, ``diverged`` (finished, with a loss that is no number),
            ``failed`` or ``changed`` (started or finished under another recipe).
        detail: Why it failed, or what has changed.
    """

    name: str
    detail: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether it reached the end of its recipe."""
        return self.name in ENDED


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep.

    Attributes:
        out_dir: Folder of the run folders.
        jobs: In the order of the axes.
        source: Recipe file.
        states: State of each job, by run id.
    """

    out_dir: Path
    jobs: tuple[Job, ...]
    source: str
    states: dict[str, State] = field(default_factory=dict)

    def to_do(self) -> list[Job]:
        """Jobs that still have to run."""
        return [job for job in self.jobs if self.states[job.run_id].name in ("new", "interrupted", "failed")]


def plan(
    source: str | Path,
    *,
    axes: Sequence[str] = (),
    overrides: Sequence[str] = (),
    out_dir: str | Path | None = None,
    rerun_changed: bool = False,
    accept_changes: bool = False,
    smoke: bool = False,
) -> Plan:
    """Expand a recipe into runs and look at what is there already.

    Args:
        source: Recipe file or shipped name.
        axes: ``key=a,b,c``; replace an axis of the recipe of that name, or add one.
        overrides: Command-line words for every run, as for ``pretrain``.
        out_dir: Folder of the sweep; by default the recipe's ``out_dir``.
        rerun_changed: Run again, from the start, what was started or finished under another recipe.
        accept_changes: Go on with what was started under another recipe.
        smoke: Apply the recipe's ``smoke:`` block: the same sweep, tiny.

    Raises:
        RecipeError: If the recipe or an axis cannot be read, or two runs have one id.
    """
    file, tree, common, grids = read(source, axes=axes, overrides=overrides, smoke=smoke)
    from lightning_spectral.training.recipe import load
    from lightning_spectral.training.trial import try_out

    base = load(file, common)
    for own in distinct(grids):
        try_out(load(file, {**common, **own}))
    folder = Path(out_dir) if out_dir is not None else base.out_dir.with_name(f"{base.out_dir.name}{'-smoke' * smoke}")
    jobs = [
        _job(file, tree, folder, common, base.content, zip([axis.name for axis in grid], chosen, strict=True))
        for grid in grids
        for chosen in itertools.product(*(axis.values for axis in grid))
    ]
    ids = [job.run_id for job in jobs]
    twice = sorted({run_id for run_id in ids if ids.count(run_id) > 1})
    if twice:
        raise RecipeError(
            f"two runs of the sweep have the id `{twice[0]}`: give each value of an axis once, or labels of their own."
        )
    states = {job.run_id: state_of(job) for job in jobs}
    if rerun_changed or accept_changes:
        jobs = [_released(job, states, fresh=rerun_changed) for job in jobs]
    return Plan(folder, tuple(jobs), str(file), states)


def _released(job: Job, states: dict[str, State], *, fresh: bool) -> Job:
    """A job whose change of recipe is wanted: it starts anew, or goes on from where it is."""
    if states[job.run_id].name != "changed":
        return job
    states[job.run_id] = State("new" if fresh else "interrupted")
    return replace(job, overrides={**job.overrides, "resume": False}) if fresh else replace(job, accept_changes=True)


def _job(
    file: Path,
    tree: Mapping[str, Any],
    folder: Path,
    common: dict[str, Any],
    content: Mapping[str, Any],
    values: Iterable[tuple[str, tuple[str, dict[str, Any]]]],
) -> Job:
    overrides, labels = dict(common), {}
    for name, (label, own) in values:
        overrides |= own
        labels[name.rpartition(".")[2]] = label
    run_id = run_id_of(labels)
    what = {key: value for key, value in tree.items() if key not in _NOT_PART_OF_A_RUN}
    what["overrides"] = {key: value for key, value in overrides.items() if key not in _NOT_PART_OF_A_RUN}
    fingerprint = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
    run_folder = folder / run_id
    overrides |= {"out_dir": str(run_folder), "resume": "auto", **_told(content, run_folder, run_id, labels)}
    return Job(run_id, str(run_folder), str(file), overrides, labels, fingerprint, what)


def _told(content: Mapping[str, Any], folder: Path, run_id: str, labels: dict[str, str]) -> dict[str, Any]:
    """Overrides that tell the callbacks where to write and what the run is called."""
    told: dict[str, Any] = {}
    for place, callback in enumerate(content.get("callbacks") or []):
        if str(callback.get("class_path")).rpartition(".")[2] in _LABELLED:
            key = f"callbacks.{place}.init_args"
            told |= {f"{key}.run_id": run_id, f"{key}.labels": dict(labels), f"{key}.dirpath": str(folder)}
    if not told:
        raise RecipeError("a sweep measures nothing without a SpectralRankCallback or TailTokenProbe in `callbacks`.")
    return {**told, "callbacks+": {"class_path": MONITOR, "init_args": {"path": str(folder / PROGRESS_FILE)}}}


def run_id_of(labels: Mapping[str, str]) -> str:
    """``{"optimizer": "Dion 1/16", "seed": "0"}`` -> ``optimizer-Dion-1-16_seed-0``."""
    parts = [f"{name}-{re.sub(r'[^A-Za-z0-9.+]+', '-', label).strip('-')}" for name, label in labels.items()]
    return "_".join(parts)


def state_of(job: Job) -> State:
    """What a run folder says."""
    folder = Path(job.folder)
    state = read_json(folder / STATE_FILE)
    # a sweep of an earlier version wrote the fingerprint of what it started into the job file alone
    started = state if state.get("fingerprint") else read_json(folder / JOB_FILE)
    same = started.get("fingerprint", job.fingerprint) == job.fingerprint
    if not same and (state.get("state") in ENDED or any(folder.glob("checkpoints/*"))):
        return State("changed", shown(differences(started.get("recipe") or {}, job.recipe)))
    if not same:
        return State("new")  # nothing was trained under the other recipe
    if state.get("state") in ENDED:
        return State(state["state"])
    if state.get("state") == "failed":
        return State("failed", str(state.get("detail", "")))
    return State("interrupted") if folder.exists() else State("new")


def write_state(job: Job, state: str, detail: str = "") -> None:
    """Record that a run has started, and how it ended."""
    content = {"state": state, "fingerprint": job.fingerprint, "detail": detail, "recipe": job.recipe}
    write_json(Path(job.folder) / STATE_FILE, content)


def write_summary(found: Plan, wall_s: float = 0.0) -> Path:
    """``sweep.json``: runs, labels, states, whether all saw the same data, and what it cost.

    Args:
        found: The sweep.
        wall_s: Wall time of this start; earlier starts' is added.
    """
    file = found.out_dir / SWEEP_FILE
    runs = []
    for job in found.jobs:
        progress = read_json(Path(job.folder) / PROGRESS_FILE)
        cost = {name: progress.get(name) for name in ("cpu_s", "wall_s")}
        runs.append({**asdict(job), "state": state_of(job).name, "data": progress.get("data"), **cost})
    content = {
        "source": found.source,
        "runs": runs,
        "same_data": same_data(found),
        "cpu_s": round(sum(run["cpu_s"] or 0.0 for run in runs), 2),
        "wall_s": round(float(read_json(file).get("wall_s") or 0.0) + wall_s, 2),
    }
    return write_json(file, content)


def same_data(found: Plan) -> dict[str, list[str]]:
    """Digests of the training order and of the evaluation tokens over all finished runs; one each when they agree."""
    return {name: sorted({digest for _, digest in pairs}) for name, pairs in seen_data(found).items()}


def one_digest_a_seed(pairs: set[tuple[str, str]]) -> bool:
    """Whether all runs of one seed saw the same: the seed may draw the data order."""
    return len(pairs) == len({seed for seed, _ in pairs})


def seen_data(found: Plan) -> dict[str, set[tuple[str, str]]]:
    """Split -> (seed, digest) of the runs that have ended and say what they saw."""
    out: dict[str, set[tuple[str, str]]] = {"train": set(), "validation": set()}
    for job in found.jobs:
        if state_of(job).has_ended:
            data = read_json(Path(job.folder) / PROGRESS_FILE).get("data") or {}
            for name, pairs in out.items():
                if data.get(name):
                    pairs.add((job.labels.get("seed", ""), str(data[name])))
    return out


def load_job(path: Path) -> tuple[Job, Recipe]:
    """A job file and its recipe, for the worker."""
    from lightning_spectral.training.recipe import load

    job = Job(**parse_json(path.read_text()))
    return job, load(job.source, job.overrides)


def write_ended(job: Job) -> None:
    """Record that a run has reached its end, and whether its losses are numbers there."""
    losses = read_json(Path(job.folder) / PROGRESS_FILE).get("losses") or {}
    write_state(job, "diverged" if None in losses.values() else "finished")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is missing or incomplete."""
    try:
        content = parse_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")
    return path
