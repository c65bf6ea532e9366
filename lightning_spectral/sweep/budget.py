"""What a recipe or a sweep takes, before anything starts: arithmetic on the recipes, nothing is built.

Floating-point operations of training are ``6 N`` per token for the N parameters of the matrix products (embedding
looked up, head multiplied), plus ``12 L d T`` for attention over T tokens (arXiv:2001.08361, arXiv:2204.02311). Memory
is that of weights, gradients and optimizer state; activations come on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

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
DEFAULT_MFU: Final = 0.4
# Of a step whose products take no time: 28,800 steps of the pocket GPT took 417 s of an H100 that 14 workers shared,
# one of eight layers by itself 24 ms.
LAUNCHES_S: Final = 0.02
RECORD_BYTES: Final = 1_300
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
        CommandError: If the recipe does not say how large the model or how long the run is.
    """
    model, train = _model(content), content.get("train") or {}
    layers, width, seq = model["n_layer"], model["n_embd"], train.get("max_seq_length") or model["block_size"]
    steps, tokens = _length(train, seq)
    hidden = layers * (model["attention"] + model["matrices"] * width * model["ffn"])
    head = model["vocab"] * width
    flops = tokens * (6 * (hidden + head) + 12 * layers * width * seq)
    parameters = hidden + 2 * head
    windows, every_window = _windows(content, steps), _rows_per_window(content, train, seq)
    groups, sites = _groups_and_sites(content)
    products = windows * every_window * layers * sites * model["ffn"] ** 2
    window_bytes = 4 * groups * sites * layers * 0.5625 * model["ffn"] ** 2
    records = windows * layers * sites * (groups + (groups > 1)) * RECORD_BYTES
    state = 4 * (parameters * 2 + _optimizer_slots(content, hidden, parameters))
    disk = 2 * (state - 4 * parameters) + 4 * parameters + records
    return RunCost(name, parameters, tokens, steps, flops, state, products, window_bytes * bool(windows), windows, disk)


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


def _model(content: Mapping[str, Any]) -> dict[str, int]:
    given = content.get("model_config")
    if given is None:
        from litgpt.config import Config  # seconds to import: only for a model that is litgpt's own

        from lightning_spectral.training.document import named_config

        given = asdict(Config(**named_config(str(content.get("model_name")))))
    missing = [name for name in ("n_layer", "n_embd") if not given.get(name)]
    if missing:
        raise CommandError(f"`model_config.{missing[0]}` is not given: the size of the model is not known.")
    width, heads = int(given["n_embd"]), int(given.get("n_head") or 1)
    groups = int(given.get("n_query_groups") or heads)
    multiplier = (content.get("architecture") or {}).get("ffn_multiplier")
    ffn = round(multiplier * width) if multiplier else int(given.get("intermediate_size") or 4 * width)
    gated = "LLaMA" in str(given.get("mlp_class_name", "")) or "Gemma" in str(given.get("mlp_class_name", ""))
    return {
        "n_layer": int(given["n_layer"]),
        "n_embd": width,
        "block_size": int(given.get("block_size") or 512),
        "ffn": ffn,
        "matrices": 3 if gated else 2,
        "attention": 2 * width * width + 2 * width * width * groups // heads,
        "vocab": int(given.get("padded_vocab_size") or given.get("vocab_size") or _data_vocabulary(content)),
    }


def _data_vocabulary(content: Mapping[str, Any]) -> int:
    data = content.get("data")
    init_args = (data.get("init_args") or {}) if isinstance(data, Mapping) else {}
    return int(init_args.get("vocab_size") or 2048)


def _length(train: Mapping[str, Any], seq: int) -> tuple[int, int]:
    batch = int(train.get("global_batch_size") or 512)
    limits = []
    if train.get("max_steps"):
        limits.append(int(train["max_steps"]))
    if train.get("max_tokens"):
        limits.append(int(train["max_tokens"]) // (batch * seq))
    if not limits:
        raise CommandError("the recipe has no `train.max_steps` and no `train.max_tokens`: its length is not known.")
    return min(limits), min(limits) * batch * seq


def _callbacks(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = []
    for spec in content.get("callbacks") or []:
        spec = {"class_path": spec} if isinstance(spec, str) else spec
        name = str(spec.get("class_path", "")).rpartition(".")[2]
        if name in _GROUPS:
            found.append((name, spec.get("init_args") or {}))
    return found


def _groups_and_sites(content: Mapping[str, Any]) -> tuple[int, int]:
    """Of the callback that keeps the most state: a plain rank callback beside a probe adds none."""
    best = (0, 1)
    for name, arguments in _callbacks(content):
        by_position = arguments.get("group_by") == "position"
        groups = int(arguments.get("num_position_groups", 4)) if by_position else _GROUPS[name]
        groups *= int(arguments.get("num_jackknife_groups", 2))
        best = max(best, (groups, len(arguments.get("sites", ["post"]))))
    return best


def _windows(content: Mapping[str, Any], steps: int) -> int:
    counts = [0]
    for _, arguments in _callbacks(content):
        stages = arguments.get("on", ["train"])
        if "train" in stages:
            counts.append(steps // int(arguments.get("every_n_steps", 200)) + 1)
        if "validation" in stages:
            counts.append(steps // int((content.get("eval") or {}).get("interval", 1000)) + 1)
    return max(counts)


def _rows_per_window(content: Mapping[str, Any], train: Mapping[str, Any], seq: int) -> float:
    share = max([float(arguments.get("token_fraction", 1.0)) for _, arguments in _callbacks(content)], default=0.0)
    return share * int(train.get("global_batch_size") or 512) * seq


def _optimizer_slots(content: Mapping[str, Any], hidden: float, parameters: float) -> float:
    """Numbers of optimizer state: two per weight for Adam, one per weight of a matrix rule."""
    spec = content.get("optimizer")
    path = str(spec.get("class_path") if isinstance(spec, Mapping) else spec or "AdamW")
    if path.rpartition(".")[2] in ("Muon", "NorMuon", "Dion"):
        return hidden + 2 * (parameters - hidden)
    return 2 * parameters
