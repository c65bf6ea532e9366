"""A LightningCLI whose mistakes are one sentence: ``LightningCLI(Model, parser_class=SentenceParser)``.

jsonargparse answers a mistake with the tree of types that it has tried. What was wrong stands in one leaf of it, next
to the class that was named.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.text import import_class, one_line

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
        self.exit(2, f"{self.prog}: {sentence(message)}\n")

    @override
    def instantiate_classes(self, cfg: Namespace, instantiate_groups: bool = True) -> Namespace:
        try:
            return super().instantiate_classes(cfg, instantiate_groups=instantiate_groups)
        except (ValueError, TypeError) as error:
            if "Union subtypes" not in str(error):
                raise
            self.error(str(error), error)


def sentence(message: str) -> str:
    """What is wrong, out of jsonargparse's tree of tried types.

    Args:
        message: Of its error, many lines.

    Returns:
        One line; the message's first, where its leaf is not found.
    """
    key = next(iter(re.findall(r'^Parser key "([^"]+)"', message)), "")
    prefix = f"`{key}`: " if key else ""
    leaf = next(_leaves(message), None)
    if leaf is None:
        return prefix + one_line(message)
    path, said = leaf
    own = _own_words(path, said, message)
    name = path.rpartition(".")[2]
    return f"{prefix}{f'{name}: ' if name and not own.startswith(name) else ''}{own}"


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
    given = message.rpartition("Given value: ")[2]
    try:
        specs: Any = ast.literal_eval(given)
    except (ValueError, SyntaxError):
        return None
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
