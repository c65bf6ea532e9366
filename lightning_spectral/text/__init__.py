"""What every room says and reads alike: one-sentence errors, suggestions, classes by path, YAML, whole files.

Imports the standard library only; YAML is imported when a file is read.
"""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import re
import secrets
import socket
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

PREVIOUS = "previous"  # folder beside the files of a run, with those of earlier ones


class CommandError(Exception):
    """Bad input, said in one sentence that names the thing, the value seen and the remedy; exit code 2."""


def one_line(message: object) -> str:
    """A message, or an error's text, without its line breaks; an error without a text is its type."""
    return " ".join(str(message).split()) or type(message).__name__


# what a terminal obeys, what turns the order of letters round, halves of characters that no encoding can write
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, *, keep: str = "") -> str:
    r"""Text of anybody, to be shown: control characters but tabs and line ends are written out, as in ``\x1b``.

    Args:
        text: E.g. a label of a foreign file.
        keep: Control characters that stay.
    """
    return _UNSEEN.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def did_you_mean(wrong: object, known: Iterable[object], *, otherwise: str = "known here", prefix: str = "") -> str:
    """``did you mean `x`?``, or what is known where nothing is close.

    Args:
        wrong: What was given; need not be a string.
        known: What could have been given.
        otherwise: Words before the list.
        prefix: Put before a name that is suggested, e.g. ``train.``.
    """
    names = [str(name) for name in known]
    by_letters = {name.lower(): name for name in reversed(names)}  # capitals are no difference
    word = str(wrong).lower()
    close = difflib.get_close_matches(word, by_letters, n=1)
    if not close and len(word) > 2:  # a beginning, such as `every` of `every_n_steps`
        close = [letters for name in names if (letters := name.lower()).startswith(word)][:1]
    return f"did you mean `{prefix}{by_letters[close[0]]}`?" if close else f"{otherwise}: {', '.join(names)}."


def import_class(path: str, *, bare_names_in: str | None = None, subclass_of: type | None = None) -> Any:
    """The object at a dotted path; nothing is called.

    Args:
        path: ``package.module.Name``.
        bare_names_in: Module in which a name without a dot is looked up.
        subclass_of: What the class must be a kind of.

    Raises:
        ImportError: If there is none, or it is something else; one sentence, without the path.
    """
    module_name, _, name = path.rpartition(".")
    module_name = module_name or bare_names_in or ""
    if not module_name:
        raise ImportError("a name without its module; give the full class path")
    try:
        found = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(one_line(error)) from error
    if subclass_of is not None and not (isinstance(found, type) and issubclass(found, subclass_of)):
        raise ImportError(f"it is no {subclass_of.__module__.partition('.')[0]} {subclass_of.__name__}")
    return found


def is_name(text: object) -> bool:
    """Whether a text can name a file or folder and lead nowhere else: letters, digits, ``.``, ``_``, ``-``."""
    return isinstance(text, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", text) is not None


def as_name(text: str) -> str:
    """A name for a file or folder that stands for any text: the text itself where it is one."""
    kept = re.sub(r"[^\w.-]+", "_", text).lstrip(".")
    return kept.encode()[:200].decode(errors="ignore") or "_"


def parse_json(text: str | bytes) -> Any:
    """JSON of anybody.

    Raises:
        ValueError: If it is none, or nested without end.
    """
    try:
        content = json.loads(text)
        raw = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
        if b"\\ud" in raw.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a character, which no file can hold") from None
    return content


def read_yaml(text: str) -> Any:
    """YAML as people mean it: ``1e-3`` is a number, ``1e6`` an integer, ``on``, ``off``, ``yes`` and ``no`` are words.

    Raises:
        yaml.YAMLError: If it is no YAML.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_yaml_loader())  # noqa: S506 - a SafeLoader
    except (ValueError, RecursionError) as error:  # a date that is none; nested without end
        raise yaml.YAMLError(one_line(error)) from error


def yaml_mistake(error: Exception) -> str:
    """What is wrong with a text that is no YAML: the line, and what to do there."""
    if isinstance(error, UnicodeDecodeError):
        return (
            f"its byte {error.start + 1} is no text in UTF-8. Save it as UTF-8, or give the text file that was meant."
        )
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return one_line(error)
    problem, context = str(getattr(error, "problem", "")), str(getattr(error, "context", "") or "")
    start = getattr(error, "context_mark", None) or mark
    if "\\t" in problem:
        return f"line {mark.line + 1} begins with a tab. Indent with spaces."
    if "flow mapping" in context or "flow sequence" in context:
        opened, closed = ("{", "}") if "mapping" in context else ("[", "]")
        return f"the `{opened}` of line {start.line + 1} has no closing `{closed}`, or a comma is missing after it."
    return f"line {mark.line + 1}: {one_line(f'{context} {problem}')}."


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file of names and values, which may be anybody's.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it cannot be read, or holds something else; the message names it.
    """
    import yaml

    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = one_line(error) if isinstance(error, OSError) else yaml_mistake(error)
        raise ValueError(f"`{path}` cannot be read: {said}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"`{path}` holds no names with values, but {one_line(content)[:80]}.")
    return content


@lru_cache(maxsize=1)
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's booleans and numbers on PyYAML, which speaks 1.1."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key `{twice}` stands twice, line {node.start_mark.line + 1} on: keep one")
        return loader.construct_mapping(node)

    def number(loader: Loader, node: yaml.ScalarNode) -> float | int:
        value = loader.construct_yaml_float(node)
        is_whole = re.fullmatch(r"[-+]?\d+[eE]\+?\d+", node.value) is not None and math.isfinite(value)
        return int(value) if is_whole else value

    boolean = "tag:yaml.org,2002:bool"
    Loader.add_constructor("tag:yaml.org,2002:float", number)
    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != boolean]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(boolean, re.compile(r"(true|false|True|False|TRUE|FALSE)$"), list("tTfF"))
    exponents = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponents, list("-+.0123456789"))
    return Loader


def folders_below(root: Path, skip: Collection[str] = (PREVIOUS,)) -> Iterator[Path]:
    """A folder and those below it, each once, in the order of their names.

    Links are followed to a folder and to what lies directly in it: a folder of links to runs or to a sweep is common,
    and a link to a whole disk is not walked through.

    Args:
        root: Where to look.
        skip: Names that are not looked into, as hidden folders are not.
    """
    seen: set[str] = set()
    waiting: list[tuple[str, int | None]] = [(str(root), None)]  # a folder, and how many levels below it
    while waiting:
        folder, levels = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        yield Path(folder)
        if levels == 0:
            continue
        try:
            found = [entry for entry in os.scandir(folder) if entry.is_dir()]
        except OSError:
            continue  # gone since, or not ours to read
        below = None if levels is None else levels - 1
        inside = [entry for entry in found if entry.name not in skip and not entry.name.startswith(".")]
        inside.sort(key=lambda entry: (entry.is_symlink(), entry.name), reverse=True)  # the last is next
        waiting += [(entry.path, 1 if entry.is_symlink() else below) for entry in inside]


def plain_file(path: Path) -> Path:
    """The path itself; what lies there may come from anybody, and reading a device or a pipe would not end.

    Raises:
        OSError: If it is one; nothing, a file and a folder are the caller's to judge.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "a device or a pipe, not a file", str(path))
    return path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; at the end of the block it takes its place, after an error it is gone.

    Readers see the old file or the new one, never a part of one, and two writers do not mix. What a killed writer left
    is removed by the next one.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, and a file is to be written", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_partials(path.parent.resolve(), os.getpid())
    partial = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    # a new file, no link that somebody put there; the umask is the kernel's to apply: reading it would change it
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        error.filename = str(path)  # what was asked for, not our name for it
        raise
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@lru_cache(maxsize=1024)
def _remove_partials(folder: Path, process: int) -> None:
    """Remove what dead processes of this machine were writing; once a process and folder, however many files it has."""
    theirs = re.compile(rf"\..*\.{re.escape(_host())}\.(\d+)\.\w+\.partial", re.DOTALL)
    for partial in folder.glob(".*.partial"):
        match = theirs.fullmatch(partial.name)
        if match is None or int(match[1]) == process:
            continue
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            partial.unlink(missing_ok=True)
        except (PermissionError, OverflowError):
            continue  # somebody else's process, or no process id


@lru_cache(maxsize=1)
def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64]


def set_aside(folder: str | Path, names: Iterable[str], label: str | None = None) -> Path | None:
    """Move what an earlier run left to ``previous/LABEL`` beside it, or to ``previous/001``, ``002``, ...

    Args:
        folder: The run folder.
        names: Files and folders that a run leaves there; those that do not exist are passed over.
        label: Id of the earlier run, if it has one; what is no plain name is not used.

    Returns:
        Where they are now, or ``None`` if there was nothing to move.
    """
    folder = Path(folder)
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        return None
    previous = folder / PREVIOUS
    numbers = [int(path.name) for path in previous.glob("[0-9]*") if path.name.isdecimal()]
    numbered = f"{1 + max(numbers, default=0):03d}"
    target = previous / (label if label is not None and is_name(label) else numbered)  # it may be from anybody's file
    while target.exists():
        target = target.with_name(target.name + "_")
    target.mkdir(parents=True)
    for path in found:
        path.rename(target / path.name)
    return target


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all (:func:`whole_file`)."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
