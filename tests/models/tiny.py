"""Tiny decoders of every family, and data for them."""

from __future__ import annotations

import torch
from litgpt import GPT, Config

VOCAB = 64


def litgpt(mlp: str = "GptNeoxMLP", **changes) -> GPT:
    extra = {}
    if mlp in ("LLaMAMLP", "GemmaMLP"):
        extra = {"intermediate_size": 48}
    elif mlp == "LLaMAMoE":
        extra = {"intermediate_size": 48, "moe_intermediate_size": 24, "n_expert": 4, "n_expert_per_token": 2}
    options = {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": VOCAB, "padded_vocab_size": VOCAB, "block_size": 32,
        "mlp_class_name": mlp, "norm_class_name": "RMSNorm", "bias": False,
    }  # fmt: skip
    return GPT(Config(**{**options, **extra, **changes}))


def hugging_face(name: str) -> torch.nn.Module:
    import transformers

    wide = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 2}
    small = {"vocab_size": VOCAB, "max_position_embeddings": 32}
    keys = {"num_key_value_heads": 2}
    no_special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    configs = {
        "gpt2": lambda: transformers.GPT2Config(
            n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=VOCAB, **no_special
        ),
        "llama": lambda: transformers.LlamaConfig(**wide, **small, **keys, **no_special),
        "mistral": lambda: transformers.MistralConfig(**wide, **small, **keys, **no_special),
        "qwen2": lambda: transformers.Qwen2Config(**wide, **small, **keys, **no_special),
        "qwen3": lambda: transformers.Qwen3Config(**wide, **small, **keys, head_dim=8, **no_special),
        "pythia": lambda: transformers.GPTNeoXConfig(**wide, **small, **no_special),
        "phi": lambda: transformers.PhiConfig(**wide, **small, **no_special),
        "opt": lambda: transformers.OPTConfig(
            hidden_size=16, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16, **small,
            **{**no_special, "pad_token_id": 1},
        ),
    }  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(configs[name]())


def ids(batch: int = 3, length: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) ** 3 * VOCAB).long()
