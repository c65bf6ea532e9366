"""The optimizer recipes are the quickstart with another optimizer, and nothing else."""

import pytest
import torch

from lightning_spectral.gpt.module import build_optimizer
from lightning_spectral.optim import SpectralOptimizer
from lightning_spectral.training.pretrain import pretrain
from lightning_spectral.training.recipe import RecipeError, load
from tests.optim.models import TinyLM

RECIPES = {
    "adamw": "adamw",
    "muon": "muon",
    "normuon": "normuon",
    "adamuon": "adamuon",
    "dion2": "dion2",
    "nordion2": "nordion2",
    "muonh": "muonh",
    "soap": "soap",
    "muon_heads": "muon",
    **{f"dion_{k}": "dion" for k in (2, 4, 8, 16)},
}


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_optimizer_differs_from_the_quickstart(name):
    recipe, quickstart = load(f"optimizers/{name}").content, load("quickstart").content
    assert {key for key in recipe if recipe[key] != quickstart[key]} == {"optimizer", "out_dir"}
    optimizer = build_optimizer(recipe["optimizer"], TinyLM())
    assert isinstance(optimizer, SpectralOptimizer)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert groups["matrix"]["algorithm"] == RECIPES[name]
    assert groups["head"]["algorithm"] == "adamw"
    rates = {role: group["lr"] * group["lr_ratio"] for role, group in groups.items()}
    assert rates.pop("matrix") == (0.02 if name == "muonh" else 3e-3)  # there it is an angle
    assert list(rates.values()) == pytest.approx([3e-3] * len(rates))
    if name.startswith("dion_"):
        assert groups["matrix"]["rank_fraction"] == 1 / int(name.removeprefix("dion_"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and loggers
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_more_than_token_frequencies_in_a_third_of_its_steps(name, tmp_path):
    changes = {"train.max_steps": 60, "out_dir": str(tmp_path), "callbacks": [], "logger_name": "csv"}
    outcome = pretrain(load(f"optimizers/{name}", changes), progress_bar=False)
    assert outcome.step == 60
    assert outcome.val_loss < outcome.unigram_entropy


def test_the_paper_can_be_said_in_yaml():
    """What ``Muon.paper`` does is a matter of plain keywords."""
    from lightning_spectral.optim import Muon

    said = {
        "class_path": "lightning_spectral.optim.Muon",
        "init_args": {
            "lr": 0.02,
            "weight_decay": 0.01,
            "orthogonalize": "muon",
            "steps": 5,
            "lr_scale": "spectral",
            "fallback": "lion",
            "fallback_lr": 0.02,
            "fallback_weight_decay": 0.0,
            "head_lr_scale": "inverse_sqrt_width",
            "betas": [0.95, 0.98],
        },
    }
    model = TinyLM()
    one, other = build_optimizer(said, model), Muon.paper(model)
    for ours, preset in zip(one.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in preset.items() if k != "params"}
        assert all(torch.equal(a, b) for a, b in zip(ours["params"], preset["params"], strict=True))


def test_a_base_of_a_base_is_refused(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: optimizers/muon\n")
    with pytest.raises(RecipeError, match="name the recipe at the bottom, `quickstart`"):
        load(recipe)
