"""The finished model in litgpt's format: ``lit_model.pth``, ``model_config.yaml``, tokenizer and recipe in a folder."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.model import GPT

from lightning_spectral.data.text_blocks import TextBlocks
from lightning_spectral.data.tokens import TOKENIZER_FILES
from lightning_spectral.gpt.architecture import Architecture, adapt_config, build_gpt
from lightning_spectral.gpt.module import LitGPT, load_weights
from lightning_spectral.models.checkpoint_file import read_checkpoint
from lightning_spectral.models.names import clean_name
from lightning_spectral.text import read_settings, whole_file, write_text


def save_final(
    trainer: pl.Trainer,
    module: LitGPT,
    data: DataModule,
    tokenizer_dir: Path | None,
    folder: Path,
    recipe: str,
) -> None:
    """Write a folder that litgpt loads (``LLM.load(folder)``); every rank must call it.

    A model that litgpt cannot build (ReLU^2, norms without parameters, PostLN) gets an ``architecture`` block in
    ``model_config.yaml``: litgpt then refuses the folder instead of computing something else; :func:`load_final` reads
    both.
    """
    weights = full_weights(module, trainer.strategy)
    if not trainer.is_global_zero:
        return
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = asdict(module.config)
    if not module.architecture.is_plain():
        config["architecture"] = asdict(module.architecture)
    write_text(folder / "model_config.yaml", yaml.safe_dump(config))
    write_text(folder / "hyperparameters.yaml", recipe)
    source = data.tokenizer_folder if isinstance(data, TextBlocks) else tokenizer_dir
    for name in TOKENIZER_FILES:
        if source is not None and (source / name).is_file():
            shutil.copy(source / name, folder)
    with whole_file(folder / "lit_model.pth") as partial:  # last: a folder with weights is a whole one
        torch.save(weights, partial)


def full_weights(module: LitGPT, strategy: Strategy | None = None) -> dict[str, torch.Tensor]:
    """The GPT's state dict on the CPU, gathered if it is sharded (a collective then)."""
    assert module.model is not None
    if isinstance(strategy, FSDPStrategy):
        assert strategy.model is not None
        from torch.distributed.fsdp import FullyShardedDataParallel

        assert strategy.model is not None
        with FullyShardedDataParallel.summon_full_params(strategy.model, writeback=False):
            whole = {clean_name(name): value.detach().cpu().clone() for name, value in module.model.named_parameters()}
            kept = {clean_name(name): value.detach().cpu().clone() for name, value in module.model.named_buffers()}
        names = build_gpt_names(module)
        return {name: value for name, value in {**whole, **kept}.items() if name in names}
    if module.device_mesh is None:
        return {name: value.detach().cpu() for name, value in module.model.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(module.model, options=options)
    return weights


def build_gpt_names(module: LitGPT) -> set[str]:
    """Names of the state dict that litgpt expects."""
    with torch.device("meta"):
        return set(GPT(module.config).state_dict())


def load_final(folder: str | Path) -> GPT:
    """The GPT of a ``final/`` folder, whatever its architecture.

    Raises:
        FileNotFoundError: If the folder holds no model.
        ValueError: If weights and config do not fit.
    """
    folder = Path(folder)
    if not (folder / "model_config.yaml").exists():
        raise FileNotFoundError(f"`{folder}` holds no model: there is no `model_config.yaml` in it.")
    read_checkpoint(folder / "lit_model.pth", device="meta")  # a torn file is said before a large model is built
    content = read_settings(folder / "model_config.yaml")
    architecture = Architecture(**content.pop("architecture", {}))
    model = build_gpt(adapt_config(Config(**content), architecture), architecture, seed=0)
    load_weights(model, folder / "lit_model.pth")
    return model
