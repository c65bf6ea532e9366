"""JSON Schema of a recipe, for completion and checks in an editor."""

from __future__ import annotations

import inspect
from typing import Any, Final

from litgpt.pretrain import setup as litgpt_setup

from lightning_spectral.callbacks import SpectralRankCallback, TailTokenProbe
from lightning_spectral.callbacks.alarm import SpectralAlarm
from lightning_spectral.callbacks.weight_spectrum import WeightSpectrumCallback
from lightning_spectral.optim import AdamW, Dion, Muon, NorMuon
from lightning_spectral.probe.settings import ProbeSettings
from lightning_spectral.records.json_schema import DRAFT, Schema, descriptions, of_signature
from lightning_spectral.training.schema import our_keys

_CALLBACKS: Final[tuple[type[Any], ...]] = (SpectralRankCallback, TailTokenProbe, SpectralAlarm, WeightSpectrumCallback)
_OPTIMIZERS: Final[tuple[type[Any], ...]] = (AdamW, Muon, NorMuon, Dion)
_SWEEP: Final = "Axes of a sweep: `axes`, `also`, `exclude`; see `lightning-spectral sweep --help`."


def of_recipe() -> Schema:
    """The keys of litgpt's ``pretrain`` and ours; our callbacks and optimizers with their arguments.

    A recipe with ``base:`` says only what differs, hence no key is required.
    """
    properties: dict[str, Any] = {
        "base": {"type": "string", "description": "A recipe that this one changes: a shipped name or a path."},
        **of_signature(litgpt_setup),
        **of_signature(our_keys),
        "optimizer": _class_or_name(_OPTIMIZERS),
        "data": _class_or_name(()),
        "callbacks": {"type": ["array", "null"], "items": _class_or_name(_CALLBACKS)},
        "sweep": {"type": "object", "description": _SWEEP},
        "smoke": {"type": "object", "description": "What `sweep --smoke` changes to run in seconds."},
    }
    for value in properties.values():
        _allow_null(value)
    whole = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"$schema": DRAFT, "title": "recipe", **whole}


def _class_or_name(ours: tuple[type[Any], ...]) -> Schema:
    """A name, or ``{class_path, init_args}``; for our classes the arguments are known."""
    known = [_known(kind) for kind in ours]
    names = [name for schema in known for name in schema["properties"]["class_path"]["enum"]]
    other: Schema = {
        "type": "object",
        "properties": {"class_path": {"type": "string"}, "init_args": {"type": ["object", "null"]}},
        "required": ["class_path"],
    }
    if names:
        other["properties"]["class_path"]["not"] = {"enum": names}
    return {"anyOf": [{"type": "string"}, *known, other]}


def _known(kind: type[Any]) -> Schema:
    name = kind.__name__
    properties = _arguments(kind)
    variable = [p for p in inspect.signature(kind.__init__).parameters.values() if p.kind is p.VAR_KEYWORD]
    if variable and "SharedArguments" in str(variable[0].annotation):
        properties = {**_arguments(ProbeSettings), **properties}
    properties.pop("params", None)
    arguments = {"type": ["object", "null"], "properties": properties}  # open: a base class may take more
    paths = [f"lightning_spectral.{name}", f"{kind.__module__}.{name}", name]
    return {
        "type": "object",
        "properties": {"class_path": {"enum": paths}, "init_args": arguments},
        "required": ["class_path"],
        "additionalProperties": False,
    }


def _arguments(kind: type[Any]) -> dict[str, Schema]:
    """Those of ``__init__``, with the class' words for them."""
    said = descriptions(kind)
    return {name: {**value, "description": said.get(name, "")} for name, value in of_signature(kind.__init__).items()}


def _allow_null(value: Schema) -> None:
    """An empty key means its default."""
    if isinstance(value.get("type"), str):
        value["type"] = [value["type"], "null"]
    elif "anyOf" in value and {"type": "null"} not in value["anyOf"]:
        value["anyOf"] = [*value["anyOf"], {"type": "null"}]
    elif "enum" in value and None not in value["enum"]:
        value["enum"] = [*value["enum"], None]
