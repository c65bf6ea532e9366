"""Shared settings are written once, and everybody sees them: mypy, help(), LightningCLI, recipes, litgpt."""

import inspect
import typing
from dataclasses import fields

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_spectral.gpt.module import optimizer_class
from lightning_spectral.optim import AdamW, Dion, Muon, NorMuon, SpectralOptimizer, matrix_rule, settings
from lightning_spectral.optim.matrix_rule import compute_dtype
from tests.optim.models import TinyLM

PAIRS = [
    (settings.CommonArguments, settings.CommonSettings),
    (settings.MatrixArguments, settings.MatrixSettings),
    (settings.OrthogonalArguments, settings.OrthogonalSettings),
]


@pytest.mark.parametrize(("typed", "checked"), PAIRS)
def test_types_for_editors_are_those_of_the_settings(typed, checked):
    hints = typing.get_type_hints(checked)
    assert typing.get_type_hints(typed) == {field.name: hints[field.name] for field in fields(checked)}


@pytest.mark.parametrize("checked", [checked for _, checked in PAIRS])
def test_every_setting_is_documented(checked):
    own = set(checked.__annotations__)
    assert all(f"{name}:" in (checked.__doc__ or "") for name in own)


@pytest.mark.parametrize("cls", [AdamW, Muon, NorMuon, Dion])
def test_the_signature_names_every_setting_with_its_default(cls):
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:2] == ["params", "lr"]
    for field in fields(cls.settings_class):
        assert parameters[field.name].default == field.default
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    with pytest.raises(ValueError, match="did you mean `weight_decay`"):
        optimizer_class({"class_path": f"lightning_spectral.optim.{cls.__name__}", "init_args": {"weight_decy": 0.1}})
    with pytest.raises(TypeError, match="weight_decy"):
        cls(TinyLM(), weight_decy=0.1)


@pytest.mark.parametrize(
    ("cls", "shown"),
    [
        (AdamW, {"weight_decay", "bf16_weights"}),
        (Muon, {"momentum", "nesterov", "split", "roles"}),
        (NorMuon, {"moment_beta", "normalize", "steps", "max_grad_norm"}),
        (Dion, {"rank_fraction", "momentum", "lr_scale", "betas"}),
    ],
)
def test_command_lines_show_and_check_every_setting(cls, shown):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SpectralOptimizer, "optimizer", skip={"params"}, instantiate=False)
    path = f"lightning_spectral.optim.{cls.__name__}"
    found = parser.parse_args([f"--optimizer={path}", "--optimizer.weight_decay=0.25", "--optimizer.betas=[0.8, 0.9]"])
    assert found.optimizer.init_args.weight_decay == 0.25
    assert shown <= set(vars(found.optimizer.init_args))
    assert set(vars(found.optimizer.init_args)) == set(inspect.signature(cls).parameters) - {"params"}


def test_every_group_carries_what_schedulers_may_look_for():
    for cls in (AdamW, Muon, NorMuon, Dion):
        optimizer = cls(TinyLM())
        for group in optimizer.param_groups:
            assert {"lr", "betas", "momentum", "weight_decay", "eps", "nesterov", "lr_ratio"} <= group.keys()
            assert not {"roles", "fallback", "fallback_lr", "split"} & group.keys()


@pytest.mark.parametrize(
    ("precision", "weights", "device", "products"),
    [
        ("auto", torch.float32, "cuda", torch.bfloat16),
        ("auto", torch.float16, "cuda", torch.bfloat16),
        ("auto", torch.bfloat16, "xpu", torch.bfloat16),
        ("auto", torch.float32, "mps", torch.float32),
        ("auto", torch.float64, "cuda", torch.float64),
        ("fp32", torch.bfloat16, "cuda", torch.float32),
        ("bf16", torch.float32, "mps", torch.bfloat16),
        ("fp64", torch.float32, "cpu", torch.float64),
    ],
)
def test_precision_of_the_products(precision, weights, device, products):
    assert compute_dtype(precision, weights, torch.device(device)) == products


@pytest.mark.parametrize(("has_units", "products"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_multiplies_in_bf16_where_it_has_units_for_it(monkeypatch, has_units, products):
    monkeypatch.setattr(matrix_rule, "_cpu_multiplies_bf16", lambda: has_units)
    assert compute_dtype("auto", torch.float32, torch.device("cpu")) == products


def test_what_is_no_parameter_is_named():
    for wrong in (["model"], [torch.nn.Linear(2, 2)], torch.nn.Linear(2, 2).state_dict()):
        with pytest.raises(TypeError, match=r"`params` holds .*, which is no parameter. Pass the module itself"):
            Muon(wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "heads", "roles": {}}, r"\['roles', 'split'\] in a parameter group: .* the whole optimizer"),
        ({"maximize": True}, "minimise the negative"),
        ({"momentum": 1.5}, r"`momentum` must be in \[0, 1\), got 1.5"),
        ({"lr_scale": "none such"}, "`lr_scale` must be one of"),
        ({"lr": -1.0}, "`lr` must be finite and >= 0"),
        ({"weight_decay": -0.1}, "`weight_decay` must be finite and >= 0"),
    ],
)
def test_a_group_whose_settings_cannot_be_honoured_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([{"params": TinyLM(), **given}])
    optimizer = Muon(TinyLM(), roles={"head": "vector"})
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": TinyLM(), **given})


def test_what_torch_writes_into_its_groups_and_is_off_passes() -> None:
    off = {"maximize": False, "foreach": None, "capturable": False, "fused": None, "betas": [0.9, 0.99], "note": 1}
    (group,) = Muon([{"params": TinyLM(), **off}]).param_groups
    assert (group["betas"], group["note"]) == ((0.9, 0.99), 1)
