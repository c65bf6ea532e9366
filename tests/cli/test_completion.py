"""The completion script, asked by a real bash."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from lightning_spectral.cli import VERBS, main
from lightning_spectral.cli.completion import options_of, script


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "script.bash"
    path.write_text(script())
    return path


def completed(made: Path, line: str) -> list[str]:
    """What bash offers at the end of the line."""
    words = [*line.split(" ")]
    array = " ".join(shlex.quote(word) for word in words)
    command = f"source {made}; COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _lightning_spectral"
    done = subprocess.run(
        ["bash", "-c", f'{command}; printf "%s\\n" "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
        cwd=made.parent,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lightning-spectral pre", ["pretrain"]),
        ("lightning-spectral co", ["count-tokens", "compare", "completion"]),
        ("lightning-spectral sweep --dry", ["--dry-run"]),
        ("lightning-spectral pretrain --config quick", ["quickstart"]),
        ("lightning-spectral sweep pocket_d", ["pocket_demo"]),
        ("lightning-spectral fit scr", ["script.bash"]),
        ("lightning-spectral schema spec", ["spectral.jsonl"]),
        ("lightning-spectral nothing --x", []),
    ],
)
def test_offers(made, line, offered) -> None:
    assert sorted(completed(made, line)) == sorted(offered)


def test_every_verb_has_its_options() -> None:
    assert {"--method", "--by", "--out"} <= set(options_of("fit"))
    for verb in VERBS:
        assert options_of(verb), verb


def test_shells(capsys) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -Uz bashcompinit")
    assert main(["completion", "fihs"]) == 2
    assert "no completion for the shell `fihs`; there are: bash, zsh." in capsys.readouterr().err
