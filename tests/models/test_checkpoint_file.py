"""One way to read a checkpoint, and nothing in it is executed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lightning_spectral.models.checkpoint_file import CheckpointError, read_checkpoint

PACKAGE = Path(__file__).parents[2] / "lightning_spectral"


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_values_come_back(tmp_path, zipped):
    content = {"state_dict": {"w": torch.arange(6.0).view(2, 3)}, "step": 3, "recipe": {"a": [1, "x", None]}}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(read["state_dict"]["w"], content["state_dict"]["w"])
    assert (read["step"], read["recipe"]) == (3, content["recipe"])
    assert read_checkpoint(tmp_path / "a.ckpt", device="meta")["state_dict"]["w"].is_meta


@pytest.mark.parametrize("zipped", [True, False])
def test_a_foreign_object_is_named_and_not_executed(tmp_path, zipped):
    torch.save({"x": Trap(tmp_path / "executed")}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"a.ckpt` holds objects of `\S+`, and reading them could execute code"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 700])
def test_an_incomplete_file_is_named(tmp_path, keep):
    torch.save({"w": torch.randn(300)}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"a.ckpt` cannot be read, it is incomplete or corrupted"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path)


def test_it_is_the_only_reader_and_no_file_is_written_in_place():
    """One rule, one place: reading checkpoints, replacing files."""
    for file in PACKAGE.rglob("*.py"):
        code, place = file.read_text(), file.relative_to(PACKAGE).as_posix()
        if place != "models/checkpoint_file.py":
            assert "torch.load(" not in code, place
        assert "weights_only=False" not in code, place
        # folders: a token cache and a sharded checkpoint are renamed when they are complete
        if place not in ("text/__init__.py", "data/tokens.py", "training/checkpoints.py"):
            assert not re.search(r"os\.replace\(|shutil\.move\(|\.partial\b(?!\()", code), place
