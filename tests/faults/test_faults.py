"""Faults drawn from a seed: nothing is lost. The committed run is in benchmarks/results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def faults(folder: Path, seed: int, count: int, only: str = "") -> str:
    """In a process of its own: it forks, mounts and adopts."""
    words = ["--seed", str(seed), "--count", str(count), "--only", only, "--work", str(folder / "work")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_fault_loses_anything(tmp_path: Path) -> None:
    said = faults(tmp_path, int(os.environ.get("FAULT_SEED", "7")), int(os.environ.get("FAULT_COUNT", "60")))
    assert re.search(r"^\d\d+ faults of seed \d+, 0 losses", said, re.MULTILINE)
