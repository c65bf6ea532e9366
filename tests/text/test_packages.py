"""The commit of the sources that run: read from the repository, never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_spectral import __version__, cli
from lightning_spectral.probe.run_folder import package_versions
from lightning_spectral.text import packages
from lightning_spectral.text.packages import source_commit

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


def repository(root: Path, head: str, files: dict[str, str], name: str = "lightning-spectral") -> Path:
    for file, text in {"HEAD": head, **files}.items():
        (root / ".git" / file).parent.mkdir(parents=True, exist_ok=True)
        (root / ".git" / file).write_text(text)
    (root / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    return root


@pytest.mark.parametrize(
    ("head", "files", "commit"),
    [
        (f"{COMMIT}\n", {}, COMMIT),
        ("ref: refs/heads/main\n", {"refs/heads/main": f"{COMMIT}\n"}, COMMIT),
        ("ref: refs/heads/a", {"packed-refs": f"# pack-refs\n{OTHER} refs/heads/ab\n{COMMIT} refs/heads/a\n"}, COMMIT),
        ("ref: refs/heads/new", {}, None),  # a branch without a commit
        ("nonsense", {}, None),
    ],
)
def test_what_is_checked_out(tmp_path: Path, head: str, files: dict[str, str], commit: str | None) -> None:
    assert source_commit(repository(tmp_path, head, files)) == commit


def test_somebody_elses_repository_says_nothing(tmp_path: Path) -> None:
    assert source_commit(repository(tmp_path, COMMIT, {}, name="theirs")) is None
    assert source_commit(tmp_path / "none") is None


def test_what_pip_wrote_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "site-packages" / "lightning_spectral" / "text" / "p.py"))
    noted: list[str | None] = [json.dumps({"vcs_info": {"vcs": "git", "commit_id": COMMIT}}), None, "{}", "{"]
    found = SimpleNamespace(read_text=lambda name: noted.pop(0) if name == "direct_url.json" else None)
    monkeypatch.setattr(packages, "distribution", lambda name: found)
    assert [source_commit() for _ in range(4)] == [COMMIT, None, None, None]


def test_version_and_run_say_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in (cli, packages):
        monkeypatch.setattr(module, "source_commit", lambda: COMMIT)
    monkeypatch.setattr("lightning_spectral.probe.run_folder.source_commit", lambda: COMMIT)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-spectral {__version__} (commit {COMMIT[:12]})\n"
    assert package_versions()["lightning-spectral commit"] == COMMIT[:12]
