"""What a recipe or a sweep takes, before anything starts: arithmetic on the recipes, nothing is built.

Floating-point operations of training are ``6 N`` per token for the N parameters of the matrix products that a token
goes through (embedding looked up, head multiplied, of experts its own), plus ``12 L d T`` for attention over
T tokens (arXiv:2001.08361, arXiv:2204.02311). Memory is that of weights, gradients and optimizer state; activations
come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lightning_spectral.sweep.model_size import ModelSize, model_size
from lightning_spectral.text import CommandError, did_you_mean

# dense bf16 peak, FLOP/s; vendors' data sheets (SXM modules where there are several)
PEAK_FLOPS: Final = {
    "a100": 312e12,
    "h100": 989e12,
    "h200": 989e12,
    "b200": 2_250e12,
    "l40s": 362e12,
    "rtx4090": 165e12,
    "mi300x": 1_307e12,
}
MEMORY_BYTES: Final = {
    "a100": 80 * 2**30,
    "h100": 80 * 2**30,
    "h200": 141 * 2**30,
    "b200": 192 * 2**30,
    "l40s": 48 * 2**30,
    "rtx4090": 24 * 2**30,
    "mi300x": 192 * 2**30,
}
DEFAULT_MFU: Final = 0.4
# Of a step whose products take no time: 28,800 steps of the pocket GPT took 417 s of an H100 that 14 workers shared,
# one of eight layers by itself 24 ms.
LAUNCHES_S: Final = 0.02
RECORD_BYTES: Final = 1_600  # of a bucket's ranks and losses
_GROUPS: Final = {"TailTokenProbe": 3, "SpectralRankCallback": 1}


@dataclass(frozen=True)
class RunCost:
    """Estimates of one run.

    Attributes:
        name: Run id.
        parameters: All weights, embedding and head included.
        tokens: Training tokens.
        steps: Optimizer steps.
        train_flops: Floating-point operations of training.
        state_bytes: Weights, gradients and optimizer state, fp32, over all devices, one copy.
        measure_flops: Products of the windows, over all of them.
        measure_bytes: State of one window on one rank.
        windows: Number of windows.
        disk_bytes: Two checkpoints, the final weights, and the records.
    """

    name: str
    parameters: int
    tokens: int
    steps: int
    train_flops: float
    state_bytes: float
    measure_flops: float
    measure_bytes: float
    windows: int
    disk_bytes: float


def run_cost(name: str, content: Mapping[str, Any]) -> RunCost:
    """Estimate one run from its recipe.

    Args:
        name: Run id.
        content: A recipe's tree with its overrides.

    Raises:
        CommandError: If the recipe does not say how long the run is, or litgpt refuses its model.
    """
    size, train = model_size(content), content.get("train") or {}
    seq = train.get("max_seq_length") or size.block_size
    if seq > size.block_size:
        raise CommandError(
            f"`train.max_seq_length` is {seq}, the model's `block_size` is {size.block_size}: lower the first or raise "
            "the second."
        )
    steps, tokens = _length(train, seq)
    windows, every_window = _windows(content, steps), _rows_per_window(content, train, seq)
    groups, sites = _groups_and_sites(content)
    products = sum(down.number * down.share * down.columns**2 for down in size.down)
    window_bytes = 4 * groups * sites * 0.5625 * sum(down.number * down.columns**2 for down in size.down)
    records = windows * sum(down.number for down in size.down) * sites * _records_of_a_site(content) * RECORD_BYTES
    optimizer = 4 * _optimizer_numbers(content, size)
    weights = 4 * size.parameters
    return RunCost(
        name=name,
        parameters=size.parameters,
        tokens=tokens,
        steps=steps,
        train_flops=tokens * size.flops_per_token(seq),
        state_bytes=2 * weights + optimizer,
        measure_flops=windows * every_window * sites * products,
        measure_bytes=window_bytes * bool(windows),
        windows=windows,
        disk_bytes=2 * (weights + optimizer) + weights + records,
    )


def hours(flops: float, gpu: str, mfu: float, num_gpus: int) -> float:
    """Wall hours of ``flops`` on so many GPUs at a share ``mfu`` of their peak.

    Raises:
        CommandError: If the GPU is not known.
    """
    if gpu.lower() not in PEAK_FLOPS:
        raise CommandError(f"unknown GPU `{gpu}`; {did_you_mean(gpu.lower(), PEAK_FLOPS)}")
    return flops / (PEAK_FLOPS[gpu.lower()] * mfu * num_gpus) / 3600


def duration(hours: float) -> str:
    """``.02`` -> ``1.2 minutes``."""
    if hours * 3600 < 90:
        return f"{hours * 3600:.0f} seconds"
    return f"{hours * 60:.1f} minutes" if hours < 1.5 else f"{hours:,.1f} hours"


def memory(num_bytes: float) -> str:
    """``3e9`` -> ``2.79 GiB``."""
    if num_bytes < 0.1 * 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:,.2f} GiB"


def _length(train: Mapping[str, Any], seq: int) -> tuple[int, int]:
    batch = int(train.get("global_batch_size") or 512)
    limits = []
    if train.get("max_steps"):
        limits.append(int(train["max_steps"]))
    if train.get("max_tokens"):
        limits.append(int(train["max_tokens"]) // (batch * seq))
    if not limits:
        raise CommandError("the recipe has no `train.max_steps` and no `train.max_tokens`: its length is not known.")
    if min(limits) < 1:
        raise CommandError(
            f"the run has no whole optimizer step: one takes {batch} sequences of {seq} tokens. Raise "
            "`train.max_tokens`, or lower `train.global_batch_size`."
        )
    return min(limits), min(limits) * batch * seq


def _callbacks(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = []
    for spec in content.get("callbacks") or []:
        spec = {"class_path": spec} if isinstance(spec, str) else spec
        name = str(spec.get("class_path", "")).rpartition(".")[2]
        if name in _GROUPS:
            found.append((name, spec.get("init_args") or {}))
    return found


def _buckets(name: str, arguments: Mapping[str, Any]) -> int:
    """Groups of tokens that are measured apart."""
    if arguments.get("group_by") == "position":
        return int(arguments.get("num_position_groups", 4))
    return _GROUPS[name]


def _groups_and_sites(content: Mapping[str, Any]) -> tuple[int, int]:
    """Of the callback that keeps the most state: a plain rank callback beside a probe adds none."""
    best = (0, 1)
    for name, arguments in _callbacks(content):
        groups = _buckets(name, arguments) * int(arguments.get("num_jackknife_groups", 2))
        best = max(best, (groups, len(arguments.get("sites", ["post"]))))
    return best


def _records_of_a_site(content: Mapping[str, Any]) -> int:
    """Lines of a window for one layer and site: every bucket, and all together."""
    buckets = max((_buckets(name, arguments) for name, arguments in _callbacks(content)), default=0)
    return buckets + (buckets > 1)


def _windows(content: Mapping[str, Any], steps: int) -> int:
    counts = [0]
    for _, arguments in _callbacks(content):
        stages, every, windows = arguments.get("on", ["train"]), int(arguments.get("every_n_steps", 200)), 0
        if "train" in stages:  # the first, each n-th, and the last step
            windows += -(-steps // every) + ((steps - 1) % every != 0)
        if "validation" in stages:
            windows += steps // int((content.get("eval") or {}).get("interval", 1000)) + 1
        counts.append(windows)
    return max(counts)


def _rows_per_window(content: Mapping[str, Any], train: Mapping[str, Any], seq: int) -> float:
    share = max([float(arguments.get("token_fraction", 1.0)) for _, arguments in _callbacks(content)], default=0.0)
    return share * int(train.get("global_batch_size") or 512) * seq


def _optimizer_numbers(content: Mapping[str, Any], size: ModelSize) -> float:
    """Numbers of optimizer state: two per weight for Adam, one for Lion, those of the rule for the hidden matrices."""
    spec = content.get("optimizer")
    path = str(spec.get("class_path") if isinstance(spec, Mapping) else spec or "AdamW")
    arguments = (spec.get("init_args") or {}) if isinstance(spec, Mapping) else {}
    rule = _RULES.get(path.rpartition(".")[2])
    if rule is None:
        return 2 * size.parameters
    per_vector_weight = 1 if arguments.get("fallback") == "lion" else 2
    matrices = sum(one.number * rule(one.rows, one.columns, arguments) for one in size.hidden)
    return matrices + per_vector_weight * (size.parameters - sum(one.entries for one in size.hidden))


def _dion(rows: int, columns: int, arguments: Mapping[str, Any]) -> float:
    rank = max(1, round(float(arguments.get("rank_fraction", 0.25)) * min(rows, columns)))
    return rows * columns + rank * columns


# numbers that each optimizer keeps of a matrix, as its rule's `extra_state` says
_RULES: Final[dict[str, Callable[[int, int, Mapping[str, Any]], float]]] = {
    "Muon": lambda rows, columns, _: rows * columns,
    "MuonH": lambda rows, columns, _: rows * columns,
    "NorMuon": lambda rows, columns, _: rows * columns + rows,
    "AdaMuon": lambda rows, columns, _: 2 * rows * columns,
    "Dion": _dion,
    "Dion2": lambda rows, columns, _: rows * columns,
    "NorDion2": lambda rows, columns, _: rows * columns + rows,
    "SOAP": lambda rows, columns, _: 2 * rows * columns + 2 * min(rows, columns) ** 2,
}
