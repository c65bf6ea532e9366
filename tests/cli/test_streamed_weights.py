"""Weights read block by block: the same records, one block in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lightning_spectral import cli, read_spectral
from lightning_spectral.models.stacks import find_stacks
from lightning_spectral.models.streamed import SafetensorsFiles
from lightning_spectral.training.load_checkpoint import load_checkpoint
from tests.cli.test_measure import hugging_face, text, trained, words  # noqa: F401
from tests.models import tiny
from tests.tiny import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(one) for one in LIGHTNING_WARNINGS]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "pythia", "phi", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_the_whole_model(tmp_path, name, dtype):
    torch.manual_seed(0)
    tiny.hugging_face(name).to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")  # several files
    ids = tiny.ids()
    with torch.no_grad():
        whole = load_checkpoint(tmp_path, stream_weights=False).on(CPU)(ids).logits
        loaded = load_checkpoint(tmp_path, stream_weights=True)
        streamed = loaded.on(CPU)
        assert torch.equal(streamed(ids).logits, whole)
        assert torch.equal(streamed(ids).logits, whole)  # and again


def held(modules) -> int:
    """Bytes of storage behind the parameters, each counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in modules for p in m.parameters()}
    return sum(storages.values())


def test_one_block_is_in_memory_at_a_time(tmp_path):
    torch.manual_seed(0)
    tiny.hugging_face("llama").save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path, stream_weights=True).on(CPU)
    blocks = [block for stack in find_stacks(model).stacks for _, block in stack.blocks]
    one = sum(p.numel() for p in blocks[0].parameters()) * 4
    seen = []
    for block in blocks:
        block.mlp.register_forward_hook(lambda *_: seen.append(held(blocks)))
    model(tiny.ids())
    assert all(one <= found < 1.3 * one for found in seen), (seen, one)
    assert held(blocks) < 0.1 * one
    blocks[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a block that fails lets go, too
        model(tiny.ids())
    assert held(blocks) < 0.1 * one


def test_measure_writes_the_same_records(hugging_face, text, tmp_path):  # noqa: F811
    records = []
    for name, more in (("whole", ()), ("streamed", ("--stream_weights",))):
        assert cli.main(["measure", str(hugging_face), *words(text, tmp_path / name, "--batch_size", "4", *more)]) == 0
        found = read_spectral(tmp_path / name).records
        records.append([(r.layer, r.site, r.bucket, r.status, r.num_tokens, r.soft_rank, r.hard_rank) for r in found])
    assert records[0] == records[1]
    assert records[0]


def test_what_cannot_be_streamed_is_said(trained, hugging_face, text, tmp_path, capsys):  # noqa: F811
    assert cli.main(["measure", str(trained / "final"), *words(text, tmp_path / "a", "--stream_weights")]) == 2
    assert "`--stream_weights` is for Hugging Face folders" in capsys.readouterr().err
    broken = Path(shutil.copytree(hugging_face, tmp_path / "broken"))
    files = SafetensorsFiles(broken)
    from safetensors.torch import save_file

    save_file({name: files(name) for name in files.names if "layers.1.mlp.up" not in name}, broken / "x.safetensors")
    (broken / "model.safetensors").unlink()
    assert cli.main(["measure", str(broken), *words(text, tmp_path / "b", "--stream_weights")]) == 2
    assert "cannot be read block by block" in capsys.readouterr().err
