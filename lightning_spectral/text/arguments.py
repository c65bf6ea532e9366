"""Checks of arguments that several rooms share: the message names the argument, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_spectral.text import is_name


def require_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise unless ``value`` is one of ``allowed``.

    Raises:
        ValueError: With the name, the value and what is allowed.
    """
    choices = list(allowed)
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


def require_count(name: str, value: object, remedy: str = "") -> None:
    """Raise unless ``value`` is an integer >= 1.

    Args:
        name: Name of the argument.
        value: What was given; a bool is no count.
        remedy: What to do, if that is not plain from the rest.

    Raises:
        ValueError: With the name, the value and the remedy.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}{f': {remedy}' if remedy else ''}.")


def require_run_id(value: object) -> None:
    """A run id becomes the name of a folder.

    Raises:
        ValueError: If it is neither ``None`` nor a plain name.
    """
    if value is not None and not is_name(value):
        raise ValueError(f"`run_id` must be a plain name (letters, digits, `.`, `_`, `-`; at most 128), got {value!r}.")
