"""The Trainer's parts that a recipe names: strategy and logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from litgpt.model import Block

from lightning_spectral.text import import_class, one_line
from lightning_spectral.text.packages import why_missing
from lightning_spectral.training.devices import check_strategy, spread_of
from lightning_spectral.training.document import RecipeError


def is_absent(kind: str) -> bool:
    """Whether torch sees no accelerator of a kind that Lightning knows."""
    return not AcceleratorRegistry[kind]["accelerator"].is_available()


class HybridShardStrategy(ModelParallelStrategy):
    """FSDP2 inside each group of ranks, copies between the groups.

    Args:
        num_replicas: Copies of the weights.
        world_size: Ranks.
    """

    def __init__(self, num_replicas: int, world_size: int) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1)
        self.num_replicas = num_replicas


def make_strategy(wanted: Any, world_size: int) -> str | Strategy:
    """``strategy:`` of a recipe: a Lightning name, one of ours, or ``{class_path, init_args}``.

    Ours: ``fsdp1``, ``fsdp2``; ``hsdp:2``, FSDP2 in two groups of ranks that hold a copy each; ``tp:2``, feed-forward
    networks in two slices, FSDP2 over the rest of the ranks.

    Raises:
        RecipeError: If it cannot be made.
    """
    check_strategy(wanted)
    spread = spread_of(wanted)
    shards = spread.data_parallel(world_size)
    if spread.kind == "fsdp1":
        return FSDPStrategy(auto_wrap_policy={Block}, state_dict_type="sharded")
    if spread.kind == "hsdp":
        return HybridShardStrategy(spread.number, world_size)
    if spread.kind:
        return ModelParallelStrategy(data_parallel_size=shards, tensor_parallel_size=spread.number)
    if isinstance(wanted, dict):
        try:
            kind = import_class(str(wanted.get("class_path")), subclass_of=Strategy)  # checked before it is built
            made: Strategy = kind(**(wanted.get("init_args") or {}))
        except (ImportError, TypeError, ValueError) as error:
            raise RecipeError(f"`strategy: {wanted}` cannot be made: {one_line(error)}") from error
        return made
    return str(wanted)


def refuse_parts(checkpoint: Path | None, strategy: Strategy, wanted: Any) -> None:
    """Refuse a checkpoint of shards, which is a folder, under a strategy that does not shard.

    Raises:
        RecipeError: With the remedy.
    """
    reads_parts = isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy))
    if checkpoint is not None and checkpoint.is_dir() and not reads_parts:
        raise RecipeError(
            f"`{checkpoint}` is a checkpoint in parts, which `strategy: {wanted}` cannot read: go on under one that "
            "divides the weights, such as the one that wrote it; the number of devices may be another."
        )


def make_logger(content: dict[str, Any], out_dir: Path, *, resuming: bool) -> Logger:
    """``logger_name:`` of a recipe, under ``out_dir/logs``; a resumed TensorBoard run goes on in its folder.

    Raises:
        RecipeError: If the logger's package is not installed.
    """
    kind, logs, log = content["logger_name"], out_dir / "logs", content["log"]
    version = _last_version(logs / kind) if resuming else None
    name = f"pretrain-{content['model_name']}"
    logger: Logger
    if kind == "tensorboard":
        return TensorBoardLogger(logs, name=kind, version=version, default_hp_metric=False)
    if kind == "csv":
        # Lightning's CSVLogger wipes an existing version: a resumed run gets its own
        return CSVLogger(logs, name=kind, flush_logs_every_n_steps=content["train"]["log_interval"])
    try:
        if kind == "wandb":
            return WandbLogger(project=log["project"] or name, name=log["run"], group=log["group"], save_dir=logs)
        if kind == "mlflow":
            return MLFlowLogger(experiment_name=name, save_dir=str(logs))
        from lightning.pytorch.loggers import LitLogger

        settings = {key: log[key] for key in ("teamspace", "metadata", "log_model", "save_logs", "checkpoint_name")}
        logger = LitLogger(root_dir=logs, name=name, **settings)  # type: ignore[assignment]
        return logger
    except ModuleNotFoundError as error:
        raise RecipeError(f"`logger_name: {kind}`: {why_missing(error.name or kind)}") from error


def _last_version(folder: Path) -> int | None:
    numbers = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    return max((int(number) for number in numbers if number.isdigit()), default=None)
