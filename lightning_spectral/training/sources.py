"""What the source of an installed module says about its names, without importing it.

Importing litgpt, torch and Lightning takes about ten seconds of CPU time, too long for reporting a misspelled name.
A function here that cannot tell returns ``None``; the full check after the import then decides.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_spectral.records.json_schema import descriptions

_HOPS = 6  # imports followed from a package's front page to the module that defines a class

_READ: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "Path": str}  # calls whose value is known

PLAIN: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "Path": Path}

Definition = ast.ClassDef | ast.FunctionDef
Hint = tuple[str, ast.expr | None]  # the module in which an annotation stands, and the annotation


@dataclass(frozen=True)
class Choice:
    """One value of a ``Literal``."""

    value: Any


@dataclass(frozen=True)
class ListOf:
    """A list, each item of which is one of these."""

    items: tuple[Any, ...]


@lru_cache(maxsize=256)
def tree_of(module: str) -> ast.Module | None:
    """The parsed source of an installed module; ``None`` if it has no Python source."""
    file = file_of(module)
    return ast.parse(file.read_text(encoding="utf-8")) if file else None


@lru_cache(maxsize=256)
def file_of(module: str) -> Path | None:
    """Where the source of an installed module lies; imports nothing."""
    top, *rest = module.split(".")
    spec = find_spec(top) if top else None  # of a top-level name: imports nothing
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    place = Path(spec.origin)
    if not rest:
        return place
    place = place.parent.joinpath(*rest)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def is_missing(path: str) -> bool:
    """Whether a class path surely names nothing: no such package, or a module whose ``__all__`` and code lack it."""
    module, _, name = path.rpartition(".")
    if find_spec(path.partition(".")[0]) is None:
        return True
    tree = tree_of(module)
    if tree is None:
        return False
    listed = public_names(module)
    return bool(listed) and name not in listed and name not in _bound(tree)


def public_names(module: str) -> list[str]:
    """``__all__`` of a module; empty if its source has no such list."""
    for node in getattr(tree_of(module), "body", []):
        if isinstance(node, ast.Assign) and any(_is_name(target, "__all__") for target in node.targets):
            return _strings(node.value)
    return []


def choices(path: str) -> list[str]:
    """The strings of an alias ``Name = Literal["a", "b"]``."""
    module, _, name = path.rpartition(".")
    return assigned_strings(module, name)


def assigned_strings(module: str, name: str) -> list[str]:
    """All strings in what a module assigns to a name; empty if it does not."""
    for node in getattr(tree_of(module), "body", []):
        if isinstance(node, ast.Assign) and any(_is_name(target, name) for target in node.targets):
            return _strings(node.value)
    return []


def fields_of(path: str) -> list[str]:
    """Annotated names in a class body, bases first: the fields of a dataclass or of a ``TypedDict``."""
    return list(_fields(path))


def _fields(path: str) -> dict[str, Hint]:
    found = _definition(path)
    if found is None:
        return {}
    module, node = found
    if not isinstance(node, ast.ClassDef):
        return {}
    bases: list[ast.expr] = node.bases
    inherited = {name: hint for base in bases for name, hint in _fields(_path_in(module, base)).items()}
    if not (inherited or _is_dataclass(node) or any(_last_name(base) == "TypedDict" for base in bases)):
        return {}
    annotated = [item for item in node.body if isinstance(item, ast.AnnAssign) and not _is_no_argument(item.value)]
    own = {item.target.id: (module, item.annotation) for item in annotated if isinstance(item.target, ast.Name)}
    return {**inherited, **own}


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(_last_name(getattr(mark, "func", mark)) == "dataclass" for mark in node.decorator_list)


def _is_no_argument(value: ast.expr | None) -> bool:
    """Whether a dataclass field is declared as ``field(init=False)``."""
    return isinstance(value, ast.Call) and any(
        word.arg == "init" and isinstance(word.value, ast.Constant) and word.value.value is False
        for word in value.keywords
    )


def arguments_of(path: str) -> list[str] | None:
    """Names that a function or a class takes; ``None`` if the source alone does not say."""
    hints = hints_of(path)
    return None if hints is None else list(hints)


def hints_of(path: str) -> dict[str, Hint] | None:
    """Annotations of what a function or a class takes, by name; ``None`` if the source alone does not say."""
    found = _definition(path)
    if found is None:
        return None
    module, node = found
    if isinstance(node, ast.FunctionDef):
        return _arguments(module, node.args)
    return _arguments_of_class(path, module, node)


def _arguments_of_class(path: str, module: str, node: ast.ClassDef) -> dict[str, Hint] | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            known = _arguments(module, item.args)
            return None if known is None else dict(list(known.items())[1:])  # without ``self``
    if _is_dataclass(node):
        return _fields(path)
    return hints_of(_path_in(module, node.bases[0])) if node.bases else None


def _arguments(module: str, args: ast.arguments) -> dict[str, Hint] | None:
    known = {arg.arg: (module, arg.annotation) for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)}
    if args.kwarg is None:
        return known
    hint = args.kwarg.annotation  # ``**shared: Unpack[SomeTypedDict]``
    if isinstance(hint, ast.Subscript) and _last_name(hint.value) == "Unpack":
        shared = _fields(_path_in(module, hint.slice))
        return {**known, **shared} if shared else None
    return None


def alternatives(hint: Hint) -> Iterator[Any]:
    """What an annotation allows, one by one: a plain type, ``Choice``, ``ListOf``, ``None``; ``...`` for any other.

    Aliases (``Name = Literal["a", "b"]``) are followed; a tensor, which no recipe can hold, is left out.
    """
    module, node = hint
    if isinstance(node, ast.BinOp):
        yield from alternatives((module, node.left))
        yield from alternatives((module, node.right))
    elif isinstance(node, ast.Subscript):
        yield from _of_subscript(module, node)
    elif isinstance(node, ast.Constant) and node.value is None:
        yield None
    elif not isinstance(node, (ast.Name, ast.Attribute)):
        yield ...
    elif _last_name(node) in PLAIN:
        yield PLAIN[_last_name(node)]
    elif _last_name(node) != "Tensor":
        alias = _alias(module, _last_name(node)) if isinstance(node, ast.Name) else None
        yield from alternatives(alias) if alias else [...]


def _of_subscript(module: str, node: ast.Subscript) -> Iterator[Any]:
    kind = _last_name(node.value)
    inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if kind == "Literal":
        constants = [item.value if isinstance(item, ast.Constant) else ... for item in inside]
        yield from (value if value in (None, ...) else Choice(value) for value in constants)
    elif kind in ("list", "Sequence", "tuple", "Tuple"):
        items = [item for item in inside if not (isinstance(item, ast.Constant) and item.value is ...)]
        yield ListOf(tuple(one for item in items for one in alternatives((module, item))))
    elif kind in ("Optional", "Union"):
        yield from (one for item in inside for one in alternatives((module, item)))
        if kind == "Optional":
            yield None
    else:
        yield ...


def _alias(module: str, name: str, hops: int = _HOPS) -> Hint | None:
    """What a module assigns to a name, imports followed."""
    tree = tree_of(module)
    if tree is None or not hops:
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(_is_name(target, name) for target in node.targets):
            return module, node.value
    home = _imported_from(tree, module, name)
    return _alias(home.rpartition(".")[0], home.rpartition(".")[2], hops - 1) if home else None


def docs_of(path: str) -> dict[str, str]:
    """What a function's ``Args:`` say of each argument; of a dataclass, what stands under or behind each field."""
    found = _definition(path)
    if found is None:
        return {}
    _, node = found
    said = descriptions(ast.get_docstring(node) or "")
    for item, after in pairwise(node.body):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(text, str):
            said.setdefault(item.target.id, " ".join(text.split()))
    return said


def type_text(hint: Hint) -> str:
    """An annotation as people read it: `int or null`."""
    node = hint[1]
    if node is None:
        return ""
    text = ast.unparse(node)
    found = re.fullmatch(r"Optional\[(.*)\]", text)
    text = f"{found[1]} | None" if found else text
    closed = re.fullmatch(r"Literal\[(.*?)\]( \| None)?", text)
    text = " | ".join(closed[1].split(", ")) + (closed[2] or "") if closed else text
    return text.replace("None", "null").replace(" | ", " or ").replace("'", "")


def defaults_of(path: str) -> dict[str, Any]:
    """Defaults of a dataclass's fields or a function's arguments, as plain values; ``None`` for one that has none.

    What is no literal, no dataclass and no path is left out.
    """
    found = _definition(path)
    if found is None:
        return {}
    module, node = found
    pairs: list[tuple[str, ast.expr]] = []
    if isinstance(node, ast.FunctionDef):
        names = [arg.arg for arg in node.args.args]
        missing: list[ast.expr] = [ast.Constant(None)] * (len(names) - len(node.args.defaults))
        pairs = list(zip(names, [*missing, *node.args.defaults], strict=True))
    else:
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and item.value is not None]
        pairs = [(item.target.id, item.value) for item in fields if isinstance(item.target, ast.Name) and item.value]
    plain = {name: _plain(module, value) for name, value in pairs}
    return {name: value for name, value in plain.items() if value is not ...}


def _plain(module: str, node: ast.expr) -> Any:
    """The value of an expression; ``...`` if it would have to be run."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if not isinstance(node, ast.Call):
        return ...
    name, arguments = _last_name(node.func), [_plain(module, argument) for argument in node.args]
    if name in _READ and len(arguments) == 1 and arguments[0] is not ...:
        return _READ[name](arguments[0])
    made = defaults_of(_path_in(module, node.func))
    return {**made, **{word.arg: _plain(module, word.value) for word in node.keywords if word.arg}} if made else ...


@lru_cache(maxsize=512)
def _definition(path: str, hops: int = _HOPS) -> tuple[str, Definition] | None:
    """``(module, node)`` of a class or a function, imports followed."""
    module, _, name = path.rpartition(".")
    tree = tree_of(module)
    if tree is None or not hops:
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
    home = _imported_from(tree, module, name)
    return _definition(home, hops - 1) if home else None


def _path_in(module: str, node: ast.expr) -> str:
    """The path of a name that a module uses, as far as its imports say."""
    name = _last_name(node)
    tree = tree_of(module)
    return (_imported_from(tree, module, name) if tree else None) or f"{module}.{name}"


def _imported_from(tree: ast.Module, module: str, name: str) -> str | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{_absolute(module, node)}.{alias.name}"
    return None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    file = file_of(module)
    is_package = file is not None and file.name == "__init__.py"
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _bound(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def _strings(node: ast.AST) -> list[str]:
    return [item.value for item in ast.walk(node) if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
