"""A Fabric loop: the probe is one of its callbacks, the loop stays as it is.

python examples/fabric_loop.py [TEXT]
"""

import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_spectral import FabricSpectralProbe, Muon, TailTokenProbe

text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_bytes()
sequences = torch.tensor(list(text))[: len(text) // 65 * 65].view(-1, 65)  # a token is a byte
counts = torch.bincount(sequences.flatten(), minlength=256)

probe = FabricSpectralProbe(TailTokenProbe(every_n_steps=10, counts=counts), num_steps=20)
logger = CSVLogger("out/examples", name="fabric_loop")
fabric = Fabric(accelerator="cpu", devices=1, callbacks=[probe], loggers=[logger])
fabric.seed_everything(0)

config = LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
model = LlamaForCausalLM(config)
model, optimizer = fabric.setup(model, Muon(model, lr=3e-3))
loader = fabric.setup_dataloaders(DataLoader(sequences, batch_size=16))

step = 0
while step < 20:
    for batch in loader:
        logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == 20:
            break
probe.remove()
print(f"loss {loss.item():.2f};", {name: round(value, 2) for name, value in probe.latest.items() if "hard" in name})
