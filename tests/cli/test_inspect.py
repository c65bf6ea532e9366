from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from lightning_spectral.cli import inspect
from lightning_spectral.functional.packed import packed_size
from lightning_spectral.text import CommandError
from tests.models import tiny

SMALL = ["n_layer=3", "n_head=2", "n_embd=16", "n_inner=48", "vocab_size=64"]


def rows_of(capsys, *arguments):
    assert inspect.main(["--format", "json", *arguments]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.out + captured.err


def test_stacks_sites_and_memory_of_a_hugging_face_type(capsys):
    rows, text = rows_of(capsys, "gpt2", "--model-args", *SMALL, "--sites", "post", "pre")
    shown = [(row["stack"], row["site"], row["module"], row["blocks"], row["width"]) for row in rows]
    assert shown == [
        ("transformer.h", "post", "mlp.c_proj", "3 of 3", 48),
        ("transformer.h", "pre", "mlp.c_fc", "3 of 3", 48),
    ]
    assert "`transformer.wte`" in text
    assert [row["layout"] for row in rows] == ["(B, T)", "(B, T)"]  # proven without any block
    # 3 buckets in 2 groups of sequences, 3 layers, a width of 48: packed in blocks, in fp32
    assert rows[0]["MiB in a window"] == 3 * 2 * 3 * 4 * packed_size(48) / 2**20


def test_what_is_not_measured_is_said(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self, with_mlp):\n"
        "        super().__init__()\n"
        "        self.norm, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)\n"
        "        if with_mlp:\n"
        "            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)\n"
        "        else:\n"
        "            self.one, self.two = nn.Linear(8, 5), nn.Linear(6, 8)\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.blocks = nn.ModuleList(Block(n != 1) for n in range(3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows, text = rows_of(capsys, "my_net.Net")
    assert [(row["stack"], row["module"], row["blocks"]) for row in rows] == [("blocks", "down", "2 of 3")]
    assert "token ids: none: pooled ranks only" in text
    assert "not measured: 1 of 3 blocks of `blocks`" in text
    assert "blocks.1" in text


def test_a_recipe_comes_with_its_callbacks_arguments(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model_name: mine\n"
        "model_config: {block_size: 32, n_layer: 2, n_head: 2, n_embd: 16, vocab_size: 64, padded_vocab_size: 64}\n"
        "architecture: {ffn_multiplier: 3}\n"
        "data: text.txt\n"
        "callbacks: [{class_path: SpectralRankCallback, init_args: {sites: [pre]}}]\n"
    )
    rows, _ = rows_of(capsys, str(tmp_path / "recipe.yaml"))
    assert [(row["stack"], row["site"], row["module"], row["width"], row["layout"]) for row in rows] == [
        ("transformer.h", "pre", "mlp.fc", 48, "(B, T)")
    ]


def test_a_litgpt_folder(capsys, tmp_path):
    (tmp_path / "model_config.yaml").write_text("{n_layer: 2, n_head: 2, n_embd: 16, padded_vocab_size: 64}")
    (row,), _ = rows_of(capsys, str(tmp_path))
    assert (row["module"], row["blocks"], row["width"]) == ("mlp.proj", "2 of 2", 64)


def test_a_hugging_face_folder_by_its_own_architecture(capsys, tmp_path):
    import transformers

    from tests.models.architectures import BERT

    transformers.BertConfig(**BERT, architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    (row,), _ = rows_of(capsys, str(tmp_path))
    assert (row["stack"], row["module"], row["width"]) == ("bert.encoder.layer", "output.dense", 48)


def test_a_folder_of_unknown_code_is_read_by_its_weights(capsys, tmp_path):
    model = tiny.hugging_face("llama")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows_it"}')
    (row,), text = rows_of(capsys, str(tmp_path))
    assert (row["stack"], row["module"], row["blocks"], row["width"]) == ("model.layers", "mlp.down_proj", "2 of 2", 48)
    assert "nobody_knows_it" in text
    assert "names and shapes of its weights" in text


CLASS = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, width=40):
        super().__init__()
        self.tok = nn.Embedding(64, 16)
        made = [nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 16)) for _ in range(2)]
        self.blocks = nn.ModuleList(made)
    def forward(self, ids):
        x = self.tok(ids).transpose(0, 1)
        for block in self.blocks:
            x = x + block(x)
        return x @ self.tok.weight.T
"""


@pytest.mark.parametrize("hparams", [None, {"_class_path": "my_lit_net.Net", "width": 24}, {"_class_path": "gone.Net"}])
def test_a_lightning_checkpoint_is_read_by_its_weights_and_runs_no_class(capsys, tmp_path, monkeypatch, hparams):
    (tmp_path / "my_lit_net.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n{CLASS}")
    monkeypatch.syspath_prepend(tmp_path)
    names = {"model.tok.weight": (64, 16)}
    for n in range(2):
        names |= {f"model.blocks.{n}.0.weight": (40, 16), f"model.blocks.{n}.2.weight": (16, 40)}
    content = {"state_dict": {name: torch.zeros(shape) for name, shape in names.items()}, "hyper_parameters": hparams}
    torch.save(content, tmp_path / "last.ckpt")
    (row,), text = rows_of(capsys, str(tmp_path / "last.ckpt"))
    assert (row["width"], row["layout"]) == (40, None)
    assert "names and shapes of its weights" in text
    words = " ".join(text.split())
    assert ("inspect my_lit_net.Net --model-args width=24" in words) == (hparams is not None and "width" in hparams)
    assert not (tmp_path / "executed").exists()


def test_a_class_of_a_file(capsys, tmp_path):
    (tmp_path / "train_it.py").write_text(
        CLASS + "\nif __name__ == '__main__':\n    raise SystemExit('not to be run')\n"
    )
    (row,), _ = rows_of(capsys, f"{tmp_path / 'train_it.py'}:Net", "--model-args", "width=24")
    assert (row["stack"], row["width"], row["layout"]) == ("blocks", 24, "(T, B)")


LOOP = """
import sys
print("the script speaks")
model = Net(int(sys.argv[1]))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = [p.clone() for p in model.parameters()]
logits = model(torch.randint(1, 60, (3, 9)))
torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 60, (27,))).backward()
open(sys.argv[2], "w").write("went on")
"""

TRAINER = """
import lightning.pytorch as pl
class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()
    def training_step(self, batch, index):  # only parts are called, the model itself never
        x = self.net.tok(batch)
        for block in self.net.blocks:
            x = block(x)
        return x.square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
trainer = pl.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
trainer.fit(Lit(), torch.utils.data.DataLoader(torch.randint(1, 60, (8, 9)), batch_size=4))
open(__file__ + ".done", "w").write("went on")
"""


def test_a_script_is_run_until_it_goes_backward(capsys, tmp_path):
    (tmp_path / "train.py").write_text(CLASS + LOOP)
    before = torch.Tensor.backward
    (row,), text = rows_of(capsys, str(tmp_path / "train.py"), "--", "24", str(tmp_path / "done"))
    assert (row["stack"], row["module"], row["width"], row["layout"]) == ("blocks", "2", 24, "(T, B)")
    assert "the script speaks" in text
    assert not (tmp_path / "done").exists()
    assert torch.Tensor.backward is before


def test_a_script_with_a_trainer_of_which_only_parts_are_called(capsys, tmp_path):
    (tmp_path / "train.py").write_text(CLASS + TRAINER)
    (row,), _ = rows_of(capsys, str(tmp_path / "train.py"))
    assert (row["stack"], row["width"], row["layout"]) == ("net.blocks", 40, "(B, T)")
    assert not (tmp_path / "train.py.done").exists()


MEASURES = """
import os
from lightning_spectral import observe
assert os.environ["WANDB_MODE"] == "disabled"
model = Net()
with observe(model, every_n_steps=1, out="here") as probe:
    model(torch.randint(1, 60, (3, 9))).square().mean().backward()
"""

MEASURES_IN_A_TRAINER = """
import lightning.pytorch as pl
from pathlib import Path
from lightning_spectral import SpectralRankCallback, TailTokenProbe, WeightSpectrumCallback
class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()
    def on_fit_start(self):
        Path(self.logger.log_dir, "config.txt").write_text(str(self.trainer.log_dir))
    def training_step(self, batch, index):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
kinds = [SpectralRankCallback, WeightSpectrumCallback, lambda **args: TailTokenProbe(counts="stream", **args)]
trainer = pl.Trainer(max_steps=3, accelerator="cpu", callbacks=[kind(every_n_steps=1, ARGS) for kind in kinds])
trainer.fit(Lit(), torch.utils.data.DataLoader(torch.randint(1, 60, (8, 9)), batch_size=4))
"""


@pytest.mark.parametrize(
    "script",
    [MEASURES, MEASURES_IN_A_TRAINER.replace("ARGS", ""), MEASURES_IN_A_TRAINER.replace("ARGS", 'dirpath="here"')],
)
def test_a_script_that_measures_already_leaves_every_folder_as_it_was(capsys, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "train.py").write_text(CLASS + script)
    earlier = tmp_path / "here" / "spectral.jsonl"
    earlier.parent.mkdir()
    earlier.write_text("of an earlier run\n")
    (tmp_path / "here" / "run.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    (row,), _ = rows_of(capsys, str(tmp_path / "train.py"))
    assert (row["width"], row["layout"]) == (40, "(T, B)")
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before
    assert earlier.read_text() == "of an earlier run\n"
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize(
    ("end", "message"),
    [("", "no module was called"), ("1 / 0", "it ended in ZeroDivisionError"), ("raise SystemExit(3)", "exit code 3")],
)
def test_a_script_without_a_model_says_why(tmp_path, end, message):
    (tmp_path / "train.py").write_text(end)
    with pytest.raises(CommandError, match=message):
        inspect.main([str(tmp_path / "train.py")])


def test_what_fits_into_a_limit_is_what_the_probe_would_choose(capsys):
    inspect.main(["gpt2", "--model-args", *SMALL, "--memory-limit-mib", "1e6"])
    assert "on 1 rank(s) with bf16 rows: all rows, " in capsys.readouterr().out
    inspect.main(["Llama-3.1-8B", "--memory-limit-mib", "2048", "--ranks", "8"])
    said = capsys.readouterr().out
    # 32 layers x 14,336 features x 512 rows a rank x 2 bytes, twice, and one layer's rows with their products: 1,824
    assert "on 8 rank(s) with bf16 rows: an even sample of 4,096 rows per window, 1,824 of 2,048 MiB" in said
    inspect.main(["Llama-3.1-8B", "--memory-limit-mib", "64"])
    assert "64 MiB do not do, 256 rows take " in capsys.readouterr().out


def test_bad_input_is_one_sentence():
    with pytest.raises(CommandError, match="`--ranks` must be a whole number >= 1, got 0"):
        inspect.main(["gpt2", "--memory-limit-mib", "5", "--ranks", "0"])
    with pytest.raises(CommandError, match="--ranks says how many share a window: give --memory-limit-mib"):
        inspect.main(["gpt2", "--ranks", "2"])
    with pytest.raises(CommandError, match="`--buckets` must be a whole number >= 1, got 0"):
        inspect.main(["gpt2", "--buckets", "0"])
    with pytest.raises(CommandError, match="there is no model at `nowhere.ckpt`"):
        inspect.main(["nowhere.ckpt"])
    with pytest.raises(CommandError, match="words behind the model are for a script"):
        inspect.main(["gpt2", "words"])
    with pytest.raises(CommandError, match="`hints`"):
        inspect.main(["gpt2", "--hints", "a,b,c"])
    with pytest.raises(CommandError, match="No module matches `nope`"):
        inspect.main(["gpt2", "--model-args", *SMALL, "--modules", "nope"])
