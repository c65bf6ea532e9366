"""JSON Schema of dataclasses and signatures, with the descriptions of their docstrings. Standard library only."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from lightning_spectral.records.schema import (
    ALARMS_FILE,
    LOSSES_FILE,
    RUN_FILE,
    SPECTRAL_FILE,
    WEIGHTS_FILE,
    AlarmRecord,
    LossRecord,
    RunInfo,
    SpectralRecord,
    WeightRecord,
)

DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"
RECORDS: Final[Mapping[str, type[Any]]] = {
    RUN_FILE: RunInfo,
    SPECTRAL_FILE: SpectralRecord,
    LOSSES_FILE: LossRecord,
    WEIGHTS_FILE: WeightRecord,
    ALARMS_FILE: AlarmRecord,
}
_PLAIN: Final = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", type(None): "null"}

Schema = dict[str, Any]


def of_record(file: str) -> Schema:
    """Schema of one line of a run folder's JSONL file, or of its ``run.json``.

    Args:
        file: A key of :data:`RECORDS`, such as ``spectral.jsonl``.
    """
    made = of_dataclass(RECORDS[file])
    properties = made["properties"]
    if "extra" in properties:  # values of further metrics stand beside the other fields
        del properties["extra"]
        made["additionalProperties"] = {"type": ["number", "null"]}
    made["required"] = [*made["required"], "schema_version"]
    return {"$schema": DRAFT, "title": file, **made}


def of_dataclass(kind: type[Any]) -> Schema:
    """An object with the dataclass' fields; those without a default are required."""
    hints, said = get_type_hints(kind), descriptions(kind)
    properties, required = {}, []
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        properties[field.name] = of_parameter(hints[field.name], field.default, said.get(field.name, ""))
        if not has_default:
            required.append(field.name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def of_signature(function: Callable[..., Any]) -> dict[str, Schema]:
    """One property for each of the function's parameters."""
    hints, said = get_type_hints(function), descriptions(function)
    properties = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            properties[name] = of_parameter(hints.get(name, Any), parameter.default, said.get(name, ""))
    return properties


def of_parameter(annotation: Any, default: Any, text: str) -> Schema:
    """One property: its type, what it is, and its default where JSON can say it."""
    made = of_type(annotation)
    if text:
        made["description"] = text
    if isinstance(default, (bool, int, float, str)):
        made["default"] = default
    return made


def of_type(annotation: Any) -> Schema:
    """Schema of an annotation; ``{}``, anything, for what JSON has no word for."""
    if annotation in _PLAIN:
        return {"type": _PLAIN[annotation]}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return _any_of([of_type(argument) for argument in arguments])
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return {**of_dataclass(annotation), "required": []}
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": of_type(arguments[1])}
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return {"type": "array", "items": of_type(arguments[0])}
    return {}


def descriptions(documented: Any) -> dict[str, str]:
    """Name -> text of the ``Args:`` or ``Attributes:`` of a Google-style docstring, or of what has it."""
    doc = documented if isinstance(documented, str) else inspect.getdoc(documented) or ""
    found = re.search(r"^(?:Args|Arguments|Attributes):\n((?:[ \t]+\S.*\n?|\n)+)", doc, re.MULTILINE)
    out: dict[str, str] = {}
    name = ""
    for line in found[1].splitlines() if found else ():
        entry = re.match(r" {4}(\w+)(?: \(.*?\))?:\s*(.*)", line)
        if entry:
            name, out[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            out[name] = f"{out[name]} {line.strip()}"
    return {key: text.replace("``", "`") for key, text in out.items()}


def _any_of(options: list[Schema]) -> Schema:
    if {} in options:
        return {}
    if all(set(option) == {"type"} for option in options):
        return {"type": [option["type"] for option in options]}
    return {"anyOf": options}
