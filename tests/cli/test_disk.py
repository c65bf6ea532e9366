"""What the disk refuses is said in a sentence, whatever the verb."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lightning_spectral.cli import inputs, main
from lightning_spectral.text import CommandError
from tests.analysis.synthetic import write_study


@pytest.mark.parametrize("verb", ["fit", "compare", "report"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9}, widths=(128, 256, 512))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(inputs, "load", lambda options: pytest.fail("computed"))
    assert main([verb, str(tmp_path / "runs"), "--out", str(tmp_path / "a" / "b")]) == 2
    assert f"cannot be written (`{tmp_path}` is read-only): give another folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_gives_up_meanwhile_is_a_sentence(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9}, widths=(128, 256, 512))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), "fits.csv")

    monkeypatch.setattr("lightning_spectral.analysis.tidy.write_csv", full)
    assert main(["fit", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"lightning-spectral fit: `fits.csv`: {os.strerror(number)}."


def test_an_error_that_is_ours_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(tmp_path / "runs", {"muon": 0.9}, widths=(128, 256, 512))
    monkeypatch.setattr(
        "lightning_spectral.analysis.tidy.write_csv", lambda *a: (_ for _ in ()).throw(OSError(errno.EBADF, "ours"))
    )
    with pytest.raises(OSError, match="ours"):
        main(["fit", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])


def test_a_folder_that_can_be_written_need_not_be_there(tmp_path: Path) -> None:
    assert inputs.out_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="is a file; give a folder"):
        inputs.out_folder(str(tmp_path / "file"))
