"""A tiny text and a tiny recipe: seconds on one core."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

# Lightning and torch say these on every run; each is about a choice that the tests make on purpose
LIGHTNING_WARNINGS = [
    "ignore:.*LeafSpec.*:FutureWarning",  # lightning 2.6 on torch 2.13
    "ignore:.*does not have many workers.*",  # blocks are memory-mapped, workers only cost
    "ignore:.*lr_warmup_steps. should be less.*:UserWarning",  # litgpt, on its own defaults
    "ignore:.*number of training batches.*smaller than the logging interval.*",
    "ignore:.*fewer than the .* of one optimizer step.*",
    "ignore:.*Checkpoint directory .* exists and is not empty.*",
]


def tiny_text(num_words: int = 6000, seed: int = 0) -> str:
    """Words of Zipf-like frequency, lines of ten."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(200)]
    drawn = rng.choices(words, weights, k=num_words)
    return "\n".join(" ".join(drawn[start : start + 10]) for start in range(0, num_words, 10))


def write_text(folder: Path, num_words: int = 6000) -> Path:
    """``folder/text.txt``."""
    path = folder / "text.txt"
    path.write_text(tiny_text(num_words))
    return path


def tiny_tree(folder: Path) -> dict[str, Any]:
    """A recipe's tree: 2 layers of width 16, 12 steps of 4 sequences of 16 tokens."""
    return {
        "model_name": "tiny",
        "model_config": {
            "block_size": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 16,
            "norm_class_name": "RMSNorm",
            "parallel_residual": False,
            "rotary_percentage": 1.0,
            "bias": False,
        },
        "out_dir": str(folder / "run"),
        "precision": "32-true",
        "data": {
            "class_path": "lightning_spectral.data.TextFiles",
            "init_args": {
                "path": str(write_text(folder)),
                "vocab_size": 300,
                "cache_dir": str(folder / "cache"),
            },
        },
        "train": {
            "save_interval": 4,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "lr_warmup_steps": 2,
            "max_tokens": None,
            "max_steps": 12,
            "max_seq_length": 16,
            "max_norm": 1.0,
            "min_lr": 1e-4,
        },
        "eval": {"interval": 6, "max_iters": 2},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "devices": 1,
        "accelerator": "cpu",
        "logger_name": "csv",
        "seed": 7,
    }


def write_recipe(folder: Path, tree: dict[str, Any] | None = None) -> Path:
    """``folder/recipe.yaml`` of a tree; default: the tiny one."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree or tiny_tree(folder)))
    return path
