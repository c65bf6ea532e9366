"""tools/mutate.py draws changes that can matter, and no noise."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("mutate", Path(__file__).parents[1] / "tools" / "mutate.py")
mutate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutate)


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("for a, b in zip(x, y, strict=True): a + b", ["Add -> Sub"]),
        ("x = dumps(a - 1, indent=2)", ["Sub -> Add", "1 -> 2"]),
        ("class A(TypedDict, total=False): x: int = 3", ["3 -> 4"]),
        ("__slots__ = ('a', *[1])", []),
        ("error = ValueError('too few', 1 + 1)", []),
        ("raise ValueError('too few', 1 + 1)", []),
        ("sum(x, start=1)", ["call left out", "1 -> 2"]),
        ("zip(x, strict=is_strict or 1)", ["call left out", "Or -> And", "1 -> 2"]),
    ],
)
def test_what_is_drawn(source, texts):
    assert [text for _, text in mutate.points(ast.parse(source))] == texts


def test_the_numbered_change_is_made():
    changed = [ast.unparse(mutate.mutant(ast.parse("x = f(a < 1, strict=True)"), number)) for number in (0, 1)]
    assert changed == ["x = f(a <= 1, strict=True)", "x = f(a < 2, strict=True)"]
