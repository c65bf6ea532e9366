"""Checks of arguments that several rooms share: the message names the argument, the value and what is allowed."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from lightning_spectral.text import did_you_mean, is_name, one_line

Init = TypeVar("Init", bound=Callable[..., None])


def require_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise unless ``value`` is one of ``allowed``.

    Raises:
        ValueError: With the name, the value and what is allowed.
    """
    choices = list(allowed)
    if value not in choices:
        close = did_you_mean(value, choices)
        raise ValueError(
            f"`{name}` must be one of {choices}, got {value!r}{f'; {close}' if close.endswith('?') else '.'}"
        )


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


def require_kinds(owner: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raise unless every value is of the kind that its annotation says: else it would show in the midst of training.

    A tensor or NumPy number is a number, any collection but text is a list, a path is text; NaN is nothing.

    Args:
        owner: A constructor, or a dataclass.
        values: By name, e.g. ``locals()`` of the constructor; names without an annotation are passed over.

    Raises:
        ValueError: With the name, the value and the kind.
    """
    for name, hint in _hints_of(owner).items():
        if name not in values or _is_kind(values[name], hint):
            continue
        value, kinds = values[name], _alternatives(hint)
        lists = [kind for kind in kinds if get_origin(kind) in _LISTS]
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if choices:
            require_choice(name, value, choices)
        if lists and isinstance(value, str):
            raise ValueError(f"`{name}` must be a list, got {value!r}: write {name}=[{value!r}].")
        words = " or ".join(dict.fromkeys(_words(kind) for kind in kinds if kind is not NoneType))
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"`{name}` must be {words}, got nan, which is none: was it computed from something?")
        text = one_line(repr(value))
        seen = f"{text if len(text) <= 80 else text[:77] + '...'} of type {type(value).__name__}"
        raise ValueError(f"`{name}` must be {words}, got {seen}.{_remedy(kinds, value)}")


def refuse_arguments(owner: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse names of arguments that are not there.

    Raises:
        TypeError: With the nearest that there is.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{owner} has no argument `{name}`: {did_you_mean(name, known)}")


def refuses_unknown(init: Init) -> Init:
    """A constructor that answers an argument it does not have with the nearest that it has.

    Raises:
        TypeError: When it is called with one.
    """
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse_arguments(type(self).__name__, kwargs, known)
        init(self, *args, **kwargs)

    return cast(Init, checked)


_LISTS: Final = (list, Sequence, tuple)
_WORDS: Final = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "names with values",
}


@lru_cache(maxsize=256)
def _hints_of(owner: Callable[..., Any]) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(owner).items() if name != "return"}


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        return [one for part in get_args(hint) for one in _alternatives(part)]
    return [hint]


def _words(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin in _LISTS:
        items = dict.fromkeys(_words(one) for part in get_args(kind) if part is not ... for one in _alternatives(part))
        return f"a list, each item {' or '.join(items)}"
    if origin is Literal:
        return f"one of {list(get_args(kind))}"
    return "a function" if origin is Callable else _WORDS.get(origin, getattr(origin, "__name__", str(origin)))


def _remedy(kinds: Collection[Any], value: object) -> str:
    """YAML 1.1, in which most YAML files are read, takes a number without a point for text."""
    match = re.fullmatch(r"([-+]?\d+)([eE][-+]?\d+)", value) if float in kinds and isinstance(value, str) else None
    return f" YAML reads `{value}` as text: write `{match[1]}.0{match[2]}`." if match else ""


def _is_kind(value: Any, hint: Any) -> bool:
    return any(_is_one(value, kind) for kind in _alternatives(hint))


def _is_one(value: Any, kind: Any) -> bool:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin in _LISTS:
        inside = [part for part in get_args(kind) if part is not ...]
        is_list = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
        return is_list and all(_is_kind(item, inside[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    if origin is Callable:
        return callable(value)
    if origin in (int, float):
        return _is_number(value, origin)
    if origin is str:
        return isinstance(value, (str, PathLike))
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def _is_number(value: Any, kind: type) -> bool:
    """Tensors and arrays of one element too: they are no ``Real``, but say what they are worth."""
    if isinstance(value, (bool, str, bytes)):
        return False
    if kind is int:
        return isinstance(value, Integral) or (hasattr(value, "__index__") and getattr(value, "ndim", 1) == 0)
    is_real = isinstance(value, Real) or (hasattr(value, "__float__") and getattr(value, "numel", lambda: 0)() == 1)
    return is_real and not math.isnan(value)
