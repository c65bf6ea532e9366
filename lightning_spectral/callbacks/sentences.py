"""A LightningCLI whose mistakes are one sentence: ``LightningCLI(Model, parser_class=SentenceParser)``.

jsonargparse answers a mistake with the tree of types that it has tried. What was wrong stands in one leaf of it, next
to the class that was named.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Final, NoReturn

import lightning.pytorch.callbacks
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.text import did_you_mean, import_class, one_line

# of the alternatives that jsonargparse lists, those that the user did not mean
_NOT_MEANT: Final = re.compile(r"Expected a <class 'NoneType'>|Not a valid subclass of|Expected a config path but")


class SentenceParser(LightningArgumentParser):
    """LightningCLI's parser, which says of a mistake the key, the value seen and the nearest that there is.

    ``LightningCLI(Model, parser_class=SentenceParser)``. A callback of this package says it in its own words; of other
    classes it is what jsonargparse knows of them.
    """

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of one class, whose error is a branch of the tree
            super().error(message, ex)
        self.exit(2, f"{self.prog}: {sentence(message, self._option_string_actions)}\n")

    @override
    def instantiate_classes(self, cfg: Namespace, instantiate_groups: bool = True) -> Namespace:
        try:
            return super().instantiate_classes(cfg, instantiate_groups=instantiate_groups)
        except (ValueError, TypeError) as error:
            if "Union subtypes" not in str(error):
                raise
            self.error(str(error), error)


def sentence(message: str, options: Iterable[str] = ()) -> str:
    """What is wrong, out of jsonargparse's tree of tried types.

    Args:
        message: Of its error, many lines.
        options: Words of the command line that there are, with their dashes.

    Returns:
        One line; the message's first, where its leaf is not found.
    """
    key = next(iter(re.findall(r'^Parser key "([^"]+)"', message)), "")
    prefix = f"`{key}`: " if key else ""
    told = _of_specs(key, message) or _of_choices(key, message) or _of_one_line(key, message, options)
    if told is not None:
        return told
    leaf = next(_leaves(message), None)
    if leaf is None:
        return prefix + one_line(message)
    path, said = leaf
    own = _own_words(path, said, message)
    name = path.rpartition(".")[2]
    return f"{prefix}{f'{name}: ' if name and not own.startswith(name) else ''}{own}"


def _of_specs(key: str, message: str) -> str | None:
    """What is wrong with the form of a class in a list: its name, or where its arguments stand."""
    given = _given(message)
    for spec in given if isinstance(given, list) else [given]:
        if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
            continue
        path, name = spec["class_path"], spec["class_path"].rpartition(".")[2]
        if "." not in path:
            front = sys.modules[__name__.partition(".")[0]]  # it was imported to get here
            known = [*front.__all__, *lightning.pytorch.callbacks.__all__]
            hint = did_you_mean(path, known)
            return f"`{key}`: there is no class `{path}`; {hint if hint.endswith('?') else 'give its class path.'}"
        if not isinstance(spec.get("init_args") or {}, dict):
            return f"`{key}`: `init_args` of {name} must hold names and values, got {spec['init_args']!r}."
        other = next((word for word in spec if word not in ("class_path", "init_args", "dict_kwargs")), None)
        if other is not None:
            return f"`{key}`: {name} takes `{other}` below `init_args`, not beside `class_path`."
    return None


def _of_choices(key: str, message: str) -> str | None:
    """Of a value outside of closed choices, which those are."""
    subtypes = re.search(r"^ *Subtypes: (.*)$", message, re.MULTILINE)
    lists = re.findall(r"typing\.Literal(\[[^\]]*\])", subtypes[1]) if subtypes else []
    known = [str(choice) for text in lists for choice in ast.literal_eval(text)]
    value = message.rpartition("Given value: ")[2].strip()
    if not known or value in known:
        return None
    hint = did_you_mean(value, known, otherwise="")
    return f"`{key}` must be one of {', '.join(dict.fromkeys(known))}, got {value}" + (
        f"; {hint}" if hint.endswith("?") else "."
    )


def _of_one_line(key: str, message: str, options: Iterable[str]) -> str | None:
    """Of a plain type that was not met, or of a word that is no option."""
    wanted = re.search(r":\s+Expected an? <class '(\w+)'>\. Got value: (.*)$", message)
    if key and wanted and "\n    -" not in message:
        return f"`{key}` must be {wanted[1]}, got {one_line(wanted[2])}."
    unknown = re.match(r"Unrecognized arguments: --([\w.]+)", message)
    if unknown:
        hint = did_you_mean(unknown[1], [option.removeprefix("--") for option in options], prefix="--")
        return f"there is no option `--{unknown[1]}`; {hint if hint.endswith('?') else '`--help` lists all.'}"
    return None


def _given(message: str) -> Any:
    """The value that did not fit; ``None`` where it is no literal."""
    try:
        return ast.literal_eval(message.rpartition("Given value: ")[2].strip())
    except (ValueError, SyntaxError):
        return None


def _leaves(message: str) -> Iterator[tuple[str, str]]:
    """Class path (empty where no class was named) and what is said of it, for each alternative that was meant."""
    for part in re.split(r"^ *- (?=\S)", message.partition("Errors:")[2].partition("Given value type:")[0], flags=re.M):
        if part.strip() and not _NOT_MEANT.match(part) and not part.startswith(("a class path", "a dict")):
            named = re.match(r"Problem with given class_path '([^']+)':", part)
            yield (named[1], part[named.end() :].strip()) if named else ("", part.strip())


def _own_words(path: str, said: str, message: str) -> str:
    """In the words of a class of ours, where it can be asked; else in jsonargparse's."""
    unknown = re.search(r"Key '([^']+)' is not expected", said)
    kind = _class_of_ours(path)
    if unknown and kind is not None and (asked := _refused(kind, {unknown[1]: None})) is not None:
        return asked
    field = re.match(r'Parser key "([^"]+)":\s*(.*)', said, re.DOTALL)
    if field is None:
        return one_line(said)
    if (asked := _asked(kind, path, message)) is not None:
        return asked
    wanted = re.match(r"Expected an? (?:<class '(\w+)'>|(.+?))\. Got value: (.*)", field[2], re.DOTALL)
    if wanted:
        return f"`{field[1]}` must be {wanted[1] or wanted[2]}, got {one_line(wanted[3])}."
    return f"`{field[1]}`: {one_line(field[2])}"


def _class_of_ours(path: str) -> type | None:
    if not path.startswith("lightning_spectral."):
        return None
    try:
        found = import_class(path)
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def _asked(kind: type | None, path: str, message: str) -> str | None:
    """What the class itself says of the arguments that were given to it in a list of callbacks."""
    specs = _given(message)
    for spec in specs if isinstance(specs, list) else []:
        if kind is not None and isinstance(spec, dict) and spec.get("class_path") == path:
            return _refused(kind, spec.get("init_args") or {})
    return None


def _refused(kind: type, arguments: dict[str, Any]) -> str | None:
    """Why a class does not take these arguments."""
    parameters: tuple[Any, ...] = ([],) if issubclass(kind, Optimizer) else ()
    try:
        kind(*parameters, **arguments)
    except (ValueError, TypeError) as error:
        return one_line(error)
    return None
