"""Ranks of a public model over its training, without training anything: checkpoints, one row each.

python examples/public_checkpoint.py my_book.txt EleutherAI/pythia-14m@step1000 EleutherAI/pythia-14m@step143000
python examples/public_checkpoint.py my_book.txt folder/step-1000 folder/step-2000
"""

import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from lightning_spectral import read_spectral
from lightning_spectral.cli import main


def local(name: str) -> str:
    """A folder stays what it is; `repository@revision` is downloaded."""
    if Path(name).is_dir():
        return name
    repository, _, revision = name.partition("@")
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    return snapshot_download(repository, revision=revision or None, allow_patterns=wanted)


if __name__ == "__main__":
    text, *checkpoints = sys.argv[1:]
    for place, name in enumerate(checkpoints):
        out = Path("out/examples/public_checkpoint") / f"{place:03d}"
        if main(["measure", local(name), "--data", text, "--tokens", "4096", "--out", str(out)]) != 0:
            raise SystemExit(1)
        pooled = [record for record in read_spectral(out).records if record.bucket == "pooled"]
        for record in pooled:
            print(
                f"{name}: layer {record.layer}, D = {record.width}, hard rank {record.hard_rank:.1f}, {record.status}"
            )
