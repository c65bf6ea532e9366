"""The routing of a model is printed without building it, in about a second after imports."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_spectral.cli import main

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tokens, self.hidden, self.out = nn.Embedding(50, width), nn.Linear(width, 16), nn.Linear(16, 50)


def rows(capsys) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()[1:] if line.strip()]


def test_a_class_path_with_settings(capsys):
    model = f"{__name__}.Net"
    assert main(["optimizer-table", "--model", model, "--model-args", "width=12", "--set", "lr=0.02"]) == 0
    found = rows(capsys)
    assert [row[0] for row in found] == ["matrix", "embedding", "head", "vector"]
    assert found[0][2] == str(12 * 16)
    assert "muon, lr 0.02" in " ".join(found[0])


def test_as_json_the_shares_are_those_of_the_parameters(capsys):
    assert main(["optimizer-table", "--model", f"{__name__}.Net", "--format", "json"]) == 0
    found = {row["role"]: row for row in json.loads(capsys.readouterr().out)}
    sizes = {"matrix": 8 * 16, "embedding": 50 * 8, "head": 16 * 50, "vector": 16 + 50}
    assert {role: row["elements"] for role, row in found.items()} == sizes
    assert found["head"]["share"] == pytest.approx(sizes["head"] / sum(sizes.values()))


def test_litgpt_and_hugging_face_names(capsys):
    assert main(["optimizer-table", "--model", "pythia-14m", "--set", "split=heads"]) == 0
    (qkv,) = [row for row in rows(capsys) if "attn.qkv" in " ".join(row)]
    assert "12 x (32 x 128)" in " ".join(qkv)  # four heads of q, k and v
    started = time.perf_counter()
    assert main(["optimizer-table", "--model", "gpt2", "--optimizer", "NorMuon"]) == 0
    assert time.perf_counter() - started < 5  # 124M parameters that nobody allocates, on a busy machine
    table = rows(capsys)
    assert sum(int(row[2].replace(",", "")) for row in table) == 124_439_808
    assert {"transposed"} <= {word for row in table for word in row}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-22"], "is no litgpt name, Hugging Face model type, folder or class path"),
        (["--model", "pythia-14m", "--optimizer", "Moun"], "no optimizer `Moun` (`--optimizer`): did you mean `Muon`?"),
        (["--model", "pythia-14m", "--set", "splitt=heads"], "`--set splitt` is no setting; did you mean `split`?"),
        (["--model", "pythia-14m", "--set", "split=head"], "`split` must be one of"),
        (["--model", "pythia-14m", "--set", "lr"], "must be NAME=VALUE"),
        (["--model", "no.such.Net"], "cannot be imported"),
        (["--model", f"{__name__}.Net", "--model-args", "depth=3"], "cannot be built"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, capsys):
    assert main(["optimizer-table", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["musicgen", "encoder-decoder"])
def test_a_type_that_says_too_little_to_build_a_model_is_one_sentence(kind, capsys):
    assert main(["optimizer-table", "--model", kind]) == 2
    said = capsys.readouterr().err
    assert f"cannot build `{kind}` from its type alone" in said
    assert "Traceback" not in said


def test_an_optimizer_on_the_meta_device_allocates_nothing_and_trains_once_it_is_real():
    from lightning_spectral.optim import Dion

    with torch.device("meta"):
        model = Net()
    optimizer = Dion(model, lr=0.1)
    assert not optimizer.state
    real = Net()
    for group in optimizer.param_groups:
        names = dict(real.named_parameters())
        group["params"] = [names[name] for name in group["param_names"]]
    before = real.hidden.weight.detach().clone()
    for p in real.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(before, real.hidden.weight)


@pytest.mark.parametrize(
    ("recipe", "rule"),
    [("optimizers/dion_16", "dion, lr 0.003"), ("optimizers/adamw", "adamw"), ("quickstart", "muon")],
)
def test_a_recipe_shows_its_own_optimizer_if_that_routes(recipe, rule, capsys):
    assert main(["optimizer-table", "--model", str(ROOT / "recipes" / f"{recipe}.yaml")]) == 0
    assert rule in " ".join(rows(capsys)[0])


@pytest.mark.parametrize("verb", [["optimizer-table", "--model"], ["inspect"]])
@pytest.mark.parametrize("model", ["pythia-14m", str(ROOT / "recipes" / "quickstart.yaml")])
def test_in_a_process_that_has_not_imported_litgpt(verb, model):
    """As it is called from a shell: litgpt's model is imported without the rest of litgpt."""
    command = [sys.executable, "-m", "lightning_spectral", *verb, model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "transformer.h" in done.stdout
