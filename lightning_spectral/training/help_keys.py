"""Every key of a recipe with its type, default and meaning, from the sources that define it; imports none of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_spectral.text import did_you_mean
from lightning_spectral.training.document import RecipeError
from lightning_spectral.training.names import GROUPS, OUR_KEYS, SETUP
from lightning_spectral.training.sources import defaults_of, docs_of, hints_of, type_text


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: With its group, ``train.max_steps``.
        kind: Type, as text.
        default: Default, as text; empty if it has none that is plain.
        meaning: One paragraph; may be empty.
    """

    name: str
    kind: str
    default: str
    meaning: str


def keys_with(word: str = "") -> list[Key]:
    """Keys whose name holds a word, all of them without one.

    Raises:
        RecipeError: If there are none.
    """
    every = list(_keys())
    found = [key for key in every if word.lower() in key.name.lower()]
    if not found:
        hint = did_you_mean(word, [*(key.name for key in every), *(key.name.rpartition(".")[2] for key in every)])
        hint = hint if hint.endswith("?") else "`--help_keys` alone lists all."
        raise RecipeError(f"`--help_keys {word}`: no key has `{word}` in its name; {hint}")
    return found


def text_of(keys: list[Key]) -> str:
    """Two lines a key."""
    lines = []
    for key in keys:
        details = ", ".join(filter(None, (key.kind, f"default: {key.default}" if key.default else "")))
        lines += [
            f"--{key.name}" + (f"  ({details})" if details else ""),
            *([f"    {key.meaning}"] * bool(key.meaning)),
        ]
    return "\n".join(lines)


def _keys() -> Iterator[Key]:
    for path in (SETUP, OUR_KEYS):
        defaults = defaults_of(path)
        for key in _keys_of("", path, defaults):
            yield key
            if key.name in GROUPS:
                start = defaults.get(key.name)
                own = defaults_of(GROUPS[key.name])
                yield from _keys_of(f"{key.name}.", GROUPS[key.name], {**own, **(start or {})})


def _keys_of(prefix: str, path: str, defaults: dict[str, Any]) -> Iterator[Key]:
    said = docs_of(path)
    for name, hint in (hints_of(path) or {}).items():
        group = not prefix and name in GROUPS
        start = "" if group or name not in defaults else _shown(defaults[name])
        yield Key(f"{prefix}{name}", "keys and values" if group else type_text(hint), start, said.get(name, ""))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
