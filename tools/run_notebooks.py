"""Run the cells of notebooks and write what they show into them.

`python tools/run_notebooks.py examples/notebooks/*.ipynb`

A plain namespace instead of a Jupyter kernel: cells without magics need none, and the lock stays without its packages.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any


def run_cells(notebook: dict[str, Any], name: str = "notebook") -> list[list[dict[str, Any]]]:
    """Outputs of each code cell, in their order; the last expression of a cell is shown, as in Jupyter."""
    space: dict[str, Any] = {"__name__": "__main__"}
    return [
        _run_cell("".join(cell["source"]), space, f"{name}, cell {place}")
        for place, cell in enumerate(notebook["cells"])
        if cell["cell_type"] == "code"
    ]


def _run_cell(source: str, space: dict[str, Any], name: str) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), space)  # noqa: S102  cells of our own notebooks
        shown = isinstance(last, ast.Expr)
        value = eval(compile(ast.Expression(last.value), name, "eval"), space) if shown else None  # noqa: S307
    lines = printed.getvalue().splitlines(keepends=True)
    outputs: list[dict[str, Any]] = [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []
    if value is not None:
        outputs.append(
            {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": _shown(value)}
        )
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for kind, method in (("text/html", "_repr_html_"), ("image/png", "_repr_png_")):
        if hasattr(value, method):
            made = getattr(value, method)()
            data[kind] = base64.b64encode(made).decode() if isinstance(made, bytes) else made.splitlines(keepends=True)
    plain = repr(value) if not data else f"<{type(value).__name__}>"
    return {**data, "text/plain": plain.splitlines(keepends=True)}


def main(paths: list[str]) -> None:
    """Run each notebook in its own folder, and keep its outputs."""
    for path in map(Path, paths):
        notebook = json.loads(path.read_text())
        start = Path.cwd()
        os.chdir(path.parent)
        try:
            outputs = iter(run_cells(notebook, path.name))
        finally:
            os.chdir(start)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = next(outputs)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
