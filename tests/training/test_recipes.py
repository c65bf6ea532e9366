"""Recipes: litgpt's schema and ours, overrides, and what is refused."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.pretrain import setup as litgpt_setup

from lightning_spectral.training.document import find, folder_of_recipes, names, parse_words, read_value, text_data
from lightning_spectral.training.recipe import RecipeError, load
from lightning_spectral.training.schema import defaults
from tests.tiny import LIGHTNING_WARNINGS, tiny_tree, write_recipe

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]


def _litgpt_yaml(path: Path, **changes: Any) -> Path:
    """A recipe with every key of the installed litgpt's pretrain, in the form of its config_hub."""
    tree: dict[str, Any] = {}
    for name, parameter in inspect.signature(litgpt_setup).parameters.items():
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        plain = str(default) if isinstance(default, Path) else default
        tree[name] = asdict(default) if is_dataclass(default) else plain
    tree.update({"model_name": "pythia-14m", "data": "TinyStories", **changes})
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_name": "tiny-llama-1.1b", "data": "TinyLlama", "resume": "auto", "precision": "bf16-mixed"},
        {"model_name": "micro-llama-300M", "data": "MicroLlama", "devices": 4, "num_nodes": 2},
        {"data": {"class_path": "litgpt.data.LitData", "init_args": {"data_path": "data"}}},
        {"data": {"class_path": "TextFiles", "init_args": {"train_data_path": "texts"}}},
        {
            "model_name": "stories15M",
            "model_config": {f.name: f.default for f in fields(Config) if f.default is not MISSING},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 4e-4, "betas": [0.9, 0.95]}},
            "tokenizer_dir": "checkpoints/some",
            "logger_name": "csv",
        },
    ],
)
def test_every_key_of_litgpts_pretrain_parses(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = load(_litgpt_yaml(tmp_path / "hub.yaml", **changes))
    assert set(inspect.signature(litgpt_setup).parameters) <= set(recipe.content)
    for key, value in changes.items():
        if key not in ("data", "model_config"):
            assert recipe.content[key] == value
    if changes.get("data") == {"class_path": "TextFiles", "init_args": {"train_data_path": "texts"}}:
        assert recipe.content["data"]["class_path"] == "litgpt.data.TextFiles"  # litgpt's name means litgpt's class


def test_the_groups_are_litgpts_dataclasses() -> None:
    known = defaults()
    for group, kind in (("train", TrainArgs), ("eval", EvalArgs), ("log", LogArgs)):
        assert set(known[group]) == {f.name for f in fields(kind)}
    assert set(known) - set(inspect.signature(litgpt_setup).parameters) == {
        "callbacks",
        "strategy",
        "accelerator",
        "architecture",
        "lr_schedule",
    }


@pytest.mark.parametrize("name", names())
def test_every_shipped_recipe_loads_by_name(name: str) -> None:
    recipe = load(name)
    assert load(recipe.source).content == recipe.content


@pytest.mark.parametrize("name", ["quickstart", "debug"])
def test_every_key_of_a_shipped_recipe_has_a_comment(name: str) -> None:
    before = ""
    for line in (folder_of_recipes() / f"{name}.yaml").read_text().splitlines():
        is_key = line.strip() and not line.strip().startswith(("#", "- ")) and ":" in line
        depth = len(line) - len(line.lstrip())
        if is_key and depth <= 2 and not line.strip().startswith(("init_args", "class_path")):
            in_config = depth == 2 and line.split(":")[0].strip() in {f.name for f in fields(Config)}
            assert before.startswith("#") or in_config, f"{name}: `{line.strip()}` has no comment above it"
        before = line.strip()


def test_a_recipe_is_complete_plain_and_picklable(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path))
    assert yaml.safe_load(recipe.text()) == recipe.content
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    (tmp_path / "again.yaml").write_text(recipe.text())
    assert load(tmp_path / "again.yaml").content == recipe.content
    assert recipe.content["train"]["log_interval"] == 1  # litgpt's default, filled in


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--train.max_steps", "50"], ("train", "max_steps"), 50),
        (["--train.max_tokens=1e6"], ("train", "max_tokens"), 1_000_000),
        (["--train.save_interval", "null"], ("train", "save_interval"), None),
        (["--optimizer.init_args.lr", "1e-3"], ("optimizer", "init_args", "lr"), 1e-3),
        (["--optimizer", "AdamW"], ("optimizer",), "AdamW"),
        (["--model_config.n_layer", "3"], ("model_config", "n_layer"), 3),
        (["--architecture.activation", "relu2"], ("architecture", "activation"), "relu2"),
        (["--lr_schedule.kind", "constant_linear_decay"], ("lr_schedule", "kind"), "constant_linear_decay"),
        (["--data.init_args.vocab_size", "512"], ("data", "init_args", "vocab_size"), 512),
        (["--callbacks", "[]"], ("callbacks",), []),
        (["--resume", "auto"], ("resume",), "auto"),
        (["--strategy", "ddp"], ("strategy",), "ddp"),
    ],
)
def test_any_key_can_be_overridden(tmp_path: Path, words: list[str], path: tuple[str, ...], value: Any) -> None:
    recipe = load(write_recipe(tmp_path), words)
    found: Any = recipe.content
    for step in path:
        found = found[step]
    assert found == value
    assert type(found) is type(value)


def test_overrides_as_words_and_as_a_mapping_are_the_same(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    words = load(file, ["--train.max_steps", "5", "--optimizer.init_args.lr=0.5"])
    mapping = load(file, {"train.max_steps": 5, "optimizer.init_args.lr": 0.5})
    assert words == mapping


def test_callbacks_by_place_by_class_and_appended(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["callbacks"] = ["SpectralRankCallback", {"class_path": "lightning_spectral.TailTokenProbe"}]
    words = ["--callbacks.0.init_args.every_n_steps", "3", "--callbacks.TailTokenProbe.init_args.every_n_steps", "4"]
    words += ["--callbacks+", "{class_path: lightning.pytorch.callbacks.LearningRateMonitor}"]
    callbacks = load(write_recipe(tmp_path, tree), words).content["callbacks"]
    assert [c["class_path"].rpartition(".")[2] for c in callbacks] == [
        "SpectralRankCallback",
        "TailTokenProbe",
        "LearningRateMonitor",
    ]
    assert [c["init_args"]["every_n_steps"] for c in callbacks[:2]] == [3, 4]


def test_a_field_of_a_named_model_can_be_overridden() -> None:
    tree = {"model_name": "pythia-14m", "data": "StateOfTheUnion", "train": {"max_steps": 1}}
    path = Path("recipe.yaml")
    from lightning_spectral.training.document import set_value as _set

    _set(tree, "model_config.n_layer", 2)
    assert Config(**tree["model_config"]).n_embd == Config.from_name("pythia-14m").n_embd  # type: ignore[arg-type]
    assert tree["model_config"]["n_layer"] == 2  # type: ignore[index]
    assert not path.exists()


@pytest.mark.parametrize("text", ["texts/a.txt", "a.parquet", "texts/*.jsonl"])
def test_a_path_is_data(tmp_path: Path, text: str) -> None:
    content = load(write_recipe(tmp_path), ["--data", text]).content
    assert content["data"]["class_path"] == "lightning_spectral.data.TextFiles"
    assert content["data"]["init_args"]["path"] == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.max_step": 5}, r"unknown key `train.max_step`; did you mean `train.max_steps`\?"),
        ({"optimiser": "AdamW"}, r"unknown key `optimiser`; did you mean `optimizer`\?"),
        ({"model_config.n_layers": 5}, r"unknown key `model_config.n_layers`; did you mean `model_config.n_layer`"),
        ({"architecture.activations": "gelu"}, r"unknown key `architecture.activations`"),
        ({"train.max_steps": "many"}, r"max_steps"),
        ({"train.max_steps": 0}, r"`train.max_steps` must be >= 1, got 0"),
        ({"train.max_steps": None}, r"the run has no end: set `train.max_tokens`"),
        ({"eval.max_new_tokens": 5}, r"`eval.max_new_tokens: 5` is for fine-tuning"),
        ({"eval.evaluate_example": 3}, r"`eval.evaluate_example: 3` is for fine-tuning"),
        ({"eval.interval": 0}, r"`eval.interval` must be >= 1, got 0"),
        ({"log.project": "mine"}, r"`log.project`.* are for `logger_name: wandb`, got csv"),
        ({"initial_checkpoint_dir": "x", "resume": "auto"}, r"both say where to start"),
        ({"logger_name": "tensorbord"}, r"logger_name"),
        ({"precision": "8-bit"}, r"precision"),
        ({"optimizer": "Adamw"}, r"no optimizer `Adamw`"),
        ({"optimizer.init_args.learning_rate": 1}, r"`optimizer`: AdamW does not know `learning_rate`"),
        (
            {"data": "StateOfUnion"},
            r"`data` is `StateOfUnion`, which is neither a file nor a data module; .*StateOfTheUnion",
        ),
        ({"data": None}, r"names no `data`"),
        ({"data.init_args.vocabulary": 5}, r"vocabulary"),
        ({"callbacks": ["SpectralRank"]}, r"SpectralRank"),
        (
            {"callbacks": [{"class_path": "SpectralRankCallback", "init_args": {"every_n_steps": "often"}}]},
            r"`callbacks.SpectralRankCallback.*every_n_steps` must be int, got often",
        ),
        ({"callbacks.3.init_args.x": 1}, r"`callbacks.3`: the list is empty"),
        ({"train.max_steps.x": 1}, r"`train.max_steps` is 12 and has nothing below it"),
        ({"train": 5}, r"`train` must hold keys and values, got 5"),
        ({"architecture.post_norm_fraction": "half"}, r"post_norm_fraction"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load(write_recipe(tmp_path), changes)
    assert "\n" not in str(caught.value)


def test_no_model_is_refused(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    del tree["model_name"], tree["model_config"]
    with pytest.raises(RecipeError, match=r"names no model: set `model_name`"):
        load(write_recipe(tmp_path, tree))


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe `quickstrat`: did you mean `quickstart`\?"):
        load("quickstrat")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match=r"no recipe `zzz`: give a YAML file or one of .*quickstart"):
        load("zzz")
    with pytest.raises(RecipeError, match=r"list.yaml` holds list, not keys and values"):
        load(tmp_path / "list.yaml")
    (tmp_path / "torn.yaml").write_text("train: {max_steps: 3\n")
    with pytest.raises(RecipeError, match=r"torn.yaml` is not YAML"):
        load(tmp_path / "torn.yaml")


def test_shipped_recipes_are_found_with_and_without_their_folder() -> None:
    assert find("quickstart") == find("quickstart.yaml") == folder_of_recipes() / "quickstart.yaml"
    assert find("recipes/quickstart.yaml").samefile(find("quickstart"))


def test_words() -> None:
    assert parse_words(["--a.b", "1", "--c=x=2", "--d", "-3"]) == [("a.b", 1), ("c", "x=2"), ("d", -3)]
    with pytest.raises(RecipeError, match=r"`--train.max_steps` has no value"):
        parse_words(["--train.max_steps", "--seed", "1"])
    with pytest.raises(RecipeError, match=r"`50` is not an option: write `--key value`"):
        parse_words(["50"])


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("-2E5", -2e5), ("[1, 2e1]", [1, 20.0]), ("1e3x", "1e3x")])
def test_values(text: str, value: Any) -> None:
    assert read_value(text) == value


def test_on_is_a_key_and_not_true(tmp_path: Path) -> None:
    text = yaml.safe_dump(tiny_tree(tmp_path))
    probe = "{class_path: lightning_spectral.SpectralRankCallback, init_args: {on: [train, validation]}}"
    file = tmp_path / "on.yaml"
    file.write_text(text.replace("callbacks: []", "") + f"\ncallbacks: [{probe}]\n")
    (callback,) = load(file).content["callbacks"]
    assert callback["init_args"]["on"] == ["train", "validation"]


def test_a_foreign_class_is_refused_before_it_is_built(tmp_path: Path) -> None:
    from lightning_spectral.training.factories import make_strategy

    touch = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "ran")]}}
    with pytest.raises(RecipeError, match=r"`strategy: .*` cannot be made: it is no lightning Strategy"):
        make_strategy(touch, 1)
    with pytest.raises(
        RecipeError, match=r"`callbacks`: `subprocess.Popen` cannot be used: it is no lightning Callback"
    ):
        load("debug", {"callbacks": [touch]})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["datasets.load_dataset", "collections.OrderedDict"])
def test_what_is_no_data_module_is_said_in_a_sentence(tmp_path: Path, path: str) -> None:
    tree = tiny_tree(tmp_path) | {"data": {"class_path": path}}
    with pytest.raises(RecipeError, match=f"`data` names `{path}`, which is no data module .*use `HubText`"):
        load(write_recipe(tmp_path, tree))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("TextFiles", r"`data`: litgpt.data.TextFiles needs `train_data_path`: set `data.init_args.train_data_path`"),
        ("HubText", r"`data`: lightning_spectral.data.HubText needs `dataset`"),
        (
            {"class_path": "lightning_spectral.data.TextFiles"},
            r"`data`: lightning_spectral.data.TextFiles needs `path`",
        ),
        ({"class_path": "HubText", "init_args": {"dataset": 3}}, r"`data.init_args.dataset` must be str, got 3"),
        (
            {"class_path": "StateOfTheUnion", "init_args": {"vocab_size": "big"}},
            r"`data.init_args.vocab_size` must be int, got big",
        ),
    ],
)
def test_what_a_data_module_misses_is_said_without_a_tree_of_types(tmp_path: Path, data: Any, message: str) -> None:
    tree = tiny_tree(tmp_path) | {"data": data}
    with pytest.raises(RecipeError, match=message) as caught:
        load(write_recipe(tmp_path, tree))
    assert "Union" not in str(caught.value)


def test_a_folder_of_shards_is_tokens_and_one_with_text_is_text(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    np.save(shards / "train_0.npy", np.arange(100, dtype=np.uint16))
    (shards / "README.md").write_text("about")
    assert text_data(str(shards))["class_path"] == "lightning_spectral.data.TokenFiles"
    (shards / "more.txt").write_text("text")
    assert text_data(str(shards))["class_path"] == "lightning_spectral.data.TextFiles"
    litdata = tmp_path / "lit" / "train"
    litdata.mkdir(parents=True)
    (litdata / "index.json").write_text("{}")
    assert text_data(str(tmp_path / "lit"))["class_path"] == "lightning_spectral.data.TokenFiles"
