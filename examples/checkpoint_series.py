"""Laws of a family of models without a training loop of its own: train three small ones, keep steps, measure them all.

For public models leave the training out: `lightning-spectral measure "hub/pythia-*/step*" --data text.txt --out out`.
"""

import json
import shutil
import sys
from pathlib import Path

from lightning_spectral import cli
from lightning_spectral.training.pretrain import run
from lightning_spectral.training.recipe import load

OUT = Path("out/checkpoint_series")
WIDTHS, STEPS = (64, 128, 256), (8, 16)
MODEL = {
    "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32, "norm_class_name": "RMSNorm", "bias": False,
    "parallel_residual": False, "rotary_percentage": 1.0,
}  # fmt: skip


def train(text: str, width: int, steps: int) -> Path:
    """A tiny GPT after so many steps, in litgpt's format."""
    recipe = {
        "model_name": f"width_{width}",
        "model_config": {**MODEL, "intermediate_size": width},
        "data": {"class_path": "lightning_spectral.data.TextFiles", "init_args": {"path": text, "vocab_size": 300}},
        "out_dir": str(OUT / "runs" / f"{width}_{steps}"),
        "train": {"global_batch_size": 8, "micro_batch_size": 8, "max_tokens": None, "max_steps": steps},
        "eval": {"max_iters": 1},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.003}},
        "precision": "32-true",
        "accelerator": "cpu",
        "devices": 1,
        "logger_name": "csv",
    }
    (OUT / "recipe.json").write_text(json.dumps(recipe))
    return run(load(OUT / "recipe.json"), progress_bar=False) / "final"


def main(text: str) -> None:
    """Train, measure, fit."""
    OUT.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        for steps in STEPS:
            kept = OUT / "checkpoints" / f"width_{width}" / f"step-{steps}"
            if not kept.exists():
                shutil.copytree(train(text, width, steps), kept)
    series = [str(OUT / "checkpoints" / "*" / "step-*"), "--data", text, "--out", str(OUT / "measured")]
    assert cli.main(["measure", *series, "--tokens", "2048", "--seq_length", "32"]) == 0
    assert cli.main(["fit", *map(str, sorted((OUT / "measured").iterdir()))]) == 0


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "README.md")
