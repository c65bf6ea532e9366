"""JSON Schemas accept what we write and shipped, refuse misspellings, and describe every key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

from lightning_spectral.cli import main
from lightning_spectral.records import ALARMS_FILE, AlarmRecord, append_records, read_run
from lightning_spectral.records.json_schema import RECORDS, of_record, of_signature, of_type
from lightning_spectral.text import read_yaml
from lightning_spectral.training.json_schema import of_recipe
from tests.analysis.synthetic import write_one
from tests.tiny import tiny_tree

ROOT = Path(__file__).parent.parent
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if "memory" not in path.parts]


def validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_accepted(path) -> None:
    validator(of_recipe()).validate(read_yaml(path.read_text()))


def test_what_is_misspelled_in_a_recipe_is_seen(tmp_path) -> None:
    check = validator(of_recipe())
    tree = tiny_tree(tmp_path)
    check.validate(tree)
    muon = {"class_path": "lightning_spectral.Muon", "init_args": {"lr": 1e-3}}
    check.validate({**tree, "optimizer": muon})
    check.validate({**tree, "optimizer": {"class_path": "mine.Optimizer", "init_args": {"anything": 1}}})
    for wrong in (
        {"optimzer": "AdamW"},
        {"train": {**tree["train"], "max_stepz": 3}},
        {"train": {**tree["train"], "max_steps": "many"}},
        {"architecture": {"activation": "rulu2"}},
        {"optimizer": {"class_path": "lightning_spectral.Muon", "init_args": {"lr": "fast"}}},
        {"callbacks": [{"class_path": "lightning_spectral.TailTokenProbe", "init_args": {"every_n_steps": "often"}}]},
        {"callbacks": [{"class_path": "lightning_spectral.TailTokenProbe", "init_args": {"token_fraction": "all"}}]},
        {"callbacks": [{"init_args": {}}]},
    ):
        assert list(check.iter_errors({**tree, **wrong})), wrong


def test_arguments_of_our_classes_are_described() -> None:
    callbacks = of_recipe()["properties"]["callbacks"]["items"]["anyOf"]
    probe = next(c for c in callbacks if "lightning_spectral.TailTokenProbe" in str(c.get("properties")))
    arguments = probe["properties"]["init_args"]["properties"]
    assert arguments["every_n_steps"] == {
        "type": "integer", "description": "Optimizer steps between windows.", "default": 200,
    }  # fmt: skip
    assert {"sites", "modules", "token_fraction", "eigenvalues"} <= set(arguments)  # shared by all probes


@pytest.mark.parametrize("file", RECORDS)
def test_records_are_accepted_and_described(file, tmp_path) -> None:
    folder = write_one(tmp_path, "muon", 0.9, 64, layers=1, steps=(0,))
    run_id = read_run(folder).run_id
    alarm = AlarmRecord(run_id, "train", 0, "hard_rank", "post", "tail", 3.0, 64.0, "width", 0.05, "low")
    append_records(folder / ALARMS_FILE, [alarm])
    schema = of_record(file)
    check = validator(schema)
    undescribed = {name for name, value in schema["properties"].items() if "description" not in value}
    assert undescribed == set()
    if not (folder / file).exists():
        assert file == "weights.jsonl"  # of another callback
        return
    text = (folder / file).read_text()
    records = [json.loads(text)] if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    for record in records:
        check.validate(record)
        wrong = {**record, "run_id": 3}
        assert list(check.iter_errors(wrong))
        del wrong["run_id"]
        assert list(check.iter_errors(wrong))


def test_the_verb(capsys) -> None:
    assert main(["schema", "spectral.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out) == of_record("spectral.jsonl")
    assert main(["schema", "spectral.json"]) == 2
    assert "there is no schema of `spectral.json`; did you mean `spectral.jsonl`?" in capsys.readouterr().err


def documented(width: int, *rest: str, share: float | None = None, names: Sequence[str] | int = 3, **more: int) -> None:
    """What it does.

    Args:
        width: Features ``D``,
            of a row.

        rest: Others.

        share: Of the tokens.

    Returns:
        Nothing.
    """


def test_a_signature_by_its_schema() -> None:
    assert of_signature(documented) == {
        "width": {"type": "integer", "description": "Features `D`, of a row."},
        "share": {"type": ["number", "null"], "description": "Of the tokens."},
        "names": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "integer"}], "default": 3},
    }


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (int | str | None, {"type": ["integer", "string", "null"]}),
        (int | complex, {}),
        (Literal["a", 3], {"enum": ["a", 3]}),
        (Literal["a"] | int, {"anyOf": [{"enum": ["a"]}, {"type": "integer"}]}),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (tuple[float, ...], {"type": "array", "items": {"type": "number"}}),
        (object, {}),
    ],
)
def test_a_type_by_its_schema(annotation: Any, schema: dict[str, Any]) -> None:
    assert of_type(annotation) == schema
