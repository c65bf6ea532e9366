"""Functions stay simple: few branches, at most 60 lines; without exception."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_LINES = 60


def test_no_function_is_complex():
    """Of all code, per-file exceptions of pyproject left aside, so that none hides behind another's."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "C901", "--output-format", "json"]
    command += ["--config", "lint.mccabe.max-complexity = 10", "lightning_spectral", "tests", "tools", "benchmarks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    found = {item["message"].split("`")[1] for item in json.loads(done.stdout)}
    assert not found


def test_no_function_is_long():
    found = {
        node.name: f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in (ROOT / "lightning_spectral").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or node.lineno) - node.lineno >= MAX_LINES
    }
    assert not found
