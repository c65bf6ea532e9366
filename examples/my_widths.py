"""Muon against AdamW over four widths in a loop of one's own: exponents, their difference, and what is missing.

python examples/my_widths.py [TEXT]

One seed and four widths show how it goes; the last table says how many seeds or widths would tell slopes .3 apart.
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_spectral import AdamW, Muon, observe
from lightning_spectral.cli import main

text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_bytes()
sequences = torch.tensor(list(text))[: len(text) // 65 * 65].view(-1, 65)  # a token is a byte
counts = torch.bincount(sequences.flatten(), minlength=256)  # over all that is trained on, the same for every run
OUT, STEPS, SEEDS, WIDTHS = Path("out/examples/my_widths"), 20, (0,), (64, 96, 128, 192)


def train(kind: type[torch.optim.Optimizer], width: int, seed: int) -> None:
    """One run in one folder; only `width`, the hidden size D of the feed-forward network, and the rule differ."""
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": width}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, pad_token_id=0, **size))
    optimizer = kind(model, lr=3e-3)
    name = kind.__name__.lower()
    labels = {"optimizer": name, "seed": str(seed)}  # by these runs are told apart
    with observe(model, 5, out=OUT / f"{name}-{width}-{seed}", counts=counts, num_steps=STEPS, labels=labels) as probe:
        for _ in range(STEPS):
            batch = sequences[torch.randint(len(sequences), (32,))]
            F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step()


if __name__ == "__main__":
    for rule in (AdamW, Muon):
        for ffn_width in WIDTHS:
            for one in SEEDS:
                train(rule, ffn_width, one)
    runs = [str(OUT), "--last", "1"]  # in a terminal: lightning-spectral fit out/examples/my_widths --last 1
    raise SystemExit(main(["fit", *runs]) or main(["compare", *runs]) or main(["power", *runs, "--amount", ".3"]))
