"""Do the tests notice? One small change at a time in the core rooms, and the tests of the changed file.

    python tools/mutate.py --count 300 --out benchmarks/results/mutations
    python tools/mutate.py --again benchmarks/results/mutations.json  # its survivors, with the tests of now

A mutant is killed where a test fails or takes too long, and survives where all pass. Each runs in a process forked from
one that has imported torch and pytest. Files whose code runs on several ranks only have no row in :data:`TESTS`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("functional", "metrics", "records", "optim")
_RECORDS = ("test_records", "test_readers", "test_json_schema", "probe/test_run_folder", "analysis/test_scan")
_STEP = ("optim/test_parts", "optim/test_single_device", "optim/test_numerics")
# file -> its tests, the most telling first
TESTS: dict[str, tuple[str, ...]] = {
    "functional/approximate": ("functional/test_approximate",),
    "functional/buckets": ("functional/test_buckets", "metrics/test_streaming"),
    "functional/coefficients": ("functional/test_orthogonalize",),
    "functional/covariance": ("functional/test_covariance", "functional/test_sample", "metrics/test_streaming"),
    "functional/flattening": ("functional/test_orthogonalize", "memory/test_flattening"),
    "functional/few_rows": ("functional/test_row_ranks", "functional/test_sample"),
    "functional/iteration": ("functional/test_orthogonalize",),
    "functional/magnitude": ("functional/test_orthogonalize", "optim/test_numerics"),
    "functional/matrix_spectrum": ("functional/test_matrix_spectrum",),
    "functional/orthogonalize": ("functional/test_orthogonalize", "optim/test_numerics"),
    "functional/packed": ("functional/test_covariance", "functional/test_products"),
    "functional/polar": ("functional/test_polar",),
    "functional/products": ("functional/test_products", "functional/test_covariance"),
    "functional/rank": ("functional/test_rank", "functional/test_sample", "functional/test_approximate"),
    "functional/row_ranks": ("functional/test_row_ranks", "functional/test_rank"),
    "functional/same_shape": ("functional/test_orthogonalize", "optim/test_host_waits"),
    "functional/sample": ("functional/test_sample", "probe/test_eigensolve"),
    "metrics/streaming": ("metrics/test_streaming",),
    **{f"records/{name}": _RECORDS for name in ("__init__", "files", "json_schema", "schema", "upgrade")},
    "records/eigenvalues": ("test_eigenvalue_names", "probe/test_eigensolve"),
    "optim/adamuon": ("optim/test_zoo", *_STEP),
    "optim/adamw": _STEP,
    "optim/base": (*_STEP, "optim/test_settings", "optim/test_routing", "optim/test_come_and_go", "optim/test_recipes"),
    "optim/checkpoint": (*_STEP, "optim/test_views", "optim/test_come_and_go"),
    "optim/dion": ("optim/test_dion", *_STEP),
    "optim/dion2": ("optim/test_zoo", *_STEP),
    "optim/factors": ("optim/test_dion", *_STEP),
    "optim/gradients": _STEP,
    "optim/grouping": ("optim/test_routing", "optim/test_views", *_STEP),
    "optim/matrices": ("optim/test_views", "optim/test_routing", *_STEP),
    "optim/matrix_rule": _STEP,
    "optim/matrix_step": (*_STEP, "optim/test_views"),
    "optim/members": (*_STEP, "optim/test_views", "optim/test_routing"),
    "optim/migrate": (*_STEP, "optim/test_come_and_go"),
    "optim/muon": _STEP,
    "optim/muonh": ("optim/test_zoo", *_STEP),
    "optim/normuon": _STEP,
    "optim/routing": ("optim/test_routing", "optim/test_families"),
    "optim/settings": ("optim/test_settings", *_STEP),
    "optim/soap": ("optim/test_zoo", *_STEP),
    "optim/state": (*_STEP, "optim/test_zoo"),
    "optim/telemetry": _STEP,
    "optim/vector_rules": _STEP,
    "optim/weights": (*_STEP, "optim/test_come_and_go"),
}
LIMIT_S = 120.0

_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
}  # fmt: skip
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}


def points(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and description of every small change."""
    return [(node.lineno, text) for _, node in _nodes(tree) for text, _ in _changes(node)]  # type: ignore[attr-defined]


def mutant(tree: ast.AST, number: int) -> ast.AST:
    """The tree with the change of that number made in it."""
    every = ((path, changed) for path, node in _nodes(tree) for _, changed in _changes(node))
    path, changed = next(islice(every, number, None))
    _replace(tree, path, changed)
    return ast.fix_missing_locations(tree)


_Path = tuple[tuple[str, int | None], ...]


# keywords that guard or format, and change no result: `zip(strict=)`, `json.dumps(indent=)`, a TypedDict's `total=`
_SILENT_KEYWORDS = ("strict", "indent", "total", "slots", "stacklevel")


def _nodes(node: ast.AST, path: _Path = ()) -> Iterator[tuple[_Path, ast.AST]]:
    """All nodes in which a change means something: no annotations, no words of errors, no docstrings."""
    if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr)) or _is_typing_only(node):
        return
    if _is_silent(node):
        return
    if hasattr(node, "lineno"):
        yield path, node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        if isinstance(value, ast.AST):
            yield from _nodes(value, (*path, (name, None)))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, ast.AST):
                    yield from _nodes(item, (*path, (name, index)))


def _is_silent(node: ast.AST) -> bool:
    """Keywords of :data:`_SILENT_KEYWORDS`, ``__slots__``, errors made before they are raised."""
    if isinstance(node, ast.keyword):
        return node.arg in _SILENT_KEYWORDS and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assign):
        return any(isinstance(one, ast.Name) and one.id == "__slots__" for one in node.targets)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id.endswith(("Error", "Warning", "Exception"))
    return False


def _is_typing_only(node: ast.AST) -> bool:
    """``if TYPE_CHECKING``, overloads, aliases and assertions for the type checker."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.FunctionDef):
        return any(isinstance(one, ast.Name) and one.id == "overload" for one in node.decorator_list)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("TypeVar", "cast")
    return isinstance(node, (ast.Assert, ast.AnnAssign)) and not isinstance(getattr(node, "value", None), ast.expr)


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in _COMPARE:
        before, new.ops[0] = type(new.ops[0]).__name__, _COMPARE[type(new.ops[0])]()
        yield f"{before} -> {type(new.ops[0]).__name__}", new
    elif isinstance(new, (ast.BinOp, ast.AugAssign)) and type(new.op) in _ARITHMETIC and not _is_type_union(new):
        before, new.op = type(new.op).__name__, _ARITHMETIC[type(new.op)]()
        yield f"{before} -> {type(new.op).__name__}", new
    elif isinstance(new, ast.BoolOp):
        before, new.op = type(new.op).__name__, ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield f"{before} -> {type(new.op).__name__}", new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, (ast.Not, ast.USub)) and not _is_place(new):
        yield f"{type(new.op).__name__} left out", new.operand
    elif isinstance(new, ast.Constant):
        yield from _other_constants(new)
    elif isinstance(new, (ast.If, ast.IfExp, ast.While)):
        new.test = ast.UnaryOp(ast.Not(), new.test)
        yield f"{type(node).__name__} turned round", new
    elif isinstance(new, ast.Call) and isinstance(new.func, (ast.Name, ast.Attribute)):
        name = new.func.id if isinstance(new.func, ast.Name) else new.func.attr
        if name in _NAMES:
            setattr(new.func, "id" if isinstance(new.func, ast.Name) else "attr", _NAMES[name])
            yield f"{name} -> {_NAMES[name]}", new
    elif isinstance(new, ast.Expr) and isinstance(new.value, ast.Call):
        yield "call left out", ast.Pass(lineno=new.lineno, col_offset=0)


def _other_constants(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    value = node.value
    if isinstance(value, bool):
        yield f"{value} -> {not value}", ast.Constant(not value)
    elif isinstance(value, int):
        yield f"{value} -> {value + 1}", ast.Constant(value + 1)
    elif isinstance(value, float):
        yield f"{value} -> {value * 2 or 1.0}", ast.Constant(value * 2 or 1.0)


def _is_type_union(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)


def _is_place(node: ast.UnaryOp) -> bool:
    """``-1``, ``-2``: places counted from the end, which the change of their number moves; 1 may be -1 of two."""
    return isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int)


def _replace(tree: ast.AST, path: _Path, new: ast.AST) -> None:
    for name, index in path[:-1]:
        tree = getattr(tree, name) if index is None else getattr(tree, name)[index]
    name, index = path[-1]
    if index is None:
        setattr(tree, name, new)
    else:
        getattr(tree, name)[index] = new


# one mutant


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed tree."""

    def __init__(self, file: str, tree: ast.AST) -> None:
        self.name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.file, self.tree, self.is_package = str(ROOT / file), tree, file.endswith("__init__.py")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        inside = [str(Path(self.file).parent)] if self.is_package else None
        return importlib.util.spec_from_file_location(name, self.file, loader=self, submodule_search_locations=inside)

    def exec_module(self, module: Any) -> None:
        exec(compile(self.tree, self.file, "exec"), module.__dict__)  # noqa: S102 - our own source, changed


def survives(file: str, tree: ast.AST, tests: list[str], limit_s: float = LIMIT_S) -> bool:
    """Whether all tests pass with the changed module."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            os.setsid()
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(null, stream)
            sys.meta_path.insert(0, _Mutated(file, tree))
            import pytest

            # plugins were imported before: their assertions cannot be rewritten any more, which would be an error
            words = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
            code = int(pytest.main([*words, *tests]))
        os._exit(code)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="+", default=list(ROOMS))
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--again", type=Path, help="only the survivors of this result, found by their source lines")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    os.chdir(ROOT)
    import hypothesis  # noqa: F401 - what every mutant's process needs, imported once
    import lightning.pytorch  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch

    torch.set_num_threads(1)
    sound: set[str] = set()  # files whose tests pass as they are
    began, results = time.monotonic(), []
    drawn = survivors(options.again) if options.again else draw(options.rooms, options.seed, options.count)
    for number, (file, line, text, index) in enumerate(drawn):
        if time.monotonic() - began > 60 * options.minutes:
            break
        tree = ast.parse((ROOT / file).read_text())
        tests = [f"tests/{name}.py" for name in TESTS[_key(file)]]
        if file not in sound and not survives(file, tree, tests):
            raise SystemExit(f"{file}: its tests fail or take over {LIMIT_S:.0f} s without any change: {tests}")
        sound.add(file)
        fate = "survived" if survives(file, mutant(tree, index), tests) else "killed"
        source, nth = named_points(file)[index][2:]
        result = {"file": file, "line": line, "change": text, "source": source, "nth": nth, "fate": fate}
        results.append(result)
        print(f"{number:03d} {fate}: {file}:{line} {text} ({time.monotonic() - began:.0f} s)", flush=True)
        if options.out:
            write(options.out, options.seed, results)
    print(Counter(result["fate"] for result in results))


def _key(file: str) -> str:
    return file.removeprefix("lightning_spectral/").removesuffix(".py")


def draw(rooms: list[str], seed: int, count: int) -> list[tuple[str, int, str, int]]:
    """File, line, description and number of as many changes, the same for a seed; rooms take turns."""
    rng, by_room = random.Random(seed), []
    for room in rooms:
        found = []
        for path in sorted((ROOT / "lightning_spectral" / room).glob("*.py")):
            file = str(path.relative_to(ROOT))
            if _key(file) not in TESTS:
                continue
            found += [(file, line, text, at) for at, (line, text) in enumerate(points(ast.parse(path.read_text())))]
        by_room.append(rng.sample(found, len(found)))
    turns = (one for turn in zip_longest(*by_room) for one in turn if one is not None)
    return list(islice(turns, count))


def named_points(file: str) -> list[tuple[int, str, str, int]]:
    """Every change as line, description, text of the line, and which of those that look so: what a later edit keeps."""
    content = (ROOT / file).read_text()
    lines, seen, named = content.splitlines(), Counter[tuple[str, str]](), []
    for line, text in points(ast.parse(content)):
        source = lines[line - 1].strip()
        named.append((line, text, source, seen[text, source]))
        seen[text, source] += 1
    return named


def survivors(result: Path) -> list[tuple[str, int, str, int]]:
    """As :func:`draw`, of what survived in a result; what is not in the source any more is left out, with a word."""
    found = []
    for one in json.loads(result.read_text())["mutants"]:
        if one["fate"] != "survived":
            continue
        at = [index for index, point in enumerate(named_points(one["file"])) if point[1:] == _look(one)]
        if at:
            found.append((one["file"], named_points(one["file"])[at[0]][0], one["change"], at[0]))
        else:
            print(f"gone: {one['file']}:{one['line']} {one['change']}", flush=True)
    return found


def _look(one: dict[str, Any]) -> tuple[str, str, int]:
    return one["change"], one["source"], one["nth"]


def write(out: Path, seed: int, results: list[dict[str, Any]]) -> None:
    """The result as JSON, and as a table of rooms with the list of survivors."""
    out.with_suffix(".json").write_text(json.dumps({"seed": seed, "mutants": results}, indent=0) + "\n")
    rooms = sorted({result["file"].split("/")[1] for result in results})
    counts = Counter((result["file"].split("/")[1], result["fate"]) for result in results)
    killed = sum(result["fate"] == "killed" for result in results)
    text = [
        f"{len(results)} mutants of seed {seed}, {killed} killed ({killed / len(results):.0%}).",
        "",
        "| room | killed | survived |",
        "|---|---|---|",
        *(f"| {room} | {counts[room, 'killed']} | {counts[room, 'survived']} |" for room in rooms),
        "",
        "Alive:",
        "",
        *(f"* `{one['file']}:{one['line']}` {one['change']}" for one in results if one["fate"] != "killed"),
    ]
    out.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
