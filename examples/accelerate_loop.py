"""Accelerate: the model is observed before it is prepared, the optimizer's steps are followed.

accelerate launch examples/accelerate_loop.py [TEXT]
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lightning_spectral import observe

text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_bytes()
sequences = torch.tensor(list(text))[: len(text) // 65 * 65].view(-1, 65)  # a token is a byte

if __name__ == "__main__":
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    size = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=256, max_position_embeddings=64, **size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(sequences, batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with observe(model, every_n_steps=5, out="out/examples/accelerate", num_steps=10) as probe:
        batches = (batch for _ in range(100) for batch in loader)
        while probe.num_steps < 10:
            with accelerator.accumulate(model):
                batch = next(batches)
                logits = model(batch[:, :-1]).logits
                loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:  # an optimizer step was made
                probe.step()
    print({name: round(value, 2) for name, value in probe.latest.items() if "hard" in name})
