"""Hugging Face's Trainer: one of its callbacks, and our optimizer.

python examples/huggingface_trainer.py [TEXT]
"""

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lightning_spectral import HuggingFaceProbe, Muon

text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_bytes()
sequences = torch.tensor(list(text))[: len(text) // 64 * 64].view(-1, 64)  # a token is a byte
dataset = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]

if __name__ == "__main__":
    model = GPT2LMHeadModel(GPT2Config(256, 64, 32, 2, 2, bos_token_id=0, eos_token_id=0))
    optimizer = Muon(model, lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = TrainingArguments(
        output_dir="out/examples/huggingface",
        max_steps=20,
        per_device_train_batch_size=16,
        logging_steps=10,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    probe = HuggingFaceProbe(every_n_steps=10, counts=torch.bincount(sequences.flatten(), minlength=256))
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[probe], optimizers=(optimizer, schedule))
    trainer.train()
    print({name: round(value, 2) for name, value in probe.latest.items() if "hard" in name})
