"""Models of transformers and torch, tables and series among them, watched where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.scripts import toys
from tests.scripts.harness import Script
from tests.scripts.inputs import labelled
from tests.scripts.toys import Lit


def hugging_face(build: str, config: str, watch: str, step: Any, **sizes: Any) -> type[Lit]:
    class HuggingFace(Lit):
        def make(self) -> nn.Module:
            import transformers

            transformers.logging.set_verbosity_error()
            return getattr(transformers, build)(getattr(transformers, config)(**sizes))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return step(self, batch)

        def watched(self) -> nn.Module:
            return self.net.get_submodule(watch)

        def counted(self, rows: Tensor) -> Tensor:
            return rows if getattr(self, "mask", None) is None else rows[self.mask]

    return HuggingFace


SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
S2S = {
    "vocab_size": toys.V, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.1,
}  # fmt: skip


def of_t5(script: Lit, batch: Tensor) -> Tensor:
    return script.net(input_ids=batch[:, :8], labels=batch[:, 8:]).loss


def of_vit(script: Lit, batch: Any) -> Tensor:
    return script.net(pixel_values=batch[0], labels=batch[1]).loss


def of_whisper(script: Lit, batch: Any) -> Tensor:
    script.row_ids = F.pad(batch[1][:, :-1], (1, 0), value=1)
    return script.net(input_features=batch[0], labels=batch[1]).loss


def of_clip(script: Lit, batch: Any) -> Tensor:
    return script.net(input_ids=batch[1], pixel_values=batch[0], return_loss=True).loss


def of_patches(script: Lit, batch: Tensor) -> Tensor:
    return script.net(past_values=batch).last_hidden_state.square().mean()


def of_llama(script: Lit, batch: dict[str, Tensor]) -> Tensor:
    script.mask = batch["attention_mask"].bool()
    script.row_ids = batch["input_ids"][script.mask]
    return script.net(**batch).loss


T5 = hugging_face(
    "T5ForConditionalGeneration", "T5Config", "decoder.block.0.layer.2.DenseReluDense.wo", of_t5, vocab_size=toys.V,
    d_model=16, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0,
    dropout_rate=0.1,
)  # fmt: skip
VIT = hugging_face(
    "ViTForImageClassification", "ViTConfig", "vit.encoder.layer.0.output.dense", of_vit, image_size=8, patch_size=4,
    **SMALL,
)  # fmt: skip
WHISPER = hugging_face(
    "WhisperForConditionalGeneration", "WhisperConfig", "model.decoder.layers.0.fc2", of_whisper, num_mel_bins=4,
    max_source_positions=8, max_target_positions=32, **S2S,
)  # fmt: skip
PATCHES = hugging_face(
    "PatchTSTModel", "PatchTSTConfig", "encoder.layers.0.ff.3", of_patches, num_input_channels=2, context_length=16,
    patch_length=4, patch_stride=4, num_hidden_layers=2, d_model=16, num_attention_heads=2, ffn_dim=32,
)  # fmt: skip
LLAMA = hugging_face(
    "LlamaForCausalLM", "LlamaConfig", "model.layers.0.mlp.down_proj", of_llama, vocab_size=toys.V, hidden_size=16,
    intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
)  # fmt: skip


class Clip(Lit):
    def make(self) -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        sizes = {name: value for name, value in SMALL.items() if "prob" not in name} | {"projection_dim": 16}
        text = {**sizes, "vocab_size": toys.V, "max_position_embeddings": 32, "eos_token_id": 2}
        vision = {**sizes, "image_size": 8, "patch_size": 4}
        return transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.row_ids = batch[1]
        return of_clip(self, batch)

    def watched(self) -> nn.Module:
        return self.net.text_model.encoder.layers[0].mlp.fc2


class Tabular(Lit):
    """A perceptron, named by a glob."""

    def make(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def watched(self) -> nn.Module:
        return self.net[2]


class TimeSeries(Lit):
    """torch's encoder, time first, over numbers."""

    def make(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1)
        model = nn.ModuleDict({"into": nn.Linear(4, 16), "out": nn.Linear(16, 1)})
        model["encoder"] = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net["out"](self.net["encoder"](self.net["into"](batch[0].transpose(0, 1)))).square().mean()

    def watched(self) -> nn.Module:
        return self.net["encoder"].layers[0].linear2


def numbers(*shape: int, ids: bool = False) -> Any:
    """A loader of (numbers, classes or ids)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, *shape, generator=generator)
    y = toys.ids(64, toys.T) if ids else torch.randint(3, (64,), generator=generator)
    return lambda: (DataLoader(list(zip(x, y, strict=True)), batch_size=8),)


SCRIPTS = {
    "LLaMA, left padding": Script(LLAMA, labelled(True)),
    "T5's decoder": Script(T5, losses=False),
    "ViT": Script(VIT, numbers(3, 8, 8), losses=False),
    "Whisper": Script(WHISPER, numbers(4, 16, ids=True), losses=False),
    "CLIP": Script(Clip, numbers(3, 8, 8, ids=True), losses=False),
    "PatchTST": Script(
        PATCHES,
        lambda: (DataLoader(torch.randn(64, 16, 2, generator=torch.Generator().manual_seed(0)), batch_size=8),),
        losses=False,
    ),
    "tabular by glob": Script(Tabular, numbers(6), losses=False, settings={"modules": ["net.2", "net.4"]}),
    "time series, time first": Script(TimeSeries, numbers(12, 4), losses=False),
    "images by glob": Script(Tabular, numbers(6), losses=False, settings={"modules": ["net.0"]}, exact=False),
}
