"""Which files of a Hugging Face folder hold the model, and what is said where they are not whole or no numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_spectral.training.load_checkpoint import load_checkpoint

transformers = pytest.importorskip("transformers")
IDS = torch.arange(20).view(2, 10)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def of_config(**options: Any) -> Path:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=16, intermediate_size=48, num_attention_heads=2, vocab_size=300,
            max_position_embeddings=32, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf", **options)
        return tmp_path / "hf"

    return of_config


def logits(folder: Path, stream_weights: bool) -> torch.Tensor:
    with torch.no_grad():
        model = load_checkpoint(folder, stream_weights=stream_weights).on(torch.device("cpu"))
        found: torch.Tensor = model(IDS).logits
        return found


def set_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "sharded"])
def test_what_lies_beside_the_models_files_is_not_the_model(options: dict[str, str], save: Callable[..., Path]) -> None:
    folder = save(**options)
    before = logits(folder, True)
    torch.testing.assert_close(before, logits(folder, False), rtol=0, atol=0)  # the same fp32 numbers
    other = {name: 5 * one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}
    save_file(other, folder / "zzz.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits(folder, True), before, rtol=0, atol=0)  # nothing else is read


def test_shards_without_an_index_that_hold_a_weight_twice_are_refused(save: Callable[..., Path]) -> None:
    folder = save(max_shard_size="20KB")
    (folder / "model.safetensors.index.json").unlink()
    last = sorted(folder.glob("*.safetensors"))[-1]
    (folder / "old.safetensors").write_bytes(last.read_bytes())
    with pytest.raises(ValueError, match=rf"is in `{last.name}` and in `old.safetensors`: remove one of them"):
        load_checkpoint(folder, stream_weights=True)


@pytest.mark.parametrize("stream_weights", [True, False])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("missing", "`model-00002-of-.*` is not there, and `model.safetensors.index.json` names it"),
        ("index", "`model.safetensors.index.json` is no index of weights"),
        ("elsewhere", "`../model-00001.safetensors` is not there"),
        ("pointer", "model-00002-of-.* stands for a file that was not downloaded"),
    ],
)
def test_a_shard_that_is_not_there_is_named(
    harm: str, message: str, stream_weights: bool, save: Callable[..., Path]
) -> None:
    folder = save(max_shard_size="20KB")
    shard, index = sorted(folder.glob("*.safetensors"))[1], folder / "model.safetensors.index.json"
    if harm == "missing":
        shard.unlink()
    elif harm == "index":
        index.write_text("[]")
    elif harm == "elsewhere":
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../model-00001.safetensors"}}))
    else:
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, stream_weights=stream_weights)


@pytest.mark.parametrize("stream_weights", [True, False])
@pytest.mark.parametrize(("kind", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_codes_are_no_weights(kind: torch.dtype, name: str, stream_weights: bool, save: Callable[..., Path]) -> None:
    """They used to be measured as if they were the numbers."""
    folder = save()
    weights = load_file(folder / "model.safetensors")
    coded = {key: (100 * one).to(kind) if "proj" in key else one for key, one in weights.items()}
    save_file(coded, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"is stored as {name}, and `config.json` says no `quantization_config`"):
        load_checkpoint(folder, stream_weights=stream_weights)


def test_quantised_weights_are_not_streamed(save: Callable[..., Path]) -> None:
    folder = save()
    set_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ValueError, match="cannot be read block by block"):
        load_checkpoint(folder, stream_weights=True)


def test_a_config_of_another_vocabulary_is_told_by_the_shapes(save: Callable[..., Path]) -> None:
    folder = save()
    set_config(folder, vocab_size=310)
    with pytest.raises(ValueError, match=r"`lm_head.weight` is \(300, 16\) in its files and \(310, 16\) by the config"):
        load_checkpoint(folder)


def test_a_package_that_is_not_installed_is_one_sentence(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of FP8 models without triton."""
    folder = save()

    def refuse(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="cannot be read \\(No module named 'triton'\\)"):
        load_checkpoint(folder)


class WithBuffer(transformers.LlamaForCausalLM):  # type: ignore[misc,name-defined]
    """A buffer that is part of the checkpoint, as the biases of a router are."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.scale
        return out


def test_buffers_of_the_checkpoint_are_read_too(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save()
    plain = logits(folder, True)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "scale": torch.tensor(3.0)}, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", lambda config, **_: WithBuffer(config))
    torch.testing.assert_close(logits(folder, True), 3 * plain, rtol=1e-6, atol=0)  # one rounding in fp32
