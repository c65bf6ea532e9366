from __future__ import annotations

import json

import pytest

from lightning_spectral.cli import inspect
from lightning_spectral.text import CommandError

SMALL = ["n_layer=3", "n_head=2", "n_embd=16", "n_inner=48", "vocab_size=64"]


def rows_of(capsys, *arguments):
    assert inspect.main([*arguments, "--format", "json"]) == 0
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


def test_bad_input_is_one_sentence():
    with pytest.raises(CommandError, match="--buckets and --shards must be >= 1"):
        inspect.main(["gpt2", "--buckets", "0"])
    with pytest.raises(CommandError, match="No module matches `nope`"):
        inspect.main(["gpt2", "--model-args", *SMALL, "--modules", "nope"])
