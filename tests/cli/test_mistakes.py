"""Every mistake is answered by one sentence with the key, the value seen and the remedy, before anything is started."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401 - else its log goes to the stderr of the test that imports it first
import pytest

from lightning_spectral.cli import main
from tests.analysis.synthetic import write_study
from tests.cli import mistakes, mistakes_in_files, mistakes_more
from tests.tiny import write_recipe


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words in capitals stand for."""
    folder = tmp_path_factory.mktemp("mistakes")
    recipe = write_recipe(folder)
    write_study(folder / "runs", {"muon": 0.9, "adamw": 0.3}, (64, 128, 256), layers=2, steps=(0, 20, 40))
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("not a folder\n")
    (folder / "keyed.jsonl").write_text('{"txt": "one"}\n')
    (folder / "blank.txt").write_text("\n")
    (folder / "lone.jsonl").write_text("{}\n")
    (folder / "twice.yaml").write_text("model_name: pythia-14m\ndata: StateOfTheUnion\nmodel_name: pythia-31m\n")
    rows = [f"{name},{width},{width**beta}" for name, beta in (("a", 0.3), ("b", 0.9)) for width in (64, 128, 256)]
    (folder / "points.csv").write_text("\n".join(["optimizer,width,value", *rows]) + "\n")
    here = {"RECIPE": recipe, "TEXT": folder / "text.txt", "RUNS": folder / "runs", "POINTS": folder / "points.csv"}
    here |= {"FILE": folder / "file.txt", "EMPTY": folder / "empty"}
    here |= {"RECORDS": folder / "lone.jsonl", "TWICE": folder / "twice.yaml"}
    here |= {"KEYED": folder / "keyed.jsonl", "BLANK": folder / "blank.txt"}
    here |= {"HERE": folder / "here"}
    mistakes_in_files.write(folder / "here", (folder / "runs" / "muon_64_0" / "run.json").read_text())
    return {name: str(path) for name, path in here.items()}


def spelled(command: str, places: dict[str, str]) -> list[str]:
    """The words of a command, with paths for those in capitals, also before a slash or a colon."""
    known = "|".join(places)
    words = shlex.split(command)
    return [re.sub(rf"^({known})(?=[/:]|$)", lambda found: places[found[0]], word) for word in words]


ALL = [*mistakes.ALL, *mistakes_more.ALL, *mistakes_in_files.ALL]


def answer(command: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what is said on stderr."""
    words = spelled(command, places)
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of litgpt, when it is imported
@pytest.mark.parametrize(("command", "wanted"), ALL, ids=[command for command, _ in ALL])
def test_the_answer_names_key_value_and_remedy(command, wanted, places, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = answer(command, places, capsys)
    assert code == 2, said
    verb = command.split(maxsplit=1)[0]
    sentences = [line for line in said.splitlines() if line.startswith("lightning-spectral")]
    assert len(sentences) == 1, said
    for word in wanted:
        wanted_word = re.sub(r"\b(FILE|TEXT|HERE)(?=[/:`])", lambda found: places[found[0]], places.get(word, word))
        assert wanted_word in sentences[0], f"`{word}` is not in: {said}"
    if command not in dict(mistakes.VERBS):
        assert sentences[0].startswith(f"lightning-spectral {verb}"), said
        assert said.splitlines() == sentences, said  # no usage, no traceback, no other lines around it
    assert not list(tmp_path.iterdir()), "something was written"


def test_there_are_more_than_120_of_them_and_none_twice() -> None:
    commands = [command for command, _ in ALL]
    assert len(set(commands)) == len(commands) > 310


EARLY = [
    command
    for group in (
        mistakes.VERBS,
        mistakes.PRETRAIN,
        mistakes.SWEEP,
        mistakes.ANALYSIS,
        mistakes.MODELS,
        mistakes_more.EARLY,
        mistakes_in_files.EARLY,
    )
    for command, _ in group
]
COSTS = """
import contextlib, io, json, shlex, sys, time
from lightning_spectral.cli import main
found = {}
for command in json.loads(sys.argv[1]):
    start = time.process_time()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(io.StringIO()):
            main(shlex.split(command))
    imported = [name for name in ("lightning", "litgpt", "jsonargparse") if name in sys.modules]
    found[command] = [time.process_time() - start, imported]
    for name in [name for name in sys.modules if name.partition(".")[0] in imported]:
        del sys.modules[name]
print(json.dumps(found))
"""


@pytest.mark.slow  # two hundred commands
def test_early_answers_import_no_lightning_and_take_less_than_a_second_of_cpu(places, tmp_path: Path) -> None:
    commands = [shlex.join(spelled(command, places)) for command in EARLY]
    words = [sys.executable, "-c", COSTS, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    costs = json.loads(done.stdout.splitlines()[-1])
    assert len(costs) == len(EARLY)
    assert [command for command, (_, imported) in costs.items() if imported] == []
    slow = [command for command, (seconds, _) in costs.items() if seconds > 1]
    assert [command for command in slow if not command.startswith("memory ")] == []  # whose settings need torch
